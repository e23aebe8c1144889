"""Noise of low rank: the definition, and that C++ gives its bits."""

import math

import pytest
import torch
from cpu_ops import DTYPES, banded, needs_native, normals, ops, terms
from helpers import assert_same_bits

import pseuzo_kernels as pk
from pseuzo_kernels import low_rank

apis = pytest.mark.parametrize("api", [pk, low_rank], ids=["ops", "reference"])
STOCHASTIC = dict(rounding="stochastic", rounding_seed=3)


@apis
def test_the_noise_is_the_product_of_its_factors(api):
    """A tensor of four dimensions is a matrix of its first one."""
    xs, streams, rank = [torch.zeros(30, 50), torch.zeros(7, 2, 3, 5)], [4, 9], 3
    api.low_rank_perturb_(xs, 1, 0.5, rank=rank, right_seed=2, streams=streams, noise_scale=2.0)
    for x, stream in zip(xs, streams, strict=True):
        u, v = api.low_rank_factors(x.shape, 1, stream, rank=rank, right_seed=2)
        assert torch.equal(u, pk.noise(u.shape, 1, stream))
        assert torch.equal(v, pk.noise(v.shape, 2, stream, offset=2**35))
        want = (u.double() @ v.double().t() / math.sqrt(rank)).view(x.shape)
        # Terms are below 6^2, and each of 3 products, 3 sums and the factor is rounded once.
        torch.testing.assert_close(x.double(), want, rtol=0, atol=8 * 3 * 36 * 2.0**-24)
    api.low_rank_perturb_(xs, 1, -1.0, rank=rank, right_seed=2, streams=streams)
    assert all((x == 0).all() for x in xs)


def test_the_noise_has_mean_0_and_variance_1_and_its_factors_are_independent():
    z = pk.low_rank_perturb(torch.zeros(900, 800), 1, 1.0, rank=4)
    # The mean has a variance of 1 / (900 * 800). The mean square is 1 up to the means of U^2 and of
    # V^2, which have variances of 2 / 900 and 2 / 800 for each of 4 ranks.
    assert abs(z.mean()) < 5 / math.sqrt(800 * 900)
    assert abs(z.square().mean() - 1) < 5 * math.sqrt(2 / 800 / 4 * 2)
    u, v = pk.low_rank_factors((5000, 5000), 1, 0, rank=2)
    assert abs((u * v).mean()) < 5 / math.sqrt(10000)


@apis
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_update_is_the_perturbations_in_a_row(api, dtype):
    """In fp32 from 0, with powers of 2 as coefficients, so that only sums are rounded."""
    x = normals(33 * 65, dtype).view(33, 65)
    got, options = x.clone(), dict(rank=2, streams=[4], noise="rademacher")
    api.low_rank_update_(got, [1, 2], [0.5, -2.0], lr=0.25, weight_decay=0.5, **options)
    want = torch.zeros(33, 65)
    for seed, scale in ((1, -0.125), (2, 0.5)):
        api.low_rank_perturb_(want, seed, scale, **options)
    want = (0.875 * x.float() + want).to(dtype)  # |x| < 4; sums of signs are off by some 2^-24
    atol = 2.0**-21 if dtype is torch.float32 else 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(got, want, rtol=0, atol=atol)


@apis
def test_skipped_out_of_place_and_strided(api):
    x = normals(40 * 30).view(30, 40).t()
    want = x.contiguous()
    out = api.low_rank_perturb(x, 1, 0.5, rank=2)
    api.low_rank_perturb_(want, 1, 0.5, rank=2, streams=[0])
    assert torch.equal(out, want) and not torch.equal(out, x)
    flag, before = torch.zeros(1), x.clone()
    bad = torch.tensor([float("nan")])
    api.low_rank_update_(x, [1], bad, lr=1.0, weight_decay=0.5, rank=2, found_inf=flag)
    assert flag == 1 and torch.equal(x, before)
    api.low_rank_perturb([x], 1, 0.5, rank=2, found_inf=flag, out=[out])
    assert torch.equal(out, x)


@apis
def test_bad_arguments_are_refused(api):
    x = torch.ones(5, 5)
    with pytest.raises(ValueError, match=r"low rank is for matrices, got shape \(3,\); pass"):
        api.low_rank_perturb_([x, torch.ones(3)], 1, 1.0, rank=2)
    with pytest.raises(ValueError, match="rank must be an int of at least 1, got 0"):
        api.low_rank_perturb_(x, 1, 1.0, rank=0)
    with pytest.raises(ValueError, match="as many coefs as seeds are needed, got 2 seeds and 1"):
        api.low_rank_update_(x, [1], [1.0], lr=1.0, rank=2, right_seeds=[1, 2])
    with pytest.raises(ValueError, match="low_rank_factors: low rank is for matrices"):
        api.low_rank_factors((5,), 1, 0, rank=2)
    for shape in ((-3, 4), (3, 4.5)):
        with pytest.raises(ValueError, match="low_rank_factors: shape must be a number"):
            api.low_rank_factors(shape, 1, 0, rank=2)
    assert (x == 1).all()


SHAPES = (((1, 1), 1), ((3, 700), 2), ((41, 130), 5), ((5000, 1), 2), ((2, 2049), 1))
# Arguments that say which elements take noise, of matrices [m, n]: where they are, and masks.
WHERE = {
    "whole": lambda m, n, count: ([], [], None, []),
    "rows": lambda m, n, count: ([5 * n, 0, 0] * count, [], None, []),
    "columns": lambda m, n, count: ([3 * (n + 9) + 4, n, n + 9] * count, [], None, []),
    "random": lambda m, n, count: ([7 * n, 0, 0] * count, [0.4] * count, torch.tensor([8]), []),
    "small": lambda m, n, count: ([], [0.5] * count, None, []),
    "given": lambda m, n, count: ([], [], None, [torch.arange(m * n) % 3 > 0] * count),
}


