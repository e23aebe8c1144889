"""The derivative of the forward gradient is that of autograd, and a pass leaves nothing behind."""

import copy
import json

import pytest
import torch
from helpers import SMALL, assert_same_weights, pseuzo
from optimizers import data, equal, head_for, small_model
from pseuzo import CausalLMObjective, ForwardGradient, Journal
from pseuzo.models.modes import tune
from pseuzo.optim.seeds import direction_seed
from pseuzo.perturb.tangent import FUSED
from pseuzo.train.replay import replay
from tiny_models import Tied, batch_of, causal_lm
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from pseuzo_kernels import reference


def closure_of(model, t):
    x, y = data(t)
    return lambda: head_for(y)(model(x))


def slopes_by_autograd(params, loss, seeds):
    """Return <dL/dx, z_j>, from the fp32 gradient in float64, and the sum of the sizes of its
    terms."""
    gradients = torch.autograd.grad(loss, [p for _, p in params], allow_unused=True)
    found = []
    for seed in seeds:
        terms = [
            (g.double() * reference.noise(p.shape, seed, i)).flatten()
            for (i, p), g in zip(params, gradients, strict=True)
            if g is not None
        ]
        found.append((torch.cat(terms).sum(), torch.cat(terms).abs().sum()))
    return found


@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize("kind, attention", [("opt", "sdpa"), ("llama", "sdpa"), ("opt", "eager")])
@pytest.mark.parametrize("options", [[17, 4], None], ids=["options", "language modelling"])
def test_the_slope_is_autograds(kind, attention, mode, options):
    """This holds for all weights, including tied ones and rows of a head, and for adapters."""
    model = causal_lm(kind)
    model.set_attn_implementation(attention)
    model = tune(model, mode, seed=0)
    for name, p in model.named_parameters():
        if "lora_B" in name:  # B starts at 0, where A's gradient is 0
            nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    model.train()
    forward, head = CausalLMObjective(model, options)(
        batch_of() | {"labels": torch.tensor([0, 1, 1, 0]) if options else batch_of()["input_ids"]}
    )
    opt = ForwardGradient(model, 0.0, seed=5, directions=2)
    flags = [enabled() for enabled, _ in FUSED]
    loss = opt.step(lambda: head(forward()))
    assert model.training and [enabled() for enabled, _ in FUSED] == flags
    model.eval()
    want = head(forward())
    torch.testing.assert_close(loss, want.detach())
    params = [(i, p) for i, p in enumerate(model.parameters()) if p.requires_grad]
    seeds = [direction_seed(5, 0, j) for j in range(2)]
    wanted = slopes_by_autograd(params, want, seeds)
    for got, (slope, size) in zip(opt.stats["projected_grad"], wanted, strict=True):
        # Both slopes are sums of products that pass through about 30 layers, each of which rounds
        # by 2^-24 of a term.
        assert abs(float(got) - float(slope)) < 64 * 2**-24 * float(size)
        assert abs(float(slope)) > 1e-4 * float(size)


