"""What Ctrl-C or an exception may cut short, and what it may not.

A forward pass takes seconds and may be interrupted: what was changed for it is undone. An update
of the weights cannot be undone (its roundings are lost), so an interrupt waits for its end.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def undoing(undo: Callable[[], None]) -> Iterator[None]:
    """Run undo, which must be idempotent, when the block ends, and again if undo is interrupted.

    This is a generator because an interrupt can come where a `with` block ends, before `__exit__`
    is called. The generator is then freed, which still runs its `finally`.
    """
    try:
        try:
            yield
        finally:
            undo()
    except BaseException:
        undo()
        raise


def cleanly(call: Callable[[], Any], undo: Callable[[], None]) -> Any:
    """Return call() after undo(), which also runs where call() fails.

    This is `undoing` for a call in place of a block: nothing can come between the end of the call
    and undo(), while the traceback of an interrupt can delay the end of a block. Whether autograd
    records is restored as well, since the interrupted call may hold blocks that change it.
    """
    records = torch.is_grad_enabled()
    try:
        try:
            return call()
        finally:
            torch.set_grad_enabled(records)
            undo()
    except BaseException:
        torch.set_grad_enabled(records)
        undo()
        raise


def uninterrupted(call: Callable[..., Any], *args: Any) -> Any:
    """Return call(*args); a SIGINT that arrives meanwhile takes effect when it has ended.

    Python delivers signals to the main thread only, so in other threads there is nothing to do. A
    handler that was not installed by Python code is left in place.
    """
    handler = signal.getsignal(signal.SIGINT)
    if not callable(handler) or threading.current_thread() is not threading.main_thread():
        return call(*args)
    waiting: list[tuple] = []
    try:
        try:
            signal.signal(signal.SIGINT, lambda *signal_and_frame: waiting.append(signal_and_frame))
            result = call(*args)
        finally:
            signal.signal(signal.SIGINT, handler)
    except BaseException:
        signal.signal(signal.SIGINT, handler)
        if waiting:
            handler(*waiting[0])
        raise
    if waiting:
        handler(*waiting[0])
    return result
