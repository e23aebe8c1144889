"""The methods of ZO-Bench, sign, conservative and block-wise, agree with plain loops."""

import copy
import warnings

import pytest
import torch
from optimizers import arguments, data, equal, head_for, losses_beside, small_model
from pseuzo import Journal, MeZO, replay
from pseuzo.optim import ZOBlocks, ZOConservative, ZOSign
from pseuzo.optim.blocks import cut
from pseuzo.optim.seeds import direction_seed, step_seed
from torch import nn

from pseuzo_kernels import reference

LR, EPS, DECAY, SEED = 0.05, 1e-2, 0.3, 9


def noise_of(model, seed, law="hadamard"):
    params = list(model.parameters())
    return [reference.noise(p.shape, seed, i, noise=law) for i, p in enumerate(params)]


def slope(model, z, t, two_sided=True):
    losses = losses_beside(model, z, (EPS, -EPS if two_sided else 0.0), *data(t))
    return (losses[0] - losses[1]) / (2 * EPS if two_sided else EPS)


def run(opt, model, steps):
    """Return the losses of the steps, each on its own batch."""
    return [opt.step(*arguments(opt, model, t)) for t in steps]


@pytest.mark.parametrize("bare", [False, True], ids=["module", "bare parameters"])
@pytest.mark.parametrize("law, directions", [("rademacher", 1), ("hadamard", 1), ("normal", 3)])
def test_the_sign_is_the_formula(bare, law, directions):
    model, want = small_model(), small_model()
    opt = ZOSign(
        model.parameters() if bare else model,
        *(LR, EPS),
        weight_decay=DECAY,
        seed=SEED,
        noise=law,
        directions=directions,
    )
    assert opt.recordable == (law == "rademacher")
    for t in range(4):
        zs = [noise_of(want, direction_seed(SEED, t, j), law) for j in range(directions)]
        slopes = [float(slope(want, z, t)) for z in zs]
        run(opt, model, [t])
        for p, q, *z in zip(want.parameters(), model.parameters(), *zs, strict=True):
            g = sum(c * zj.double() for c, zj in zip(slopes, z, strict=True))
            # Slopes, from losses about 2 divided by eps, have an error of 2e-5. So the sign of a
            # gradient near 0 is not certain.
            sure = g.abs() > 1e-3
            assert sure.float().mean() > 0.9
            new = (1 - LR * DECAY) * p.double() - LR * g.sign()
            torch.testing.assert_close(q.double()[sure], new[sure], rtol=0, atol=1e-6)
            with torch.no_grad():
                p.copy_(q)


@pytest.mark.filterwarnings("ignore:.*skipped")
def test_the_sign_of_groups_of_skipped_steps_and_of_16_bits():
    model = small_model().to(torch.bfloat16)
    params = list(model.parameters())
    groups = [{"params": params[:2], "noise_scale": 2.0, "maximize": True}, {"params": params[2:]}]
    opt = ZOSign(groups, lr=2**-7, eps=EPS, model=model, seed=SEED)
    before = copy.deepcopy(model)
    run(opt, model, [0])
    up = [(p - q).detach().float() for p, q in zip(params, before.parameters(), strict=True)]
    z = noise_of(model, step_seed(SEED, 0))
    sign = opt.stats["projected_grad"].sign().detach()
    for i, (moved, zi) in enumerate(zip(up, z, strict=True)):
        size = 2**-6 if i < 2 else -(2**-7)  # bf16 rounds weights below 1 by 2^-9
        assert float((moved - size * sign * zi.sign()).abs().max()) <= 2**-8
        assert float((moved / size * sign * zi.sign()).mean()) == pytest.approx(1, abs=0.1)
    # An ulp of weights below 0.25 is at most 2^-9.
    assert float(opt.update_rms()["bfloat16"]) > 1
    before = copy.deepcopy(model)
    opt.step(*arguments(opt, model, 1, poison=True))
    assert equal(model, before) and opt.skipped_steps == 1
    assert float(opt.update_rms()["bfloat16"]) == 0


