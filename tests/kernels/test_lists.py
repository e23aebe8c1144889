"""Lists of tensors: out of place, in any dense layout, checked once and when something changes."""

from weakref import getweakrefcount

import pytest
import torch
from cpu_ops import DTYPES
from helpers import assert_same_bits
from torch import nn

import pseuzo_kernels as pk
from pseuzo_kernels import lists, reference

apis = pytest.mark.parametrize("api", [pk, reference], ids=["ops", "reference"])
STREAMS = [4, 9, 2, 0]


def tensors(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    shapes = ((2049,), (3, 7), (0,), (5, 4, 3, 2))
    return [torch.randn(shape, generator=draw).to(dtype) for shape in shapes]


@apis
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_out_of_place_has_the_bits_of_in_place_and_leaves_params(api, dtype):
    xs, start, want = tensors(dtype), tensors(dtype), tensors(dtype)
    options = dict(streams=STREAMS, rounding="stochastic", rounding_seed=3)
    options["noise_scale"] = [1.0, 0.5, 1.0, 0.0]
    out = [torch.full_like(x, 7) for x in xs]
    assert api.perturb(xs, 5, 0.1, out=out, **options) == out
    made = api.perturb(xs, 5, 0.1, **options)
    api.perturb_(want, 5, 0.1, **options)
    for x, was, *results, wanted in zip(xs, start, out, made, want, strict=True):
        assert_same_bits(x, was)
        for got in results:
            assert_same_bits(got, wanted)
    args = [1, 2], [0.5, -2.0]
    rate = dict(lr=0.1, weight_decay=[0.3, 0.0, 0.1, 0.1])
    api.update(xs, *args, **rate, out=out, **options)
    api.update_(xs, *args, **rate, **options)
    for x, got in zip(xs, out, strict=True):
        assert_same_bits(x, got)
    api.perturb(xs, 5, 0.1, streams=STREAMS, out=xs)  # params may be out
    for x, got in zip(xs, api.perturb(out, 5, 0.1, streams=STREAMS), strict=True):
        assert_same_bits(x, got)
    one = api.perturb(xs[0], 5, 0.1, out=out[0])
    assert one is out[0] and api.perturb([], 1, 1.0) == []


@apis
def test_a_skipped_call_copies(api):
    xs, out = tensors(), tensors()
    flag = torch.ones(1)
    api.perturb(xs, 5, 0.1, out=out, found_inf=flag)
    assert all(map(torch.equal, xs, out))


@apis
def test_out_is_refused_unless_it_is_like_params(api):
    x, y = torch.ones(12), torch.ones(12)
    for out, sentence in (
        ([x.clone()], r"out must be one tensor for each of params \(2\), got 1"),
        ([torch.ones(12), torch.ones(11)], r"out\[1\] must be like params\[1\], \(12,\)"),
        ([y, x], "out must be params itself or share no memory with it"),
        ([torch.ones(20)[:12], x], "out must be params itself or share no memory with it"),
        ([x, x], "the same tensor, or a part of it, is in the list twice"),
    ):
        with pytest.raises(ValueError, match=sentence):
            api.perturb([x, y], 1, 1.0, out=out)
    assert (x == 1).all() and (y == 1).all()


@apis
def test_noise_into_out(api):
    out = torch.empty(3, 1000, dtype=torch.bfloat16)
    assert api.noise((3, 1000), 5, 2, out=out) is out
    assert torch.equal(out, reference.noise((3, 1000), 5, 2, dtype=torch.bfloat16))
    for options, sentence in (
        (dict(shape=3000), r"out must be \(3000,\) , got \(3, 1000\)"),
        (dict(dtype=torch.float32), "out must be .* torch.float32, got .* torch.bfloat16"),
        (dict(device="meta"), "out must be on meta, got cpu"),
    ):
        with pytest.raises(ValueError, match=sentence):
            api.noise(**dict(shape=(3, 1000), seed=5, stream=2, out=out) | options)


LAYOUTS = {
    "transposed": lambda x: x.permute(1, 0, 3, 2),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
}


@apis
@pytest.mark.parametrize("layout", LAYOUTS)
def test_noise_does_not_depend_on_the_layout(api, layout):
    """Other tensors of the list are in other layouts."""
    x = torch.randn(6, 5, 4, 30).bfloat16()
    strided = LAYOUTS[layout](x.clone())
    want = strided.contiguous()
    assert not strided.is_contiguous()
    xs, options = [torch.ones(9), strided], dict(rounding="stochastic", rounding_seed=1)
    strides = strided.stride()
    api.perturb_(xs, 5, 0.3, streams=[0, 1], **options)
    api.update_(xs, [5, 6], [1.0, 2.0], lr=0.1, weight_decay=0.1, streams=[0, 1])
    api.add_noise_(strided, 5, 0.3, 2)
    out = api.perturb(xs, 1, 1.0, streams=[0, 1])[1]
    api.perturb_([torch.ones(9), want], 5, 0.3, streams=[0, 1], **options)
    api.update_([torch.ones(9), want], [5, 6], [1.0, 2.0], lr=0.1, weight_decay=0.1, streams=[0, 1])
    api.add_noise_(want, 5, 0.3, 2)
    assert torch.equal(strided, want) and strided.stride() == strides
    assert torch.equal(out, api.perturb(want, 1, 1.0, streams=[1])) and out.stride() == strides


@apis
def test_a_list_that_passed_is_checked_again_when_it_changed(api):
    params = [nn.Parameter(torch.ones(6)) for _ in range(3)]
    call = lambda: api.perturb_(params, 1, 0.1, streams=range(3))  # noqa: E731
    call(), call()
    changes = (
        (lambda p: setattr(p, "data", params[0].data), ValueError, "in the list twice"),
        (lambda p: setattr(p, "data", torch.ones(6).double()), TypeError, "got torch.float64"),
        (lambda p: setattr(p, "data", torch.ones(12)[::2]), ValueError, "must be contiguous"),
        (lambda p: p.untyped_storage().resize_(0), ValueError, "was freed"),
    )
    for change, error, sentence in changes:
        params[1] = nn.Parameter(torch.ones(6))
        call()
        change(params[1])
        with pytest.raises(error, match=sentence):
            call()
    params[1] = nn.Parameter(torch.ones(8, 2)[:3])
    call()
    params[1].data = params[1].data.view(-1)
    call()
    params[1].data.resize_(16)
    want = reference.perturb(params, 1, 0.1, streams=range(3))
    call()
    assert all(map(torch.equal, params, want))


@apis
def test_autograd_is_told_of_every_write(api):
    xs = [nn.Parameter(torch.ones(4)) for _ in range(2)]
    out = [torch.ones(4) for _ in range(2)]
    for call, written in (
        (lambda: api.perturb_(xs, 1, 1.0, streams=[0, 1]), xs),
        (lambda: api.perturb(xs, 1, 1.0, streams=[0, 1], out=out), out),
        (lambda: api.noise((4,), 1, 0, out=out[0]), out[:1]),
    ):
        for _ in range(2):
            before = [x._version for x in written]
            call()
            assert all(x._version > old for x, old in zip(written, before, strict=True))
            assert all(x.is_leaf for x in written) and all(x.requires_grad for x in xs)
    before = [x._version for x in xs]
    api.perturb(xs, 2, 1.0, streams=[0, 1])
    assert [x._version for x in xs] == before


def test_lists_are_forgotten_when_newer_ones_come(monkeypatch):
    monkeypatch.setattr(lists, "MAX_TENSORS", 4)
    known = lists.CheckedLists()
    pairs = [[torch.ones(2), torch.ones(2)] for _ in range(3)]
    for pair in (*pairs[:2], pairs[1], pairs[2]):
        known.check("perturb_", pair)
    remembered = [[getweakrefcount(x) > 0 for x in pair] for pair in pairs]
    assert remembered == [[False] * 2, [True] * 2, [True] * 2]
    assert not getweakrefcount(pk.noise((4,), 1, 0))  # no call gets this tensor as a list again
