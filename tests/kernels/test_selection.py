"""Shards of tensors, masks of all kinds and signs: the definition, and that C++ and Triton give its
bits."""

import functools
import itertools

import pytest
import torch
from cpu_ops import BIT_EXACT, DTYPES, banded, needs_native, normals, ops, same_bytes, terms
from helpers import assert_same_bits
from triton_ops import DEVICE

import pseuzo_kernels as pk
from pseuzo_kernels import parts, reference

apis = pytest.mark.parametrize("api", [pk, reference], ids=["ops", "reference"])
N = 7000
BOUNDS = ((0, N), (1, 5), (127, 2049), (2048, 4096), (2047, 2050), (5000, N - 1), (16, 6016))
MASKS = {
    "none": lambda x: None,
    "small": lambda x: pk.SmallMask(0.6),
    "random": lambda x: pk.RandomMask(0.4, -5),
    "given": lambda x: x.float().sin() > 0,
}
STOCHASTIC = dict(rounding="stochastic", rounding_seed=3)


@apis
@pytest.mark.parametrize("kind", MASKS)
def test_a_shard_becomes_what_its_elements_of_the_whole_become(api, kind):
    for dtype in (torch.bfloat16, torch.float16):
        x = normals(N, dtype)
        step = dict(lr=0.5, weight_decay=0.1, streams=[4], **STOCHASTIC)
        mask, args = MASKS[kind](x), ([1, 2, 3], [0.1, -0.2, 0.3])
        whole = api.update(x, *args, mask=mask, **step)
        signs = x.clone()
        api.sign_update_(signs, *args, mask=mask, **step)
        for first, last in BOUNDS:
            part = mask[first:last] if kind == "given" else mask
            options = dict(offset=first, mask=part, **step)
            got = x[first:last].clone()
            assert_same_bits(api.update(got, *args, **options), whole[first:last])
            assert_same_bits(got, x[first:last])
            api.update_(got, *args, **options)
            assert_same_bits(got, whole[first:last])
            got = x[first:last].clone()
            api.sign_update_(got, *args, **options)
            assert_same_bits(got, signs[first:last])


@apis
def test_columns_and_rows_of_a_matrix(api):
    """Also for one tensor at a time, and for noise alone."""
    x = normals(50 * 130, torch.bfloat16).view(50, 130)
    whole, z = api.perturb(x, 1, 0.5), api.noise((50, 130), 1, 0)
    for columns, rows in ((slice(10, 33), slice(0, 50)), (slice(0, 130), slice(7, 9))):
        shard = x[rows, columns].contiguous()
        first = rows.start * 130 + columns.start
        part = pk.Part(first, shard.shape[1], 130)
        for got in (
            api.perturb(shard, 1, 0.5, offset=part),
            api.perturb([shard], 1, 0.5, offset=[part])[0],
            api.add_noise(shard, 1, 0.5, 0, offset=part),
        ):
            assert_same_bits(got, whole[rows, columns].contiguous())
        assert torch.equal(api.noise(shard.shape, 1, 0, offset=part), z[rows, columns])
        api.add_noise_(shard, 1, 0.5, 0, offset=part)
        assert_same_bits(shard, whole[rows, columns].contiguous())


@apis
@pytest.mark.parametrize("kind", [kind for kind in MASKS if kind != "none"])
def test_a_mask_chooses_the_elements_that_change(api, kind):
    x = normals(3000)
    mask = MASKS[kind](x)
    plain, got = api.perturb(x, 5, 0.5), api.perturb(x, 5, 0.5, mask=mask)
    changed = got != x
    assert 0.2 < changed.float().mean() < 0.8
    assert torch.equal(got, torch.where(changed, plain, x))
    if kind == "small":
        assert torch.equal(changed, x.abs() <= 0.6)
        mask = changed  # x moves below
    if kind == "given":
        assert torch.equal(changed, mask)
    moved = x.clone()
    api.perturb_(moved, 5, 0.5, mask=mask)
    assert torch.equal(moved, got)
    api.restore_(moved, 5, 0.5, mask=mask)
    assert torch.equal(moved[~changed], x[~changed])
    torch.testing.assert_close(moved, x, rtol=0, atol=2.0**-21)  # two roundings of numbers below 8
    api.update_(moved, [5], [1.0], lr=0.1, weight_decay=0.5, mask=mask)
    assert torch.equal(moved != x, changed) or (moved[~changed] == x[~changed]).all()
    api.add_noise_(moved, 5, 0.5, 0, mask=mask, keep=0.5)
    assert torch.equal(moved[~changed], x[~changed])


@apis
def test_sign_update(api):
    """The sum of two signs that cancel is 0: such an element only decays."""
    x = normals(5000)
    got = x.clone()
    api.sign_update_(got, [1, 2], [0.5, 0.5], lr=0.25, weight_decay=0.5, noise="rademacher")
    total = api.noise((5000,), 1, 0, noise="rademacher") + api.noise(
        (5000,), 2, 0, noise="rademacher"
    )
    assert (total == 0).any()
    assert torch.equal(got, 0.875 * x - 0.25 * total.sign())  # products of few bits are exact
    still = torch.full((3000,), -0.0)
    api.sign_update_(still, [1, 2], torch.tensor([1.0, float("nan")]), lr=1.0, weight_decay=0.5)
    assert same_bytes(still, torch.full((3000,), -0.0))


