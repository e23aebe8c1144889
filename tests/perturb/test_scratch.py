"""Perturbed weights are made in scratch that is shared by blocks of modules, and some are kept."""

import pytest
import torch
from helpers import assert_untouched, perturbed_copy, snapshot
from pseuzo import perturbed
from pseuzo.perturb import perturbation, scratch
from pseuzo.perturb.module import known_passes
from tiny_models import batch_of, causal_lm
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode


class Layer(nn.Module):
    """Has two large weights and a third that runs twice."""

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
    """Runs layers one after another. The b of the last layer also runs outside this layer, before
    it."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.head = nn.Linear(300, 700, bias=False)

    def forward(self, x):
        for layer in self.layers[:2]:
            x = layer(x)
        return self.head(self.layers[2](self.layers[2].b(x)))


def calls_of_a_pass(model, seed, x) -> tuple[torch.Tensor, list[int]]:
    """Return the output of a perturbed pass, and how many weights each launch made."""
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
    """As many weights as fit are made together, without those that also run outside the block. (The
    nine biases are copied for a whole pass.)"""
    monkeypatch.setattr(scratch, "TOGETHER", together)
    model = Layers()
    before, x = snapshot(model), torch.randn(2, 300)
    launches = []
    for seed in range(4):
        got, made = calls_of_a_pass(model, seed, x)
        assert torch.equal(got, perturbed_copy(model, seed, 0.1)(x))
        launches.append(made)
    assert launches[0] == launches[1] == [9] + [1] * 14  # these passes are watched
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
    """Modules run outside the block in which they ran until then, and later inside it again."""
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
        lambda m: m(x),
        lambda m: m[2](m[1](m[0](x))),
        lambda m: m[1].b(m[0].a(x)),
        lambda m: m[0](m[0].b(m[0](x))),
        caught,
    )
    before = snapshot(model)
    for seed, way in enumerate([*ways[:1] * 4, *ways[1:], *ways, *ways[:1] * 2]):
        with perturbed(model, seed, 0.1):
            got = way(model)
        assert torch.equal(got, way(perturbed_copy(model, seed, 0.1))), seed
        assert_untouched(model, before)
    assert not any(p.numel() > 1 << 16 for p in known_passes(model).whole_pass), (
        "the memory of weights that ran elsewhere is still held"
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


def test_backward_through_scratch_fails_loudly():
    model = nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 300))
    x = torch.randn(2, 300, requires_grad=True)
    with perturbed(model, 1, 0.1):
        loss = model(x).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_block_that_fails_and_is_caught(monkeypatch):
    """Its weights are put back before the model continues, also in passes that are not watched."""
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
    """This includes an embedding that is asked for more rows than it has, which is copied."""
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
