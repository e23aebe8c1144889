"""Several calls that share what each of them needs one after another, such as the layers of a model
that are uploaded one at a time.

Each call runs in a thread of its own, but only one at a time. A call that needs something new stops
until all the others have stopped or ended, too. What they wait for is then made once, and all the
calls that wait for it go on, one after another. So calls need not know of each other.
"""

import contextvars
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from threading import Semaphore
from typing import Any

import torch
from torch.overrides import _get_current_function_mode_stack
from torch.overrides import _pop_mode as pop_function_mode
from torch.overrides import _push_mode as push_function_mode
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils._python_dispatch import _pop_mode as pop_dispatch_mode
from torch.utils._python_dispatch import _push_mode as push_dispatch_mode

from pseuzo.interrupts import cleanly, uninterrupted


class _Cancelled(BaseException):
    """Ends a call that waits, because another one has failed."""


class ThreadState:
    """What torch keeps by thread, as it is in the thread that makes this object."""

    def __init__(self, device: torch.device) -> None:
        self._records = torch.is_grad_enabled()
        self._inference = torch.is_inference_mode_enabled()
        self._cache = torch.is_autocast_cache_enabled()
        self._autocast = [
            (kind, torch.get_autocast_dtype(kind))
            for kind in sorted({"cpu", device.type})
            if torch.is_autocast_enabled(kind)
        ]
        self._functions = _get_current_function_mode_stack()
        self._dispatches = _get_current_dispatch_mode_stack()
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

    @contextmanager
    def carried(self) -> Iterator[None]:
        """Inside, another thread has this state."""
        with ExitStack() as stack:
            if self._stream is not None:
                stack.enter_context(torch.cuda.stream(self._stream))
            if self._inference:
                stack.enter_context(torch.inference_mode())
            stack.enter_context(torch.set_grad_enabled(self._records))
            for kind, dtype in self._autocast:
                stack.enter_context(torch.autocast(kind, dtype, cache_enabled=self._cache))
            stack.callback(torch.set_autocast_cache_enabled, torch.is_autocast_cache_enabled())
            torch.set_autocast_cache_enabled(self._cache)
            for function_mode in self._functions:
                push_function_mode(function_mode)
                stack.callback(pop_function_mode)
            for dispatch_mode in self._dispatches:
                push_dispatch_mode(dispatch_mode)
                stack.callback(pop_dispatch_mode)
            yield


class Lane:
    """One of the calls. wants: what it waits for; None at its start. done: whether it has ended."""

    def __init__(self, call: Callable[["Lane"], Any]) -> None:
        self._call = call
        self._go, self._stopped = Semaphore(0), Semaphore(0)
        self._cancelled = False
        self.wants: Hashable = None
        self.begun = self.done = False
        self.result: Any = None
        self.error: BaseException | None = None

    def begin(self, threads: ThreadPoolExecutor, state: ThreadState) -> None:
        """Give the call a thread, in which it waits for go_on()."""
        threads.submit(contextvars.copy_context().run, self._work, state)
        self.begun = True

    def wait_for(self, wanted: Hashable) -> None:
        """Stop until what is wanted is there. Called by the call."""
        self.wants = wanted
        self._stopped.release()
        self._go.acquire()
        if self._cancelled:
            raise _Cancelled

    def _work(self, state: ThreadState) -> None:
        self._go.acquire()
        try:
            if not self._cancelled:
                with state.carried():
                    self.result = self._call(self)
        except _Cancelled:
            pass
        except BaseException as error:  # raised again in the thread that waits for the call
            self.error = error
        finally:
            self.done = True
            self._stopped.release()

    def go_on(self) -> None:
        """Let the call run until it waits or ends."""
        self._go.release()
        self._stopped.acquire()

    def cancel(self) -> None:
        """End the call at its next stop, and wait for its end. Idempotent."""
        self._cancelled = True
        self._go.release()
        while self.begun and not self.done:
            self._stopped.acquire()


class LockStep:
    """Runs calls in lock step. Their threads are kept for the next ones."""

    def __init__(self) -> None:
        self._threads: ThreadPoolExecutor | None = None
        self._count = 0
        self._running: Lane | None = None

    def run(
        self,
        calls: Sequence[Callable[[Lane], Any]],
        serve: Callable[[Any], None],
        device: torch.device,
    ) -> list[Any]:
        """Return the results of the calls.

        Each call gets its lane, whose wait_for(wanted) it calls for what it needs. serve(wanted)
        makes that, in the thread of the caller, once for all lanes that wait for it. If a call or
        serve() raises, the calls are ended where they wait, and the error is raised.
        """
        threads, state = self._threads_for(len(calls)), ThreadState(device)
        lanes = [Lane(call) for call in calls]
        self._running = lanes[0]

        def in_turn() -> None:
            uninterrupted(_begin, lanes, threads, state)
            while waiting := [lane for lane in lanes if not lane.done]:
                by_want: dict[Hashable, list[Lane]] = {}
                for lane in waiting:
                    by_want.setdefault(lane.wants, []).append(lane)
                for wanted, together in by_want.items():
                    if wanted is not None:
                        serve(wanted)
                    for lane in together:
                        self._running = lane
                        lane.go_on()
                        if lane.error is not None:
                            raise lane.error

        def end() -> None:
            uninterrupted(_cancel, [self._running, *lanes])  # never two at a time
            self._running = None

        cleanly(in_turn, end)
        return [lane.result for lane in lanes]

    def _threads_for(self, count: int) -> ThreadPoolExecutor:
        if self._threads is None or count > self._count:
            if self._threads is not None:
                self._threads.shutdown(wait=False)
            self._count = count
            self._threads = ThreadPoolExecutor(count, thread_name_prefix="pseuzo-pass")
        return self._threads


def _begin(lanes: Sequence[Lane], threads: ThreadPoolExecutor, state: ThreadState) -> None:
    for lane in lanes:
        lane.begin(threads, state)


def _cancel(lanes: Sequence[Lane | None]) -> None:
    for lane in lanes:
        if lane is not None and not lane.done:
            lane.cancel()
