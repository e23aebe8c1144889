"""Passes recorded as CUDA graphs: one launch replaces hundreds of launches from Python.

A graph holds addresses and no Python: it reads its batch, its seed and its eps from tensors that
are written before each replay. What differs between steps on the host (the window's slot, the lr)
stays outside the graph, in a few launches. The bits are those of the same kernels run one by one.
"""

import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from pseuzo.sentences import first_line
from pseuzo_kernels.ops import tables_of_a_graph

# This many steps of a kind run before one is recorded: they compile kernels and allocate memory.
WARM_UP = 2
# This many kinds of step are kept, the ones used last: a graph is small, but shapes may be many.
MAX_GRAPHS = 64


Recorded = tuple[Any, Callable[[], None]]  # the outputs of a pass, and the replay that writes them


def check_device(name: str, device: torch.device) -> None:
    """ValueError if graphs cannot be recorded on device."""
    if device.type != "cuda":
        raise ValueError(
            f"{name}: capture needs a CUDA GPU, and the weights are on {device}; leave it off"
        )


def _record(call: Callable[[], Any], stream: Any, pool: Any) -> Recorded:
    """Record call(). Nothing is computed until the replay."""
    graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(stream.device)
    try:
        # The mode is "relaxed" because some kernels are loaded at their first launch, maybe here.
        with (
            tables_of_a_graph() as tables,
            torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="relaxed"),
        ):
            outputs = call()
    except BaseException:
        try:
            _end_failed(stream, pool)
        finally:
            torch.cuda.set_stream(current)
        raise
    return outputs, partial(_replay, graph, tables)


def _end_failed(stream: Any, pool: Any) -> None:
    """End what a failed capture leaves behind, whose end failed too, with most of what it had to
    do: torch stays on the stream, the allocator believes that the capture into the pool is under
    way, and so do the generators of random numbers, until another capture ends well."""
    with suppress(RuntimeError, AttributeError):  # torch has ended it, or cannot
        torch._C._cuda_endAllocateToPool(stream.device.index, pool)
    with (
        suppress(RuntimeError),
        torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream, capture_error_mode="relaxed"),
    ):
        torch.zeros(1, device=stream.device)


def _replay(graph: torch.cuda.CUDAGraph, tables: object) -> None:
    """Replay a graph. tables: the launch tables that it reads, which live as long as it does."""
    graph.replay()


class Graphs:
    """Runs the passes of steps: first as they are, then once to record them, then as graphs.

    All graphs share one pool of memory, which one pass leaves to the next. They must therefore not
    run at the same time, and outputs are returned as copies.
    """

    def __init__(self, device: torch.device):
        self.device = device
        # By the key of a kind of step: how often it ran, or the graphs of its passes by name.
        self._steps: OrderedDict[Hashable, int | dict[str, Recorded]] = OrderedDict()
        self._graphs: dict[str, Recorded] | None = None  # those of the step that runs
        self._recording = False
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None
        # How many kinds of step in a row were forgotten before they were recorded.
        self._lost = 0

    def clear(self) -> None:
        """Forget all graphs, as the model no longer uses the memory that they read and write."""
        self._steps.clear()

    @contextmanager
    def step(self, key: Hashable, ready: bool) -> Iterator[None]:
        """Inside, run() runs the passes of one step.

        key: all that determines which passes they are and what they read. ready: False while a pass
        still does work on the host, such as the watch, so that it cannot be recorded.
        """
        known = self._steps.get(key, 0)
        self._recording = known == WARM_UP and ready
        self._graphs = {} if self._recording else None if isinstance(known, int) else known
        try:
            yield
            ran = known + 1 if isinstance(known, int) else WARM_UP
            self._keep(key, min(ran, WARM_UP) if self._graphs is None else self._graphs)
        finally:
            self._recording, self._graphs = False, None

    def run(self, name: str, call: Callable[[], Any]) -> Any:
        """Return call(), a tensor or a tuple of tensors, or what its graph computes.

        name: passes of one step that do the same have the same name, and share a graph.
        """
        if self._graphs is None:
            outputs = call()
            if not all(isinstance(x, Tensor) for x in tree_leaves(outputs)):
                raise TypeError(
                    "capture: a pass must return tensors, not numbers; leave out .item(), or leave "
                    "capture off"
                )
            return outputs
        if not self._recording:
            outputs, replay = self._graphs[name]
            replay()
            return tree_map(Tensor.clone, outputs)
        # Recording computes nothing, so this gives the result of the step.
        outputs = self._on_its_stream(call)
        try:
            if name not in self._graphs:
                self._graphs[name] = _record(call, self._stream, self._pool)
        except Exception as error:
            # torch may believe that the failed graph is still being captured into the pool.
            self._pool = None
            # The error at the end of a failed graph only says that it failed.
            first = error.__context__ or error
            raise RuntimeError(
                "capture: a pass does what a CUDA graph cannot hold, such as waiting for the "
                f"device ({first_line(first)}); change it, or leave capture off"
            ) from error
        return outputs

    def _on_its_stream(self, call: Callable[[], Any]) -> Any:
        """Return call(), run on the stream that records. Workspaces of libraries and launch tables
        of the ops belong to a stream, and this call makes them there.
        """
        if self.device.type != "cuda":
            return call()
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            outputs = call()
        current.wait_stream(self._stream)
        return tree_map(Tensor.clone, outputs)  # in memory of the stream that uses them next

    def _keep(self, key: Hashable, known: int | dict[str, Recorded]) -> None:
        self._steps[key] = known
        self._steps.move_to_end(key)
        if not isinstance(known, int):
            self._lost = 0
        if len(self._steps) > MAX_GRAPHS:
            self._lost += isinstance(self._steps.popitem(last=False)[1], int)
            if self._lost == MAX_GRAPHS:
                warnings.warn(
                    "capture: every step brings new functions, so nothing is recorded; give the "
                    "same ones each time, and let them read their batch from tensors that you "
                    "write (tensor.copy_(...)) before the step",
                    stacklevel=2,
                )
