"""The noise contract: known answers, and the statistics of z."""

import math

import numpy as np
import pytest
import torch
from helpers import (
    KNOWN_DITHER,
    KNOWN_ELEMENTS,
    KNOWN_HADAMARD,
    KNOWN_ROUNDED,
    KNOWN_TERMS,
    rounded_by_definition,
)
from scipy import stats

import pseuzo_kernels as pk
from pseuzo_kernels import NOISES, laws, reference

PHILOX = """
 7 00000000 00000000 00000000 00000000 00000000 00000000 5f6fb709 0d893f64 4f121f81 4f730a48
 7 ffffffff ffffffff ffffffff ffffffff ffffffff ffffffff 5207ddc2 45165e59 4d8ee751 8c52f662
 7 243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0 4dfccaba 190a87f0 c47362ba b6b5242a
10 00000000 00000000 00000000 00000000 00000000 00000000 6627e8d5 e169c58d bc57ac4c 9b00dbd8
10 ffffffff ffffffff ffffffff ffffffff ffffffff ffffffff 408f276d 41c83b0e a20bc7c6 6d5451fd
10 243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0 d16cfe09 94fdcceb 5001e420 24126ea1
"""  # rounds, counter, key -> output: the known answers of Random123
INF, NAN = float("inf"), float("nan")
N = 1 << 21
KINDS = [noise for noise in NOISES if noise != "hadamard-fp16"]  # its z is that of hadamard


@pytest.mark.parametrize("row", PHILOX.strip().splitlines())
def test_philox_known_answers(row):
    rounds, *words = row.split()
    words = [int(w, 16) for w in words]
    got = reference.philox4x32(tuple(words[:4]), tuple(words[4:6]), int(rounds))
    assert [int(w) for w in got] == words[6:]


def test_hash_known_answer():
    want = 0xE220A8397B1DCDAF - (1 << 64)
    assert reference.hash_seed(0) == want
    seeds = torch.tensor([0, -1, 2**63 - 1, -(2**63), 12345])
    assert reference.hash_seeds(seeds).tolist() == [reference.hash_seed(int(s)) for s in seeds]


def test_hadamard_known_answers():
    z = reference.noise((4096,), 0, 0)[KNOWN_ELEMENTS]
    assert torch.equal(z, KNOWN_HADAMARD)


def test_add_noise_known_answers():
    x = torch.full((4096,), 0.5)
    reference.add_noise_(x, [1, 2, 3], [0.1, -0.2, 0.3], 3, keep=0.75)
    want = [
        0.19077313,
        0.44670042,
        0.34673935,
        -0.009034246,
        0.52201,
        0.22578181,
        0.57975304,
        0.27137128,
    ]
    assert torch.equal(x[KNOWN_ELEMENTS], torch.tensor(want))
    for dtype, want in KNOWN_ROUNDED.items():
        x = torch.full((4096,), 0.5, dtype=dtype)
        reference.add_noise_(x, *KNOWN_TERMS, 3, keep=0.75, rounding="stochastic", rounding_seed=9)
        assert [v & 0xFFFF for v in x[KNOWN_ELEMENTS].view(torch.int16).tolist()] == want


