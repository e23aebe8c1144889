"""The public functions: what they compute, and what they tell autograd."""

import numpy as np
import pytest
import torch
from torch import nn

import pseuzo_kernels as pk
from pseuzo_kernels import reference


@pytest.mark.parametrize("noise", ["hadamard", "hadamard-fp16", "rademacher"])
@pytest.mark.parametrize("api", [pk, reference], ids=["ops", "reference"])
def test_perturb_restore_update_are_add_noise(api, noise):
    xs = [torch.randn(5000), torch.randn(3, 7), torch.randn(0), torch.randn(2048)]
    start = [x.clone() for x in xs]
    # Coefficients up to 0.2 are rounded to 17 bits, and |z| < 5.5; fp32's own errors are far less.
    atol = 0.2 * 5.5 * 2.0**-17
    api.perturb_(xs, 5, 0.1, streams=[4, 9, 2, 0], noise=noise, noise_scale=[1.0, 2.0, 1.0, 0.0])
    for x, was, stream, scale in zip(xs, start, (4, 9, 2, 0), (1.0, 2.0, 1.0, 0.0), strict=True):
        z = reference.noise(x.shape, 5, stream, noise=noise)
        torch.testing.assert_close(x, was + 0.1 * scale * z, rtol=0, atol=atol)
    api.restore_(xs, 5, 0.1, streams=[4, 9, 2, 0], noise=noise, noise_scale=[1.0, 2.0, 1.0, 0.0])
    for x, was in zip(xs, start, strict=True):
        # There are two roundings of numbers below 8.
        torch.testing.assert_close(x, was, rtol=0, atol=2.0**-21)
    assert torch.equal(xs[3], start[3])
    api.update_(xs[:2], [1, 2], [0.5, -2.0], lr=0.1, weight_decay=[0.3, 0.0], noise=noise)
    for i, (x, was) in enumerate(zip(xs[:2], start, strict=False)):
        z = 0.5 * reference.noise(x.shape, 1, i, noise=noise) - 2 * reference.noise(
            x.shape, 2, i, noise=noise
        )
        # In half precision, coefs up to 0.2 have an error of up to 0.25 * 2^-11. Each of the two
        # sums below 0.5 has an error of up to 2^-12. The transform adds these errors over 16 inputs
        # of up to 1.86.
        more = 0.2978 * 16 * (2 * 1.86 * 2.0**-13 + 2 * 2.0**-12) if noise == "hadamard-fp16" else 0
        torch.testing.assert_close(
            x, (1 - 0.1 * (0.3, 0.0)[i]) * was - 0.1 * z, rtol=0, atol=2 * atol + more
        )


@pytest.mark.parametrize("api", [pk, reference], ids=["ops", "reference"])
def test_a_scale_may_be_negative(api):
    """MeZO moves from x + eps z to x - eps z with a scale of -2 eps."""
    start = torch.randn(5000)
    x, want = start.clone(), start.clone()
    api.perturb_(x, 5, -0.1)
    api.restore_(want, 5, 0.1)
    assert torch.equal(x, want) and not torch.equal(x, start)
    api.restore_(x, 5, -0.1)
    api.perturb_(want, 5, 0.1)
    assert torch.equal(x, want)
    torch.testing.assert_close(x, start, rtol=0, atol=2.0**-21)  # two roundings of numbers below 8


@pytest.mark.parametrize("api", [pk, reference], ids=["ops", "reference"])
def test_numbers_may_come_from_numpy_and_torch(api):
    got, want = [torch.ones(300), torch.ones(9)], [torch.ones(300), torch.ones(9)]
    half, number = np.float32(0.5), torch.tensor(0.25)
    api.perturb_(got, np.int64(3), number, noise_scale=half)
    api.update_(
        got,
        np.array([1, 2]),
        np.array([0.5, 2.0]),
        lr=np.array(0.25),
        weight_decay=number,
        noise_scale=number,
    )
    api.add_noise_(got[0], 3, half, 0, keep=number, noise_scale=half)
    api.perturb_(want, 3, 0.25, noise_scale=0.5)
    api.update_(want, [1, 2], [0.5, 2.0], lr=0.25, weight_decay=0.25, noise_scale=0.25)
    api.add_noise_(want[0], 3, 0.5, 0, keep=0.25, noise_scale=0.5)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_ops_equal_the_reference(dtype):
    got = [torch.randn(n).to(dtype) for n in (5000, 1, 2049)]
    want = [x.clone() for x in got]
    for api, xs in ((pk, got), (reference, want)):
        api.perturb_(xs, 3, 0.5, rounding="stochastic", rounding_seed=1)
        api.update_(
            xs,
            torch.tensor([1, 2, 3]),
            torch.tensor([0.1, 0.2, -0.3]),
            lr=0.3,
            weight_decay=0.1,
            rounding="stochastic",
            rounding_seed=2,
            noise_scale=0.7,
        )
        api.add_noise_(xs[0], 8, 0.25, 11, keep=0.5)
        xs.append(api.add_noise(xs[0], [8, 9], [0.25, 1.0], 2**32 - 1, keep=0.5))
        xs.append(api.noise((3, 1000), -1, 5, dtype=dtype))
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


def test_one_tensor_or_many_and_views_and_out():
    x = torch.randn(100, 50)
    view = x[20:40]
    want = x.clone()
    want[20:40] = reference.add_noise(view, 1, 2.0, 0)
    pk.perturb_(view, 1, 2.0)
    assert torch.equal(x, want)
    out = torch.empty_like(x)
    assert pk.add_noise(x, 1, 2.0, 0, out=out) is out and torch.equal(x, want)
    assert torch.equal(pk.add_noise(x, 1, 2.0, 0, noise_scale=0.0), x)
    pk.add_noise(x, 1, 2.0, 0, out=x)
    assert torch.equal(x, out)
    pk.perturb_([], 1, 1.0)


def test_parameters_are_written_and_autograd_is_told():
    w = nn.Parameter(torch.randn(10))
    loss = (w * w).sum()
    pk.perturb_([w], 1, 0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_unsigned_and_signed_seeds_are_the_same():
    assert torch.equal(pk.noise((9,), 2**64 - 1, 0), pk.noise((9,), -1, 0))


def test_seeds_and_coefs_may_be_strided():
    seeds, coefs = torch.arange(6), torch.linspace(-1, 2, 6)
    got, want = torch.ones(300), torch.ones(300)
    pk.update_(got, seeds[::2], coefs[:1].expand(3), lr=0.1)
    pk.update_(want, [0, 2, 4], [-1.0] * 3, lr=0.1)
    assert torch.equal(got, want)