BLOCKS = {"rows": (slice(3, 9), slice(None)), "columns": (slice(None), slice(5, 60))}


@apis
@pytest.mark.parametrize("block", BLOCKS)
def test_a_block_of_a_matrix_takes_its_block_of_the_noise(api, block):
    """So it becomes what it becomes within the whole matrix, also its rounding and its mask."""
    rows, columns = BLOCKS[block]
    whole = normals(12 * 70, torch.bfloat16).view(12, 70)
    part = pk.Part(3 * 70) if block == "rows" else pk.Part(5, 55, 70)
    how: dict = dict(rank=3, streams=[6], mask=pk.RandomMask(0.7, 5), **STOCHASTIC)
    update = dict(lr=0.5, weight_decay=0.1, right_seeds=[8, 9], **how)
    want = whole.clone()
    api.low_rank_update_(want, [1, 2], [0.3, -0.4], **update)
    got = whole[rows, columns].clone()
    api.low_rank_update_(got, [1, 2], [0.3, -0.4], offset=part, **update)
    assert_same_bits(got, want[rows, columns])
    assert 0.2 < (got == whole[rows, columns]).float().mean() < 0.5
    want = api.low_rank_perturb(whole, 1, 0.5, **how)[rows, columns]
    got = api.low_rank_perturb(whole[rows, columns].contiguous(), 1, 0.5, offset=part, **how)
    assert_same_bits(got, want)


@apis
def test_masks(api):
    """Elements that a mask leaves out keep their bits, others become what they become without."""
    x = normals(200).view(10, 20)
    whole = api.low_rank_perturb(x, 1, 0.5, rank=2, streams=[3])
    for mask, takes in (
        (x > 0, x > 0),
        (pk.SmallMask(0.5), x.abs() <= 0.5),
        ([x < 1], x < 1),
    ):
        got = api.low_rank_perturb(x, 1, 0.5, rank=2, streams=[3], mask=mask)
        assert torch.equal(got, torch.where(takes, whole, x))
    with pytest.raises(ValueError, match="a SmallMask depends on x, which this call changes"):
        api.low_rank_perturb_(x, 1, 0.5, rank=2, mask=pk.SmallMask(0.5))


@apis
def test_other_parts_are_refused(api):
    x = torch.ones(5, 4)
    for part in (3, pk.Part(0, 2, 4), pk.Part(2, 4, 5)):
        with pytest.raises(
            ValueError, match=r"offset\[1\] must be that of whole rows of its matrix"
        ):
            api.low_rank_perturb_([x.clone(), x], 1, 1.0, rank=2, offset=[0, part])
    assert (x == 1).all()


@needs_native
@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("where", WHERE)
def test_cpp(where):
    """Rows end within vectors and chunks; out is another tensor or x."""
    for (m, n), R in SHAPES if where == "whole" else SHAPES[:3]:
        left, right = normals(m * R).view(m, R), normals(R * n, seed=1).view(R, n)
        xs = [normals(m * n, dtype, seed=2) for dtype in DTYPES]
        numbers = [7, 2**32 - 1, 0], [0.9, 1.0, -0.5], [0.7, -1.3, 0.0 if R == 5 else 0.2]
        for stochastic in (False, True):
            how = stochastic, 9, None, *WHERE[where](m, n, 3)
            shared = [left] * 3, [right] * 3, terms(2)[1], *numbers, *how
            want = [torch.empty_like(x) for x in xs]
            low_rank.add_outer_parts_out(xs, *shared, out=want)
            out, bands = zip(*map(banded, xs), strict=True)
            ops.add_outer_parts_out(list(out), *shared, out=list(out))
            for x, a, b, band in zip(xs, want, out, bands, strict=True):
                assert_same_bits(b, a)
                assert (band != 7).sum() <= x.numel(), "wrote outside x"


def test_both_ways_in_plain_torch_have_the_same_bits(monkeypatch):
    """fp32 never rounds stochastically, so the way by rows can be compared with that by columns."""
    monkeypatch.setattr(low_rank, "ELEMENTS_AT_ONCE", 500)
    left, right, x = normals(40 * 3).view(40, 3), normals(3 * 90).view(3, 90), normals(3600)
    shared = [7], [0.9], [0.7], False, 9, None
    out = torch.empty_like(x)
    low_rank.add_outer_out([x], [left], [right], torch.ones(1), *shared, out=[out])
    q = torch.arange(256)
    d = low_rank.outer_sum(left, right, 0, "", q, 7, None, None, 0.7)
    columns = d.view(16, 2, 128).transpose(0, 1).reshape(-1)[:3600]
    assert_same_bits(out, x * torch.tensor(0.9) + columns)


@needs_native
def test_cpp_refuses():
    x, left, right = torch.ones(6), torch.ones(2, 1), torch.ones(1, 3)
    shared = torch.ones(1), [0], [1.0], [1.0], False, 0, None
    for args, sentence in (
        (([x], [left], [right.double()]), "right must be float32 with two dimensions"),
        (([x], [left], [torch.ones(1, 4)]), "and x and out of m \\* n elements"),
        (([x, x], [left], [right]), "must be one per tensor"),
    ):
        with pytest.raises(RuntimeError, match=sentence):
            ops.add_outer_out(*args, *shared, out=[x])