@pytest.mark.parametrize("bare", [False, True], ids=["module", "bare parameters"])
@pytest.mark.parametrize("two_sided", [False, True], ids=["one-sided", "two-sided"])
def test_conservative_takes_the_lowest_of_three_losses(bare, two_sided):
    """The rate is too high in some steps, so that each candidate is taken at least once."""
    lr, taken = 4.0, []
    model = small_model()
    opt = ZOConservative(
        model.parameters() if bare else model,
        *(lr, EPS),
        weight_decay=0.01,
        two_sided=two_sided,
        seed=SEED,
    )
    for t in range(24):
        want, calls = copy.deepcopy(model), []
        z = noise_of(want, step_seed(SEED, t))
        c = float(slope(want, z, t, two_sided))
        losses = losses_beside(want, z, (-lr * c, 0.0, lr * c), *data(t))
        x, y = data(t)
        loss = opt.step(lambda x=x, y=y, calls=calls: calls.append(1) or head_for(y)(model(x)))
        assert len(calls) == (5 if two_sided else 4)
        torch.testing.assert_close(loss.double(), losses[1], rtol=0, atol=1e-6)
        best = min(range(3), key=losses.__getitem__)
        taken.append(best)
        for p, q, zi in zip(want.parameters(), model.parameters(), z, strict=True):
            new = (1 - lr * 0.01) * p.double() + lr * c * (best - 1) * zi.double()
            # The error of c is 2e-5, and |z| is at most 4.
            torch.testing.assert_close(q.double(), new, rtol=0, atol=2e-5 * 4 * lr)
    assert {0, 1} <= set(taken), taken


def test_conservative_with_maximize_takes_the_highest():
    down, up = small_model(), small_model()
    one, two = (
        ZOConservative(down, LR, EPS, seed=1),
        ZOConservative(up, LR, EPS, seed=1, maximize=True),
    )
    for t in range(5):
        x, y = data(t)
        one.step(lambda x=x, y=y: head_for(y)(down(x)))
        two.step(lambda x=x, y=y: -head_for(y)(up(x)))
    assert equal(down, up)


@pytest.mark.filterwarnings("ignore:.*skipped")
def test_conservative_and_losses_that_are_not_finite():
    """A candidate without a finite loss is not taken; a step without one at x is skipped."""
    model = small_model()
    opt = ZOConservative(model, LR, EPS, seed=SEED)

    def step(bad):
        calls, (x, y) = [], data(0)

        def closure():
            calls.append(1)
            return head_for(y)(model(x)) * (float("nan") if len(calls) in bad else 1.0)

        before = copy.deepcopy(model)
        opt.step(closure)
        return before

    assert not equal(step([]), model)
    assert equal(step([4]), model) and opt.skipped_steps == 0, "the step was not kept at x"
    assert equal(step([3]), model) and opt.skipped_steps == 1
    assert equal(step([1]), model) and opt.skipped_steps == 2


def test_conservative_refuses_several_rates():
    model = small_model()
    groups = [
        {"params": list(model.parameters())[:2], "lr": 1.0},
        {"params": model[2].parameters()},
    ]
    opt = ZOConservative(groups, 0.1, model=model)
    with pytest.raises(ValueError, match="compares steps of one lr, but its groups have lr"):
        run(opt, model, [0])


