"""The updates agree with the formulas, which are written out plainly."""

import copy
import math
import warnings

import pytest
import torch
from optimizers import (
    LABELS,
    MAKERS,
    arguments,
    data,
    head_for,
    losses_beside,
    plain_pseuzo,
    small_model,
)
from pseuzo import (
    CausalLMObjective,
    Constant,
    Cycles,
    CyclicHyperbola,
    Linear,
    MeZO,
    PseuZO,
    Reciprocal,
    Schedule,
)
from pseuzo.optim.seeds import direction_seed, step_seed
from tiny_models import batch_of, causal_lm
from torch import nn

from pseuzo_kernels import reference


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
        # For outputs about 1, o1 - o0 has an error of 2^-23 / eps = 1.2e-5 of the change. There are
        # six steps, with coefficients about 1.
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
        # Losses about 2 have a relative error of 2^-23, which is divided by eps.
        torch.testing.assert_close(p, q, rtol=0, atol=2e-5)


@pytest.mark.parametrize("momentum", [1.0, 0.5])
@pytest.mark.filterwarnings("ignore:.*skipped")
def test_the_weighted_mean_is_the_formula(momentum):
    """The mean is over the entries in the window. There are fewer at first, and none for step 2,
    which is skipped."""
    lr, eps, K, steps = 0.1, 1e-2, 3, 6
    model, want = small_model(), small_model()
    opt = PseuZO(model, lr, eps, K, momentum, seed=5, weighting="mean")
    for t in range(steps):
        opt.step(*arguments(opt, model, t, poison=t == 2))
    plain_pseuzo(want, steps, lr, eps, K, momentum, 0.0, LABELS, 5, mean=True, skipped=[2])
    for p, q, start in zip(
        model.parameters(), want.parameters(), small_model().parameters(), strict=True
    ):
        # The error is derived as in the tests above, for a rate five times as large and a mean in
        # place of a sum of three.
        torch.testing.assert_close(
            p, q, rtol=0, atol=4e-5 * (1 + float((q - start).detach().abs().max()))
        )
        assert (p - start).abs().max() > 1e-2


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
    """noise_scale, weight_decay and lr are per group. A scale of 0 freezes a group. Streams do not
    depend on how parameters are grouped."""
    model, want = small_model(), small_model()
    params = list(model.parameters())
    opt = PseuZO(
        [
            {"params": params[3:], "noise_scale": 2.0},
            {"params": params[:1], "noise_scale": 0.5},
            {"params": params[1:3], "noise_scale": 0.0},
        ],
        lr=0.01,
        eps=1e-2,
        window=2,
        momentum=0.5,
        seed=5,
        weight_decay=0.1,
        model=model,
    )
    for t in range(4):
        x, y = data(t)
        opt.step(lambda x=x: model(x), head_for(y))
    plain_pseuzo(want, 4, 0.01, 1e-2, 2, 0.5, 0.1, None, 5, scale=[0.5, 0.0, 0.0, 2.0])
    for i, (p, q) in enumerate(zip(params, want.parameters(), strict=True)):
        torch.testing.assert_close(p, q, rtol=0, atol=2e-5 if i in (0, 3) else 0)


@pytest.mark.parametrize("lr, decay", [((0.01, 0.03), (0.5, 0.0)), ((0.02, 0.02), (0.5, 0.0))])
def test_lr_and_decay_by_group(lr, decay):
    """Bare parameters and a module agree, although their launches hold different tensors. A skipped
    step decays nothing."""
    models = [small_model(), small_model()]
    for model, exact in zip(models, (None, models[1]), strict=True):
        params = list(model.parameters())
        groups = [
            {"params": p, "lr": a, "weight_decay": b}
            for p, a, b in zip((params[:2], params[2:]), lr, decay, strict=True)
        ]
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


