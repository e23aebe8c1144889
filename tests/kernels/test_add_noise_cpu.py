"""The C++ noise ops on the CPU against the reference: bit for bit, on every instruction set this machine has."""

import ctypes
import functools
import importlib
import math
import mmap
import os
import subprocess
import sys

import pytest
import torch
from helpers import (
    KNOWN_ELEMENTS,
    KNOWN_ROUNDED,
    KNOWN_TERMS,
    assert_same_bits,
    rounded_by_definition,
)

import pseuzo_kernels
from pseuzo_kernels import NOISES, reference

_C = pseuzo_kernels._C
pytestmark = pytest.mark.skipif(
    _C is None,
    reason="pseuzo_kernels._C is not built; PSEUZO_BUILD=cpu pip install --no-build-isolation -e .",
)
ops = torch.ops.pseuzo

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = (0, 1, 127, 128, 2047, 2048, 2049, 5000)
BIT_EXACT = ("hadamard", "hadamard-fp16", "rademacher")
BAND = 35  # elements: odd, so that no x is aligned


def usable_isas() -> list[str]:
    usable = []
    for isa in _C.build_info()["isas"] if _C else ["none"]:
        try:
            _C and _C._set_cpu_isa(isa)
            usable.append(isa)
        except RuntimeError:
            pass
    return usable


DEFAULT_ISA = _C.cpu_isa() if _C else None
ISAS = usable_isas()


@pytest.fixture(params=ISAS, autouse=True)
def isa(request):
    _C._set_cpu_isa(request.param)
    yield request.param
    _C._set_cpu_isa(DEFAULT_ISA)


def normals(n: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed)).to(dtype)