def test_the_steps_are_the_formula():
    lr, decay, q, scales = 0.05, 0.3, 3, [1.0, 2.0, 1.0, 2.0]
    model, want = small_model(), small_model()
    params = list(model.parameters())
    groups = [{"params": params[::2]}, {"params": params[1::2], "noise_scale": 2.0}]
    opt = ForwardGradient(groups, lr, model=model, weight_decay=decay, directions=q, seed=9)
    for t in range(5):
        loss = opt.step(closure_of(model, t))
        wanted = closure_of(want, t)()
        torch.testing.assert_close(loss, wanted.detach(), rtol=0, atol=1e-5)
        gradient = torch.autograd.grad(wanted, list(want.parameters()))
        pairs = list(zip(scales, gradient, strict=True))
        moves = [torch.zeros_like(g) for g in gradient]
        for seed in (direction_seed(9, t, j) for j in range(q)):
            z = [s * reference.noise(g.shape, seed, i) for i, (s, g) in enumerate(pairs)]
            c = sum((g * zi).sum() for g, zi in zip(gradient, z, strict=True))
            moves = [m + c / q * zi for m, zi in zip(moves, z, strict=True)]
        with torch.no_grad():
            for p, m in zip(want.parameters(), moves, strict=True):
                p.copy_((1 - lr * decay) * p - lr * m)
    for p, w in zip(params, want.parameters(), strict=True):
        # After sums of 101 terms, c is about 2 with a relative error of 2^-20. There are five
        # steps, lr is 0.05, and the noise is at most 6.
        torch.testing.assert_close(p, w, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_resumes_and_replays_to_the_bit(dtype, tmp_path):
    model = small_model().to(dtype)
    base = copy.deepcopy(model)

    def steps(opt, model, numbers):
        for t in numbers:
            x, y = data(t)
            opt.step(lambda x=x, y=y: head_for(y)(model(x.to(dtype))))

    opt = ForwardGradient(model, 0.02, weight_decay=0.1, seed=2, directions=2)
    with Journal(tmp_path / "run.pzj", opt):
        steps(opt, model, range(3))
        torch.save(opt.state_dict(), tmp_path / "opt.pt")
        resumed = copy.deepcopy(model)
        steps(opt, model, range(3, 6))
    again = ForwardGradient(resumed, 0.5)  # the state replaces all of its settings
    again.load_state_dict(torch.load(tmp_path / "opt.pt", weights_only=True))
    steps(again, resumed, range(3, 6))
    assert equal(model, resumed)
    assert replay(tmp_path / "run.pzj", base) == 6
    assert equal(model, base)


def test_weights_used_outside_their_module_move():
    """They move as in MeZO's passes. The weight of a module on which no loss depends stays."""

    class Outside(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.never = (nn.Linear(6, 6) for _ in range(3))

        def forward(self, x):
            return self.a(F.linear(x, self.b.weight).tanh())

    model, x = Outside(), data(0)[0]
    opt = ForwardGradient(model, 0.1)
    before = {name: p.clone() for name, p in model.named_parameters()}
    for _ in range(3):
        opt.step(lambda: model(x).square().mean())
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"a.weight", "a.bias", "b.weight"}
    tied = Tied()
    ids = torch.randint(0, 300, (3, 5), generator=torch.Generator().manual_seed(1))
    start = copy.deepcopy(tied)
    ForwardGradient(tied, 0.1).step(lambda: tied(ids).square().mean())
    assert not any(map(torch.equal, tied.parameters(), start.parameters()))


@pytest.mark.parametrize("where", ["in the pass", "at its end"])
def test_an_interrupt_leaves_the_model(where, monkeypatch):
    model, other = small_model(), small_model()
    opt, undisturbed = ForwardGradient(model, 0.05, seed=3), ForwardGradient(other, 0.05, seed=3)
    own = [dict(m._parameters) for m in model.modules()]

    def interrupted():
        raise KeyboardInterrupt

    def pass_of():
        loss = closure_of(model, 0)()
        return interrupted() if where == "in the pass" else loss

    with monkeypatch.context() as patch:
        if where == "at its end":
            patch.setattr(forward_ad, "unpack_dual", lambda x: interrupted())
        with pytest.raises(KeyboardInterrupt):
            opt.step(pass_of)
    assert all(a == dict(m._parameters) for a, m in zip(own, model.modules(), strict=True))
    assert not any(m._forward_pre_hooks for m in model.modules())
    with forward_ad.dual_level():  # none is open
        pass
    for t in range(3):
        opt.step(closure_of(model, t))
        undisturbed.step(closure_of(other, t))
    assert equal(model, other) and opt.steps == 3


def test_examples_are_clipped():
    x, y = data(0)
    x[1] *= 30
    model = small_model()
    opt = ForwardGradient(model, 0.0, clip_examples=2.0, seed=1)
    opt.step(lambda: F.cross_entropy(model(x), y, reduction="none"))
    params = list(enumerate(model.parameters()))
    each = []
    for i in range(len(x)):
        loss = F.cross_entropy(model(x), y, reduction="none")[i]
        ((slope, _),) = slopes_by_autograd(params, loss, [direction_seed(1, 0, 0)])
        each.append(float(slope))
    limit = 2 * torch.tensor(each).abs().median()
    want = torch.tensor(each).clamp(-limit, limit).mean()
    assert float(opt.stats["projected_grad"]) == pytest.approx(float(want), rel=1e-5)
    assert max(map(abs, each)) > limit


class NoDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


def test_bad_input():
    model = small_model()
    before = copy.deepcopy(model)
    opt = ForwardGradient(model)
    x = data(0)[0]
    with pytest.raises(TypeError, match="needs a closure"):
        opt.step(3.0)
    with pytest.raises(TypeError, match="must return a tensor, got float"):
        opt.step(lambda: float(model(x).sum()))
    with pytest.raises(ValueError, match="does not depend on a trained weight"):
        opt.step(lambda: model(x).argmax(-1).float().mean())
    with pytest.raises(ValueError, match="does not depend on a trained weight"):
        opt.step(lambda: before(x).mean())
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        opt.step(lambda: NoDerivative.apply(model(x)).mean())
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="inside another one"):
        opt.step(lambda: model(x).mean())
    assert equal(model, before) and opt.steps == 0
    with pytest.warns(UserWarning, match=r"1 step\(s\) skipped"):
        opt.step(lambda: model(x).mean() * float("inf"))
    assert equal(model, before) and opt.skipped_steps == 1