@pytest.mark.parametrize("kind", ["opt", "llama"])
@pytest.mark.parametrize("options", [[17, 4], None], ids=["options", "language modelling"])
def test_mezo_steps_after_pseuzo_steps_see_the_whole_perturbation(kind, options):
    """The head is part of the loss but not of h, so what one kind of pass learned about the model
    must not be used in the other. The projected gradient is that of weights perturbed in place."""
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
    # The losses have an error of about 1e-6, which is divided by 2 eps.
    torch.testing.assert_close(
        opt.stats["projected_grad"], (losses[0] - losses[1]).view(1) / 2e-2, rtol=1e-5, atol=2e-4
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


def test_cycles_repeat_a_schedule_and_leave_the_rest_to_mezo():
    # 7 epochs of 10 steps, of which the last has 8, make two cycles of 3 epochs. 2 epochs of each
    # cycle are PseuZO's.
    cycles = Cycles.from_steps(lambda active: Linear(0.8, 0.0, active), 68, 10, 2, 2)
    one = [0.8 - 0.8 * t / 20 for t in range(20)] + [0.0] * 10
    assert [cycles(t) for t in range(68)] == pytest.approx(one * 2 + [0.0] * 8)
    assert cycles.plan() == "PseuZO active in 40 of 68 steps, MeZO in the rest"
    reciprocal = Reciprocal(0.9, 10)
    assert [reciprocal(t) for t in (0, 9, 10, 25)] == [0.9, 0.9, 0.9 / 1.5, 0.9 / 2]
    whole = Cycles.from_steps(lambda active: reciprocal, 60, 10, 3)
    assert whole.plan() is None and whole(39) == whole(19) == 0.9 / 1.5
    assert CyclicHyperbola(7, cycles=3, pseuzo_epochs=1)(4) == 1.0
    assert [CyclicHyperbola(1, 5, cycles=1)(t) for t in (0, 4)] == [1.0, 1.0]


@pytest.mark.parametrize("make", [
    lambda **o: CyclicHyperbola.from_steps(68, 10, **o),
    lambda **o: Cycles.from_steps(Constant, 68, 10, **o),
])  # fmt: skip
def test_cycles_that_do_not_fit(make):
    with pytest.raises(ValueError, match=r"7 epoch\(s\), too few for 8 cycles"):
        make(cycles=8)
    with pytest.raises(ValueError, match=r"pseuzo_epochs is 4, but a cycle has 3 epoch\(s\)"):
        make(cycles=2, pseuzo_epochs=4)


def test_schedule_says_its_plan(capsys):
    def plan(momentum):
        return PseuZO(small_model(), momentum=momentum).schedule.plan()

    assert plan(CyclicHyperbola.from_steps(10_000, 64)) == (
        "PseuZO active in 1408 of 10000 steps, MeZO in the rest"
    )
    assert plan(CyclicHyperbola(1, 50)) == "PseuZO active in 0 of 50 steps, MeZO in the rest"
    assert plan(1.0) is None
    assert capsys.readouterr().out == "", "a constructor prints nothing"


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


@pytest.mark.parametrize("bare", [False, True], ids=["module", "bare parameters"])
@pytest.mark.parametrize("two_sided", [False, True], ids=["one-sided", "two-sided"])
@pytest.mark.parametrize("momentum, window", [(0.0, 14), (0.8, 3)])
def test_directions_and_momentum_are_the_formula(bare, two_sided, momentum, window):
    """x <- (1 - lr wd) x - lr sum_age mu^age mean_j c_j z_j, with a buffer of every past gradient.
    Step 2 is skipped: it counts as a step of gradient 0."""
    lr, eps, decay, q = 0.02, 1e-2, 0.3, 3
    model, want = small_model(), small_model()
    opt = MeZO(
        model.parameters() if bare else model,
        lr,
        eps,
        weight_decay=decay,
        two_sided=two_sided,
        seed=9,
        directions=q,
        momentum=momentum,
        window=window,
    )
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
        # Losses about 2 have a relative error of 2^-23. Divided by eps, it is an error of 2.4e-5 of
        # a coefficient. There are 7 steps, lr is 0.02, and momentum's weights add up to 2.4.
        torch.testing.assert_close(p, q_, rtol=0, atol=3e-5)


def test_momentum_is_sgd_with_momentum_until_the_window_is_full():
    """The steps equal those of torch's SGD, given c z as its gradient. When the window is full, the
    oldest gradient leaves the sum."""
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
        # Six roundings of values below 2 differ. From step 4 on, 0.01 * 0.9^4 c z of step 0 is
        # missing.
        assert far < 1e-6 if t < 4 else far > 1e-4


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
    # The rms of 3605 normals has a relative error of 1 / sqrt(2 * 3605). Rounding to bf16 adds half
    # an ulp to 20 ulps or more.
    assert float(ratios[key]) == pytest.approx(
        float(update.detach().square().mean().sqrt()) / ulp, rel=0.06
    )