def terms(k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """seeds over all of int64, and coefs that round17 changes."""
    generator = torch.Generator().manual_seed(k)
    seeds = torch.randint(-(2**63), 2**63 - 1, (k,), generator=generator)
    return seeds, torch.randn(k, generator=generator)


def banded(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A copy of x, and the larger tensor full of 7 that it lies in."""
    band = torch.full((x.numel() + 2 * BAND,), 7.0, dtype=x.dtype)
    inside = band[BAND : BAND + x.numel()]
    inside.copy_(x)
    return inside, band


def mixed_list(k: int) -> tuple[list[torch.Tensor], list[int], list[float], list[float]]:
    """xs, streams, keeps, scales; many seeds on few sizes, for the sake of the reference's time."""
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


@pytest.mark.parametrize("stochastic", (False, True), ids=("nearest", "stochastic"))
@pytest.mark.parametrize("k", (1, 14, 100))
@pytest.mark.parametrize("noise", BIT_EXACT)
def test_list_matches_reference(noise, k, stochastic):
    xs, *rest = mixed_list(k)
    xs, bands = zip(*map(banded, xs), strict=True)
    ops.add_noise_list_(list(xs), *terms(k), *rest, noise, stochastic, 77, None)
    for x, band, want in zip(xs, bands, wanted_list(noise, k, stochastic), strict=True):
        assert_same_bits(x, want)
        assert (band[:BAND] == 7).all() and (band[-BAND:] == 7).all(), "wrote outside x"


@functools.cache
def steps_in_a_row(noise: str) -> tuple[list[torch.Tensor], tuple]:
    """x and the arguments of 5 steps: no seed, one, several; keeps and scales of their own, some 0."""
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


@pytest.mark.parametrize("noise", NOISES)
def test_steps_are_the_updates_in_a_row(noise):
    xs, args = steps_in_a_row(noise)
    got, bands = zip(*map(banded, xs), strict=True)
    want = [x.clone() for x in xs]
    ops.add_noise_steps_(list(got), *args)
    seeds, coefs, counts, streams, keeps, scales, *_, rounding_seeds = args
    T, first = len(xs), 0
    for s, K in enumerate(counts):
        terms_of_step = seeds[first : first + K], coefs[first : first + K]
        ts = slice(s * T, (s + 1) * T)
        ops.add_noise_list_(
            want,
            *terms_of_step,
            streams,
            keeps[ts],
            scales[ts],
            noise,
            True,
            rounding_seeds[s],
            None,
        )
        first += K
    for x, band, wanted in zip(got, bands, want, strict=True):
        assert_same_bits(x, wanted)
        assert (band[:BAND] == 7).all() and (band[-BAND:] == 7).all(), "wrote outside x"


@functools.cache
def wanted_steps(noise: str) -> list[torch.Tensor]:
    xs, args = steps_in_a_row(noise)
    want = [x.clone() for x in xs]
    reference.add_noise_steps_(want, *args)
    return want


@pytest.mark.parametrize("noise", BIT_EXACT)
def test_steps_match_reference(noise):
    xs, args = steps_in_a_row(noise)
    got = [x.clone() for x in xs]
    ops.add_noise_steps_(got, *args)
    for x, want in zip(got, wanted_steps(noise), strict=True):
        assert_same_bits(x, want)


def test_known_answers():
    z = torch.empty(4096)
    ops.add_noise_list_out(
        [],
        torch.tensor([0]),
        torch.tensor([1.0]),
        [0],
        [1.0],
        [1.0],
        "hadamard",
        False,
        0,
        None,
        out=[z],
    )
    want = [
        0.83796775,
        -0.25703105,
        0.82517433,
        0.32332414,
        1.4113448,
        1.2560793,
        0.5873334,
        -0.8112179,
    ]
    assert_same_bits(z[KNOWN_ELEMENTS], torch.tensor(want))
    for dtype, want in KNOWN_ROUNDED.items():
        x = torch.full((4096,), 0.5, dtype=dtype)
        args = (*map(torch.tensor, KNOWN_TERMS), [3], [0.75], [1.0], "hadamard", True, 9, None)
        ops.add_noise_list_([x], *args)
        assert [bits & 0xFFFF for bits in x.view(torch.int16)[KNOWN_ELEMENTS].tolist()] == want


# sizes of x' that are rounded: about the ends of the dtypes, next to the values that they hold, below their spacing
ROUNDED = (
    1.0, 1.25 + 2**-17, 2 - 2**-23, 1 / 3, 2**-14, 2**-14 - 2**-38, 6.1e-5, 5.96e-8, 3e-8, 1e-9, 2**-40, 2**-41,
    65504.0, 65519.9, 65520.0, 65535.99, 65536.0, 1e-38, 2**-133, 2**-134 + 2**-140, 3.38e38, 3.4e38,
)  # fmt: skip


@functools.cache
def dither() -> torch.Tensor:
    q, _ = reference._columns(0, 1, torch.device("cpu"))
    return reference.rounding_dither(q, 3, reference.hash_seeds(torch.tensor(9))).flatten()


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_rounds_as_defined(dtype):
    """One term of +-1 makes x' of any size, another one of the same seed the bits beyond 17."""
    signs = reference.noise(2048, 5, 3, noise="rademacher")
    for size in map(float, torch.tensor(ROUNDED)):
        first = float(reference.round17(torch.tensor(size)))
        coefs = (
            torch.tensor([first, size - first])
            if math.isfinite(first)
            else torch.tensor([size / 2, size / 2])
        )
        x = signs * reference.round17(coefs).sum()
        got = torch.empty(2048, dtype=dtype)
        ops.add_noise_list_out(
            [],
            torch.tensor([5, 5]),
            coefs,
            [3],
            [1.0],
            [1.0],
            "rademacher",
            True,
            9,
            None,
            out=[got],
        )
        assert_same_bits(got, rounded_by_definition(x, dither(), dtype))


@functools.cache
def special_values(dtype: torch.dtype) -> torch.Tensor:
    """Every fp16 and bf16 there is; fp32: those, with the lower bits filled."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16)
    if dtype is not torch.float32:
        return every.view(dtype)
    return ((every.int() << 16) | (every.int() * 40503 & 0xFFFF)).view(torch.float32)


@functools.cache
def wanted_special(dtype: torch.dtype, size: float, stochastic: bool) -> torch.Tensor:
    x = special_values(dtype).clone()
    reference.add_noise_list_([x], *special_args(size, stochastic))
    return x


@functools.cache
def wanted_fp16(dtype: torch.dtype, k: int, size: float) -> torch.Tensor:
    x = normals(2300, dtype)
    reference.add_noise_list_([x], *fp16_args(k, size))
    return x


def fp16_args(k: int, size: float) -> tuple:
    seeds, coefs = terms(k)
    spread = torch.exp2(-14 * torch.rand(k, generator=torch.Generator().manual_seed(k)))
    return seeds, coefs * spread * size, [1], [0.9], [0.5], "hadamard-fp16", True, 5, None


@pytest.mark.parametrize("size", (1.0, 1e-44, 1e-38, 1e38, float("inf"), float("nan")))
@pytest.mark.parametrize("k", (2, 15, 16, 17, 33, 40))
def test_fp16_sums(k, size):
    """Blocks of 16, coefs of any size: so small that 2^e has an end, so large that the op is skipped."""
    for dtype in DTYPES:
        x = normals(2300, dtype)
        ops.add_noise_list_([x], *fp16_args(k, size))
        assert_same_bits(x, wanted_fp16(dtype, k, size))
        skipped = not bool(fp16_args(k, size)[1].abs().max() <= 2.0**126)
        assert torch.equal(x, normals(2300, dtype)) == skipped


def special_args(size: float, stochastic: bool) -> tuple:
    seeds, coefs = terms(3)
    return seeds, coefs * size, [1], [0.9], [1.0], "hadamard", stochastic, 5, None


SPECIAL_CASES = (
    *(
        (dtype, size)
        for dtype in (torch.float32, torch.bfloat16)
        for size in (1e-30, 1.0, 1e37, float("inf"))
    ),
    *((torch.float16, size) for size in (1e-6, 1e4, float("nan"))),
)


@pytest.mark.parametrize("stochastic", (False, True), ids=("nearest", "stochastic"))
@pytest.mark.parametrize(("dtype", "size"), SPECIAL_CASES, ids=str)
def test_every_value_of_x(dtype, size, stochastic):
    x = special_values(dtype).clone()
    ops.add_noise_list_([x], *special_args(size, stochastic))
    assert_same_bits(x, wanted_special(dtype, size, stochastic))


def test_subnormals_survive_flush_denormal():
    x = special_values(torch.float32).clone()
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush subnormals")
    try:
        ops.add_noise_list_([x], *special_args(1e-30, False))
        assert float(torch.tensor(1e-40) * 1.0) == 0, "the mode of the thread was changed"
    finally:
        torch.set_flush_denormal(False)
    assert_same_bits(x, wanted_special(torch.float32, 1e-30, False))


@pytest.mark.skipif(sys.platform != "linux", reason="needs mprotect")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reads_nothing_beyond_x(dtype):
    page = mmap.PAGESIZE
    memory = mmap.mmap(-1, 12 * page)
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    mprotect = ctypes.CDLL(None, use_errno=True).mprotect
    for guard in (0, 11):
        assert (
            mprotect(ctypes.c_void_p(base + guard * page), ctypes.c_size_t(page), 0) == 0
        )  # no access
    size = dtype.itemsize
    for n in (1, 127, 2047, 2049, 5000):
        for offset in (page, 11 * page - n * size):  # after the first guard, before the last
            x = torch.frombuffer(memory, dtype=dtype, count=n, offset=offset)
            ops.add_noise_list_([x], *terms(2), [0], [0.5], [1.0], "hadamard", True, 0, None)
            index = torch.tensor([0, n - 1])
            ops.add_noise_rows(x.view(n, 1), index, *terms(2), 0, 1.0, "hadamard")


@pytest.mark.parametrize("stochastic", (False, True), ids=("nearest", "stochastic"))
def test_out_of_place(stochastic):
    xs, streams, keeps, scales = mixed_list(14)
    before = [x.clone() for x in xs]
    out, bands = zip(*[banded(torch.zeros_like(x)) for x in xs], strict=True)
    args = (*terms(14), streams, keeps, scales, "hadamard", stochastic, 77, None)
    ops.add_noise_list_out(xs, *args, out=list(out))
    for x, y, want, band, kept in zip(
        xs, out, wanted_list("hadamard", 14, stochastic), bands, before, strict=True
    ):
        assert_same_bits(y, want)
        assert_same_bits(x, kept)
        assert (band[:BAND] == 7).all() and (band[-BAND:] == 7).all(), "wrote outside out"


@pytest.mark.parametrize("noise", BIT_EXACT)
def test_out_without_x(noise):
    for dtype in DTYPES:
        got, want = torch.full((5000,), torch.nan, dtype=dtype), torch.empty(5000, dtype=dtype)
        args = (*terms(3), [4], [0.5], [1.7], noise, True, 1, None)
        ops.add_noise_list_out([], *args, out=[got])
        reference.add_noise_list_out([], *args, out=[want])
        assert_same_bits(got, want)


def test_scale_zero():
    x = torch.cat([special_values(torch.float32), torch.tensor([-0.0, 0.0])])
    for keep in (1.0, 0.5):
        kept, out = x.clone(), torch.empty_like(x)
        args = (*terms(3), [4], [keep], [0.0], "hadamard", False, 1, None)
        ops.add_noise_list_([kept], *args)
        assert_same_bits(kept, x)
        ops.add_noise_list_out([x], *args, out=[out])
        assert_same_bits(out, x * keep)
    ops.add_noise_list_out([], *args, out=[out])
    assert_same_bits(out, torch.zeros_like(x))


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


NOT_FINITE = (
    math.nan,
    math.inf,
    -math.inf,
    torch.finfo(torch.float32).max,
)  # the last once it is rounded to 17 bits


@pytest.mark.parametrize("noise", NOISES)
def test_skipped(noise):
    """By found_inf, or by a coefficient that is not finite, which sets it: no byte changes, those of NaN and -0
    included; out of place they are copied."""
    specials = torch.tensor([math.nan, -math.nan, -0.0, 1e-45, math.inf])
    for dtype in DTYPES:
        start = torch.cat([special_values(dtype), specials.to(dtype)])
        for k, at, bad, found in (
            *((k, k // 2, bad, 0.0) for k in (1, 3, 20) for bad in NOT_FINITE), (3, 0, 1.0, 1.0), (3, 0, 1.0, math.nan),
            (3, 0, math.nan, 2.0),
        ):  # fmt: skip
            seeds, coefs = terms(k)
            coefs[at] = bad
            for flag in (torch.full((1,), found), None) if found == 0 else (torch.full((), found),):
                x, out, empty = start.clone(), torch.empty_like(start), torch.full_like(start, 7.0)
                args = (seeds, coefs, [4], [0.5], [1.0], noise, True, 0, flag)
                ops.add_noise_list_([x], *args)
                assert same_bytes(x, start)
                assert flag is None or flag == (found if bad == 1 else 1) or found != found
                ops.add_noise_list_out([x], *args, out=[out])
                ops.add_noise_list_out([], *args, out=[empty])
                assert same_bytes(out, start) and same_bytes(empty, torch.zeros_like(start))


@pytest.mark.parametrize("noise", BIT_EXACT)
def test_scales_at_the_ends(noise):
    """A scale that fp32 does not hold is still a scale: keep applies, and zeros get the sign of the noise's. Large ones
    overflow alike."""
    for dtype in DTYPES:
        start = torch.cat(
            [torch.tensor([-0.0, 0.0, 1e-45, 65504.0, -6e-8, math.inf, math.nan]), normals(300)]
        ).to(dtype)
        for scale, size in ((1e-60, 1.0), (1e-40, 1e-30), (1e30, 1.0), (3e38, 1.0), (1e30, 1e30)):
            seeds, coefs = terms(3)
            args = ([3], [0.9], [scale], noise, True, 5)
            steps = (seeds, coefs * size, [1, 2], [3], [0.9, 0.8], [scale] * 2, noise, True, [5, 6])
            results = []
            for list_op, out_op, steps_op in (
                (ops.add_noise_list_, ops.add_noise_list_out, ops.add_noise_steps_),
                (
                    reference.add_noise_list_,
                    reference.add_noise_list_out,
                    reference.add_noise_steps_,
                ),
            ):
                x, y, z, row = (
                    start.clone(),
                    torch.empty_like(start),
                    torch.empty_like(start),
                    start.clone(),
                )
                list_op([x], seeds, coefs * size, *args, None)
                out_op([start], seeds, coefs * size, *args, None, out=[y])
                out_op([], seeds, coefs * size, *args, None, out=[z])
                steps_op([row], *steps)
                results.append((x, y, z, row))
            for got, want in zip(*results, strict=True):
                assert_same_bits(got, want)
    rows, index = torch.full((4, 5), -0.0), torch.tensor([1, 3])
    for rows_op in (ops.add_noise_rows, reference.add_noise_rows):
        assert same_bytes(rows_op(rows, index, *terms(2), 0, 0.0, noise), rows[index])


@pytest.mark.parametrize("noise", BIT_EXACT)
def test_skipped_matches_reference(noise):
    """Values that are not skipped are as before: with a flag of 0, which stays 0."""
    for dtype in DTYPES:
        for bad, found in ((1.0, 0.0), (math.nan, 0.0), (1.0, 1.0)):
            got, want = normals(3000, dtype), normals(3000, dtype)
            flags = torch.full((1,), found), torch.full((1,), found)
            seeds, coefs = terms(3)
            coefs[1] *= bad
            args = (seeds, coefs, [4], [0.5], [1.0], noise, False, 0)
            ops.add_noise_list_([got], *args, flags[0])
            reference.add_noise_list_([want], *args, flags[1])
            assert_same_bits(got, want)
            assert torch.equal(*flags) and bool(flags[0]) == (bad != 1 or found == 1)
            assert torch.equal(got, normals(3000, dtype)) == bool(flags[0])


@pytest.mark.parametrize("noise", BIT_EXACT)
def test_a_step_in_a_row_is_skipped(noise):
    xs, args = steps_in_a_row(noise)
    seeds, coefs, counts, *rest = args
    coefs = coefs.clone()
    coefs[2] = math.nan  # one of the three of step 1
    got, want, without = ([x.clone() for x in xs] for _ in range(3))
    ops.add_noise_steps_(got, seeds, coefs, counts, *rest)
    reference.add_noise_steps_(want, seeds, coefs, counts, *rest)
    streams, keeps, scales, *more = rest
    scales = [0.0 if i // len(xs) == 1 else scale for i, scale in enumerate(scales)]
    ops.add_noise_steps_(without, seeds, args[1], counts, streams, keeps, scales, *more)
    for x, w, v in zip(got, want, without, strict=True):
        assert_same_bits(x, w)
        assert_same_bits(x, v)


def test_rows_of_a_skipped_op():
    x, index = normals(40 * 48).view(40, 48), torch.tensor([3, 39, 3])
    seeds, coefs = terms(3)
    for bad in NOT_FINITE:
        coefs[1] = bad
        for rows in (ops.add_noise_rows, reference.add_noise_rows):
            assert torch.equal(rows(x, index, seeds, coefs, 6, 1.3, "hadamard"), x[index])


def test_nothing_to_do_finds_nothing():
    seeds, coefs = terms(3)
    coefs[1] = math.nan
    for list_op in (ops.add_noise_list_, reference.add_noise_list_):
        flag = torch.zeros(1)
        for xs, scale in (([], 1.0), ([torch.empty(0)], 1.0), ([torch.ones(5)], 0.0)):
            n = len(xs)
            list_op(xs, seeds, coefs, [0] * n, [1.0] * n, [scale] * n, "hadamard", False, 0, flag)
        assert flag == 0


@pytest.mark.parametrize("width", (1, 48, 128, 768, 2048, 5000))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows(dtype, width):
    x = normals(40 * width, dtype).view(40, width)
    index = torch.tensor([[3, 39, 3], [0, 17, 38]])
    for noise in NOISES:
        whole = torch.empty_like(x)
        args = (*terms(5), [6], [1.0], [1.3], noise, False, 0, None)
        ops.add_noise_list_out([x], *args, out=[whole])
        got = ops.add_noise_rows(x, index, *terms(5), 6, 1.3, noise)
        assert got.shape == (2, 3, width)
        assert_same_bits(got.view(-1), whole[index].view(-1))
    assert_same_bits(
        got.view(-1),
        ops.add_noise_rows(x, index.t().contiguous().t(), *terms(5), 6, 1.3, noise).view(-1),
    )
    assert ops.add_noise_rows(x, index[:0], *terms(5), 6, 1.3, noise).shape == (0, 3, width)


def test_rows_match_reference():
    x, index = normals(50 * 768, torch.bfloat16).view(50, 768), torch.tensor([49, 0, 7, 7])
    want = reference.add_noise_rows(x, index, *terms(5), 6, 0.01, "hadamard")
    assert_same_bits(
        ops.add_noise_rows(x, index, *terms(5), 6, 0.01, "hadamard").view(-1), want.view(-1)
    )


def test_rows_out_of_range():
    for row in (-1, 50):
        with pytest.raises(
            IndexError, match=rf"add_noise_rows: index must be in 0 .. 49, the rows of x, got {row}"
        ):
            ops.add_noise_rows(
                torch.zeros(50, 4), torch.tensor([1, row]), *terms(1), 0, 1.0, "hadamard"
            )


@functools.cache
def wanted_normal() -> torch.Tensor:
    z = torch.empty(
        1 << 22
    )  # 2^21 pairs: each of the 65536 radii and angles is missed with probability e^-32
    seed, coef = torch.tensor([5]), torch.tensor([1.0])
    reference.add_noise_list_out([], seed, coef, [0], [1.0], [1.0], "normal", False, 0, out=[z])
    return z


first_normal = {}


def test_normal(isa):
    got, want = torch.empty(1 << 22), wanted_normal()
    seed, coef = torch.tensor([5]), torch.tensor([1.0])
    ops.add_noise_list_out([], seed, coef, [0], [1.0], [1.0], "normal", False, 0, None, out=[got])
    # half of it is the reference's: its angle is rounded to fp32, 1.2e-7 near pi, before the cosine
    atol = 4 * torch.finfo(torch.float32).eps * want.abs().clamp(min=1)
    assert ((got - want).abs() <= atol).all(), (
        f"off by {float(((got - want).abs() / atol).max())} of the tolerance"
    )
    assert_same_bits(
        got, first_normal.setdefault("z", got)
    )  # no fma in it, so the instruction sets agree


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_normal_sums(dtype):
    got, want, x = normals(5000, dtype), normals(5000, dtype), normals(5000, dtype).float()
    args = (*terms(14), [6], [0.9], [1.3], "normal", False, 0)
    ops.add_noise_list_([got], *args, None)
    reference.add_noise_list_([want], *args)
    # each of 14 terms is off by 4 ulp of at most 4.85 * |coef|; then sums and product round 16 times, and x once
    bound = 1.3 * 4.85 * float(terms(14)[1].abs().sum())
    atol = 20 * torch.finfo(torch.float32).eps * bound + torch.finfo(dtype).eps * (
        x.abs() + want.float().abs()
    )
    assert ((got.float() - want.float()).abs() <= atol).all()


@pytest.mark.parametrize("noise", NOISES)
def test_threads_do_not_matter(noise):
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            xs = [normals(n, dtype) for n in (70000, 3, 0, 2049) for dtype in DTYPES]
            streams, ones = list(range(len(xs))), [1.0] * len(xs)
            ops.add_noise_list_(xs, *terms(4), streams, ones, ones, noise, True, 3, None)
            x = normals(100000).view(100, 1000)
            rows = ops.add_noise_rows(x, torch.arange(99, -1, -1), *terms(4), 0, 1.0, noise)
            results.append([*xs, rows.view(-1)])
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        for got, want in zip(result, results[0], strict=True):
            assert_same_bits(got, want)


MANY_SEEDS = (*terms(1500), [6], [0.9], [1.0], "rademacher", False, 0)


@functools.cache
def wanted_of_many_seeds() -> torch.Tensor:
    x = normals(300)
    reference.add_noise_list_([x], *MANY_SEEDS)
    return x


def test_many_seeds():
    x = normals(300)
    ops.add_noise_list_([x], *MANY_SEEDS, None)
    assert_same_bits(x, wanted_of_many_seeds())


def test_an_extension_of_other_sources_is_refused(monkeypatch):
    """It would round by the rule of then, and journals would say that of now."""
    monkeypatch.setattr(reference, "ROUNDING_VERSION", 99)
    with pytest.raises(ImportError, match="built from other sources than these; build it again"):
        importlib.reload(pseuzo_kernels)


def test_refuses_what_would_corrupt_memory():
    seeds, coefs = terms(2)

    def call(xs, seeds=seeds, coefs=coefs, streams=(0,), out=None, found_inf=None):
        args = (seeds, coefs, list(streams), [1.0], [1.0], "hadamard", False, 0, found_inf)
        if out is None:
            ops.add_noise_list_(xs, *args)
        else:
            ops.add_noise_list_out(xs, *args, out=out)

    x, freed, short = torch.zeros(8), torch.zeros(8), torch.zeros(8)
    freed_seeds, freed_flag = freed.view(torch.int64)[:2], freed[:1]
    freed.untyped_storage().resize_(0)
    short.untyped_storage().resize_(16)
    for message, arguments in {
        "x must be contiguous": {"xs": [torch.zeros(8, 8).t()]},
        "x must be float32, bfloat16 or float16": {"xs": [x.double()]},
        "must be one per tensor": {"xs": [x], "streams": (0, 1)},
        "as many coefs as seeds": {"xs": [x], "coefs": coefs[:1]},
        "seeds must be int64": {"xs": [x], "seeds": seeds.int()},
        "coefs must be float32": {"xs": [x], "coefs": coefs.double()},
        "found_inf must be float32": {"xs": [x], "found_inf": torch.zeros(1, dtype=torch.int32)},
        "out must be like x": {"xs": [x], "out": [torch.zeros(9)]},
        "out must be like x,": {"xs": [x], "out": [torch.zeros(8, dtype=torch.float16)]},
        "the memory of x was freed": {"xs": [freed]},
        "the memory of x was freed.* has 16 bytes": {"xs": [short]},
        "the memory of out was freed": {"xs": [], "out": [freed]},
        "the memory of seeds was freed": {"xs": [x], "seeds": freed_seeds},
        "the memory of found_inf was freed": {"xs": [x], "found_inf": freed_flag},
    }.items():
        with pytest.raises(RuntimeError, match=message):
            call(**arguments)
    for message, changed in {
        "streams must be one per tensor": {2: [1], 4: [1.0, 1.0]},
        "counts must add up": {2: [3]},
        "counts must not be negative": {2: [3, -1], 4: [1.0, 1.0], 5: [1.0, 1.0], 8: [0, 0]},
    }.items():
        args = [seeds, coefs, [2], [0], [1.0], [1.0], "hadamard", False, [0]]
        for i, value in changed.items():
            args[i] = value
        with pytest.raises(RuntimeError, match=message):
            ops.add_noise_steps_([x], *args)
    assert (x == 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["plain"], indirect=True)
def test_environment_chooses_the_isa(isa):
    code = "import pseuzo_kernels; print(pseuzo_kernels._C.cpu_isa())"

    def run(choice: str) -> subprocess.CompletedProcess:
        environment = os.environ | {"PSEUZO_CPU_ISA": choice}
        return subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True
        )

    assert run(isa).stdout.strip() == isa
    assert "PSEUZO_CPU_ISA: must be one of" in run("sse9").stderr
