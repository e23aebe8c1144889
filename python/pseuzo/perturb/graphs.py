"""Passes recorded as CUDA graphs: what was hundreds of launches from Python becomes one.

A graph holds addresses and no Python: it reads its batch, its seed and its eps from tensors that are written before
each replay. What differs from step to step on the host (the window's slot, the lr) stays outside: a few launches. The
bits are those of the same kernels run one by one.
"""

import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from pseuzo_kernels.ops import tables_of_a_graph

WARM_UP = (
    2  # steps before the passes of one are recorded: they compile kernels and make what is kept
)
MOST = 64  # kinds of step kept, the ones used last: a graph is small, but a long run may see many shapes


def check_device(name: str, device: torch.device) -> None:
    if device.type != "cuda":
        raise ValueError(
            f"{name}: capture needs a CUDA GPU, and the weights are on {device}; leave it off"
        )


def _record(call: Callable[[], Any], stream: Any, pool: Any) -> tuple[Any, Callable[[], None]]:
    """What call() returned while it was recorded, and the replay that writes it anew. Nothing is computed yet."""
    graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(stream.device)
    try:
        # relaxed: some kernels are first needed, and loaded, in here
        with (
            tables_of_a_graph() as tables,
            torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="relaxed"),
        ):
            outputs = call()
    finally:  # torch stays on the stream of a graph whose end fails, as it does after an error in between
        torch.cuda.set_stream(current)
    return outputs, partial(_replay, graph, tables)


def _replay(graph: torch.cuda.CUDAGraph, tables: object) -> None:
    """tables: what the graph reads; they are freed with it."""
    graph.replay()


class Graphs:
    """Runs the passes of steps: at first as they are, in one step while they are recorded, and from then on as graphs.

    All graphs share one pool of memory, so that of one pass serves the next: they must not run at the same time, and
    outputs are handed out as copies.
    """

    def __init__(self, device: torch.device):
        self.device = device
        # by what makes a step's passes: how often it was run, or its graphs by the name of the pass
        self._steps: OrderedDict[Hashable, int | dict[str, tuple[Any, Callable[[], None]]]] = (
            OrderedDict()
        )
        self._graphs: dict[str, tuple[Any, Callable[[], None]]] | None = (
            None  # of the step that runs
        )
        self._recording = False
        self._stream = self._pool = None
        self._lost = (
            0  # kinds of step that were forgotten before they were recorded, one after another
        )

    def clear(self) -> None:
        """Forget all graphs: the tensors that they read or write are no longer those of the model."""
        self._steps.clear()

    @contextmanager
    def step(self, key: Hashable, ready: bool) -> Iterator[None]:
        """A step whose passes run() runs inside. key: all that says which passes they are, and of what. ready: False
        while one of them still does things on the host."""
        known = self._steps.get(key, 0)
        self._recording = known == WARM_UP and ready
        self._graphs = {} if self._recording else None if isinstance(known, int) else known
        try:
            yield
            self._keep(key, min(known + 1, WARM_UP) if self._graphs is None else self._graphs)
        finally:
            self._recording, self._graphs = False, None

    def run(self, name: str, call: Callable[[], Any]) -> Any:
        """call(), a tensor or a tuple of them. name: passes of a step that are the same have the same."""
        if self._graphs is None:
            outputs = call()
            if not all(isinstance(x, Tensor) for x in tree_leaves(outputs)):
                raise TypeError(
                    "capture: a pass must return tensors, not numbers; without .item(), or capture off"
                )
            return outputs
        if not self._recording:
            outputs, replay = self._graphs[name]
            replay()
            return tree_map(Tensor.clone, outputs)
        outputs = self._on_its_stream(call)  # this step's result; recording computes none
        try:
            if name not in self._graphs:
                self._graphs[name] = _record(call, self._stream, self._pool)
        except Exception as error:
            self._pool = (
                None  # torch may still take the failed graph for one that is being captured into it
            )
            first = (
                error.__context__ or error
            )  # the end of a graph that failed says no more than that
            raise RuntimeError(
                "capture: a pass does what a CUDA graph cannot hold, such as waiting for the device "
                f"({str(first).splitlines()[0]}); change it, or leave capture off"
            ) from error
        return outputs

    def _on_its_stream(self, call: Callable[[], Any]) -> Any:
        """call() on the stream that records: workspaces of libraries and our launch tables belong to a stream."""
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
        return tree_map(Tensor.clone, outputs)  # memory of the stream that uses it from here on

    def _keep(self, key: Hashable, what: Any) -> None:
        self._steps[key] = what
        self._steps.move_to_end(key)
        if not isinstance(what, int):
            self._lost = 0
        if len(self._steps) > MOST:
            self._lost += isinstance(self._steps.popitem(last=False)[1], int)
            if self._lost == MOST:
                warnings.warn(
                    "capture: every step brings new functions, so nothing is recorded; give the same ones each time, "
                    "which read their batch from tensors that you write (tensor.copy_(...)) before the step",
                    stacklevel=2,
                )
