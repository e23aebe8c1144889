"""Streams: by name, by position, and what is said where two tensors would get one noise."""

import gc
import warnings

import pytest
import torch
from torch import nn

import pseuzo_kernels as pk
from pseuzo_kernels import reference, streams
from pseuzo_kernels.api import NoiseApi


@pytest.fixture(params=["ops", "reference"])
def api(request):
    """Return the functions with nothing remembered of other tests."""
    if request.param == "reference":
        return NoiseApi(reference.add_noise_list_, reference.add_noise_list_out)
    return NoiseApi(torch.ops.pseuzo.add_noise_list_, torch.ops.pseuzo.add_noise_list_out)


def model() -> nn.Module:
    return nn.ModuleDict({"a": nn.Linear(7, 9), "b": nn.Linear(7, 9)})


def test_the_stream_of_a_name_is_known():
    """The first bytes of SHA-256 of "abc" are ba 78 16 bf, those of "" e3 b0 c4 42."""
    assert pk.stream_of_name("abc") == 0xBF1678BA and pk.stream_of_name("") == 0x42C4B0E3
    with pytest.raises(TypeError, match=r"stream_of_name: name must be a string, .* got 3"):
        pk.stream_of_name(3)


def test_names_give_the_same_noise_in_any_order_and_part(api):
    with torch.no_grad():
        pairs = [(name, p.zero_()) for name, p in model().named_parameters()]
    api.perturb_(pairs, 3, 1.0, streams="names")
    for name, p in pairs:
        assert torch.equal(p, reference.noise(p.shape, 3, pk.stream_of_name(name)))
    api.restore_(pairs[::-1], 3, 1.0)  # names are the default for pairs
    for pair in pairs:
        api.perturb_([pair], 3, 1.0)
    api.update_(iter(pairs), [3], [1.0], lr=1.0)
    assert all((p == 0).all() for _, p in pairs)
    api.perturb_(pairs, 3, 1.0, streams=[0, 1, 2, 3])
    assert torch.equal(pairs[2][1], reference.noise(pairs[2][1].shape, 3, 2))


def test_names_are_refused_where_they_cannot_be_streams(api, monkeypatch):
    x, y = torch.zeros(3), torch.zeros(3)
    with pytest.raises(ValueError, match='streams="names" needs pairs of a name and a tensor'):
        api.perturb_([x, y], 1, 1.0, streams="names")
    with pytest.raises(ValueError, match="""streams must be numbers or "names", got 'name'"""):
        api.perturb_([("x", x)], 1, 1.0, streams="name")
    with pytest.raises(TypeError, match="all of them pairs of a name and a tensor, got Tensor at"):
        api.perturb_([("x", x), y], 1, 1.0)
    with pytest.raises(ValueError, match=r"the names 'x' and 'x' have the same stream, \d+"):
        api.perturb_([("x", x), ("x", y)], 1, 1.0)
    assert (x == 0).all() and (y == 0).all()


@pytest.mark.parametrize("seed", [1, [1], torch.tensor([1])], ids=["int", "list", "tensor"])
def test_lists_of_other_tensors_with_one_seed_are_said(api, seed):
    """The noise of the second list would be that of the first one."""
    blocks = list(model().values())
    update = dict(coefs=[1.0], lr=1.0)
    api.update_(blocks[0].parameters(), seed, **update)
    with pytest.warns(pk.StreamWarning, match="update_: seed 1 was used before with other tensors"):
        api.update_(blocks[1].parameters(), seed, **update)
    with pytest.warns(pk.StreamWarning):  # temporary tensors in memory that lives
        api.update_([p.data for p in blocks[0].parameters()], [5, 6], [1.0, 1.0], lr=1.0)
        api.update_([p.data for p in blocks[1].parameters()], [7, 6], [1.0, 1.0], lr=1.0)


def test_names_that_are_not_unique_are_said(api):
    blocks = list(model().values())
    api.perturb_(blocks[0].named_parameters(), 1, 1.0)
    with pytest.warns(pk.StreamWarning, match="another tensor named 'weight', and both have"):
        api.perturb_(blocks[1].named_parameters(), 1, 1.0)


def test_a_tensor_at_another_position_is_not_restored(api):
    """A parameter that was frozen meanwhile shifts all others."""
    params = list(model().parameters())
    api.perturb_(params, 1, 1.0)
    before = [p.detach().clone() for p in params]
    for call in (
        lambda: api.restore_(params[1:], 1, 1.0),
        lambda: api.update_(params[::-1], [7, 1], [1.0, 1.0], lr=1.0),
    ):
        with pytest.raises(ValueError, match=r"params\[\d\] had stream \d when seed 1 was used"):
            call()
    assert all(map(torch.equal, params, before))
    with pytest.warns(pk.StreamWarning, match="so its noise is another one"):
        api.perturb_(params[1:], 1, 1.0)


def test_nothing_is_said_of_calls_that_are_right(api, monkeypatch):
    monkeypatch.setattr(streams, "MAX_SEEDS", 20)
    params = list(model().parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error", pk.StreamWarning)
        for seed in range(30):  # more than are remembered
            api.perturb_(params, seed, 0.1)
            api.restore_([p.data for p in params], seed, 0.1)
            api.perturb_(params[:2], seed, 0.1)  # the same positions
        api.update_(params, range(30), [0.0] * 30, lr=0.1)
        for block in model().values():
            api.perturb_(block.parameters(), 1000, 1.0, streams=[0, 1])  # as the caller wants
        for _ in range(3):  # the models before are gone
            api.perturb_(model().parameters(), 2000, 1.0)
            gc.collect()
        for name, block in model().items():
            api.perturb_(block.named_parameters(prefix=name), 3000, 1.0)
