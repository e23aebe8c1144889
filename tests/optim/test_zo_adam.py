"""ZO-Adam agrees with Adam in plain torch, with both kinds of moments, and resumes."""

import copy

import pytest
import torch
from optimizers import Headed, data, equal, head_for, losses_beside, small_model
from pseuzo import Journal, MeZO, ZOAdam
from pseuzo.optim.seeds import direction_seed

from pseuzo_kernels import reference

BETAS, ADAM_EPS = (0.8, 0.99), 1e-3


def closure_for(model, t, rows=4):
    x, y = data(t, rows)
    return lambda: head_for(y)(model(x.to(next(model.parameters()).dtype)))


def plain_adam(model, steps, lr, eps, decay, q, two_sided, seed, scale, window):
    """Apply the published Adam to MeZO's estimates of the last steps, in float64 except for the
    losses.

    Within the window the moments are Adam's, with its correction of the bias. In a longer run the
    weights of the steps in the window are divided by their sum.
    """
    params = list(model.parameters())
    past = []
    for t in range(steps):
        x, y = data(t)
        g = [torch.zeros_like(p, dtype=torch.float64) for p in params]
        for j in range(q):
            s = direction_seed(seed, t, j)
            z = [scale * reference.noise(p.shape, s, i).double() for i, p in enumerate(params)]
            at = (eps, -eps if two_sided else 0.0)
            plus, minus = losses_beside(model, [zi.float() for zi in z], at, x, y)
            c = (plus - minus) / (2 * eps if two_sided else eps) / q
            g = [gi + c * zi for gi, zi in zip(g, z, strict=True)]
        past = [*past, g][-window:]
        for i, p in enumerate(params):
            m = v = torch.zeros_like(p, dtype=torch.float64)
            for old in past:
                m = BETAS[0] * m + (1 - BETAS[0]) * old[i]
                v = BETAS[1] * v + (1 - BETAS[1]) * old[i].square()
            m, v = (a / (1 - beta ** len(past)) for a, beta in zip((m, v), BETAS, strict=True))
            with torch.no_grad():
                p.copy_((1 - lr * decay) * p.double() - lr * m / (v.sqrt() + ADAM_EPS))


@pytest.mark.parametrize("bare", [False, True], ids=["module", "bare parameters"])
@pytest.mark.parametrize("moments, window", [("seeds", 3), ("seeds", 9), ("state", 1)])
@pytest.mark.parametrize("q, two_sided", [(1, True), (3, False)])
def test_the_formula(q, two_sided, moments, window, bare):
    # The formula holds for any shift. A long one keeps the rounding of losses out of the slopes.
    lr, eps, decay, scale, steps = 0.01, 0.25, 0.3, 1.5, 5
    model, want = small_model(), small_model()
    opt = ZOAdam(
        model.parameters() if bare else model,
        lr,
        eps,
        betas=BETAS,
        adam_eps=ADAM_EPS,
        window=window,
        moments=moments,
        directions=q,
        two_sided=two_sided,
        weight_decay=decay,
        noise_scale=scale,
        seed=9,
    )
    for t in range(steps):
        opt.step(closure_for(model, t))
    assert opt.stats["window"] == (min(window, steps) if moments == "seeds" else 0)
    n = window if moments == "seeds" else steps
    plain_adam(want, steps, lr, eps, decay, q, two_sided, 9, scale, n)
    for p, start, known in zip(
        model.parameters(), small_model().parameters(), want.parameters(), strict=True
    ):
        # Losses about 2 are off by 2^-22 or so, a slope by 2^-22 / eps, or 1e-6, and an estimate by
        # as much. Rounding of bare weights by 2^-24 adds less. A change of an estimate changes the
        # move by at most lr / ADAM_EPS times as much, so each of five moves is off by 1e-3 lr.
        torch.testing.assert_close(p, known, rtol=0, atol=5 * lr * 1e-3)
        assert (p - start).abs().max() > 0.02


