"""Defines the memory that a kernel may touch, and the threads that run it."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

WARP = 32
UNINITIALIZED = 0xA5  # every byte of a register that was never written, and of fresh shared memory
FIRST_ADDRESS = 1 << 12
MEMORY = np.frombuffer(
    (ctypes.c_uint8 * ((1 << 47) - 2 * FIRST_ADDRESS)).from_address(FIRST_ADDRESS), np.uint8
)

_allowed: list[tuple[int, int]] | None = None  # first and last addresses; None allows all memory


def extent(x: torch.Tensor) -> tuple[int, int]:
    return x.data_ptr(), x.data_ptr() + x.numel() * x.element_size()


@contextmanager
def memory_of(*tensors: torch.Tensor) -> Iterator[None]:
    """Raise an error inside this context for accesses outside these tensors and a launch's
    arguments."""
    global _allowed
    before, _allowed = _allowed, [extent(x) for x in tensors]
    try:
        yield
    finally:
        _allowed = before


@contextmanager
def also_allowed(tensors: list[torch.Tensor]) -> Iterator[None]:
    """Inside this context, also allow accesses to these tensors."""
    global _allowed
    before = _allowed
    if _allowed is not None:
        _allowed = _allowed + [extent(x) for x in tensors]
    try:
        yield
    finally:
        _allowed = before


class Threads:
    """Holds the registers and the shared memory of the threads of some programs of a launch."""

    def __init__(self, ids: np.ndarray, per_program: int, shared: int):
        self.programs, self.per_program = len(ids), per_program
        self.registers = {
            "%tid.x": np.tile(np.arange(per_program, dtype=np.uint32), len(ids)),
            "%ctaid.x": np.repeat(ids.astype(np.uint32), per_program),
        }
        self.shared = np.full((len(ids), shared), UNINITIALIZED, np.uint8)

    @property
    def count(self) -> int:
        return self.programs * self.per_program

    def part(self, programs: np.ndarray) -> "Threads":
        """Return the threads of the programs that a mask selects, with copies of all that they
        hold."""
        part = object.__new__(Threads)
        part.programs, part.per_program = int(programs.sum()), self.per_program
        threads = np.repeat(programs, self.per_program)
        part.registers = {name: values[threads] for name, values in self.registers.items()}
        part.shared = self.shared[programs]
        return part


def elements(
    threads: Threads,
    space: str,
    addresses: np.ndarray,
    there: np.ndarray,
    dtype: np.dtype,
    count: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Return a memory as elements of a type, and the indices of the elements at the addresses.

    The indices are [threads in the mask, count].
    """
    addresses, size = addresses[there], dtype.itemsize * count
    if (addresses % size).any():
        raise RuntimeError(f"an access of {size} bytes is not aligned")
    if space in ("shared", "shared::cta"):  # of a program, in some versions of Triton
        memory = threads.shared
        if len(addresses) and (addresses.min() < 0 or addresses.max() + size > memory.shape[1]):
            raise RuntimeError("an access outside of shared memory")
        programs = np.repeat(np.arange(threads.programs), threads.per_program)[there]
        addresses, memory = addresses + programs * memory.shape[1], memory.reshape(-1)
    elif space == "global":
        memory = MEMORY
        if len(addresses) and (
            addresses.min() < FIRST_ADDRESS or addresses.max() >= FIRST_ADDRESS + len(MEMORY)
        ):
            raise RuntimeError(f"an access to address {int(addresses.min()):#x}")
        if _allowed is not None:
            begins, ends = np.array(sorted(_allowed)).T
            at = np.searchsorted(begins, addresses, side="right") - 1
            if ((at < 0) | (addresses + size > np.maximum.accumulate(ends)[at])).any():
                raise RuntimeError("an access outside of the tensors that the kernel may touch")
        addresses = addresses - FIRST_ADDRESS
    else:
        raise NotImplementedError(f"memory {space}")
    return memory.view(dtype), (addresses // dtype.itemsize)[:, None] + np.arange(count)