def arguments(
    kind: str, noise: str, k: int, stochastic: bool, sign: bool, xs: list[torch.Tensor]
) -> tuple:
    """Return the arguments of the ops that follow xs. Every second tensor has rows."""
    T = len(xs)
    places = [(0, 0, 0), (3, 1, 1), (2047, 0, 0), (5, 1, 40)]
    places = [list(places[t % 4]) for t in range(T)]
    for place, x in zip(places, xs, strict=True):
        if place[1]:
            n = x.numel()
            place[1] = next(n // rows for rows in (3, 4, 1) if n % rows == 0)
            place[2] = place[2] * 3 + place[1]
    limits = {"small": [0.6] * T, "random": [0.3] * T}.get(kind, [])
    takes = [x.float().sin() > 0 for x in xs] if kind == "given" else []
    numbers = [2**32 - 1 - t for t in range(T)], [0.9] * T, [(1.0, -0.5)[t % 2] for t in range(T)]
    if not sign:
        numbers = *numbers[:2], [abs(s) for s in numbers[2]]
    mask_seed = torch.tensor([-5]) if kind == "random" else None
    rest = list(itertools.chain(*places)), limits, mask_seed, takes, sign
    return *terms(k), *numbers, noise, stochastic, 7, None, *rest


def cases(xs: list[torch.Tensor], noise: str, k: int) -> list[tuple]:
    kinds = list(MASKS) if k == 4 else ["given", "random"]
    found = [arguments(kind, noise, k, True, kind == "none", xs) for kind in kinds]
    return [*found, arguments("given", noise, k, False, True, xs)]


@functools.cache
def wanted(noise: str) -> list[tuple]:
    """Return xs, the arguments that follow, and what they should give."""
    found = []
    for k in (1, 4, 14, 40):
        sizes = (1, 2049, 5000) if k == 4 else (75,)
        xs = [normals(n, dtype, n) for n in sizes for dtype in DTYPES]
        for args in cases(xs, noise, k):
            want = [torch.empty_like(x) for x in xs]
            parts.add_noise_parts_out(xs, *args, out=want)
            found.append((xs, args, want))
    return found


@needs_native
@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("noise", BIT_EXACT)
def test_cpp(noise):
    for xs, args, want in wanted(noise):
        out, bands = zip(*map(banded, xs), strict=True)
        ops.add_noise_parts_out(xs, *args, out=list(out))
        got = [x.clone() for x in xs]
        ops.add_noise_parts_(got, *args)
        for a, b, c, band in zip(want, out, got, bands, strict=True):
            assert_same_bits(b, a)
            assert_same_bits(c, a)
            assert (band != 7).sum() <= a.numel(), "wrote outside x"


@(pytest.mark.gpu if DEVICE == "cuda" else pytest.mark.slow)
def test_triton(noise="hadamard", k=1):
    """All other paths are run as machine code, in ptx_cases.py."""
    launch = pytest.importorskip("pseuzo_kernels.triton.parts")
    sizes = (3, 5000, 16000) if DEVICE == "cuda" else (3, 2500)
    xs = [normals(n, torch.bfloat16, n) for n in sizes]
    for args in cases(xs, noise, k):
        want = [torch.empty_like(x) for x in xs]
        parts.add_noise_parts_out(xs, *args, out=want)
        there = [
            [a.to(DEVICE) for a in arg]
            if isinstance(arg, list) and arg and isinstance(arg[0], torch.Tensor)
            else arg.to(DEVICE)
            if isinstance(arg, torch.Tensor)
            else arg
            for arg in args
        ]
        got = [x.to(DEVICE) for x in xs]
        out = [torch.empty_like(x) for x in got]
        launch.add_noise_parts_out_triton(got, *there, out=out)
        launch.add_noise_parts_triton_(got, *there)
        for a, b, c in zip(want, out, got, strict=True):
            assert_same_bits(b.cpu(), a)
            assert_same_bits(c.cpu(), a)


REFUSED = {
    "limits": (dict(mask=pk.SmallMask(-1.0)), "the limit of mask must be finite and not negative"),
    "share": (dict(mask=pk.RandomMask(1.5, 1)), "the share of mask must be in 0 .. 1, got 1.5"),
    "seed": (dict(mask=pk.RandomMask(0.5, torch.tensor([1.0]))), "the seed of mask must be an int"),
    "shape": (dict(mask=torch.ones(5) > 0), r"mask must be like its tensor, \(6,\) on cpu"),
    "dtype": (dict(mask=torch.ones(6)), "mask must be a bool tensor, got torch.float32"),
    "number": (dict(mask=[torch.ones(6) > 0] * 2), r"one tensor for each of params \(1\), got 2"),
    "float": (dict(mask=0.5), "mask must be a bool tensor for each of params, a SmallMask"),
    "negative": (dict(offset=-1), "offset must be a number of elements, not negative"),
    "rows": (dict(offset=pk.Part(0, 4, 9)), "needs whole rows, of a width up to the stride"),
    "end": (dict(offset=2**36), "beyond the 2\\^36 that the 32-bit counter reaches"),
    "offsets": (dict(offset=[0, 1]), r"one number or Part, or one per tensor \(1\), got 2"),
}


@apis
@pytest.mark.parametrize("case", REFUSED)
def test_bad_masks_and_offsets_are_refused(api, case):
    options, sentence = REFUSED[case]
    x = torch.ones(6)
    with pytest.raises((ValueError, TypeError), match=sentence):
        api.update_(x, 1, 1.0, lr=1.0, **options)
    assert (x == 1).all()


@apis
def test_a_mask_of_x_is_refused_where_x_moves(api):
    for call in (api.perturb_, api.restore_):
        with pytest.raises(ValueError, match="a SmallMask depends on x, which this call changes"):
            call(torch.ones(6), 1, 1.0, mask=pk.SmallMask(0.5))