@pytest.mark.parametrize("bare", [False, True], ids=["module", "bare parameters"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_of_blocks_is_mezo_of_the_block_alone(bare, dtype):
    model, n = small_model().to(dtype), 3
    names = [name for name, _ in model.named_parameters()]
    opt = ZOBlocks(
        model.parameters() if bare else model, LR, EPS, blocks=n, weight_decay=DECAY, seed=SEED
    )
    moved = []
    for t in range(2 * n):
        want = copy.deepcopy(model)
        block = {p.data_ptr() for p in opt.block()}
        mine = [p.data_ptr() in block for p in model.parameters()]
        for p, trained in zip(want.parameters(), mine, strict=True):
            p.requires_grad_(trained)
        mezo = MeZO(want, LR, EPS, weight_decay=DECAY, seed=SEED)
        state = {"zero_order": mezo.own_state() | {"step": t}}
        mezo.load_state_dict(mezo.state_dict() | {"state": state})
        want_loss = run(mezo, want, [t])[0]
        torch.testing.assert_close(run(opt, model, [t])[0], want_loss, rtol=0, atol=1e-6)
        for p, q in zip(model.parameters(), want.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=2e-5 if bare else 0)
        moved.append([name for name, trained in zip(names, mine, strict=True) if trained])
    assert moved[:n] == moved[n:] and all(moved)
    assert [name for block in moved[:n] for name in block] == names


def test_blocks_are_contiguous_balanced_and_never_empty():
    assert cut(3, [10, 10, 10, 10, 10, 10]) == [2, 2, 2]
    assert cut(2, [100, 1, 1, 1]) == [1, 3]
    assert cut(4, [1, 1, 1, 100]) == [1, 1, 1, 1]
    assert cut(3, [1, 1, 100, 1, 1]) == [2, 1, 2]
    assert cut(1, [5, 5]) == [2]


def test_blocks_keep_what_passes_learned_and_no_scratch():
    model = nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 300), nn.Linear(300, 5))
    opt = ZOBlocks(model, LR, EPS, blocks=2, seed=SEED)
    x = torch.randn(4, 300)
    made = [opt.step(lambda: model(x).square().mean()) and opt.passes._of_module for _ in range(6)]
    assert made[0] is made[2] is made[4] and made[1] is made[3] and made[0] is not made[1]
    assert made[0].settled("loss") and made[0].scratch.sizes == []


def test_blocks_resume_in_mid_cycle_and_replay(tmp_path):
    model = small_model()
    opt, base = ZOBlocks(model, LR, EPS, blocks=3, seed=SEED, weight_decay=DECAY), small_model()
    with Journal(tmp_path / "run.pzj", opt):
        run(opt, model, range(4))
    replay(tmp_path / "run.pzj", base)
    assert equal(base, model)
    again = ZOBlocks(base, LR, EPS, seed=1, weight_decay=DECAY)
    again.load_state_dict(opt.state_dict())
    assert again.blocks == 3
    for t in range(4, 9):
        assert torch.equal(*run(opt, model, [t]), *run(again, base, [t]))
        assert opt.own_state()["used"] == again.own_state()["used"] == {"loss": [0, 1, 2, 3]}
    assert equal(base, model)


@pytest.mark.parametrize("make", [
    lambda m: ZOSign(m, 1e-3, EPS, seed=3, noise="rademacher"),
    lambda m: ZOConservative(m, 1.0, EPS, seed=3),
], ids=["sign", "conservative"])  # fmt: skip
def test_sums_of_seeds_are_replayed(tmp_path, make):
    model, base = small_model().to(torch.bfloat16), small_model().to(torch.bfloat16)
    opt = make(model)
    with Journal(tmp_path / "run.pzj", opt), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run(opt, model, range(3))
        opt.step(*arguments(opt, model, 3, poison=True))
        run(opt, model, range(4, 6))
    replay(tmp_path / "run.pzj", base)
    assert equal(base, model)


def test_refusals(tmp_path):
    model = small_model()
    for options in ({}, {"noise": "rademacher", "directions": 2}):
        with pytest.raises(ValueError, match="updates of ZOSign are not sums of seeds"):
            Journal(tmp_path / "run.pzj", ZOSign(model, **options))
    with pytest.raises(ValueError, match="4 parameters are trained, too few for 5 blocks"):
        ZOBlocks(model, blocks=5)
    for blocks in (0, 1.5):
        with pytest.raises(ValueError, match="blocks must be an int of at least 1"):
            ZOBlocks(model, blocks=blocks)
    with pytest.raises(ValueError, match="ZOBlocks: capture records passes"):
        ZOBlocks(model, capture=True)
    with pytest.raises(TypeError, match=r"ZOConservative\.step: needs a closure"):
        ZOConservative(model).measure("loss")