def dither_of(n: int, stream: int, rounding_seed: int) -> torch.Tensor:
    """Return the dither of each element, [n]."""
    q, elements = reference.columns_of_chunks(0, -(-n // reference.CHUNK), torch.device("cpu"))
    dither = reference.rounding_dither(q, stream, reference.hash_seeds(torch.tensor(rounding_seed)))
    return dither.flatten()[elements.flatten().argsort()][:n]


def test_rounding_known_answers():
    dither = dither_of(4096, 3, 9)
    assert dither[KNOWN_ELEMENTS].tolist() == KNOWN_DITHER
    x = torch.tensor(
        [0, -0.0, INF, -INF, NAN, 65504, 65519.9, 65520, 1e-8, -3e-8, 6e-5, -6.1e-5, 1, -2.5]
    )
    want = [
        0x0000,
        0x8000,
        0x7C00,
        0xFC00,
        0x7E00,
        0x7BFF,
        0x7C00,
        0x7BFF,
        0x0000,
        0x8000,
        0x03EF,
        0x8400,
        0x3C00,
        0xC100,
    ]
    got = reference.round_stochastically(x, dither[:14], torch.float16)
    assert [v & 0xFFFF for v in got.view(torch.int16).tolist()] == want


def test_fp16_known_answers():
    """These functions differ slightly from those above, and journals depend on them as well."""
    x = torch.full((4096,), 0.5)
    reference.add_noise_(x, [1, 2, 3], [0.1, -0.2, 0.3], 3, keep=0.75, noise="hadamard-fp16")
    want = [
        0.19015898,
        0.4464677,
        0.34697354,
        -0.008765668,
        0.5227874,
        0.22580422,
        0.57975346,
        0.27074468,
    ]
    assert torch.equal(x[KNOWN_ELEMENTS], torch.tensor(want))
    x = torch.full((4096,), 0.5, dtype=torch.bfloat16)
    seeds, coefs = list(range(20)), [0.1 * k - 1 for k in range(20)]  # more than a block
    reference.add_noise_(
        x,
        seeds,
        coefs,
        3,
        keep=0.75,
        noise="hadamard-fp16",
        rounding="stochastic",
        rounding_seed=9,
        noise_scale=0.5,
    )
    want = [0xBF84, 0xBE39, 0x3F16, 0xBFF6, 0x3EDC, 0xBF85, 0xBE41, 0x3E95]
    assert [v & 0xFFFF for v in x[KNOWN_ELEMENTS].view(torch.int16).tolist()] == want


def test_fp16_with_one_seed_is_hadamard():
    x, y = torch.randn(5000), torch.empty(5000)
    y.copy_(x)
    reference.add_noise_(x, 5, 0.3, 1, keep=0.9)
    reference.add_noise_(y, 5, 0.3, 1, keep=0.9, noise="hadamard-fp16")
    assert torch.equal(x, y)
    assert torch.equal(
        reference.noise((5000,), 7, 2), reference.noise((5000,), 7, 2, noise="hadamard-fp16")
    )


@pytest.mark.parametrize(
    "coefs, want, power",
    [
        ([0.25, -1.0, 0.5], [0.25, -1.0, 0.5], 1.0),  # a power of two is its own 2^e
        ([1.0000001, -3.0], [0.25, -0.75], 4.0),
        (
            [1.0, 2.5 / 1024, 3.5 / 1024, -0.5 / 1024, 0.51 / 1024],
            [1.0, 2 / 1024, 4 / 1024, 0.0, 1 / 1024],
            1.0,
        ),
        ([0.0, -0.0], [0.0, 0.0], 2.0**-126),
        # Subnormals, below the least power, are rounded to a coarser grid.
        (
            [2.0**-149, 2.0**-127],
            [0.0, 0.5],
            2.0**-126,
        ),
        ([1e-38, 2.0**126], [0.0, 1.0], 2.0**126),
        ([1.0, 2.0**126 * 1.0000002], [NAN, NAN], NAN),
        ([1.0, INF], [NAN, NAN], NAN),
        ([-INF, NAN], [NAN, NAN], NAN),
    ],
    ids=str,
)
def test_fp16_coefs(coefs, want, power):
    got, up = reference.fp16_coefs(torch.tensor(coefs))
    torch.testing.assert_close(got, torch.tensor(want), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(up, torch.tensor(power), rtol=0, atol=0, equal_nan=True)


def test_fp16_sums_are_rounded_once():
    """fp32 holds the exact result that a fused multiply-add rounds to fp16.

    Patterns and coefs are multiples of 2^-9 and 2^-10, and sums are below 32. So the reference
    rounds each sum once, and this test computes the same sums from fp64.
    """
    every = torch.arange(1 << 16)
    b = laws.HADAMARD((every, every, every, every))
    assert (b * 512 == (b * 512).round()).all()
    h = np.float16(0)
    for _ in range(reference.FP16_BLOCK):
        h = np.float16(np.float64(h) + float(b.max()))  # the coefficient c' is 1
    assert 29 < h < 32
    coefs, power = reference.fp16_coefs(torch.randn(40, generator=torch.Generator().manual_seed(0)))
    q, hashes = torch.arange(256), reference.hash_seeds(torch.arange(40))
    acc = torch.zeros(16, 256)
    law = laws.LAWS["hadamard"]
    for k in range(40):
        if k % reference.FP16_BLOCK == 0:
            h = np.zeros((16, 256), np.float16)
        terms = float(coefs[k]) * law.column_noise(q, 3, hashes[k]).double().numpy()
        h = (h + terms).astype(np.float16)
        if k % reference.FP16_BLOCK == reference.FP16_BLOCK - 1 or k == 39:
            acc += torch.from_numpy(h).float()
    got = reference.noise_sum("hadamard-fp16", q, 3, hashes, coefs * power, 0.5)
    scale = torch.tensor(law.scale * 0.5, dtype=torch.float32) * power
    want = reference.fwht16(acc) * scale
    assert torch.equal(got, want)


@pytest.mark.parametrize("spread", [0, 12])
@pytest.mark.parametrize("K", [2, 14, 16, 17, 40, pytest.param(1000, marks=pytest.mark.slow)])
def test_fp16_sums_are_near_and_unbiased(K, spread):
    """A step rounds h by at most 2^-10 |h| / sqrt(12) rms.

    The errors of the 16 steps of a block add in squares, to less than 2^-10 sqrt(16/12) of the sum.
    A coefficient has an error of delta. spread: the range of the coefs, in powers of two. The first
    pattern of a block has 128 values, in pairs of signs, so its errors average over 64 only.
    """
    g = torch.Generator().manual_seed(K)
    coefs = torch.randn(K, generator=g) * torch.exp2(-spread * torch.rand(K, generator=g))
    n = 1 << 13
    x = torch.zeros(n)
    reference.add_noise_(x, list(range(K)), coefs, 1, noise="hadamard-fp16")
    scaled, power = reference.fp16_coefs(coefs)
    delta = (scaled * power).double() - coefs.double()
    assert delta.abs().max() <= power * 2.0**-11
    want, of_coefs = torch.zeros(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
    for k in range(K):
        z = reference.noise((n,), k, 1).double()
        want += coefs[k].double() * z
        of_coefs += delta[k] * z
    error, size = x.double() - want, want.square().mean().sqrt()
    rounding = error - of_coefs
    bound = 2.0**-10 * math.sqrt(16 / 12)
    assert 1e-4 * size < rounding.square().mean().sqrt() < bound * size
    assert error.square().mean().sqrt() < (bound + 1.05 * delta.norm() / coefs.norm()) * size
    deviation = 5 * rounding.std() / math.sqrt(n)  # the errors are independent
    assert abs(rounding.mean()) < deviation
    first = 5 * 2.0**-10 / math.sqrt(12 * 64)
    # The sum is neither shrunk nor stretched.
    assert abs((rounding * want).mean()) < (deviation + first * size) * size


def test_transform_is_orthogonal_and_linear():
    """FWHT16 of the identity is a Hadamard matrix, so sum_k c_k z_k = FWHT16(sum_k c_k b_k) up to
    rounding."""
    h = reference.fwht16(torch.eye(16))
    assert torch.equal(h @ h.T, 16 * torch.eye(16)) and set(h.unique().tolist()) == {-1.0, 1.0}
    # The coefs are powers of two, which rounding to 17 bits does not change.
    seeds, coefs = (
        [3, 4, 5],
        [0.5, -2.0, 0.25],
    )
    x = torch.zeros(5000)
    reference.add_noise_(x, seeds, coefs, 1)
    want = sum(
        c * reference.noise((5000,), s, 1).double() for s, c in zip(seeds, coefs, strict=True)
    )
    # The sums have 48 terms below 8 in fp32.
    torch.testing.assert_close(x.double(), want, rtol=0, atol=16 * 2.0**-24 * 8)


@pytest.mark.parametrize("noise", KINDS)
def test_moments_and_distribution(noise):
    """Bounds are 5 standard errors of N samples.

    The bound of the KS distance is that of level 1e-6, plus the known distance of hadamard, 4e-4.
    """
    z = reference.noise((N,), 2024, 5, noise=noise).double()
    kurtosis = {"hadamard": 3 - 0.0144, "normal": 3.0, "rademacher": 1.0}[noise]
    assert abs(z.mean()) < 5 / math.sqrt(N)
    assert abs(z.var() - 1) < 5 * math.sqrt((kurtosis - 1) / N) + 1e-5
    assert abs((z**3).mean()) < 5 * math.sqrt(15 / N)
    assert abs((z**4).mean() - kurtosis) < 5 * math.sqrt(96 / N) + 2e-3
    if noise == "rademacher":
        assert set(z.unique().tolist()) == {-1.0, 1.0}
    else:
        assert stats.kstest(z.numpy(), "norm").statistic < 2.6 / math.sqrt(N) + 4e-4
        assert z.abs().max() < 5.8


@pytest.mark.parametrize("noise", KINDS)
def test_no_correlation_between_seeds_streams_and_neighbours(noise):
    """|r| < 5 / sqrt(N) for independent samples. Seeds and streams that differ in one bit are the
    hardest.
    """
    z = {
        (s, t): reference.noise((N // 4,), s, t, noise=noise) for s in (0, 1, 2**32) for t in (0, 1)
    }
    bound = 5 / math.sqrt(N // 4)
    names = list(z)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            assert abs((z[a] * z[b]).mean()) < bound, (a, b)
    for lag in (1, 2, 16, 127, 128, 2047, 2048):
        assert abs((z[0, 0][:-lag] * z[0, 0][lag:]).mean()) < bound, lag


def test_elements_do_not_depend_on_the_size():
    assert torch.equal(reference.noise((10,), 1, 2), reference.noise((100, 77), 1, 2).view(-1)[:10])


# These fp32 values of x' are near the largest and smallest values of the dtypes, near values that
# the dtypes hold, or far below their spacing.
NEAR = (
    0.0,
    1.0,
    1.25,
    2 - 2**-23,
    2**-14,
    6.1e-5,
    6e-5,
    5.96e-8,
    3e-8,
    1e-8,
    2**-40,
    65504.0,
    65519.9,
    65535.9,
)
OFFSETS = (0, 2**-24, 2**-18, 2**-12, -(2**-13), 2**-9, 0.3e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_stochastic_rounding_is_exactly_unbiased(dtype):
    """The average over all 2^16 dithers of a value is that value, and each dither gives the defined
    result.

    The average is exact, except for bits below 2^-16 of the spacing (for fp16, below 2^-40).
    """
    x = torch.tensor(
        [a + a * b for a in NEAR for b in OFFSETS] + [-0.3, -1e-6, -(2**-24) * (1 + 2**-16)]
    )
    if dtype is torch.bfloat16:
        x = torch.cat([x, torch.tensor([1e-38, -3e-39, 1e-45, 1.7e38])])
    dither, spacing = torch.arange(1 << 16), 2.0**-24 if dtype is torch.float16 else 0.0
    for value in x.unique():
        every = value.expand(1 << 16).contiguous()
        y = reference.round_stochastically(every, dither, dtype)
        assert torch.equal(y, rounded_by_definition(every, dither, dtype))
        if value.abs() <= torch.finfo(dtype).max:
            error = float((y.double().mean() - value.double()).abs())
            assert (
                error == 0 if value.abs() >= 2.0**-14 else error < spacing * 2.0**-16 or error == 0
            ), value
    exact = torch.tensor([0.0, -0.0, 1.0, -2.5, 6e-8, 65504.0, INF, -INF]).to(dtype)
    for value in exact:  # values that the dtype holds do not change
        same = reference.round_stochastically(
            value.float().expand(1 << 16).contiguous(), dither, dtype
        )
        assert torch.equal(
            same.view(torch.int16), value.expand(1 << 16).contiguous().view(torch.int16)
        )
    assert reference.round_stochastically(torch.full((1 << 16,), NAN), dither, dtype).isnan().all()


def test_dither_is_uniform_and_partners_hardly_correlate():
    """A chi-square test takes both bytes jointly. The correlation of roundings is computed exactly,
    over all pairs of bytes."""
    planes = dither_of(1 << 22, 1, 5).view(-1, 16, 128)
    for plane in (0, 3, 4, 9, 15):
        counts = torch.bincount(planes[:, plane].flatten() >> 4, minlength=4096)
        assert stats.chisquare(counts.numpy()).pvalue > 1e-4
        counts = torch.bincount(planes[:, plane].flatten() & 0xFFF, minlength=4096)
        assert stats.chisquare(counts.numpy()).pvalue > 1e-4
    high, low = np.divmod(np.arange(1 << 16), 256)
    swapped = low * 256 + high
    assert (planes[:, :4] & 0xFF == planes[:, 4:8] >> 8).all() and (
        planes[:, 8:12] >> 8 == planes[:, 12:] & 0xFF
    ).all()
    for p in (2**-16, 2**-13, 2**-11, 2**-10, 2**-9, 2**-8, 0.01, 0.0588, 0.3, 0.5, 0.71, 0.996):
        up, partner = (d >= round((1 - p) * 2**16) for d in (np.arange(1 << 16), swapped))
        bound = 0.012 if 2**-9 <= p <= 1 - 2**-9 else 2**-16 / p
        assert abs(np.corrcoef(up, partner)[0, 1]) <= bound * (1 + 1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_updates_far_below_the_spacing_arrive(dtype):
    """Rounding to nearest loses updates of 1/2048 of a spacing, and stochastic rounding keeps them
    on average."""
    steps, n, ulp = 8, 1 << 20, torch.finfo(dtype).eps
    coef = ulp / 2048
    z = pk.noise((n,), 7, 0)
    near, stochastic = torch.full((n,), 1.25, dtype=dtype), torch.full((n,), 1.25, dtype=dtype)
    for t in range(steps):
        pk.add_noise_(near, 7, coef, 0)
        pk.add_noise_(stochastic, 7, coef, 0, rounding="stochastic", rounding_seed=t)
    arrived = float(((stochastic.double() - 1.25) * z).sum() / (steps * coef * (z * z).sum()))
    # An element moves up or down by an ulp with probability p = |coef z| / ulp, so its variance per
    # step is at most p ulp^2. The regression on z then has a variance of ulp sum |z|^3 / (steps
    # coef n^2). With E|z|^3 = 1.6, the standard deviation is 0.02.
    assert abs(arrived - 1) < 5 * math.sqrt(1.6 * 2048 / (steps * n))
    assert (near == 1.25).all()


@pytest.mark.slow
def test_small_updates_survive_in_bf16():
    """Rounding to nearest loses 400 updates of 1/40 of a spacing, and stochastic rounding keeps
    them."""
    steps, n = 400, 1 << 14
    ulp = 2.0**-7
    total = torch.zeros(n)
    near, stochastic = torch.ones(n, dtype=torch.bfloat16), torch.ones(n, dtype=torch.bfloat16)
    for t in range(steps):
        coef = ulp / 40
        seed = t % 4  # directions are repeated, so that updates add up
        reference.add_noise_(total, seed, coef, 0)
        reference.add_noise_(near, seed, coef, 0)
        reference.add_noise_(stochastic, seed, coef, 0, rounding="stochastic", rounding_seed=t)
    want = total.double()
    moved = lambda x: ((x.double() - 1) * want).sum() / (want * want).sum()  # noqa: E731
    # The noise of rounding is independent of want, so its regression on want is 0 within 5 standard
    # errors.
    error = 5 * math.sqrt(steps) * ulp / 2 / (want.std() * math.sqrt(n))
    assert abs(moved(stochastic) - 1) < error
    assert moved(near) < 0.2
