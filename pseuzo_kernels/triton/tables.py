"""Launch tables on the device, and the cache that keeps them.

A training step launches over the same tensors again and again.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from threading import Lock, local
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

MAX_BYTES = 1 << 27  # of cached tables; those of a list take 8 bytes for every 8192 elements
# Each entry counts for this much beside its tables: its key on the host holds numbers per tensor.
ENTRY_BYTES = 1 << 16


class TableCache(OrderedDict):
    """Keeps launch tables by their key, with the most recently used at the end."""

    n_bytes = 0

    @staticmethod
    def size_of(tables: Any) -> int:
        return ENTRY_BYTES + sum(x.nbytes for x in tree_leaves(tables) if isinstance(x, Tensor))

    def keep(self, key: tuple, tables: Any) -> Any:
        """Keep and return tables, or return those that another thread has kept meanwhile."""
        if key in self:
            return self[key]
        self[key] = tables
        self.n_bytes += self.size_of(tables)
        while self.n_bytes > MAX_BYTES and len(self) > 1:
            self.n_bytes -= self.size_of(self.popitem(last=False)[1])
        return tables


cache = TableCache()
# Tables for graphs that other code captures are kept for good, because such a graph may always be
# replayed.
captured: dict[tuple, Any] = {}
_lock = Lock()  # of cache and captured


class _Graph(local):
    """For each thread, the tables of the graph that it captures, if it keeps them."""

    tables: dict[tuple, Any] | None = None


_graph = _Graph()


@contextmanager
def tables_of_a_graph() -> Iterator[dict[tuple, Any]]:
    """A context in which a CUDA graph is captured.

    The graph holds the addresses of the launch tables that are in the dict at the end, so keep the
    dict as long as the graph.
    """
    before, _graph.tables = _graph.tables, {}
    try:
        yield _graph.tables
    finally:
        _graph.tables = before


def capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def cached(key: tuple, build: Callable[[], Any], in_graph: bool) -> Any:
    """Return build(), or what it returned for the same key.

    While a graph is captured (in_graph), returns None if nothing is cached: the graph would copy
    the tables at each replay, from memory that is freed by then.
    """
    with _lock:
        tables = cache.get(key)  # it takes time to hash a long key
        if tables is not None:
            cache.move_to_end(key)
            if in_graph:
                (captured if _graph.tables is None else _graph.tables)[key] = tables
    if tables is not None or in_graph:
        return tables
    tables = build()  # other threads need not wait for that
    with _lock:
        return cache.keep(key, tables)


def to_device(values: list | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    t = torch.as_tensor(values, dtype=dtype, device="cpu")
    if device.type == "cuda":
        return t.pin_memory().to(device, non_blocking=True)
    return t.to(device)


class Kept:
    """The tables of an op on a device, and on its current stream: a table belongs to the stream on
    which it was copied."""

    def __init__(self, op: str, device: torch.device) -> None:
        cuda = device.type == "cuda"
        stream = torch.cuda.current_stream(device).cuda_stream if cuda else 0
        self._op, self._device, self._place = op, device, (device, stream)

    def get(self, key: tuple, build: Callable[[], Any]) -> Any:
        """build(), or what it returned for the same key. RuntimeError if a graph is captured, and
        there is nothing yet."""
        made = cached((self._place, *key), build, capturing(self._device))
        if made is None:
            raise RuntimeError(
                f"{self._op}: a CUDA graph can only record a call whose tables exist; make the "
                "same call once before it is captured"
            )
        return made

    def numbers(self, values: Sequence[float], dtype: torch.dtype) -> Tensor:
        return self.get((dtype, *values), partial(to_device, list(values), dtype, self._device))


def aligned_rows(*columns: Sequence[int]) -> list[list[int]]:
    """Rows of a table that all begin on a multiple of 16 bytes: Triton compiles another kernel for
    addresses that do not."""
    return [[*column, *[0] * (-len(column) % 4)] for column in columns]


def columns_of(rows: Sequence[Sequence[int]], device: torch.device) -> list[Tensor]:
    """The columns of a table, int64, each at such an address; they end in zeros."""
    return list(to_device(aligned_rows(*zip(*rows, strict=True)), torch.int64, device).unbind())


def blocks_of(sizes: Sequence[int], elements: int, device: torch.device) -> Tensor:
    """[programs, 2] int32: each program's tensor and block of so many elements."""
    blocks = torch.tensor([-(-n // elements) for n in sizes], device="cpu")
    tensor_of = torch.repeat_interleave(torch.arange(len(sizes), device="cpu"), blocks)
    block_of = torch.arange(len(tensor_of), device="cpu") - (blocks.cumsum(0) - blocks)[tensor_of]
    return to_device(torch.stack([tensor_of, block_of], dim=1), torch.int32, device)
