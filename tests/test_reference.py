"""The noise contract: known answers, and the statistics of z."""

import math

import pytest
import torch
from scipy import stats

from pseuzo_kernels import NOISES, reference

PHILOX = """
 7 00000000 00000000 00000000 00000000 00000000 00000000 5f6fb709 0d893f64 4f121f81 4f730a48
 7 ffffffff ffffffff ffffffff ffffffff ffffffff ffffffff 5207ddc2 45165e59 4d8ee751 8c52f662
 7 243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0 4dfccaba 190a87f0 c47362ba b6b5242a
10 00000000 00000000 00000000 00000000 00000000 00000000 6627e8d5 e169c58d bc57ac4c 9b00dbd8
10 ffffffff ffffffff ffffffff ffffffff ffffffff ffffffff 408f276d 41c83b0e a20bc7c6 6d5451fd
10 243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0 d16cfe09 94fdcceb 5001e420 24126ea1
"""  # rounds, counter, key -> output: the known answers of Random123
ELEMENTS = [0, 1, 2, 127, 128, 2047, 2048, 4095]
N = 1 << 21


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
    z = reference.noise((4096,), 0, 0)[ELEMENTS]
    want = [0.83796775, -0.25703105, 0.82517433, 0.32332414, 1.4113448, 1.2560793, 0.5873334, -0.8112179]
    assert torch.equal(z, torch.tensor(want))


def test_add_noise_known_answers():
    x = torch.full((4096,), 0.5)
    reference.add_noise_(x, [1, 2, 3], [0.1, -0.2, 0.3], 3, keep=0.75)
    want = [0.19077313, 0.44670042, 0.34673935, -0.009034246, 0.52201, 0.22578181, 0.57975304, 0.27137128]
    assert torch.equal(x[ELEMENTS], torch.tensor(want))
    x = torch.full((4096,), 0.5, dtype=torch.bfloat16)
    reference.add_noise_(x, [1, 2, 3], [0.1, -0.2, 0.3], 3, keep=0.75, rounding="stochastic", rounding_seed=9)
    want = [0x3E44, 0x3EE5, 0x3EB2, 0xBC14, 0x3F06, 0x3E67, 0x3F14, 0x3E8B]
    assert [v & 0xFFFF for v in x[ELEMENTS].view(torch.int16).tolist()] == want


def test_transform_is_orthogonal_and_linear():
    """FWHT16 of the identity is a Hadamard matrix, so sum_k c_k z_k = FWHT16(sum_k c_k b_k) up to rounding."""
    h = reference.fwht16(torch.eye(16))
    assert torch.equal(h @ h.T, 16 * torch.eye(16)) and set(h.unique().tolist()) == {-1.0, 1.0}
    seeds, coefs = [3, 4, 5], [0.5, -2.0, 0.25]  # powers of two: rounding them to 17 bits changes nothing
    x = torch.zeros(5000)
    reference.add_noise_(x, seeds, coefs, 1)
    want = sum(c * reference.noise((5000,), s, 1).double() for s, c in zip(seeds, coefs, strict=True))
    torch.testing.assert_close(x.double(), want, rtol=0, atol=16 * 2.0**-24 * 8)  # sums of 48 terms below 8 in fp32


@pytest.mark.parametrize("noise", NOISES)
def test_moments_and_distribution(noise):
    """Bounds are 5 standard errors of N samples; KS at the 1e-6 level, plus the known distance of hadamard, 4e-4."""
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


@pytest.mark.parametrize("noise", NOISES)
def test_no_correlation_between_seeds_streams_and_neighbours(noise):
    """|r| < 5 / sqrt(N) for independent samples. Seeds and streams that differ in a bit are the hard ones."""
    z = {(s, t): reference.noise((N // 4,), s, t, noise=noise) for s in (0, 1, 2**32) for t in (0, 1)}
    bound = 5 / math.sqrt(N // 4)
    names = list(z)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            assert abs((z[a] * z[b]).mean()) < bound, (a, b)
    for lag in (1, 2, 16, 127, 128, 2047, 2048):
        assert abs((z[0, 0][:-lag] * z[0, 0][lag:]).mean()) < bound, lag


def test_elements_do_not_depend_on_the_size():
    assert torch.equal(reference.noise((10,), 1, 2), reference.noise((100, 77), 1, 2).view(-1)[:10])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_stochastic_rounding_is_unbiased(dtype):
    """All 256 dithers of a value give, on average, that value to 1/512 of the spacing; representable values stay."""
    g = torch.Generator().manual_seed(0)
    x = torch.cat([torch.randn(500, generator=g), torch.randn(500, generator=g) * 1e-6, torch.tensor([60000.0])])
    dither = torch.arange(256)
    y = reference.round_stochastically(x.repeat_interleave(256), dither.repeat(len(x)), dtype).double()
    near = x.to(dtype)
    spacing = (torch.nextafter(near.abs(), torch.tensor(float("inf"), dtype=dtype)) - near.abs()).double()
    # nextafter from the nearest may sit one binade above the value: half a spacing of slack in that case
    assert ((y.view(-1, 256).mean(1) - x.double()).abs() <= spacing / 512 + 1e-30).all()
    exact = torch.tensor([0.0, -0.0, 1.0, -2.5, 6e-8, 65504.0, float("inf")]).to(dtype)
    again = reference.round_stochastically(exact.float().repeat_interleave(256), dither.repeat(7), dtype)
    assert torch.equal(again.view(torch.int16), exact.repeat_interleave(256).view(torch.int16))
    nan = reference.round_stochastically(torch.full((256,), float("nan")), dither, dtype)
    assert nan.isnan().all()


def test_small_updates_survive_in_bf16():
    """400 updates of 1/40 of a spacing: lost to nearest, kept on average by stochastic rounding."""
    steps, n = 400, 1 << 14
    ulp = 2.0**-7
    total = torch.zeros(n)
    near, stochastic = torch.ones(n, dtype=torch.bfloat16), torch.ones(n, dtype=torch.bfloat16)
    for t in range(steps):
        coef = ulp / 40
        seed = t % 4  # the same directions come again, so that updates add up
        reference.add_noise_(total, seed, coef, 0)
        reference.add_noise_(near, seed, coef, 0)
        reference.add_noise_(stochastic, seed, coef, 0, rounding="stochastic", rounding_seed=t)
    want = total.double()
    moved = lambda x: ((x.double() - 1) * want).sum() / (want * want).sum()  # noqa: E731
    # the noise of rounding is independent of want: its regression on it is 0 within 5 standard errors
    error = 5 * math.sqrt(steps) * ulp / 2 / (want.std() * math.sqrt(n))
    assert abs(moved(stochastic) - 1) < error
    assert moved(near) < 0.2
