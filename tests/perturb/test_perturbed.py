"""The perturbed forward sees x + eps z exactly, and never writes x."""

import copy
import gc
import pickle
import weakref
from collections import OrderedDict

import pytest
import torch
from helpers import assert_untouched, perturbed_copy, snapshot
from pseuzo import perturbed
from pseuzo.perturb.module import known_passes, passes_of
from tiny_models import KINDS, Tied, batch_of, causal_lm
from torch import nn
from torch.nn import functional as F

from pseuzo_kernels import add_noise, perturb_


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_a_model_with_perturbed_weights(kind, dtype):
    model = causal_lm(kind).to(dtype).eval()
    batch = batch_of()
    before = snapshot(model)
    for eps, sign in ((1e-2, 1), (1e-2, -1), (-1e-2, 1), (1e-2, 1)):
        want = perturbed_copy(model, 7, sign * eps)(**batch).logits
        with perturbed(model, 7, eps, sign=sign):
            got = model(**batch).logits
        assert torch.equal(got, want)
    assert not torch.equal(got, model(**batch).logits)
    assert_untouched(model, before)


@torch.no_grad()
@pytest.mark.parametrize("keep_view", [False, True], ids=["attribute", "kept view"])
def test_weights_used_outside_their_module(keep_view):
    """The weights are perturbed from the first pass on. The watch substitutes them at once, and in
    every later pass if a swapped weight would not be seen."""
    model = Tied(keep_view=keep_view).eval()
    ids = torch.randint(0, 300, (3, 5))
    before = snapshot(model)
    want = perturbed_copy(model, 3, 0.1)
    if keep_view:
        want.kept = [want.down.weight.view(-1)]
    for _ in range(4):
        with perturbed(model, 3, 0.1):
            got = model(ids)
        assert torch.equal(got, want(ids))
    assert_untouched(model, before)


@torch.no_grad()
def test_frozen_weights_run_as_they_are():
    model = Tied().eval()
    model.mix.weight.requires_grad_(False)
    ids = torch.randint(0, 300, (3, 5))
    want = perturbed_copy(model, 3, 0.1)(ids)
    with perturbed(model, 3, 0.1):
        assert torch.equal(model(ids), want)


@torch.no_grad()
def test_embedding_subclass_and_max_norm():
    class Scaled(nn.Embedding):
        def forward(self, ids):
            assert (
                self.weight.dtype is torch.float32
            )  # reading an attribute does not use the weight
            return super().forward(ids) * 3

    for embed in (Scaled(300, 300), nn.Embedding(300, 300, max_norm=1.0)):
        model = nn.Sequential(embed)
        ids = torch.randint(0, 300, (4, 2))
        before = snapshot(model)
        want = perturbed_copy(model, 1, 0.1)(ids)
        for _ in range(3):
            with perturbed(model, 1, 0.1):
                assert torch.equal(model(ids), want)
        assert_untouched(model, before)


@torch.no_grad()
def test_a_thousand_passes_and_failures_leave_the_weights():
    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.big, self.small = nn.Linear(300, 300), nn.Linear(300, 3)
            self.error = None

        def forward(self, x):
            y = self.inner(self.big(x)) if self.error else self.big(x)
            return self.small(y)

        def inner(self, y):
            raise self.error

    model = Fails().to(torch.bfloat16)
    before = snapshot(model)
    x = torch.randn(2, 300, dtype=torch.bfloat16)
    clean = model(x)
    for step in range(1000):
        with perturbed(model, step, 1e-3, sign=1 - 2 * (step % 2)):
            model(x)
    assert_untouched(model, before)
    for error in (ValueError("no"), KeyboardInterrupt()):
        model.error = error
        with pytest.raises(type(error)), perturbed(model, 1, 0.5):
            model(x)
        model.error = None
        assert_untouched(model, before)
        assert (
            torch.equal(model(x), clean)
            and not model._forward_hooks
            and not model.big._forward_pre_hooks
        )


@torch.no_grad()
def test_interrupt_inside_a_large_module():
    class Interrupted(nn.Linear):
        def forward(self, x):
            super().forward(x)
            raise KeyboardInterrupt

    model = nn.Sequential(Interrupted(300, 300))
    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt), perturbed(model, 1, 0.5):
        model(torch.randn(2, 300))
    assert_untouched(model, before)


def test_inference_mode_first():
    """Tensors kept from passes in inference mode can be used outside it."""
    model, x = nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 700)), torch.randn(2, 300)
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad, torch.inference_mode):
        for seed in range(4):
            with mode(), perturbed(model, seed, 0.1):
                got = model(x)
            with torch.no_grad():
                assert torch.equal(got, perturbed_copy(model, seed, 0.1)(x))


