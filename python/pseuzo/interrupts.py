"""What Ctrl-C or an exception may cut short, and what it may not.

A forward pass takes seconds and may be interrupted: what was changed for it is undone. An update
of the weights cannot be undone (its roundings are lost), so an interrupt waits for its end.
"""

import signal
import threading
from collections.abc import Callable
from typing import Any

import torch


def cleanly(call: Callable[[], Any], undo: Callable[[], None]) -> Any:
    """Return call() after undo(), which also runs where call() fails.

    undo() must be idempotent: where it is interrupted itself, it runs once more. Whether autograd
    records is put back as well, as an interrupt can skip the end of a `with` block.
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

    Python delivers signals to the main thread only, so that there is nothing to do in others. A
    handler that was not installed by Python code is left alone.
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
