"""Passes recorded as CUDA graphs: what was hundreds of launches from Python becomes one, with the same bits.

A graph holds addresses and no Python: it reads its batch, its seed and its eps from tensors that are written before
each replay. What differs from step to step on the host (the window's slot, the lr) stays outside: a few launches.
"""

import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

WARM_UP = 2  # runs before a pass is recorded: they compile kernels, choose algorithms and make what is kept
MOST = 64  # passes kept, the ones used last: a graph is small, but a long run may see many shapes


def check_device(name: str, device: torch.device) -> None:
    if device.type != "cuda":
        raise ValueError(f"{name}: capture needs a CUDA GPU, and the weights are on {device}; leave it off")


def _record(call: Callable[[], Any], stream: Any, pool: Any) -> tuple[Any, Callable[[], None]]:
    """What call() returned while it was recorded, and the replay that writes it anew. Nothing is computed yet."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=stream):
        outputs = call()
    return outputs, graph.replay


class Graphs:
    """Runs passes, each named by a key: at first as they are, later as the graph of the same key.

    All graphs share one pool of memory, so that of one pass serves the next: they must not run at the same time, and
    outputs are handed out as copies.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._passes: OrderedDict[Hashable, tuple[Any, Callable[[], None]] | int] = OrderedDict()
        self._stream = self._pool = None
        self._lost = 0  # passes that were forgotten before they were recorded, one after another

    def clear(self) -> None:
        """Forget all graphs: the tensors that they read or write are no longer those of the model."""
        self._passes.clear()

    def run(self, key: Hashable, call: Callable[[], Any], ready: bool) -> Any:
        """call(), a tensor or a tuple of them. ready: False while its run still does things on the host."""
        known = self._passes.get(key, 0)
        if not isinstance(known, int):
            self._passes.move_to_end(key)
            known[1]()
            return tree_map(Tensor.clone, known[0])
        if known < WARM_UP or not ready:
            outputs = call()
            if not all(isinstance(x, Tensor) for x in tree_leaves(outputs)):
                raise TypeError("capture: a pass must return tensors, not numbers; without .item(), or capture off")
            self._keep(key, known + 1)
            return outputs
        outputs = self._on_its_stream(call)  # this run's result; recording computes none
        try:
            self._keep(key, _record(call, self._stream, self._pool))
        except Exception as error:
            raise RuntimeError(
                "capture: a pass does what a CUDA graph cannot hold, such as waiting for the device "
                f"({str(error).splitlines()[0]}); change it, or leave capture off"
            ) from error
        return outputs

    def _on_its_stream(self, call: Callable[[], Any]) -> Any:
        """call() on the stream that records: workspaces of libraries and our launch tables belong to a stream."""
        if self.device.type != "cuda":
            return call()
        if self._stream is None:
            self._stream, self._pool = torch.cuda.Stream(self.device), torch.cuda.graph_pool_handle()
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            outputs = call()
        current.wait_stream(self._stream)
        return tree_map(Tensor.clone, outputs)  # memory of the stream that uses it from here on

    def _keep(self, key: Hashable, what: Any) -> None:
        self._passes[key] = what
        self._passes.move_to_end(key)
        if not isinstance(what, int):
            self._lost = 0
        if len(self._passes) > MOST:
            self._lost += isinstance(self._passes.popitem(last=False)[1], int)
            if self._lost == MOST:
                warnings.warn(
                    "capture: every step brings new functions, so nothing is recorded; give the same ones each time, "
                    "which read their batch from tensors that you write (tensor.copy_(...)) before the step",
                    stacklevel=2,
                )
