"""PseuZO and MeZO against the formulas written out plainly, and as torch optimizers."""

import copy
import math
import pickle
import subprocess
import sys
import warnings
from contextlib import nullcontext

import pytest
import torch
from helpers import Waits, run_steps
from pseuzo import (
    CausalLMObjective,
    Constant,
    CyclicHyperbola,
    Linear,
    MeZO,
    PseuZO,
    Schedule,
    perturbed,
)
from pseuzo.optim.base import ROUNDING_DOMAIN, ZeroOrder, _Skips, direction_seed, step_seed
from pseuzo.train.journal import Journal, replay
from tiny_models import Tied, batch_of, causal_lm
from torch import nn

from pseuzo_kernels import reference

LABELS = torch.tensor([0, 1, 1, 0])


def small_model():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))


def data(step: int, rows: int = 4):
    g = torch.Generator().manual_seed(100 + step)
    return torch.randn(rows, 6, generator=g), torch.randint(0, 5, (rows,), generator=g)


def head_for(y):
    return lambda o: nn.functional.cross_entropy(o.float(), y)


def losses_beside(model, z, bys, x, y):
    """The losses of weights + by * z, in copies of the model."""
    losses = []
    for by in bys:
        other = copy.deepcopy(model)
        with torch.no_grad():
            for p, zi in zip(other.parameters(), z, strict=True):
                p.add_(by * zi)
            losses.append(head_for(y)(other(x)).double())
    return losses


def plain_pseuzo(
    model, steps, lr, eps, K, momentum, decay, groups, seed, two_sided=False, scale=None
):
    """PseuZO as in the paper, in float64 except for the forward: no ring, no fused kernels, weights copied about."""
    params = list(model.parameters())
    scale = scale or [1.0] * len(params)
    entries = []
    for t in range(steps):
        x, y = data(t)
        s = step_seed(seed, t)
        z = [
            f * reference.noise(p.shape, s, i)
            for i, (p, f) in enumerate(zip(params, scale, strict=True))
        ]

        @torch.no_grad()
        def output(by, x=x, z=z):
            other = copy.deepcopy(model)
            for p, zi in zip(other.parameters(), z, strict=True):
                p.add_(by * zi)
            return other(x)

        o0 = output(0.0)
        o = o0.clone().requires_grad_()
        (e,) = torch.autograd.grad(head_for(y)(o), o)
        change = (output(eps) - output(-eps)) / 2 if two_sided else output(eps) - o0
        entries = [*entries, (s, change.double())][-K:]
        update = [torch.zeros_like(p, dtype=torch.float64) for p in params]
        for age, (sk, d) in enumerate(reversed(entries)):
            if age == 0 or groups is None:
                dot = (d * e.double()).sum()
            else:
                dot = sum(
                    d[groups == g].mean(0) @ e[groups == g].double().sum(0) for g in groups.unique()
                )
            c = momentum**age * dot / eps
            for i, p in enumerate(params):
                update[i] += c * scale[i] * reference.noise(p.shape, sk, i).double()
        with torch.no_grad():
            for p, u, f in zip(params, update, scale, strict=True):
                if f:
                    p.copy_((1 - lr * decay) * p.double() - lr * u)


@pytest.mark.parametrize("bare", [False, True], ids=["module", "bare parameters"])
@pytest.mark.parametrize("two_sided", [False, True], ids=["one-sided", "two-sided"])
@pytest.mark.parametrize("groups", [None, LABELS], ids=["rows", "groups"])
def test_pseuzo_is_the_formula(bare, two_sided, groups):
    lr, eps, K, momentum, decay, steps = 0.02, 1e-2, 3, 0.8, 0.3, 6
    model, want = small_model(), small_model()
    target = model.parameters() if bare else model
    opt = PseuZO(target, lr, eps, K, momentum, decay, seed=5, two_sided=two_sided)
    for t in range(steps):
        x, y = data(t)
        before = nn.functional.cross_entropy(model(x), y)
        loss = opt.step(lambda x=x: model(x), head_for(y), groups=groups)
        torch.testing.assert_close(loss, before.detach())
    plain_pseuzo(want, steps, lr, eps, K, momentum, decay, groups, 5, two_sided)
    for p, q, start in zip(
        model.parameters(), want.parameters(), small_model().parameters(), strict=True
    ):
        # o1 - o0 of outputs about 1 is known to 2^-23 / eps = 1.2e-5 of the change; six steps of it, coefficients
        # about 1
        torch.testing.assert_close(
            p, q, rtol=0, atol=2e-5 * (1 + float((q - start).detach().abs().max()))
        )
        assert (p - start).abs().max() > 1e-2


@pytest.mark.parametrize("bare", [False, True], ids=["module", "bare parameters"])
@pytest.mark.parametrize("two_sided", [False, True], ids=["one-sided", "two-sided"])
def test_mezo_is_the_formula(bare, two_sided):
    lr, eps, decay = 0.05, 1e-2, 0.3
    model, want = small_model(), small_model()
    opt = MeZO(
        model.parameters() if bare else model,
        lr,
        eps,
        weight_decay=decay,
        two_sided=two_sided,
        seed=9,
    )
    for t in range(5):
        x, y = data(t)
        opt.step(lambda x=x, y=y: nn.functional.cross_entropy(model(x), y))
        z = [reference.noise(p.shape, step_seed(9, t), i) for i, p in enumerate(want.parameters())]
        losses = losses_beside(want, z, (eps, -eps if two_sided else 0.0), x, y)
        g = (losses[0] - losses[1]) / (2 * eps if two_sided else eps)
        with torch.no_grad():
            for p, zi in zip(want.parameters(), z, strict=True):
                p.copy_((1 - lr * decay) * p.double() - lr * g * zi.double())
    for p, q in zip(model.parameters(), want.parameters(), strict=True):
        torch.testing.assert_close(
            p, q, rtol=0, atol=2e-5
        )  # as above: losses about 2 known to 2^-23, over eps


def test_lambda_zero_is_a_two_sided_mezo_step():
    a, b = small_model(), small_model()
    pseuzo, mezo = PseuZO(a, 0.05, 1e-2, momentum=0.0, seed=4), MeZO(b, 0.05, 1e-2, seed=4)
    for t in range(3):
        x, y = data(t)
        la = pseuzo.step(lambda x=x: a(x), head_for(y))
        lb = mezo.step(lambda x=x, y=y: head_for(y)(b(x)))
        assert torch.equal(la, lb)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_groups_of_parameters():
    """noise_scale, weight_decay and lr per group; scale 0 freezes; streams do not depend on how groups are cut."""
    model, want = small_model(), small_model()
    params = list(model.parameters())
    opt = PseuZO(
        [{"params": params[3:], "noise_scale": 2.0}, {"params": params[:1], "noise_scale": 0.5},
         {"params": params[1:3], "noise_scale": 0.0}],
        lr=0.01, eps=1e-2, window=2, momentum=0.5, seed=5, weight_decay=0.1, model=model,
    )  # fmt: skip
    for t in range(4):
        x, y = data(t)
        opt.step(lambda x=x: model(x), head_for(y))
    plain_pseuzo(want, 4, 0.01, 1e-2, 2, 0.5, 0.1, None, 5, scale=[0.5, 0.0, 0.0, 2.0])
    for i, (p, q) in enumerate(zip(params, want.parameters(), strict=True)):
        torch.testing.assert_close(p, q, rtol=0, atol=2e-5 if i in (0, 3) else 0)


@pytest.mark.parametrize("lr, decay", [((0.01, 0.03), (0.5, 0.0)), ((0.02, 0.02), (0.5, 0.0))])
def test_lr_and_decay_by_group(lr, decay):
    """Bare parameters and a module agree though their launches are cut differently; a skipped step decays nothing."""
    models = [small_model(), small_model()]
    for model, exact in zip(models, (None, models[1]), strict=True):
        params = list(model.parameters())
        groups = [{"params": p, "lr": a, "weight_decay": b} for p, a, b in
                  zip((params[:2], params[2:]), lr, decay, strict=True)]  # fmt: skip
        opt = MeZO(groups, eps=1e-2, seed=1, model=exact)
        for t in range(3):
            x, y = data(t)
            opt.step(lambda x=x, y=y, m=model: head_for(y)(m(x)))
        before = [p.clone() for p in params]
        with pytest.warns(UserWarning, match=r"1 step\(s\) skipped"):
            opt.step(lambda: float("nan"))
        for p, was in zip(params, before, strict=True):
            torch.testing.assert_close(p, was, rtol=0, atol=0 if exact is not None else 1e-6)
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=2e-5)