@torch.no_grad()
def test_embedding_with_many_tokens_and_32_bit_ids():
    model = nn.Sequential(nn.Embedding(100, 700))
    want = perturbed_copy(model, 1, 0.1)
    for ids in (torch.arange(100).repeat(3), torch.tensor([[3, 1], [99, 3]], dtype=torch.int32)):
        for _ in range(3):
            with perturbed(model, 1, 0.1):
                assert torch.equal(model(ids), want(ids))


@torch.no_grad()
def test_an_empty_context_teaches_nothing():
    model = Tied().eval()
    ids = torch.randint(0, 300, (3, 5))
    want = perturbed_copy(model, 3, 0.1)(ids)
    for _ in range(3):
        with perturbed(model, 3, 0.1):
            pass
    with perturbed(model, 3, 0.1):
        assert torch.equal(model(ids), want)


@torch.no_grad()
def test_moved_weights_and_copies_of_the_model():
    model = Tied().eval()
    ids = torch.randint(0, 300, (3, 5))
    with perturbed(model, 3, 0.1):
        model(ids)
    other = copy.deepcopy(model)
    model.to(torch.bfloat16)
    for m in (model, other):
        want = perturbed_copy(m, 3, 0.1)(ids)
        with perturbed(m, 3, 0.1):
            assert torch.equal(m(ids), want)


@torch.no_grad()
def test_passes_last_as_long_as_their_model():
    """The passes' knowledge is kept outside the model, which is freed, copied and pickled as
    usual."""
    model = Tied().eval()
    ids = torch.randint(0, 300, (3, 5))
    attributes = set(vars(model))
    for seed in range(4):
        with perturbed(model, seed, 0.1):
            want = model(ids)
    assert set(vars(model)) == attributes
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert known_passes(other) is None
        with perturbed(other, 3, 0.1):
            assert torch.equal(other(ids), want)
    passes, alive = weakref.ref(known_passes(model)), weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None and passes() is None


def test_bad_arguments():
    model = nn.Linear(3, 3)
    for eps in (float("nan"), float("-inf")):
        with pytest.raises(ValueError, match="eps must be finite"), perturbed(model, 0, eps):
            pass
    with pytest.raises(ValueError, match="unknown noise 'gauss'; known: 'hadamard'"):
        with perturbed(model, 0, 0.1, noise="gauss"):
            pass
    with pytest.raises(ValueError, match="must fit 64 bits"), perturbed(model, 1 << 70, 0.1):
        pass
    with perturbed(model, 2**64 - 1, 0.1):  # a refused block leaves nothing behind
        pass
    with perturbed(model, 0, 0.1):
        pass
    bias = model._parameters.pop("bias")
    with pytest.raises(KeyError), known_passes(model).at(0, 0.1):
        pass
    model._parameters["bias"] = bias
    with perturbed(model, 0, 0.1):  # nor does a block that could not start
        pass
    with (
        pytest.raises(RuntimeError, match="do not nest"),
        perturbed(model, 0, 0.1),
        perturbed(model, 1, 0.1),
    ):
        pass


@pytest.mark.parametrize("settled", [False, True])
def test_weights_that_were_put_in_a_module_run_as_they_are(settled):
    """functional_call, assigning a parameter, or tying it to another later puts in weights that are
    not the trained ones."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(300, 300, bias=False), nn.ReLU(), nn.Linear(300, 300, bias=False)
    ).eval()
    x = torch.randn(2, 300)
    with torch.no_grad():
        for seed in range(4 * settled):
            with perturbed(model, seed, 1e-2):
                model(x)
        with perturbed(model, 5, 1e-2):
            got = torch.func.functional_call(model, {"0.weight": torch.eye(300)}, (x,))
        want = F.linear(x.relu(), add_noise(model[2].weight, [5], [1e-2], stream=1))
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
        passes = passes_of(
            model, {p: (i, 1.0) for i, p in enumerate(model.parameters())}, "hadamard"
        )
        model[0].weight = nn.Parameter(torch.eye(300))
        with passes.at(5, 1e-2):
            torch.testing.assert_close(model(x), want, rtol=0, atol=1e-6)


def test_hooks_are_put_where_the_module_has_them_now():
    model = nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 300)).eval()
    x = torch.randn(2, 300)
    with torch.no_grad():
        for seed in (0, 1, 2, 3, 3, 3):
            with perturbed(model, seed, 1e-2):
                last = model(x)
            for module in model.modules():
                assert not module._forward_hooks and not module._forward_pre_hooks
                assert not module._forward_hooks_always_called
                if seed == 3:
                    module._forward_hooks, module._forward_pre_hooks = OrderedDict(), OrderedDict()
        assert known_passes(model).settled("any") and not torch.equal(last, model(x))
        other = copy.deepcopy(model)
        perturb_(list(other.parameters()), 3, 1e-2)
        assert torch.equal(last, other(x))
