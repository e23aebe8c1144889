"""The C++ noise ops give the bits of the reference, on all instruction sets of this machine."""

import functools

import pytest
import torch
from cpu_ops import (
    BAND,
    BIT_EXACT,
    DTYPES,
    banded,
    mixed_list,
    normals,
    on_every_isa,
    ops,
    special_values,
    steps_in_a_row,
    terms,
    wanted_list,
    wanted_steps,
)
from helpers import (
    assert_same_bits,
)

from pseuzo_kernels import NOISES, reference

pytestmark = on_every_isa


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


@pytest.mark.parametrize("noise", BIT_EXACT)
def test_steps_match_reference(noise):
    xs, args = steps_in_a_row(noise)
    got = [x.clone() for x in xs]
    ops.add_noise_steps_(got, *args)
    for x, want in zip(got, wanted_steps(noise), strict=True):
        assert_same_bits(x, want)


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
