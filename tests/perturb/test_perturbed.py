"""The perturbed forward sees x + eps z exactly, and never writes x."""

import copy
from collections import OrderedDict

import pytest
import torch
from helpers import perturbed_copy
from pseuzo import perturbed
from pseuzo.perturb import perturbation, scratch
from pseuzo.perturb.module import known_passes, passes_of
from tiny_models import KINDS, Tied, batch_of, causal_lm
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from pseuzo_kernels import add_noise, perturb_


def snapshot(model):
    return [(p, p.data_ptr(), p.clone()) for p in model.parameters()]


def assert_untouched(model, before):
    assert [p.data_ptr() for p in model.parameters()] == [ptr for _, ptr, _ in before]
    assert all(
        p is q and torch.equal(p, was)
        for p, (q, _, was) in zip(model.parameters(), before, strict=True)
    )


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
    """From the first pass on: the watch substitutes at once, and keeps doing so where a swap would not be seen."""
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
            assert self.weight.dtype is torch.float32  # asking is not using
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
    """What is kept from passes in inference mode is of use outside of it."""
    model, x = nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 700)), torch.randn(2, 300)
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad, torch.inference_mode):
        for seed in range(4):
            with mode(), perturbed(model, seed, 0.1):
                got = model(x)
            with torch.no_grad():
                assert torch.equal(got, perturbed_copy(model, seed, 0.1)(x))


class Layer(nn.Module):
    """Two large weights and a third that runs twice."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.twice = (nn.Linear(300, 300) for _ in range(3))
        self.error = None

    def forward(self, x):
        x = self.twice(self.twice(self.b(self.a(x))).relu())
        if self.error is not None:
            raise self.error
        return x


class Layers(nn.Module):
    """Layers one after another; the last one's b also runs outside of it, before it."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.head = nn.Linear(300, 700, bias=False)

    def forward(self, x):
        for layer in self.layers[:2]:
            x = layer(x)
        return self.head(self.layers[2](self.layers[2].b(x)))


def calls_of_a_pass(model, seed, x) -> tuple[torch.Tensor, list[int]]:
    """The output of a perturbed pass, and how many weights each launch made."""
    made = []

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "pseuzo":
                made.append(len(kwargs["out"]))
            return func(*args, **(kwargs or {}))

    with Calls(), perturbed(model, seed, 0.1):
        return model(x), made


@torch.no_grad()
@pytest.mark.parametrize(
    "together, blocks", [(0, [1] * 14), (3 * 90112, [3, 3] + [1] * 6), (1 << 24, [10])], ids=str
)
def test_weights_of_a_block_are_made_together(together, blocks, monkeypatch):
    """As many as fit, and none that also runs outside of the block. (The nine biases are copied for a whole pass.)"""
    monkeypatch.setattr(scratch, "TOGETHER", together)
    model = Layers()
    before, x = snapshot(model), torch.randn(2, 300)
    launches = []
    for seed in range(4):
        got, made = calls_of_a_pass(model, seed, x)
        assert torch.equal(got, perturbed_copy(model, seed, 0.1)(x))
        launches.append(made)
    assert launches[0] == launches[1] == [9] + [1] * 14  # while it is watched
    assert launches[2] == launches[3] == [9, *blocks]
    model.layers[1].error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt), perturbed(model, 5, 0.1):
        model(x)
    model.layers[1].error = None
    assert_untouched(model, before)
    got, made = calls_of_a_pass(model, 6, x)
    assert torch.equal(got, perturbed_copy(model, 6, 0.1)(x)) and made == launches[3]
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks


