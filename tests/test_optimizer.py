"""PseuZO and MeZO against the formulas written out plainly, and as torch optimizers."""

import copy
import warnings

import pytest
import torch
from models import Tied, batch_of, causal_lm
from pseuzo import CausalLMObjective, Constant, CyclicHyperbola, Linear, MeZO, PseuZO, Schedule
from pseuzo.optimizer import ROUNDING_DOMAIN, step_seed
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


def plain_pseuzo(model, steps, lr, eps, K, momentum, decay, groups, seed, two_sided=False, scale=None):
    """PseuZO as in the paper, in float64 except for the forward: no ring, no fused kernels, weights copied about."""
    params = list(model.parameters())
    scale = scale or [1.0] * len(params)
    entries = []
    for t in range(steps):
        x, y = data(t)
        s = step_seed(seed, t)
        z = [f * reference.noise(p.shape, s, i) for i, (p, f) in enumerate(zip(params, scale, strict=True))]

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
                dot = sum(d[groups == g].mean(0) @ e[groups == g].double().sum(0) for g in groups.unique())
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
    for p, q, start in zip(model.parameters(), want.parameters(), small_model().parameters(), strict=True):
        # o1 - o0 of outputs about 1 is known to 2^-23 / eps = 1.2e-5 of the change; six steps of it, coefficients
        # about 1
        torch.testing.assert_close(p, q, rtol=0, atol=2e-5 * (1 + float((q - start).detach().abs().max())))
        assert (p - start).abs().max() > 1e-2


@pytest.mark.parametrize("bare", [False, True], ids=["module", "bare parameters"])
@pytest.mark.parametrize("two_sided", [False, True], ids=["one-sided", "two-sided"])
def test_mezo_is_the_formula(bare, two_sided):
    lr, eps, decay = 0.05, 1e-2, 0.3
    model, want = small_model(), small_model()
    opt = MeZO(model.parameters() if bare else model, lr, eps, weight_decay=decay, two_sided=two_sided, seed=9)
    for t in range(5):
        x, y = data(t)
        opt.step(lambda x=x, y=y: nn.functional.cross_entropy(model(x), y))
        z = [reference.noise(p.shape, step_seed(9, t), i) for i, p in enumerate(want.parameters())]
        losses = []
        for by in (eps, -eps if two_sided else 0.0):
            other = copy.deepcopy(want)
            with torch.no_grad():
                for p, zi in zip(other.parameters(), z, strict=True):
                    p.add_(by * zi)
                losses.append(nn.functional.cross_entropy(other(x), y).double())
        g = (losses[0] - losses[1]) / (2 * eps if two_sided else eps)
        with torch.no_grad():
            for p, zi in zip(want.parameters(), z, strict=True):
                p.copy_((1 - lr * decay) * p.double() - lr * g * zi.double())
    for p, q in zip(model.parameters(), want.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=2e-5)  # as above: losses about 2 known to 2^-23, over eps


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
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), resumed.parameters(), strict=True))


def test_load_state_dict_refuses_others():
    model = small_model()
    opt = PseuZO(model)
    for state in (torch.optim.SGD(model.parameters(), 0.1).state_dict(), MeZO(model).state_dict()):
        with pytest.raises(ValueError, match="not a state of PseuZO, it lacks"):
            opt.load_state_dict(state)


def test_stochastic_rounding_by_default_and_reproducible():
    """A bf16 update of a hundredth of an ulp is kept on average; rounding to nearest loses it."""
    moved = {}
    for rounding in ("stochastic", "nearest"):
        model = nn.Linear(256, 256, bias=False).to(torch.bfloat16)
        nn.init.ones_(model.weight)
        opt = MeZO(model, 1.0, 1e-2, seed=1, **({} if rounding == "stochastic" else {"rounding": "nearest"}))
        losses = iter([2**-14 * 1e-2, -(2**-14) * 1e-2])  # projected gradient 2^-14; an ulp of 1 is 2^-7
        x = torch.ones(1, 256, dtype=torch.bfloat16)
        opt.step(lambda losses=losses, model=model, x=x: (model(x), next(losses))[1])
        z = reference.noise((256, 256), step_seed(1, 0), 0)
        moved[rounding] = float(((1 - model.weight.detach().float()) * z).sum() / (2**-14 * (z * z).sum()))
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
@pytest.mark.parametrize("method", ["mezo", "pseuzo", "pseuzo two-sided"])
@pytest.mark.parametrize("bare", [False, True], ids=["module", "bare parameters"])
@pytest.mark.parametrize("fail_at", [0, 1, 2])
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
    try:
        step()
        assert fail_at == 2 and "two-sided" not in method
    except Broken:
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
            opt.step(forward, head) if make is PseuZO else opt.step(lambda f=forward, h=head: h(f()))
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
        assert [str(w.message)[:25] for w in caught] == (["1 step(s) skipped, 1 in a"] if t == 2 else [])
    assert opt.skipped_steps == 1 and all(p.isfinite().all() for p in model.parameters())


def test_published_schedule():
    published = CyclicHyperbola.from_steps(10_000, 64)
    values = [published(t) for t in range(10_000)]
    assert sum(v > 0 for v in values) == 1408 and sum(published.clears(t) for t in range(10_000)) == 128
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


@pytest.mark.parametrize("arguments, sentence", [
    (dict(lr=-1.0), "PseuZO: lr must be finite and not negative"),
    (dict(lr=float("nan")), "PseuZO: lr must be finite"),
    (dict(eps=0.0), "PseuZO: eps must be positive"),
    (dict(eps=float("inf")), "eps must be finite"),
    (dict(weight_decay=-0.1), "PseuZO: weight_decay must be"),
    (dict(noise_scale=-1.0), "PseuZO: noise_scale must be"),
    (dict(noise="gauss"), "unknown noise 'gauss'; known: 'hadamard', 'normal', 'rademacher'"),
    (dict(rounding="up"), "unknown rounding 'up'; known: 'nearest', 'stochastic'"),
    (dict(window=0), "capacity must be an int of at least 1"),
    (dict(momentum=1.5), "must be in 0 .. 1"),
    (dict(seed=1 << 70), "a seed must fit 64 bits"),
])  # fmt: skip
def test_bad_options(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        PseuZO(small_model(), **arguments)


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
    (lambda m, x: m(x), lambda y: lambda o: o.sum(1), None, ValueError, "head must return a scalar"),
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
        opt.step(lambda: torch.ones(3))
    with pytest.raises(TypeError, match="must return a scalar tensor or a number"):
        opt.step(lambda: None)
    with pytest.raises(TypeError, match="needs a closure"):
        opt.step(None)
