"""The Triton kernels of low rank give the bits of the definition."""

import pytest
import torch
from helpers import assert_same_bits
from test_low_rank import WHERE
from triton_ops import DEVICE, seeds_coefs, values

from pseuzo_kernels import low_rank, ops

pytest.importorskip("triton")
from pseuzo_kernels.triton import low_rank as kernels

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
# The interpreter is slow; on a GPU all of them run.
slow = pytest.mark.gpu if DEVICE == "cuda" else pytest.mark.slow
if DEVICE == "cuda":
    pytestmark = pytest.mark.gpu


def run(op, xs, K, rank, stochastic, where, noise="hadamard", scales=None, in_place=False):
    """What an op makes of matrices, and found_inf."""
    T, found_inf = len(xs), torch.zeros(1, device=DEVICE)
    seeds, coefs = seeds_coefs(2 * K)
    places, limits, takes = [], [], []
    mask_seed = None
    for x in xs:  # each has its own place and mask
        place, limit, mask_seed, given = WHERE[where](*x.shape, 1)
        places, limits = places + place, limits + limit
        takes += [mask.view(x.shape).to(DEVICE) for mask in given]
    mask_seed = None if mask_seed is None else mask_seed.to(DEVICE)
    numbers = (
        [2**32 - 1, 5, 0, 9][:T],
        [0.9, 1.0, -0.5, 0.7][:T],
        scales or [0.7, -1.3, 2.0, 0.2][:T],
    )
    how = noise, stochastic, 9, found_inf, places, limits, mask_seed, takes
    out = xs if in_place else [torch.full_like(x, 7) for x in xs]
    op(xs, seeds[:K], seeds[K:], coefs[:K], rank, *numbers, *how, out=out)
    return out, found_inf


def matrix(m: int, n: int, dtype: torch.dtype) -> torch.Tensor:
    return values(m * n, dtype).view(m, n).to(DEVICE)


@pytest.mark.parametrize(
    "shapes, dtype, K, rank, stochastic, where, noise",
    [
        ([(1, 1), (17, 33), (2, 700)], FP32, 2, 3, False, "whole", "hadamard"),
        ([(3, 130), (2, 16)], BF16, 1, 2, True, "columns", "hadamard"),
        ([(5, 40)], FP16, 1, 9, False, "given", "rademacher"),
        pytest.param([(33, 512), (2, 2049)], FP32, 5, 8, False, "rows", "hadamard", marks=slow),
        pytest.param([(3, 400), (4, 20)], BF16, 2, 1, True, "random", "hadamard", marks=slow),
        pytest.param([(3, 160), (19, 7)], FP16, 3, 5, True, "rows", "hadamard-fp16", marks=slow),
        pytest.param([(3, 160), (19, 7)], BF16, 3, 5, False, "small", "hadamard", marks=slow),
    ],
)
def test_bits(shapes, dtype, K, rank, stochastic, where, noise, monkeypatch):
    """Rows end within tiles, and factors begin within chunks and do not fit one buffer."""
    monkeypatch.setattr(kernels, "FACTOR_BYTES", 1 << 14)
    xs = [matrix(*shape, dtype) for shape in shapes]
    terms = K, rank, stochastic, where, noise
    got, flag = run(kernels.add_low_rank_out_triton, xs, *terms)
    want, _ = run(low_rank.add_low_rank_out, xs, *terms)
    for g, w in zip(got, want, strict=True):
        assert_same_bits(g, w)
    assert flag == 0


def test_in_place_with_a_matrix_left_out():
    xs, terms = [matrix(3, 16, FP32), matrix(2, 5, FP32)], (1, 2, False, "whole")
    want, _ = run(low_rank.add_low_rank_out, xs, *terms, scales=[0.0, 0.5])
    got = [x.clone() for x in xs]
    run(kernels.add_low_rank_out_triton, got, *terms, scales=[0.0, 0.5], in_place=True)
    for g, w in zip(got, want, strict=True):
        assert_same_bits(g, w)
    assert_same_bits(got[0], xs[0])


@pytest.mark.parametrize("coef", [float("nan"), -float("inf")])
def test_skipped(coef, monkeypatch):
    """What is skipped keeps its bits, and sets the flag; out of place it is copied."""
    monkeypatch.setattr("test_low_rank_triton.seeds_coefs", lambda K: _with_bad(K, coef))
    xs = [matrix(2, 20, BF16)]
    for in_place in (False, True):
        for scales in ([0.5], [0.0]):
            terms = xs, 2, 2, True, "whole", "hadamard", scales, in_place
            got, flag = run(kernels.add_low_rank_out_triton, *terms)
            assert flag == 1
            assert_same_bits(got[0], matrix(2, 20, BF16))


def _with_bad(K, coef):
    seeds, coefs = seeds_coefs_of(K)
    coefs[1] = coef
    return seeds, coefs


seeds_coefs_of = seeds_coefs


def test_other_laws_run_in_plain_torch(monkeypatch):
    from pseuzo_kernels.laws import LAWS

    monkeypatch.setitem(LAWS, "own", LAWS["rademacher"])
    xs = [matrix(3, 16, FP32)]
    got, _ = run(kernels.add_low_rank_out_triton, xs, 1, 2, False, "whole", "own")
    want, _ = run(low_rank.add_low_rank_out, xs, 1, 2, False, "whole", "rademacher")
    assert_same_bits(got[0], want[0])


def test_the_op_of_the_cpu_gives_the_same_bits():
    xs = [matrix(3, 130, BF16), matrix(2, 16, BF16)]
    for where in WHERE:
        got, _ = run(ops.add_low_rank_out, xs, 2, 3, True, where)
        want, _ = run(low_rank.add_low_rank_out, xs, 2, 3, True, where)
        for g, w in zip(got, want, strict=True):
            assert_same_bits(g, w)
