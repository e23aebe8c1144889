"""Instruction sets, tensors and terms for the tests of the C++ noise ops."""

import functools

import pytest
import torch

import pseuzo_kernels
from pseuzo_kernels import reference

_C = pseuzo_kernels._C
needs_native = pytest.mark.skipif(
    _C is None,
    reason="pseuzo_kernels._C is not built; PSEUZO_BUILD=cpu pip install --no-build-isolation -e .",
)
ops = torch.ops.pseuzo
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = (0, 1, 127, 128, 2047, 2048, 2049, 5000)
BIT_EXACT = ("hadamard", "hadamard-fp16", "rademacher")
BAND = 35  # elements; the number is odd, so that no x is aligned
DEFAULT_ISA = _C.cpu_isa() if _C else None


def usable_isas() -> list[str]:
    usable = []
    for isa in _C.build_info()["isas"] if _C else ["none"]:
        try:
            _C and _C._set_cpu_isa(isa)
            usable.append(isa)
        except RuntimeError:
            pass
    if _C:
        _C._set_cpu_isa(DEFAULT_ISA)
    return usable


ISAS = usable_isas()
on_every_isa = [needs_native, pytest.mark.usefixtures("isa")]


def normals(n: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed)).to(dtype)


def terms(k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return seeds from all of int64, and coefs that round17 changes."""
    generator = torch.Generator().manual_seed(k)
    seeds = torch.randint(-(2**63), 2**63 - 1, (k,), generator=generator)
    return seeds, torch.randn(k, generator=generator)


def banded(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a copy of x, and the larger tensor, filled with 7, that contains it."""
    band = torch.full((x.numel() + 2 * BAND,), 7.0, dtype=x.dtype)
    inside = band[BAND : BAND + x.numel()]
    inside.copy_(x)
    return inside, band


def mixed_list(k: int) -> tuple[list[torch.Tensor], list[int], list[float], list[float]]:
    """Return xs, streams, keeps and scales. There are fewer sizes with many seeds, since the
    reference is slow."""
    xs = [
        normals(n, dtype, seed=n)
        for n in (SIZES if k < 100 else (1, 127, 2048, 2049))
        for dtype in DTYPES
    ]
    streams = [2**32 - 1 - t if t % 2 else t for t in range(len(xs))]
    keeps = [0.9, 1.0, 0.75, -0.3] * (len(xs) // 4)
    scales = [1.0, 1.3, 0.7] * (len(xs) // 3)
    return xs, streams, keeps, scales


@functools.cache
def wanted_list(noise: str, k: int, stochastic: bool) -> list[torch.Tensor]:
    xs, *rest = mixed_list(k)
    reference.add_noise_list_(xs, *terms(k), *rest, noise, stochastic, 77)
    return xs


@functools.cache
def steps_in_a_row(noise: str) -> tuple[list[torch.Tensor], tuple]:
    """Return x and the arguments of 5 steps. A step has no, one or several seeds, and its own keeps
    and scales."""
    counts = [1, 3, 0, 1, 2]
    xs = [normals(n, dtype, seed=n) for n in (*SIZES, 9000) for dtype in DTYPES]
    size = len(counts) * len(xs)
    keeps = [(0.9, 1.0, 0.75, -0.3)[i % 4] for i in range(size)]
    scales = [(1.0, 0.0, 0.7)[i * i % 7 % 3] for i in range(size)]
    seeds, coefs = terms(sum(counts))
    return xs, (
        seeds,
        coefs,
        counts,
        list(range(len(xs))),
        keeps,
        scales,
        noise,
        True,
        [5, -1, 2**40, 0, 6],
    )


@functools.cache
def wanted_steps(noise: str) -> list[torch.Tensor]:
    xs, args = steps_in_a_row(noise)
    want = [x.clone() for x in xs]
    reference.add_noise_steps_(want, *args)
    return want


@functools.cache
def special_values(dtype: torch.dtype) -> torch.Tensor:
    """Return all values of fp16 or bf16; for fp32, those of bf16 with the lower bits filled."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16)
    if dtype is not torch.float32:
        return every.view(dtype)
    return ((every.int() << 16) | (every.int() * 40503 & 0xFFFF)).view(torch.float32)


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))
