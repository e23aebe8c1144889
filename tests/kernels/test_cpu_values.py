"""The C++ noise ops handle all kinds of numbers: roundings, half precision, special values,
normals."""

import functools
import math

import pytest
import torch
from cpu_ops import (
    BIT_EXACT,
    DTYPES,
    normals,
    on_every_isa,
    ops,
    same_bytes,
    special_values,
    terms,
)
from helpers import (
    KNOWN_ELEMENTS,
    KNOWN_HADAMARD,
    KNOWN_ROUNDED,
    KNOWN_TERMS,
    assert_same_bits,
    rounded_by_definition,
)

from pseuzo_kernels import reference

pytestmark = on_every_isa


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
    assert_same_bits(z[KNOWN_ELEMENTS], KNOWN_HADAMARD)
    for dtype, want in KNOWN_ROUNDED.items():
        x = torch.full((4096,), 0.5, dtype=dtype)
        args = (*map(torch.tensor, KNOWN_TERMS), [3], [0.75], [1.0], "hadamard", True, 9, None)
        ops.add_noise_list_([x], *args)
        assert [bits & 0xFFFF for bits in x.view(torch.int16)[KNOWN_ELEMENTS].tolist()] == want


# These sizes of x' are rounded. They are near the largest and smallest values of the dtypes, next
# to values that the dtypes hold, or below their spacing.
ROUNDED = (
    1.0,
    1.25 + 2**-17,
    2 - 2**-23,
    1 / 3,
    2**-14,
    2**-14 - 2**-38,
    6.1e-5,
    5.96e-8,
    3e-8,
    1e-9,
    2**-40,
    2**-41,
    65504.0,
    65519.9,
    65520.0,
    65535.99,
    65536.0,
    1e-38,
    2**-133,
    2**-134 + 2**-140,
    3.38e38,
    3.4e38,
)


@functools.cache
def dither() -> torch.Tensor:
    q, _ = reference.columns_of_chunks(0, 1, torch.device("cpu"))
    return reference.rounding_dither(q, 3, reference.hash_seeds(torch.tensor(9))).flatten()


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_rounds_as_defined(dtype):
    """A term of +-1 gives x' its size, and another term with the same seed gives the bits beyond
    17."""
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
    """Coefs in blocks of 16 have any size, from the smallest 2^e to so large that the op is
    skipped."""
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


@pytest.mark.parametrize("noise", BIT_EXACT)
def test_scales_at_the_ends(noise):
    """A scale that fp32 cannot hold still counts as a scale, so keep applies.

    Zeros get the sign of the noise, and large scales overflow as in the reference.
    """
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


@functools.cache
def wanted_normal() -> torch.Tensor:
    # With 2^21 pairs, each of the 65536 radii and angles is missed with probability e^-32.
    z = torch.empty(1 << 22)
    seed, coef = torch.tensor([5]), torch.tensor([1.0])
    reference.add_noise_list_out([], seed, coef, [0], [1.0], [1.0], "normal", False, 0, out=[z])
    return z


first_normal = {}


def test_normal(isa):
    got, want = torch.empty(1 << 22), wanted_normal()
    seed, coef = torch.tensor([5]), torch.tensor([1.0])
    ops.add_noise_list_out([], seed, coef, [0], [1.0], [1.0], "normal", False, 0, None, out=[got])
    # Half of the tolerance is for the reference, which rounds its angle to fp32 before the cosine:
    # by up to 1.2e-7 near pi.
    atol = 4 * torch.finfo(torch.float32).eps * want.abs().clamp(min=1)
    assert ((got - want).abs() <= atol).all(), (
        f"off by {float(((got - want).abs() / atol).max())} of the tolerance"
    )
    # The computation uses no fma, so the instruction sets agree.
    assert_same_bits(got, first_normal.setdefault("z", got))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_normal_sums(dtype):
    got, want, x = normals(5000, dtype), normals(5000, dtype), normals(5000, dtype).float()
    args = (*terms(14), [6], [0.9], [1.3], "normal", False, 0)
    ops.add_noise_list_([got], *args, None)
    reference.add_noise_list_([want], *args)
    # Each of 14 terms has an error of 4 ulps of at most 4.85 * |coef|. Then the sums and the
    # product are rounded 16 times, and x once.
    bound = 1.3 * 4.85 * float(terms(14)[1].abs().sum())
    atol = 20 * torch.finfo(torch.float32).eps * bound + torch.finfo(dtype).eps * (
        x.abs() + want.float().abs()
    )
    assert ((got.float() - want.float()).abs() <= atol).all()