@pytest.mark.parametrize("q", [1, 2])
@pytest.mark.filterwarnings("ignore:.*skipped")
def test_state_is_a_window_of_all_steps_to_the_bit(q):
    """This also holds after a skipped step, with groups of several rates, and with maximize."""
    models = small_model(), small_model()
    opts = []
    for model, own in zip(models, ({"moments": "state"}, {"window": 8}), strict=True):
        first, *rest = model.parameters()
        groups = [{"params": first, "lr": 0.01, "noise_scale": 0.5}]
        groups += [{"params": rest, "weight_decay": 0.1, "maximize": True}]
        opts.append(ZOAdam(groups, 0.02, 1e-2, directions=q, model=model, seed=3, **own))
    for t in range(8):
        for opt, model in zip(opts, models, strict=True):
            loss, before = closure_for(model, t), copy.deepcopy(model)
            opt.step(lambda f=loss, by=float("nan") if t == 3 else 1.0: f() * by)
            assert equal(before, model) == (t == 3)
    assert equal(*models) and opts[0].skipped_steps == 1
    assert not equal(models[0], small_model())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("own", [{"window": 3, "directions": 2}, {"moments": "state"}], ids=str)
def test_resumes_to_the_bit(own, dtype, tmp_path):
    model = small_model().to(dtype)
    opt = ZOAdam(model, 0.01, 1e-2, seed=2, betas=BETAS, **own)
    for t in range(4):
        opt.step(closure_for(model, t))
    for from_file in (True, False):  # or from the state of an optimizer that continues
        state, resumed = opt.state_dict(), copy.deepcopy(model)
        if from_file:
            torch.save(state, tmp_path / "opt.pt")
            state = torch.load(tmp_path / "opt.pt", weights_only=True)
        again = ZOAdam(resumed, 0.01, 1e-2, seed=7)  # the state replaces these settings
        again.load_state_dict(state)
        for t in range(opt.steps, opt.steps + 3):
            opt.step(closure_for(model, t))
            again.step(closure_for(resumed, t))
            assert equal(model, resumed)
        assert again.moments == own.get("moments", "seeds")


@pytest.mark.parametrize("moments", ["seeds", "state"])
def test_small_moves_of_16_bit_weights_arrive_on_average(moments):
    """Each step moves all weights by lr, a thirtieth of their spacing. So it moves few of them,
    each by a whole spacing."""
    model = torch.nn.Linear(64, 64).bfloat16()
    with torch.no_grad():
        model.weight.fill_(1.0)
    opt = ZOAdam(model, 2**-12, 1e-2, betas=(0.0, 0.0), adam_eps=1e-30, moments=moments)
    opt.step(lambda: model.weight.float().square().mean() * 100)
    moved = model.weight.detach().double() - 1
    # 4096 draws have probability 1/32 (up, by 2^-7) or 1/16 (down, by 2^-8). The bounds are 4
    # standard deviations.
    assert moved.abs().mean() == pytest.approx(2**-12, rel=0.3)
    assert set(moved.unique().tolist()) == {-(2**-8), 0.0, 2**-7}


def test_refusals(tmp_path):
    model = small_model()
    for options, sentence in (
        ({"betas": (0.9, 1.0)}, "beta2 must be at least 0 and below 1, got 1.0"),
        ({"adam_eps": 0.0}, "adam_eps must be positive in float32, got 0.0"),
        ({"moments": "memory"}, "moments must be seeds or state, got 'memory'"),
        ({"window": 0}, "window must be an int of at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=f"ZOAdam: {sentence}"):
            ZOAdam(model, **options)
    opt = ZOAdam(model)
    with pytest.raises(ValueError, match="the updates of ZOAdam are not sums of seeds"):
        Journal(tmp_path / "run.pzj", opt)
    with pytest.raises(ValueError, match="not a state of ZOAdam, it lacks adam"):
        opt.load_state_dict(MeZO(model).state_dict())
    with pytest.raises(ValueError, match="use PseuZO"):
        ZOAdam([{"params": Headed().out.parameters(), "exact_gradient": True}])
    assert equal(model, small_model())
