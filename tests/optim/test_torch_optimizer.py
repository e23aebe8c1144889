"""PseuZO and MeZO work as torch optimizers in other people's loops."""

import copy
import warnings
from contextlib import nullcontext

import pytest
import torch
from helpers import Waits, run_steps
from optimizers import (
    LABELS,
    MAKERS,
    Headed,
    arguments,
    data,
    equal,
    exact_groups,
    head_for,
    small_model,
    with_data,
)
from pseuzo import (
    CausalLMObjective,
    MeZO,
    PseuZO,
)
from pseuzo.optim.base import ZeroOrder
from pseuzo.optim.seeds import ROUNDING_DOMAIN, step_seed
from pseuzo.optim.skips import Skips
from pseuzo.train.journal import Journal
from pseuzo.train.replay import replay
from tiny_models import Tied, batch_of, causal_lm
from torch import nn

from pseuzo_kernels import reference


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
        # the projected gradient is 2^-14, and an ulp of 1 is 2^-7
        losses = iter([2**-14 * 1e-2, -(2**-14) * 1e-2])
        x = torch.ones(1, 256, dtype=torch.bfloat16)
        opt.step(lambda losses=losses, model=model, x=x: (model(x), next(losses))[1])
        z = reference.noise((256, 256), step_seed(1, 0), 0)
        moved[rounding] = float(
            ((1 - model.weight.detach().float()) * z).sum() / (2**-14 * (z * z).sum())
        )
        want = torch.ones(256, 256, dtype=torch.bfloat16)
        reference.update_(
            want,
            step_seed(1, 0),
            2**-14,
            lr=1.0,
            rounding=rounding,
            rounding_seed=step_seed(1, 0, ROUNDING_DOMAIN),
        )
        assert torch.equal(model.weight, want)
    # The rounding error is at most an ulp per element, so the error of the ratio is at most 5 * 2^7
    # / 256 * sqrt(|z| / 2^7) < 0.6.
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("make", [MeZO, PseuZO])
def test_bare_16_bit_parameters_do_not_drift(make, dtype):
    """100 steps with a rate of 0, some of them skipped, change no bit. A step equals that of the
    whole module."""
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
    other._steps = opt.steps
    if make is PseuZO:
        opt.window.clear()
    for o in (opt, other):
        o.param_groups[0]["lr"] = 0.05
    step(opt, model, 7, 1.0)
    step(other, twin, 7, 1.0)
    for p, q, was in zip(model.parameters(), twin.parameters(), before, strict=True):
        assert torch.equal(p, q) and not torch.equal(p, was)


def test_an_untied_head_takes_no_noise_from_pseuzo():
    """PseuZO's h does not use the head, so the head could only get noise. MeZO, whose loss uses the
    head, trains it."""
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
    # Bare parameters are shifted in place, and restored up to rounding.
    assert opt.skipped_steps == 101 and torch.allclose(x, torch.ones(4), atol=1e-5)


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("method", [MeZO, PseuZO])
def test_frozen_parameters_are_left_alone(method, bare, tmp_path):
    """Frozen parameters in a list are left alone, as by torch's optimizers. They are trained again
    once they are unfrozen."""
    model = small_model()
    frozen = next(model.parameters()).requires_grad_(False)
    other = nn.Parameter(torch.arange(3), requires_grad=False)  # such as quantised weights
    x, y = data(0)
    given = [*model.parameters(), other] if bare else list(model.parameters())
    opt = method(given, 0.1, 1e-2, weight_decay=0.1, **({} if bare else {"model": model}))
    step = (
        (lambda: opt.step(lambda: model(x), head_for(y)))
        if method is PseuZO
        else (lambda: opt.step(lambda: head_for(y)(model(x))))
    )
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
        state = wrapped.state_dict()["state"]
        of_weights = range(4) if name == "mezo-svrg" else ()
        assert state.keys() == {"zero_order", *of_weights}


@pytest.mark.parametrize("clip", [None, 2.0])
@pytest.mark.parametrize("name", MAKERS)
def test_no_step_reads_a_value_back(name, clip, monkeypatch):
    # On a CPU the warning reads the count at once, on a GPU only when it has arrived.
    monkeypatch.setattr(Skips, "tell", lambda self: None)
    model = Headed()
    if name.startswith("pseuzo"):
        opt = MAKERS[name](exact_groups(model), clip_examples=clip, model=model)
    else:
        opt = MAKERS[name](model, clip_examples=clip)
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
                opt.step(*with_data(opt, lambda: head(forward())))
            opt.update_rms()
        assert waits.seen == []
        steps += 1
    assert opt.steps == steps


def test_half_precision_sums_restore_bare_parameters_as_exactly():
    """The pass of the update also takes back a shift by eps. If it rounded that shift to half
    precision, it would leave 1e-3 of it."""
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
    """A change discards what was learned about the groups before, as if the optimizer were new."""
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