class Wrapped(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer.b(self.layer.a(x))


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
@pytest.mark.parametrize("together", [3 * 90112, 1 << 24], ids=["layers", "all"])
def test_another_way_through_a_model_that_is_settled(together, tied, monkeypatch):
    """Modules that run outside of the block that they ran inside of until then; and back again."""
    monkeypatch.setattr(scratch, "TOGETHER", together)
    model = nn.Sequential(Layer(), Layer(), nn.Linear(300, 700))
    if tied:
        model[1].b.weight = model[0].a.weight
    x = torch.randn(2, 300)

    def caught(m):
        m[0].error = ValueError("no")
        with pytest.raises(ValueError, match="no"):
            m[0](x)
        m[0].error = None
        return m[2](m[0].twice(x))

    ways = (
        lambda m: m(x), lambda m: m[2](m[1](m[0](x))), lambda m: m[1].b(m[0].a(x)), lambda m: m[0](m[0].b(m[0](x))),
        caught,
    )  # fmt: skip
    before = snapshot(model)
    for seed, way in enumerate([*ways[:1] * 4, *ways[1:], *ways, *ways[:1] * 2]):
        with perturbed(model, seed, 0.1):
            got = way(model)
        assert torch.equal(got, way(perturbed_copy(model, seed, 0.1))), seed
        assert_untouched(model, before)
    assert not any(p.numel() > 1 << 16 for p in known_passes(model).whole_pass), (
        "memory of weights that ran elsewhere"
    )
    _, made = calls_of_a_pass(model, 9, x)
    assert made[0] == 7 and sum(made[1:]) == 9, made
    first = model[0]
    model[0] = Wrapped(first)
    want = perturbed_copy(model, 3, 0.1)(x)
    for _ in range(3):
        with perturbed(model, 3, 0.1):
            assert torch.equal(model(x), want)


@torch.no_grad()
def test_blocks_in_an_embedding_and_modules_that_are_made_late(monkeypatch):
    monkeypatch.setattr(scratch, "TOGETHER", 3 * 90112)

    class Table(nn.Embedding):
        def __init__(self):
            super().__init__(700, 300)
            self.a, self.b = nn.Linear(300, 300), nn.Linear(300, 300)

        def forward(self, ids):
            if not hasattr(self, "late"):
                self.late = nn.Identity()
            return self.late(self.b(self.a(super().forward(ids))))

    model, ids = (
        nn.Sequential(Table(), nn.Linear(300, 700), nn.Linear(700, 300)),
        torch.tensor([[3, 699, 3]]),
    )
    for seed in range(5):
        with perturbed(model, seed, 0.1):
            got = model(ids)
        assert torch.equal(got, perturbed_copy(model, seed, 0.1)(ids))


@torch.no_grad()
def test_memory_is_that_of_the_largest_module(monkeypatch):
    monkeypatch.setattr(scratch, "TOGETHER", 0)
    model = nn.Sequential(
        *(nn.Linear(300, 300 + 100 * (i == 2), bias=False) for i in range(2)), nn.Linear(300, 400)
    )
    for seed in range(3):
        with perturbed(model, seed, 0.1):
            model(torch.randn(2, 300))
    passes = known_passes(model)
    assert passes.scratch.sizes == [-(-300 * 400 // 2048) * 2048]
    assert set(passes.whole_pass) == {model[2].bias}


@torch.no_grad()
def test_an_output_that_is_a_view_of_a_weight():
    class Rows(nn.Linear):
        def forward(self, n):
            return {"rows": self.weight[:n]}

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.rows, self.other = Rows(300, 300), nn.Linear(300, 300)

        def forward(self, x):
            rows = self.rows(4)["rows"]
            return self.other(x), rows

    model = Model()
    x = torch.randn(2, 300)
    want = perturbed_copy(model, 1, 0.5)(x)
    for _ in range(3):
        with perturbed(model, 1, 0.5):
            got = model(x)
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


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


def test_backward_through_scratch_fails_loudly():
    model = nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 300))
    x = torch.randn(2, 300, requires_grad=True)
    with perturbed(model, 1, 0.1):
        loss = model(x).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


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
    with perturbed(model, 2**64 - 1, 0.1):  # a refused one leaves nothing behind
        pass
    with perturbed(model, 0, 0.1):
        pass
    bias = model._parameters.pop("bias")
    with pytest.raises(KeyError), known_passes(model).at(0, 0.1):
        pass
    model._parameters["bias"] = bias
    with perturbed(model, 0, 0.1):  # nor does one that could not begin
        pass
    with (
        pytest.raises(RuntimeError, match="do not nest"),
        perturbed(model, 0, 0.1),
        perturbed(model, 1, 0.1),
    ):
        pass


@pytest.mark.parametrize("settled", [False, True])
def test_weights_that_were_put_in_a_module_run_as_they_are(settled):
    """By functional_call, by assigning a parameter, or by tying it to another late: they are not the trained ones."""
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


def test_a_block_that_fails_and_is_caught(monkeypatch):
    """Its weights are put back before the model goes on, in passes that are not watched, too."""
    monkeypatch.setattr(scratch, "TOGETHER", 0)

    class Caught(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(300, 300), nn.Linear(300, 300)
            self.first.register_forward_hook(self.fail)
            self.caught = []

        def fail(self, *args):
            raise ValueError("on purpose")

        def forward(self, x):
            try:
                return self.first(x)
            except ValueError:
                self.caught.append(self.first._parameters["weight"])
                return self.second(x)

    model, x = Caught().eval(), torch.randn(2, 300)
    weight = model.first.weight
    with torch.no_grad():
        for seed in range(5):
            with perturbed(model, seed, 1e-2):
                got = model(x)
    assert known_passes(model).settled("any")
    assert len(model.caught) == 5 and all(w is weight for w in model.caught)
    assert torch.equal(got, perturbed_copy(model, 4, 1e-2).second(x))


def test_nothing_is_prepared_anew_in_a_settled_pass(monkeypatch):
    """Not for an embedding of which more rows are looked up than it has, either: it is copied."""
    monkeypatch.setattr(scratch, "SMALL", 200)
    made, repeated = [], perturbation.RepeatedPerturb
    monkeypatch.setattr(
        perturbation, "RepeatedPerturb", lambda *args: made.append(1) or repeated(*args)
    )
    model = causal_lm("opt").eval()  # 66 positions
    batch = batch_of(rows=8)
    for seed in range(6):
        known = len(made)
        with torch.no_grad(), perturbed(model, seed, 1e-2):
            got = model(**batch).logits
        with torch.no_grad():
            assert torch.equal(got, perturbed_copy(model, seed, 1e-2)(**batch).logits)
    assert len(made) == known > 0