@pytest.mark.parametrize("options, match", [
    ({"directions": 0}, "directions must be an int of at least 1, got 0"),
    ({"eps": 1e-3}, "there is no eps"),
    ({"capture": True}, "leave capture off"),
])  # fmt: skip
def test_bad_options(options, match):
    with pytest.raises(ValueError, match=match):
        ForwardGradient(small_model(), **options)


def test_it_needs_the_model():
    with pytest.raises(ValueError, match="needs the model"):
        ForwardGradient(small_model().parameters())


class Made(TorchDispatchMode):
    """Records the shapes of the matrices that ops make, unless they are views of the parameters."""

    def __init__(self, model):
        super().__init__()
        self.own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.shapes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dim() == 2 and not is_zero(result):
            if result.untyped_storage().data_ptr() not in self.own:
                self.shapes.add(tuple(sorted(result.shape)))
        return result


def is_zero(x):
    """Return whether x has no storage, like tangents that are 0."""
    try:
        return x.untyped_storage().data_ptr() is None
    except RuntimeError:
        return True


def test_a_frozen_layer_costs_no_matrix_of_its_size():
    model = nn.Sequential(nn.Linear(6, 501), nn.Tanh(), nn.Linear(501, 607))
    model[2].requires_grad_(False)
    opt, (x, _) = ForwardGradient(model), data(0)
    with Made(model) as made:
        opt.step(lambda: model(x).square().mean())
    assert (4, 607) in made.shapes and (501, 607) not in made.shapes


@pytest.mark.slow
def test_a_run_of_the_command_line_is_recorded(tmp_path):
    out, journal = tmp_path / "run", tmp_path / "run.pzj"
    train = ["train", *SMALL, *"--method forward-gradient --lr 1e-4 --directions 2".split()]
    train += [*"--steps 2 --eval-every 0 --keep last --journal".split(), journal, "--output", out]
    pseuzo(*train)
    results = json.loads((out / "results.json").read_text())
    assert results["method"] == "forward-gradient" and results["forwards"] == 12
    assert results["eps"] is None  # since --config refuses it
    assert "\neps: null\n" in (out / "config.yaml").read_text()
    pseuzo("replay", "--base", "demo", "--journal", journal, "--output", tmp_path / "replayed")
    assert_same_weights(out / "model", tmp_path / "replayed")
    refused = pseuzo(*train, "--eps", 1e-3, code=2)
    assert "not for forward-gradient" in " ".join(refused.split())