def test_schedulers_maximize_and_torch_rng():
    model, other = small_model(), small_model()
    opt, up = MeZO(model, 0.1, 1e-2), MeZO(other, 0.1, 1e-2, maximize=True)
    lr = torch.optim.lr_scheduler.LambdaLR(opt, lambda t: 0.5**t)
    state = torch.get_rng_state()
    start = [p.clone() for p in model.parameters()]
    x, y = data(0)
    opt.step(lambda: head_for(y)(model(x)))
    up.step(lambda: head_for(y)(other(x)))
    for p, q, s in zip(model.parameters(), other.parameters(), start, strict=True):
        torch.testing.assert_close(p + q, 2 * s)
    lr.step()
    assert opt.param_groups[0]["lr"] == 0.05
    opt.step(lambda: head_for(y)(model(x)))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("make", [
    lambda m: PseuZO(m, 0.02, 1e-2, 3, 0.9, 0.1, seed=2),
    lambda m: PseuZO(m.parameters(), 0.02, 1e-2, 3, CyclicHyperbola(6), seed=2),
    lambda m: MeZO(m, 0.02, 1e-2, seed=2),
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_state_dict_then_equal_steps(make, dtype, tmp_path):
    def run(opt, model, steps):
        for t in steps:
            x, y = data(t)
            if isinstance(opt, PseuZO):
                opt.step(lambda x=x: model(x.to(dtype)), head_for(y), groups=LABELS)
            else:
                opt.step(lambda x=x, y=y: head_for(y)(model(x.to(dtype))))

    model = small_model().to(dtype)
    opt = make(model)
    run(opt, model, range(5))
    torch.save(opt.state_dict(), tmp_path / "opt.pt")
    resumed = copy.deepcopy(model)
    again = make(resumed)
    again.load_state_dict(torch.load(tmp_path / "opt.pt", weights_only=True))
    run(opt, model, range(5, 10))
    run(again, resumed, range(5, 10))
    assert all(
        torch.equal(p, q) for p, q in zip(model.parameters(), resumed.parameters(), strict=True)
    )


def test_load_state_dict_refuses_others():
    model = small_model()
    opt = PseuZO(model)
    for state in (torch.optim.SGD(model.parameters(), 0.1).state_dict(), MeZO(model).state_dict()):
        with pytest.raises(ValueError, match="not a state of PseuZO, it lacks"):
            opt.load_state_dict(state)


@pytest.mark.parametrize("make", [PseuZO, MeZO])
@pytest.mark.parametrize("dtype, rounding", [(torch.bfloat16, "stochastic"), (torch.float16, "stochastic"),
                                             (torch.bfloat16, "nearest"), (torch.float32, "stochastic")])  # fmt: skip
def test_a_state_of_another_rounding_rule(make, dtype, rounding):
    """Its 16-bit weights would go on by another rule; all others have the same bits under every rule."""
    opt = make(small_model().to(dtype), rounding=rounding)
    for written in (None, 99):
        state, before = copy.deepcopy(opt.state_dict()), copy.deepcopy(opt.state_dict())
        own = state["state"]["zero_order"]
        assert own.pop("rounding_version") == reference.ROUNDING_VERSION
        own |= (
            {"step": 7} if written is None else {"step": 7, "rounding_version": written}
        )  # the first was not written
        same = written is None and reference.ROUNDING_VERSION == 1
        if same or dtype is torch.float32 or rounding == "nearest":
            opt.load_state_dict(state)
            assert opt.state_dict()["state"]["zero_order"]["step"] == 7
            continue
        with pytest.raises(
            ValueError,
            match=f"16-bit weights were rounded stochastically by version {written or 1} ",
        ):
            opt.load_state_dict(state)
        assert (
            opt.state_dict()["state"]["zero_order"]["step"] == before["state"]["zero_order"]["step"]
        )


def test_stochastic_rounding_by_default_and_reproducible():
    """A bf16 update of a hundredth of an ulp is kept on average; rounding to nearest loses it."""
    moved = {}
    for rounding in ("stochastic", "nearest"):
        model = nn.Linear(256, 256, bias=False).to(torch.bfloat16)
        nn.init.ones_(model.weight)
        opt = MeZO(
            model,
            1.0,
            1e-2,
            seed=1,
            **({} if rounding == "stochastic" else {"rounding": "nearest"}),
        )
        losses = iter(
            [2**-14 * 1e-2, -(2**-14) * 1e-2]
        )  # projected gradient 2^-14; an ulp of 1 is 2^-7
        x = torch.ones(1, 256, dtype=torch.bfloat16)
        opt.step(lambda losses=losses, model=model, x=x: (model(x), next(losses))[1])
        z = reference.noise((256, 256), step_seed(1, 0), 0)
        moved[rounding] = float(
            ((1 - model.weight.detach().float()) * z).sum() / (2**-14 * (z * z).sum())
        )
        want = torch.ones(256, 256, dtype=torch.bfloat16)
        reference.update_(want, step_seed(1, 0), 2**-14, lr=1.0, rounding=rounding,
                          rounding_seed=step_seed(1, 0, ROUNDING_DOMAIN))  # fmt: skip
        assert torch.equal(model.weight, want)
    # the rounding error is at most an ulp an element, so the ratio is known to 5 * 2^7 / 256 * sqrt(|z| / 2^7) < 0.6
    assert abs(moved["stochastic"] - 1) < 0.6 and moved["nearest"] == 0


def test_passes_run_without_dropout_and_modes_come_back():
    model = Tied().train()
    model.norm.eval()
    opt = PseuZO(model, 1e-3, 1e-3)
    ids = torch.randint(0, 300, (3, 5))
    seen = []
    opt.step(lambda: (seen.append(model.drop.training), model(ids))[1], lambda o: o.square().mean())
    assert seen == [False, False]
    assert model.training and model.drop.training and not model.norm.training


class Broken(Exception):
    pass


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bare", [False, True], ids=["module", "bare parameters"])
@pytest.mark.parametrize("method, fail_at", [("mezo", 0), ("mezo", 1), ("pseuzo", 0), ("pseuzo", 1),
                         ("pseuzo two-sided", 0), ("pseuzo two-sided", 1), ("pseuzo two-sided", 2)])  # fmt: skip
def test_an_exception_in_a_pass_leaves_the_weights(method, bare, fail_at, dtype):
    model = small_model().to(dtype)
    before = [p.clone() for p in model.parameters()]
    target = model.parameters() if bare else model
    x, y = data(0)
    calls = []

    def forward():
        calls.append(1)
        if len(calls) > fail_at:
            raise Broken
        return model(x.to(dtype))

    if method == "mezo":
        opt, step = MeZO(target, 0.1, 1e-2), lambda: opt.step(lambda: head_for(y)(forward()))
    else:
        opt = PseuZO(target, 0.1, 1e-2, two_sided="two-sided" in method)
        step = lambda: opt.step(forward, head_for(y))  # noqa: E731
    with pytest.raises(Broken):
        step()
    for p, was in zip(model.parameters(), before, strict=True):
        # in place, + eps z and - eps z are two roundings of values below 2; 16-bit weights are put back from a copy
        atol = 2 * 2.0**-23 if bare and dtype is torch.float32 else 0
        torch.testing.assert_close(p, was, rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("make", [MeZO, PseuZO])
def test_bare_16_bit_parameters_do_not_drift(make, dtype):
    """100 steps of rate 0, some of them skipped, leave every bit; and a step equals that of the whole module's."""
    model, twin = small_model().to(dtype), small_model().to(dtype)
    opt = make(model.parameters(), 0.0, 1e-2, weight_decay=0.5)
    other = make(twin, 0.0, 1e-2, weight_decay=0.5)

    def step(opt, model, t, factor):
        x, y = data(t)
        if make is MeZO:
            return opt.step(lambda: head_for(y)(model(x.to(dtype))) * factor)
        return opt.step(lambda: model(x.to(dtype)), lambda o: head_for(y)(o) * factor)

    before = [p.clone() for p in model.parameters()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for t in range(100):
            step(opt, model, t, float("nan") if t % 3 == 0 else 1.0)
    assert opt.skipped_steps == 34
    assert all(torch.equal(p, was) for p, was in zip(model.parameters(), before, strict=True))
    other._step = opt._step
    if make is PseuZO:
        opt.window.clear()
    for o in (opt, other):
        o.param_groups[0]["lr"] = 0.05
    step(opt, model, 7, 1.0)
    step(other, twin, 7, 1.0)
    for p, q, was in zip(model.parameters(), twin.parameters(), before, strict=True):
        assert torch.equal(p, q) and not torch.equal(p, was)


@pytest.mark.parametrize("kind", ["opt", "llama"])
@pytest.mark.parametrize("options", [[17, 4], None], ids=["options", "language modelling"])
def test_mezo_steps_after_pseuzo_steps_see_the_whole_perturbation(kind, options):
    """The head is no part of h but of the loss, so what was learned of the model in one kind of pass must not be used
    in the other. The projected gradient is that of weights perturbed in place."""
    model = causal_lm(kind)
    objective = CausalLMObjective(model, options)
    batch = batch_of()
    labels = torch.tensor([0, 1, 1, 0]) if options else batch["input_ids"]
    forward, head = objective({**batch, "labels": labels})

    class Switch(Schedule):
        def __call__(self, step):
            return float(step < 3)

    opt = PseuZO(model, lr=0.0, eps=1e-2, momentum=Switch(), seed=3)
    for _ in range(3):
        opt.step(forward, head)
    opt.step(forward, head)
    losses = []
    for sign in (1, -1):
        other = copy.deepcopy(model).eval()
        with torch.no_grad():
            for i, p in enumerate(other.parameters()):
                p.copy_(reference.add_noise(p, step_seed(3, 3), sign * 1e-2, i))
        f, h = CausalLMObjective(other, options)({**batch, "labels": labels})
        with torch.no_grad():
            losses.append(h(f()))
    # the losses are known to about 1e-6, over 2 eps
    torch.testing.assert_close(
        opt.stats["projected_grad"], (losses[0] - losses[1]).view(1) / 2e-2, rtol=1e-5, atol=2e-4
    )


def test_an_untied_head_takes_no_noise_from_pseuzo():
    """h does not use it: all it could get is noise. MeZO, whose loss does use it, trains it."""
    for make, moves in ((PseuZO, False), (MeZO, True)):
        model = causal_lm("llama")
        before = model.lm_head.weight.clone()
        embedding = model.get_input_embeddings().weight.clone()
        forward, head = CausalLMObjective(model)({**batch_of(), "labels": batch_of()["input_ids"]})
        opt = make(model, lr=1e-4, eps=1e-3, weight_decay=0.5)
        for _ in range(3):
            opt.step(forward, head) if make is PseuZO else opt.step(
                lambda f=forward, h=head: h(f())
            )
        assert torch.equal(model.lm_head.weight, before) != moves
        assert not torch.equal(model.get_input_embeddings().weight, embedding)


def test_a_pass_that_never_runs_the_model_is_refused():
    with pytest.raises(RuntimeError, match="used no weight of the model"):
        MeZO(small_model()).step(lambda: 1.0)


def test_state_dict_leaves_nothing_behind():
    model = small_model()
    opt = PseuZO(model, 0.02, 1e-2)
    x, y = data(0)
    opt.step(lambda: model(x), head_for(y))
    state = opt.state_dict()
    assert "zero_order" in state["state"] and not opt.state
    opt.load_state_dict(state)
    assert not opt.state


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64], ids=str)
def test_default_dtype_does_not_matter(default):
    want, got = small_model(), small_model()
    for model, dtype in ((want, torch.float32), (got, default)):
        x, y = data(0)
        torch.set_default_dtype(dtype)
        try:
            for opt in (PseuZO(model, 0.02, 1e-2), MeZO(model.parameters(), 0.02, 1e-2)):
                if isinstance(opt, PseuZO):
                    opt.step(lambda x=x, m=model: m(x), head_for(y))
                else:
                    opt.step(lambda x=x, y=y, m=model: head_for(y)(m(x)))
        finally:
            torch.set_default_dtype(torch.float32)
    assert all(torch.equal(p, q) for p, q in zip(want.parameters(), got.parameters(), strict=True))


@pytest.mark.parametrize("poison", ["loss", "output", "gradient"])
def test_non_finite_steps_change_nothing_and_are_counted(poison):
    model = small_model()
    opt = PseuZO(model, 0.05, 1e-2, 3, weight_decay=0.5)
    calls = []

    def forward(bad):
        calls.append(1)
        o = model(x)
        return o * float("inf") if bad == "output" and len(calls) % 2 == 0 else o

    def head(o, bad):
        loss = head_for(y)(o)
        if bad == "loss":
            return loss + float("nan")
        return loss * float("inf") if bad == "gradient" else loss

    for t in range(4):
        x, y = data(t)
        before = [p.clone() for p in model.parameters()]
        bad = poison if t == 2 else ""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            opt.step(lambda bad=bad: forward(bad), lambda o, bad=bad: head(o, bad))
        unchanged = [torch.equal(p, was) for p, was in zip(model.parameters(), before, strict=True)]
        assert all(unchanged) if t == 2 else not any(unchanged)
        assert [str(w.message)[:24] for w in caught] == (
            ["1 step(s) skipped so far"] if t == 2 else []
        )
    assert opt.skipped_steps == 1 and all(p.isfinite().all() for p in model.parameters())


def test_a_diverged_run_is_warned_of_ten_times_less_often_each_time():
    x = torch.ones(4)
    opt = MeZO([x], 1e-3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(101):
            opt.step(lambda: x.sum() * float("nan"))
    assert [str(w.message).split()[0] for w in caught] == ["1", "10", "100"]
    assert opt.skipped_steps == 101 and torch.allclose(
        x, torch.ones(4), atol=1e-5
    )  # shifted in place, to rounding


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("method", [MeZO, PseuZO])
def test_frozen_parameters_are_left_alone(method, bare, tmp_path):
    """As by torch's optimizers, when all are given as a list; and the same weights are trained again once they thaw."""
    model = small_model()
    frozen = next(model.parameters()).requires_grad_(False)
    other = nn.Parameter(torch.arange(3), requires_grad=False)  # quantised, say
    x, y = data(0)
    given = [*model.parameters(), other] if bare else list(model.parameters())
    opt = method(given, 0.1, 1e-2, weight_decay=0.1, **({} if bare else {"model": model}))
    step = (lambda: opt.step(lambda: model(x), head_for(y))) if method is PseuZO else (
        lambda: opt.step(lambda: head_for(y)(model(x))))  # fmt: skip
    before = [p.detach().clone() for p in model.parameters()]
    base = copy.deepcopy(model)
    with Journal(tmp_path / "a.pzj", opt) if not bare else nullcontext():
        step()
    changed = [not torch.equal(p, was) for p, was in zip(model.parameters(), before, strict=True)]
    assert changed == [p is not frozen for p in model.parameters()] and torch.equal(
        other, torch.arange(3)
    )
    if not bare:
        replay(tmp_path / "a.pzj", base)
        assert all(
            torch.equal(p, q) for p, q in zip(base.parameters(), model.parameters(), strict=True)
        )
    frozen.requires_grad_(True)
    step()
    assert not torch.equal(frozen, before[0])
    for p in model.parameters():
        p.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter requires grad"):
        method(list(model.parameters()), 0.1)
    with pytest.raises(ValueError, match="no parameter requires grad"):
        step()


def test_groups_and_weights_that_cannot_be_meant_are_refused():
    w = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match="no option 'noise_scal'; did you mean 'noise_scale'"):
        MeZO([{"params": [w], "noise_scal": 0.0}], 0.1)
    with pytest.raises(ValueError, match="eps is one for all groups"):
        MeZO([{"params": [w], "eps": 0.1}], 0.1)
    MeZO([{"params": [w], "name": "all", "initial_lr": 0.1}], 0.1)
    offloaded = nn.Parameter(torch.ones(3, device="meta"), requires_grad=False)
    MeZO([offloaded, w], 0.1).step(lambda: w.sum())
    with pytest.raises(ValueError, match="on the meta device"):
        MeZO([nn.Parameter(torch.ones(3, device="meta"))], 0.1)
    opt = MeZO([w], 0.1)
    for copied in (copy.deepcopy, pickle.dumps):
        with pytest.raises(
            TypeError, match="make a new MeZO of the other weights, and give it state_dict"
        ):
            copied(opt)


@pytest.mark.parametrize("method", [MeZO, PseuZO])
def test_steps_in_inference_mode_and_outside_are_the_same(method):
    model, twin = small_model(), small_model()
    x, y = data(0)
    for m, mode in ((model, torch.inference_mode), (twin, nullcontext)):
        opt = method(m, 0.1, 1e-2)
        for t in range(4):
            with mode() if t < 2 else nullcontext():
                if method is PseuZO:
                    opt.step(lambda m=m: m(x), head_for(y))
                else:
                    opt.step(lambda m=m: head_for(y)(m(x)))
    assert all(
        torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True)
    )


def test_published_schedule():
    published = CyclicHyperbola.from_steps(10_000, 64)
    values = [published(t) for t in range(10_000)]
    assert (
        sum(v > 0 for v in values) == 1408
        and sum(published.clears(t) for t in range(10_000)) == 128
    )
    assert values[64 * 3] == 1 / 31 and values[64 * 11] == 0 and values[64 * 78] == 1.0
    assert CyclicHyperbola(1, 50)(0) == 0.0
    assert Linear(1.0, 0.0, 10)(5) == 0.5 and Constant(0.3)(99) == 0.3


def test_schedule_says_its_plan(capsys):
    PseuZO(small_model(), momentum=CyclicHyperbola.from_steps(10_000, 64))
    assert capsys.readouterr().out == "PseuZO active in 1408 of 10000 steps, MeZO in the rest\n"
    PseuZO(small_model(), momentum=CyclicHyperbola(1, 50))
    assert capsys.readouterr().out == "PseuZO active in 0 of 50 steps, MeZO in the rest\n"
    PseuZO(small_model())
    assert capsys.readouterr().out == ""


def test_window_is_emptied_where_the_schedule_says():
    model = small_model()
    opt = PseuZO(model, 1e-3, 1e-2, 14, CyclicHyperbola(28, 2))
    sizes = []
    for t in range(56):
        x, y = data(t)
        opt.step(lambda x=x: model(x), head_for(y))
        sizes.append(opt.stats["window"])
    cycle = [1, 1, *range(2, 14), 14, 14, 14, 14, 14, 14, 14, 14] + [0] * 6
    assert sizes == cycle * 2


def test_a_mezo_step_empties_the_window():
    class Gap(Schedule):
        def __call__(self, step):
            return 0.0 if step == 3 else 0.5

    model = small_model()
    opt = PseuZO(model, 1e-3, 1e-2, 14, Gap())
    sizes = []
    for t in range(6):
        x, y = data(t)
        opt.step(lambda x=x: model(x), head_for(y))
        sizes.append(opt.stats["window"])
    assert sizes == [1, 2, 3, 0, 1, 2]


@pytest.mark.parametrize("arguments, sentence", [
    (dict(lr=-1.0), "PseuZO: lr must be finite and not negative"),
    (dict(lr=float("nan")), "PseuZO: lr must be finite"),
    (dict(eps=0.0), "PseuZO: eps must be positive"),
    (dict(eps=float("inf")), "eps must be finite"),
    (dict(weight_decay=-0.1), "PseuZO: weight_decay must be"),
    (dict(noise_scale=-1.0), "PseuZO: noise_scale must be"),
    (dict(noise="gauss"), "unknown noise 'gauss'; known: 'hadamard', 'hadamard-fp16', 'normal', 'rademacher'"),
    (dict(rounding="up"), "unknown rounding 'up'; known: 'nearest', 'stochastic'"),
    (dict(window=0), "capacity must be an int of at least 1"),
    (dict(momentum=1.5), "must be in 0 .. 1"),
    (dict(seed=1 << 70), "a seed must fit 64 bits"),
    (dict(clip_examples=0.0), "PseuZO: clip_examples must be positive, or None, got 0"),
    (dict(clip_examples=-1.0), "PseuZO: clip_examples must be finite and not negative"),
])  # fmt: skip
def test_bad_options(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        PseuZO(small_model(), **arguments)


@pytest.mark.parametrize("arguments, sentence", [
    (dict(directions=0), "MeZO: directions must be an int of at least 1, got 0"),
    (dict(directions=1.5), "MeZO: directions must be an int of at least 1, got 1.5"),
    (dict(window=0), "MeZO: window must be an int of at least 1"),
    (dict(momentum=1.1), "MeZO: momentum must be in 0 .. 1, got 1.1"),
    (dict(momentum=float("nan")), "MeZO: momentum must be in"),
])  # fmt: skip
def test_bad_options_of_mezo(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        MeZO(small_model(), **arguments)


def test_bad_parameters():
    frozen = small_model().requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter of the model requires grad"):
        MeZO(frozen)
    with pytest.raises(TypeError, match="must be float32, bfloat16 or float16"):
        MeZO(small_model().double())
    with pytest.raises(ValueError, match=r"must be contiguous.*call \.contiguous\(\)"):
        MeZO([nn.Parameter(torch.randn(4, 5).T)])
    with pytest.raises(ValueError, match="not one of the model's"):
        MeZO([nn.Parameter(torch.zeros(3))], model=small_model())
    with pytest.raises(ValueError, match="noise_scale must be finite and not negative"):
        MeZO([{"params": small_model().parameters(), "noise_scale": -2.0}])


@pytest.mark.parametrize("forward, head, groups, error, sentence", [
    (lambda m, x: [1.0], head_for, None, TypeError, "forward must return a floating-point tensor"),
    (lambda m, x: torch.arange(4), head_for, None, TypeError, "forward must return a floating-point tensor"),
    (lambda m, x: m(x)[0], head_for, None, ValueError, r"must return \[B, P, D\] or \[B, D\]"),
    (None, head_for, None, ValueError, r"returned \(4, 5\) and then \(3, 5\)"),
    (lambda m, x: m(x), lambda y: lambda o: o, None, ValueError, "head must return a scalar"),
    (lambda m, x: m(x), lambda y: lambda o: 1.0, None, ValueError, "head must return a scalar"),
    (lambda m, x: m(x), lambda y: lambda o: torch.ones(()), None, ValueError, "does not depend on the output"),
    (lambda m, x: m(x), head_for, torch.zeros(3, dtype=torch.long), ValueError, "one per row of the output, 4, got 3"),
    (lambda m, x: m(x), head_for, torch.zeros(4), ValueError, "groups must be 4 integers"),
])  # fmt: skip
@pytest.mark.parametrize("bare", [False, True], ids=["module", "bare parameters"])
def test_bad_steps_change_nothing(forward, head, groups, error, sentence, bare):
    model = small_model()
    before = [p.clone() for p in model.parameters()]
    x, y = data(0)
    calls = []
    if forward is None:
        forward = lambda m, x: m(x[: 4 - len(calls)])  # noqa: E731
    opt = PseuZO(model.parameters() if bare else model, 0.1, 1e-2)

    def run():
        o = forward(model, x)
        calls.append(1)
        return o

    with pytest.raises(error, match=sentence):
        opt.step(run, head(y), groups=groups)
    for p, was in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(p, was, rtol=0, atol=2 * 2.0**-23 if bare else 0)


@pytest.mark.parametrize("bare", [False, True], ids=["module", "bare parameters"])
def test_bad_losses(bare):
    model = small_model()
    opt = MeZO(model.parameters() if bare else model, 0.1, 1e-2)
    with pytest.raises(ValueError, match="the loss must be a scalar"):
        opt.step(lambda: torch.ones(3, 2))
    with pytest.raises(ValueError, match="the loss must be a scalar"):
        opt.step(lambda: torch.ones(0))
    with pytest.raises(ValueError, match=r"losses of shapes \(3,\) and \(2,\)"):
        sizes = iter((3, 2))
        opt.step(lambda: torch.ones(next(sizes)))
    with pytest.raises(TypeError, match="must return a scalar tensor or a number"):
        opt.step(lambda: None)
    with pytest.raises(TypeError, match="needs a closure"):
        opt.step(1.0)
    for step in (opt.step, PseuZO(model).step, lambda: opt.step(None)):
        with pytest.raises(RuntimeError, match="there is no estimate to apply; call estimate"):
            step()
    for arguments in ((model,), (None, model), (1.0, model)):
        with pytest.raises(TypeError, match=r"PseuZO.step: needs forward\(\) -> o and head"):
            PseuZO(model).step(*arguments)


# two halves of a step

MAKERS = {
    "pseuzo": lambda p, **o: PseuZO(p, 0.02, 1e-2, 3, 0.9, 0.1, seed=2, **o),
    "pseuzo two-sided": lambda p, **o: PseuZO(
        p, 0.02, 1e-2, 3, 0.9, 0.1, seed=2, two_sided=True, **o
    ),
    "pseuzo cyclic": lambda p, **o: PseuZO(p, 0.02, 1e-2, 3, CyclicHyperbola(3, 2), seed=2, **o),
    "mezo": lambda p, **o: MeZO(p, 0.02, 1e-2, weight_decay=0.1, seed=2, **o),
    "mezo momentum": lambda p, **o: MeZO(
        p,
        0.02,
        1e-2,
        weight_decay=0.1,
        seed=2,
        momentum=0.9,
        window=3,
        directions=2,
        two_sided=False,
        **o,
    ),
}


def arguments(opt, model, t, poison=False):
    """What step() and estimate() take, for batch t."""
    x, y = data(t)
    factor = float("nan") if poison else 1.0
    dtype = next(model.parameters()).dtype
    forward, head = lambda: model(x.to(dtype)), lambda o: head_for(y)(o) * factor
    return (forward, head, LABELS) if isinstance(opt, PseuZO) else (lambda: head(forward()),)


def equal(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bare", [False, True], ids=["module", "bare parameters"])
@pytest.mark.parametrize("name", MAKERS)
def test_estimate_and_step_are_a_step(name, bare, dtype):
    """And between the two the weights are what they were; an estimate that was not applied leaves no trace."""
    whole, halves = small_model().to(dtype), small_model().to(dtype)
    one, two = (MAKERS[name](m.parameters() if bare else m) for m in (whole, halves))
    exact = not bare or dtype is torch.bfloat16  # bare fp32 is put back to rounding
    for t in range(5):
        before = copy.deepcopy(halves)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loss = one.step(*arguments(one, whole, t, poison=t == 3))
            if t % 2 == 0:
                two.estimate(*arguments(two, halves, 50 + t))  # is replaced
            assert two.estimate(*arguments(two, halves, t, poison=t == 3)).isnan() == (t == 3)
            for p, was in zip(halves.parameters(), before.parameters(), strict=True):
                torch.testing.assert_close(p, was, rtol=0, atol=0 if exact else 1e-6)
            assert two.step() is None
        assert (two._step, two.skipped_steps) == (one._step, one.skipped_steps)
        assert two.stats.keys() == one.stats.keys() >= {"projected_grad", "momentum", "window"}
        if exact:
            assert equal(whole, halves) and loss.dim() == 0
        for p, q in zip(whole.parameters(), halves.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=2e-4)
        with pytest.raises(RuntimeError, match="there is no estimate to apply"):
            two.step()
    assert not equal(halves, small_model().to(dtype)) and two.skipped_steps == 1


@pytest.mark.filterwarnings("ignore:.*skipped")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", MAKERS)
def test_a_skipped_step_changes_no_bit(name, dtype):
    """Nor the sign of a zero."""
    model = small_model().to(dtype)
    opt = MAKERS[name](model)
    opt.step(*arguments(opt, model, 0))
    with torch.no_grad():
        for p in model.parameters():
            p.view(-1)[:3] = -0.0
    before = [p.detach().clone() for p in model.parameters()]
    opt.step(*arguments(opt, model, 1, poison=True))
    assert opt.skipped_steps == 1
    for p, was in zip(model.parameters(), before, strict=True):
        assert torch.equal(p.detach().view(torch.uint8), was.view(torch.uint8))


@pytest.mark.parametrize("name", MAKERS)
def test_a_state_saved_between_estimate_and_step_is_that_before_the_estimate(name):
    model = small_model()
    opt = MAKERS[name](model)
    for t in range(4):
        opt.step(*arguments(opt, model, t))
    opt.estimate(*arguments(opt, model, 4))
    state, resumed = copy.deepcopy(opt.state_dict()), copy.deepcopy(model)
    opt.step()
    again = MAKERS[name](resumed)
    again.load_state_dict(state)
    with pytest.raises(RuntimeError, match="there is no estimate"):
        again.step()
    for t in range(4, 8):
        again.step(*arguments(again, resumed, t))
        if t > 4:
            opt.step(*arguments(opt, model, t))
    assert equal(model, resumed)


@pytest.mark.parametrize("bare", [False, True], ids=["module", "bare parameters"])
def test_a_failed_estimate_drops_the_one_before(bare):
    model = small_model().to(torch.bfloat16)
    opt = MAKERS["mezo momentum"](model.parameters() if bare else model)
    before = copy.deepcopy(model)
    opt.estimate(*arguments(opt, model, 0))
    calls = []

    def fails():
        calls.append(1)
        if len(calls) == 3:  # in the second direction, while bare parameters hold the first
            raise Broken
        return arguments(opt, model, 1)[0]()

    with pytest.raises(Broken):
        opt.estimate(fails)
    with pytest.raises(RuntimeError, match="there is no estimate"):
        opt.step()
    opt.estimate(*arguments(opt, model, 0))
    opt.param_groups[0]["lr"] = -1.0
    with pytest.raises(ValueError, match="lr must be finite and not negative"):
        opt.estimate(*arguments(opt, model, 1))
    opt.param_groups[0]["lr"] = 0.1
    with pytest.raises(RuntimeError, match="there is no estimate"):
        opt.step()
    assert equal(model, before) and opt._step == 0


def test_an_error_in_the_second_half_puts_bare_parameters_back():
    model = small_model().to(torch.bfloat16)
    opt = PseuZO(model.parameters(), 0.1, 1e-2)
    forward, head, _ = arguments(opt, model, 0)
    opt.step(forward, head, LABELS)
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match="the window holds entries with groups"):
        opt.step(forward, head)
    assert equal(model, before) and opt._step == 1


# directions and momentum


@pytest.mark.parametrize("bare", [False, True], ids=["module", "bare parameters"])
@pytest.mark.parametrize("two_sided", [False, True], ids=["one-sided", "two-sided"])
@pytest.mark.parametrize("momentum, window", [(0.0, 14), (0.8, 3)])
def test_directions_and_momentum_are_the_formula(bare, two_sided, momentum, window):
    """x <- (1 - lr wd) x - lr sum_age mu^age mean_j c_j z_j, with a buffer of every past gradient. Step 2 is skipped:
    it counts as a step of gradient 0."""
    lr, eps, decay, q = 0.02, 1e-2, 0.3, 3
    model, want = small_model(), small_model()
    opt = MeZO(model.parameters() if bare else model, lr, eps, weight_decay=decay, two_sided=two_sided, seed=9,
               directions=q, momentum=momentum, window=window)  # fmt: skip
    gradients = []
    for t in range(7):
        x, y = data(t)
        calls = []

        def closure(x=x, y=y, calls=calls, t=t):
            calls.append(1)
            return head_for(y)(model(x)) * (float("inf") if t == 2 and len(calls) == 3 else 1.0)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            opt.step(closure)
        assert len(calls) == (2 * q if two_sided else q + 1)
        gradient = [torch.zeros_like(p, dtype=torch.float64) for p in want.parameters()]
        for j in range(q if t != 2 else 0):
            seed = direction_seed(9, t, j)
            assert (seed == step_seed(9, t)) == (j == 0)
            z = [reference.noise(p.shape, seed, i) for i, p in enumerate(want.parameters())]
            losses = losses_beside(want, z, (eps, -eps if two_sided else 0.0), x, y)
            c = (losses[0] - losses[1]) / (2 * eps if two_sided else eps)
            gradient = [g + c / q * zi.double() for g, zi in zip(gradient, z, strict=True)]
        gradients.append(gradient)
        past = list(enumerate(reversed(gradients[-window:]))) if momentum else [(0, gradient)]
        if t != 2:
            with torch.no_grad():
                for i, p in enumerate(want.parameters()):
                    update = sum(momentum**age * g[i] for age, g in past)
                    p.copy_((1 - lr * decay) * p.double() - lr * update)
        assert opt.stats["window"] == (min(t + 1, window) if momentum else 0)
    assert opt.skipped_steps == 1
    for p, q_ in zip(model.parameters(), want.parameters(), strict=True):
        # losses about 2 are known to 2^-23, over eps 2.4e-5 of a coefficient; 7 steps, lr 0.02, momentum's sum 2.4
        torch.testing.assert_close(p, q_, rtol=0, atol=3e-5)


def test_momentum_is_sgd_with_momentum_until_the_window_is_full():
    """torch's own buffer, given c z as its gradient; then the oldest gradient leaves the sum."""
    model, want = small_model(), small_model()
    opt = MeZO(model, 0.01, 1e-2, seed=1, momentum=0.9, window=4)
    sgd = torch.optim.SGD(want.parameters(), 0.01, momentum=0.9)
    for t in range(6):
        opt.step(*arguments(opt, model, t))
        c = opt.stats["projected_grad"]
        for i, p in enumerate(want.parameters()):
            p.grad = c * reference.noise(p.shape, step_seed(1, t), i)
        sgd.step()
        far = max(
            float((p - q).detach().abs().max())
            for p, q in zip(model.parameters(), want.parameters(), strict=True)
        )
        # six roundings of values below 2; then 0.01 * 0.9^4 c z of step 0 is missing
        assert far < 1e-6 if t < 4 else far > 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.filterwarnings("ignore:.*skipped")
def test_directions_and_momentum_resume_and_replay_to_the_bit(dtype, tmp_path):
    def make(m):
        return MeZO(m, 0.02, 1e-2, weight_decay=0.1, seed=2, directions=2, momentum=0.7, window=3)

    model = small_model().to(dtype)
    base = copy.deepcopy(model)
    opt = make(model)
    with Journal(tmp_path / "run.pzj", opt):
        for t in range(5):
            opt.step(*arguments(opt, model, t, poison=t == 1))
        torch.save(opt.state_dict(), tmp_path / "opt.pt")
        resumed = copy.deepcopy(model)
        for t in range(5, 9):
            opt.step(*arguments(opt, model, t))
    again = MeZO(resumed, 0.5)  # all of its settings come from the state
    again.load_state_dict(torch.load(tmp_path / "opt.pt", weights_only=True))
    for t in range(5, 9):
        again.step(*arguments(again, resumed, t))
    assert equal(model, resumed)
    assert replay(tmp_path / "run.pzj", base) == 9
    assert equal(model, base)


# losses of examples


def test_losses_of_examples_are_their_mean():
    for make in (
        MAKERS["mezo"],
        MAKERS["mezo momentum"],
        MAKERS["pseuzo"],
        MAKERS["pseuzo cyclic"],
    ):
        models = small_model(), small_model()
        losses = []
        for model, reduction in zip(models, ("mean", "none"), strict=True):
            opt = make(model)
            for t in range(4):
                x, y = data(t)
                head = lambda o, y=y, r=reduction: nn.functional.cross_entropy(o, y, reduction=r)  # noqa: E731
                forward = lambda m=model, x=x: m(x)  # noqa: E731
                loss = (
                    opt.step(forward, head)
                    if isinstance(opt, PseuZO)
                    else opt.step(lambda f=forward, h=head: h(f()))
                )
            losses.append(loss)
        assert losses[0].shape == losses[1].shape == ()
        torch.testing.assert_close(*losses)
        for p, q in zip(*(m.parameters() for m in models), strict=True):
            torch.testing.assert_close(
                p, q, rtol=0, atol=2e-5
            )  # losses are known to 2^-23, over eps


@pytest.mark.parametrize("two_sided", [False, True], ids=["one-sided", "two-sided"])
@pytest.mark.parametrize("values, want", [
    ([1.0, -2.0, 9.0, 3.0, -40.0], 1 - 2 + 6 + 3 - 6),  # median of sizes 3
    ([1.0, -2.0, 9.0, -40.0], 1 - 2 + 4 - 4),  # the lower one of 2 and 9
    ([0.0, 0.0, 7.0], 7),  # a median of 0 clips nothing
    ([5.0], 5),
])  # fmt: skip
def test_mezo_clips_examples(values, want, two_sided):
    model = nn.Linear(2, 2)
    opt = MeZO(model, 1e-3, 0.5, clip_examples=2.0, two_sided=two_sided)
    slopes = torch.tensor(values)
    clean, plus, minus = 1 + 0 * slopes, 1 + 0.5 * slopes, 1 - 0.5 * slopes
    results = iter((plus, minus) if two_sided else (clean, plus))
    loss = opt.step(lambda: (model(torch.ones(1, 2)), next(results))[1])
    torch.testing.assert_close(
        opt.stats["projected_grad"], torch.tensor([want / len(values)], dtype=torch.float32)
    )
    assert loss == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("two_sided", [False, True], ids=["one-sided", "two-sided"])
@pytest.mark.parametrize("at", [0, 1])
def test_an_example_that_is_not_finite_skips_the_step_though_it_would_be_clipped(
    bad, two_sided, at
):
    model = nn.Linear(2, 2)
    opt = MeZO(model, 1.0, 0.5, clip_examples=2.0, two_sided=two_sided)
    before = copy.deepcopy(model)
    losses = [torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1.5, 3.0, 3.0])]
    losses[at][1] = bad
    results = iter(losses)
    with pytest.warns(UserWarning, match="skipped"):
        opt.step(lambda: (model(torch.ones(1, 2)), next(results))[1])
    assert equal(model, before) and opt.skipped_steps == 1


def test_clipping_needs_the_losses_of_the_examples():
    model = small_model()
    x, y = data(0)
    opt = MeZO(model, 0.1, clip_examples=2.0)
    with pytest.raises(
        ValueError, match=r"clip_examples needs the loss of each example, \[B\], and got one number"
    ):
        opt.step(lambda: head_for(y)(model(x)))
    pseuzo = PseuZO(model, 0.1, momentum=0.0, clip_examples=2.0)  # its MeZO steps too
    with pytest.raises(ValueError, match="clip_examples needs the loss of each example"):
        pseuzo.step(lambda: model(x), head_for(y))
    pseuzo.step(lambda: model(x), lambda o: nn.functional.cross_entropy(o, y, reduction="none"))


@pytest.mark.parametrize("two_sided", [False, True], ids=["one-sided", "two-sided"])
@pytest.mark.parametrize(
    "examples", [None, torch.tensor([7, 3, 7, 3, 5, 9])], ids=["rows", "examples"]
)
def test_pseuzo_clips_examples(examples, two_sided):
    """The newest coefficient is the sum of the clipped projected gradients, and older entries are projected on the same
    gradient."""
    eps, ratio = 1e-2, 1.5
    model, plain = small_model(), small_model()
    opt = PseuZO(model, 0.0, eps, 4, 0.7, seed=3, clip_examples=ratio, two_sided=two_sided)
    groups = torch.tensor([0, 1, 1, 0, 2, 1])
    window = reference.EmaWindow(4, momentum=0.7, eps=eps)
    clipped_any = 0
    for t in range(5):
        x, y = data(t, 6)
        opt.step(lambda x=x: model(x), head_for(y), groups, examples)
        seed = step_seed(3, t)
        outputs = {}
        for by in (0.0, eps, -eps):
            other = copy.deepcopy(plain)
            with torch.no_grad():
                for i, p in enumerate(other.parameters()):
                    p.copy_(reference.add_noise(p, seed, by, i))
                outputs[by] = other(x)
        change = (outputs[eps] - outputs[-eps]) / 2 if two_sided else outputs[eps] - outputs[0.0]
        o = outputs[0.0].clone().requires_grad_()
        (e,) = torch.autograd.grad(head_for(y)(o), o)
        rows = (change * e).sum(1) / eps
        of = examples if examples is not None else torch.arange(6)
        p = {int(i): float(rows[of == i].sum()) for i in of.unique()}
        sizes = sorted(map(abs, p.values()))
        limit = ratio * sizes[(len(sizes) - 1) // 2]
        factors = torch.tensor([min(1.0, limit / abs(p[int(i)])) for i in of])
        clipped_any += int((factors < 1).sum())
        _, coefs = window.step(seed, None, change, e * factors[:, None], groups)
        want = sum(max(-limit, min(limit, v)) for v in p.values())
        torch.testing.assert_close(
            opt.stats["projected_grad"][0], torch.tensor(want), rtol=1e-4, atol=1e-5
        )
        torch.testing.assert_close(opt._last[0], coefs, rtol=1e-4, atol=1e-5)
    assert clipped_any > 3


@pytest.mark.filterwarnings("ignore:.*skipped")
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_pseuzo_skips_what_is_not_finite_though_it_would_be_clipped(bad):
    model = small_model()
    opt = PseuZO(model, 0.05, 1e-2, clip_examples=2.0)
    before = copy.deepcopy(model)
    x, y = data(0)
    calls = []

    def forward():
        calls.append(1)
        o = model(x)
        if len(calls) == 2:
            o[1, 2] = bad
        return o

    opt.step(forward, head_for(y))
    assert opt.skipped_steps == 1 and equal(model, before)


def test_examples_must_be_integers_one_per_row():
    model = small_model()
    x, y = data(0)
    opt = PseuZO(model, clip_examples=2.0)
    for examples in (
        torch.zeros(3, dtype=torch.long),
        torch.zeros(4),
        torch.zeros(4, 1, dtype=torch.long),
    ):
        with pytest.raises(ValueError, match="examples must be 4 integers, one per row"):
            opt.step(lambda: model(x), head_for(y), None, examples)


# an output head of its own, trained by the exact gradient


class Headed(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(5)
        self.body, self.out = nn.Linear(6, 8), nn.Linear(8, 5)
        self.to(dtype)


def headed_steps(model, opt, steps, poison=()):
    dtype = model.out.weight.dtype
    for t in steps:
        x, y = data(t)
        factor = float("nan") if t in poison else 1.0
        opt.step(
            lambda x=x: torch.tanh(model.body(x.to(dtype))),
            lambda o, y=y, f=factor: head_for(y)(model.out(o)) * f,
        )


def exact_groups(model, lr=0.05, weight_decay=0.2, **options):
    head = {
        "params": model.out.parameters(),
        "lr": lr,
        "weight_decay": weight_decay,
        "exact_gradient": True,
    }
    return [{"params": model.body.parameters()}, head | options]


@pytest.mark.filterwarnings("ignore:.*skipped")
@pytest.mark.parametrize("maximize", [False, True])
def test_exact_gradients_are_those_of_sgd(maximize):
    """For the head; the body sees what it would see with the head frozen. A skipped step decays nothing."""
    model = Headed()
    opt = PseuZO(
        exact_groups(model, maximize=maximize), 0.02, 1e-2, 3, seed=4, weight_decay=0.1, model=model
    )
    for t in range(5):
        before = copy.deepcopy(model)
        headed_steps(model, opt, [t], poison=(2,))
        if t == 2:
            assert equal(model, before)
            continue
        x, y = data(t)
        head_for(y)(before.out(torch.tanh(before.body(x)))).backward()
        for p, was in zip(model.out.parameters(), before.out.parameters(), strict=True):
            sign = -1 if maximize else 1
            torch.testing.assert_close(
                p, (1 - 0.05 * 0.2) * was - sign * 0.05 * was.grad, rtol=0, atol=1e-6
            )
        if t == 0:
            frozen = copy.deepcopy(before)
            twin = PseuZO(
                frozen.body.parameters(), 0.02, 1e-2, 3, seed=4, weight_decay=0.1, model=frozen
            )
            headed_steps(frozen, twin, [0])
            assert equal(model.body, frozen.body) and equal(before.out, frozen.out)
        assert not torch.equal(model.body.weight, before.body.weight)
    assert opt.skipped_steps == 1


def test_exact_gradients_round_stochastically_and_reproducibly():
    moved = []
    for _ in range(2):
        model = Headed(torch.bfloat16)
        with torch.no_grad():
            model.out.weight.fill_(1.0)
        opt = PseuZO(exact_groups(model, lr=1e-3, weight_decay=0.5), 0.0, 1e-2, model=model, seed=3)
        for t in range(64):  # decay of 5e-4 a step, a fifteenth of an ulp below 1
            headed_steps(model, opt, [t])
        moved.append(model.out.weight.detach().float())
    assert torch.equal(*moved)
    # lost altogether if rounded to nearest. The gradient sums to 0 over the classes; 40 weights, of which 64 roundings
    # up or down with chances 1/8 and 7/8 have an sd of 2^-8 * sqrt(64 * 7 / 64) each
    assert abs(float(moved[0].mean()) - (1 - 5e-4) ** 64) < 4 * 2.0**-8 * math.sqrt(7 / 40)
    assert moved[0].mean() < 0.99


def test_a_gradient_that_is_not_finite_skips_the_whole_step():
    model = Headed()
    opt = PseuZO(exact_groups(model), 0.02, 1e-2, model=model)
    before = copy.deepcopy(model)
    x, _ = data(0)
    with pytest.warns(UserWarning, match="skipped"):
        # the slope of sqrt at 0 is infinite, and o does not see it
        opt.step(
            lambda: model.body(x),
            lambda o: model.out(o).square().mean() + (model.out.bias * 0).abs().sqrt().sum(),
        )
    assert equal(model, before) and opt.skipped_steps == 1


def test_exact_gradient_in_other_steps_and_places(tmp_path):
    model = Headed()
    opt = PseuZO(exact_groups(model), 0.02, 1e-2, momentum=0.0, model=model)
    before = copy.deepcopy(model)
    headed_steps(model, opt, range(2))  # MeZO steps
    assert equal(model.out, before.out) and not equal(model.body, before.body)
    with pytest.raises(ValueError, match="Journal: updates by exact_gradient are no seeds"):
        Journal(tmp_path / "run.pzj", opt)
    with pytest.raises(
        ValueError, match="MeZO: exact_gradient=True needs the head that PseuZO differentiates"
    ):
        MeZO(exact_groups(model), model=model)
    wrong = PseuZO([{"params": model.out.parameters()}, {"params": model.body.parameters(), "exact_gradient": True}],
                   0.02, model=model)  # fmt: skip
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=r"the head does not use a parameter of shape \(8, 6\)"):
        headed_steps(model, wrong, [0])
    assert equal(model, before)


@pytest.mark.parametrize("options", [[17, 4], None], ids=["options", "language modelling"])
def test_exact_gradient_of_a_causal_lm_head(options):
    model = causal_lm("llama")
    labels = LABELS if options else batch_of()["input_ids"]
    objective = CausalLMObjective(model, options)
    forward, head = objective({**batch_of(), "labels": labels})
    body = [p for n, p in model.named_parameters() if n != "lm_head.weight"]
    opt = PseuZO([{"params": body}, {"params": [model.lm_head.weight], "lr": 0.5, "exact_gradient": True}],
                 1e-4, 1e-3, model=model)  # fmt: skip
    before, weight = copy.deepcopy(model), model.lm_head.weight
    loss = opt.step(forward, head)
    f, h = CausalLMObjective(before, options)({**batch_of(), "labels": labels})
    (gradient,) = torch.autograd.grad(h(f()), before.lm_head.weight)
    torch.testing.assert_close(weight, before.lm_head.weight - 0.5 * gradient, rtol=0, atol=1e-6)
    assert gradient.abs().max() > 1e-3 and loss > 0


# what a resumed run knows


class Experts(nn.Module):
    """Which of two large layers runs depends on the data: x[0, 0] > 0 takes the second."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(6)
        self.first, self.second, self.out = (
            nn.Linear(6, 20_000),
            nn.Linear(6, 20_000),
            nn.Linear(20_000, 5),
        )

    def forward(self, x):
        return self.out(self.second(x) if x[0, 0] > 0 else self.first(x)) / 100


@pytest.mark.parametrize("name", ["pseuzo", "mezo"])
def test_a_resumed_run_knows_which_weights_were_used(name, tmp_path):
    """The second expert ran before the state was saved, and not again: the unbroken run goes on decaying it."""
    model = Experts()

    def step(opt, m, t):
        x, y = data(t)
        x[0, 0] = 1.0 if t == 1 else -1.0
        forward, head = lambda: m(x), head_for(y)
        opt.step(forward, head) if isinstance(opt, PseuZO) else opt.step(lambda: head(forward()))

    opt = MAKERS[name](model)
    never = model.second.weight.clone()
    step(opt, model, 0)
    assert torch.equal(model.second.weight, never)
    for t in range(1, 4):
        step(opt, model, t)
    kind = "output" if name == "pseuzo" else "loss"
    state = copy.deepcopy(opt.state_dict())
    assert state["state"]["zero_order"]["used"] == {kind: [0, 1, 2, 3, 4, 5]}
    resumed = copy.deepcopy(model)
    again = MAKERS[name](resumed)
    again.load_state_dict(state)
    assert again.state_dict()["state"]["zero_order"]["used"] == {kind: [0, 1, 2, 3, 4, 5]}
    for t in range(4, 7):
        step(opt, model, t)
        step(again, resumed, t)
        assert equal(model, resumed)
    # a new optimizer knows nothing, though the model has run before
    fresh = MAKERS[name](model)
    before = model.second.weight.clone()
    step(fresh, model, 4)
    assert torch.equal(model.second.weight, before)
    old = copy.deepcopy(state)
    del old["state"]["zero_order"]["used"]
    with pytest.raises(ValueError, match="it lacks used"):
        again.load_state_dict(old)


def test_a_second_optimizer_finds_weights_used_outside_their_module():
    """What the first one's passes learned of the model does not keep the second from seeing what is used."""
    model = Tied()
    ids = torch.randint(0, 300, (3, 5))
    for seed in range(2):
        opt = PseuZO(model, 1e-5, 1e-2, seed=seed)
        for _ in range(4):
            before = {name: p.clone() for name, p in model.named_parameters()}
            opt.step(lambda: model(ids), lambda o: o.square().mean())
            assert not any(torch.equal(p, before[name]) for name, p in model.named_parameters())


# in other people's loops


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["pseuzo", "mezo momentum"])
def test_update_rms_is_that_of_the_update(name, dtype):
    model = nn.Sequential(nn.Linear(6, 300), nn.Tanh(), nn.Linear(300, 5)).to(dtype)
    params = list(model.parameters())
    groups = [{"params": params[:2], "lr": 0.5, "noise_scale": 2.0}, {"params": params[2:]}]
    opt = MAKERS[name](groups, model=model)
    assert opt.update_rms() == {}
    for t in range(3):
        before = [p.detach().clone() for p in params]
        opt.step(*arguments(opt, model, t))
    (key,) = ratios = opt.update_rms()
    assert key == str(dtype).removeprefix("torch.")
    keeps = [1 - 0.1 * (0.5 if i < 2 else opt.param_groups[1]["lr"]) for i in range(4)]
    update = torch.cat(
        [(p - k * was).flatten() for p, k, was in zip(params, keeps, before, strict=True)]
    ).float()
    rms = torch.cat([p.detach().flatten() for p in params]).float().square().mean().sqrt()
    ulp = 2.0 ** math.floor(math.log2(rms)) * torch.finfo(dtype).eps
    # 3605 normals have an rms known to 1 / sqrt(2 * 3605) of itself; rounding to bf16 adds half an ulp to 20 or more
    assert float(ratios[key]) == pytest.approx(
        float(update.detach().square().mean().sqrt()) / ulp, rel=0.06
    )


def test_accelerate_and_schedulers():
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    for name in MAKERS:
        model, twin = small_model(), small_model()
        opt, other = MAKERS[name](model), MAKERS[name](twin)
        for t in range(2):
            opt.step(*arguments(opt, model, t))
            other.step(*arguments(other, twin, t))
        wrapped = accelerator.prepare(opt)
        schedulers = [torch.optim.lr_scheduler.LinearLR(o, 0.5, 1.0, 4) for o in (opt, other)]
        for t in range(2, 6):
            opt.estimate(*arguments(opt, model, t))
            wrapped.step()
            wrapped.zero_grad()
            other.step(*arguments(other, twin, t))
            for scheduler in schedulers:
                scheduler.step()
        assert equal(model, twin) and opt.param_groups[0]["lr"] == other.param_groups[0]["lr"]
        state = {k: v for k, v in wrapped.state_dict()["state"].items()}
        assert state.keys() == {"zero_order"}


@pytest.mark.parametrize("clip", [None, 2.0])
@pytest.mark.parametrize("name", MAKERS)
def test_no_step_reads_a_value_back(name, clip, monkeypatch):
    monkeypatch.setattr(
        _Skips, "tell", lambda self: None
    )  # on a CPU it looks at once; on a GPU when the news is there
    model = Headed()
    if name.startswith("mezo"):
        opt = MAKERS[name](model, clip_examples=clip)
    else:
        opt = MAKERS[name](exact_groups(model), clip_examples=clip, model=model)
    assert isinstance(opt, ZeroOrder)
    x, y = data(0)
    examples = torch.tensor([0, 0, 1, 2])
    forward = lambda: torch.tanh(model.body(x))  # noqa: E731
    head = lambda o: nn.functional.cross_entropy(model.out(o), y, reduction="none")  # noqa: E731
    steps = 0
    for _ in range(8):
        with Waits() as waits:
            if isinstance(opt, PseuZO):
                opt.step(forward, head, LABELS, examples)
            else:
                opt.step(lambda: head(forward()))
            opt.update_rms()
        assert waits.seen == []
        steps += 1
    assert opt._step == steps


def test_half_precision_sums_restore_bare_parameters_as_exactly():
    """A shift by eps is taken back in the pass of the update: rounded to half precision it would leave 1e-3 of it."""
    drifts = {}
    for noise in ("hadamard", "hadamard-fp16"):
        model = causal_lm("opt").eval()
        start = [p.detach().clone() for p in model.parameters()]
        opt = MeZO(model.parameters(), lr=0.0, eps=1e-2, noise=noise)
        for t in range(4):
            batch = batch_of(seed=t)
            opt.step(lambda b=batch, m=model: m(**b).logits.square().mean())
        drifts[noise] = [p.detach() - x for p, x in zip(model.parameters(), start, strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(*drifts.values(), strict=True))
    assert max(float(d.abs().max()) for d in drifts["hadamard-fp16"]) < 1e-5


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_groups_may_change_in_mid_run(make):
    """What was learned of them before must not be used any more: as of an optimizer that is made then."""
    model = causal_lm("opt").eval()
    opt, weight = make(model), model.model.decoder.layers[0].fc1.weight
    run_steps(opt, model, 5)
    for change in ("noise_scale", "frozen", "thawed"):
        twin = copy.deepcopy(model).requires_grad_()
        again = make(twin)
        again.load_state_dict(opt.state_dict())
        for m, o in ((model, opt), (twin, again)):
            if change == "noise_scale":
                o.param_groups[0]["noise_scale"] = 0.5
            m.model.decoder.layers[0].fc1.weight.requires_grad_(change != "frozen")
        before = weight.clone()
        assert torch.equal(run_steps(opt, model, 4), run_steps(again, twin, 4))
        assert all(
            torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True)
        )
        assert torch.equal(weight, before) == (change == "frozen")


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_backward_of_a_forward_before_the_step_fails_loudly(make):
    model = causal_lm("opt").eval()
    loss = model(**batch_of()).logits.square().mean()
    run_steps(make(model), model, 1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


AUTOCAST_MAKERS = {
    "mezo": lambda p: MeZO(p, 1e-2, 1e-2, seed=2),
    "mezo one-sided": lambda p: MeZO(p, 1e-2, 1e-2, two_sided=False, seed=2),
    "pseuzo": lambda p: PseuZO(p, 1e-2, 1e-2, 3, seed=2),
    "pseuzo two-sided": lambda p: PseuZO(p, 1e-2, 1e-2, 3, two_sided=True, seed=2),
}
WHERE = (
    "a step",
    "the loop",
    "a pass",
    "the loop and a pass, which caches",
    "the loop, and what is run before a step",
)


def steps_under_autocast(make, bare, where, cache):
    """Slopes, losses and weights of some steps, and the losses of an evaluation after each, all to the bit."""
    net, ids = Tied(vocab=24, width=16), torch.arange(12).view(4, 3)
    opt = make(net.parameters() if bare else net)

    def autocast(inside="", cache=cache):
        return (
            torch.autocast("cpu", torch.bfloat16, cache_enabled=cache)
            if inside in where
            else nullcontext()
        )

    inner = torch.autocast("cpu", torch.bfloat16, cache_enabled=cache)

    def run():
        with inner if "pass" in where else nullcontext():
            return net.eval()(ids).float()

    def loss_of(o):
        return nn.functional.cross_entropy(o, LABELS)

    found = []
    with autocast("the loop"):
        for _ in range(5):
            if "before" in where:  # casts of weights that the step then changes
                loss_of(run()).backward()
            with autocast("a step"):
                args = (run, loss_of) if isinstance(opt, PseuZO) else (lambda: loss_of(run()),)
                enabled = torch.is_autocast_cache_enabled()
                found += [opt.step(*args), *opt.stats["projected_grad"]]
                assert torch.is_autocast_cache_enabled() == enabled
                with torch.no_grad():
                    found.append(loss_of(run()))
    return torch.stack(found), [p.detach() for p in net.parameters()]


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("bare", [False, True], ids=["module", "parameters"])
@pytest.mark.parametrize("name", AUTOCAST_MAKERS)
def test_no_step_uses_or_leaves_casts_that_autocast_caches(name, bare, where):
    """To the bit those of an autocast that caches nothing, through a module that uses a weight outside its module."""
    got, want = (
        steps_under_autocast(AUTOCAST_MAKERS[name], bare, where, cache) for cache in (True, False)
    )
    assert torch.equal(got[0], want[0])
    assert all(map(torch.equal, got[1], want[1]))
    plain = steps_under_autocast(AUTOCAST_MAKERS[name], bare, "nowhere", True)
    assert not torch.equal(plain[0], want[0]), "it was in bf16"


def test_a_context_of_perturbed_weights_leaves_no_casts():
    net, ids = (
        Tied().eval(),
        torch.arange(12).view(4, 3),
    )  # with a weight that is not copied beforehand
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before = net(ids)
        with perturbed(net, 3, 0.5):
            inside = net(ids)
        assert torch.equal(net(ids), before)
    with (
        torch.no_grad(),
        torch.autocast("cpu", torch.bfloat16, cache_enabled=False),
        perturbed(net, 3, 0.5),
    ):
        assert torch.equal(net(ids), inside) and not torch.equal(inside, before)


ONE_PROCESS = "runs in one process, but this is one of 2 ranks"


def test_several_ranks_are_refused(monkeypatch):
    """At the constructor and at every step; nothing is changed. A group of one rank is none."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    model, (x, y) = small_model(), data(0)
    before = copy.deepcopy(model.state_dict())
    mezo, pseuzo = MeZO(model), PseuZO(model.parameters())
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        ddp = nn.parallel.DistributedDataParallel(model)
        for use in (
            lambda: MeZO(model), lambda: PseuZO(ddp), lambda: MeZO(model.parameters()),
            lambda: mezo.step(lambda: head_for(y)(model(x))), lambda: mezo.estimate(lambda: head_for(y)(model(x))),
            lambda: pseuzo.step(lambda: model(x), head_for(y)),
        ):  # fmt: skip
            with pytest.raises(ValueError, match=ONE_PROCESS):
                use()
        assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
        MeZO(ddp).step(lambda: head_for(y)(ddp(x)))
    finally:
        torch.distributed.destroy_process_group()
    mezo.step(lambda: head_for(y)(model(x)))


RANK = """
import sys, torch
from pseuzo import MeZO
torch.distributed.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=int(sys.argv[2]), world_size=2)
try:
    MeZO(torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2)))
except ValueError as error:
    print(error)
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_each_of_two_processes_is_refused(tmp_path):
    args = [sys.executable, "-c", RANK, str(tmp_path / "store")]
    ranks = [
        subprocess.Popen([*args, str(rank)], stdout=subprocess.PIPE, text=True) for rank in range(2)
    ]
    assert all(ONE_PROCESS in rank.communicate(timeout=300)[0] for rank in ranks)
