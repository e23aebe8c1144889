"""MeZO-SVRG agrees with its formula in a plain loop. Its state holds the anchor."""

import copy

import pytest
import torch
from optimizers import data, equal, head_for, small_model
from pseuzo import Journal, MeZO, MeZOSVRG
from pseuzo.optim.seeds import direction_seed
from pseuzo.perturb.module import known_passes
from pseuzo.train.replay import replay

from pseuzo_kernels import reference

ALL = 3  # batches of the training data, numbered from 50


def closures(model, t, dtype=torch.float32):
    """Return the arguments of step() at step t: the loss of its batch, and those of all the
    data."""

    def loss(i):
        x, y = data(i)
        return lambda: head_for(y)(model(x.to(dtype)))

    return loss(t), lambda: map(loss, range(50, 50 + ALL))


def plain_slope(model, weights, seed, eps, scales, two_sided, batch):
    """Return MeZO's c at these weights, which are put into a copy of the model."""
    other = copy.deepcopy(model)
    x, y = data(batch)
    losses = []
    for by in (eps, -eps if two_sided else 0.0):
        with torch.no_grad():
            for i, (p, w) in enumerate(zip(other.parameters(), weights, strict=True)):
                p.copy_(w + by * scales[i] * reference.noise(p.shape, seed, i))
            losses.append(head_for(y)(other(x)).double())
    return (losses[0] - losses[1]) / (2 * eps if two_sided else eps)


@pytest.mark.parametrize("two_sided, q", [(True, 1), (False, 2)])
def test_the_steps_are_the_formula(two_sided, q):
    lr, eps, decay, every, scale, steps = 0.05, 1e-2, 0.3, 3, 0.5, 8
    noise_scales = [1.0, 2.0, 1.0, 2.0]
    model, want = small_model(), small_model()
    params = list(model.parameters())
    opt = MeZOSVRG(
        [{"params": params[::2]}, {"params": params[1::2], "noise_scale": 2.0}],
        *(lr, eps),
        model=model,
        anchor_every=every,
        anchor_scale=scale,
        two_sided=two_sided,
        directions=q,
        weight_decay=decay,
        seed=9,
    )
    weights = [p.detach().clone() for p in want.parameters()]
    corrections = []
    for t in range(steps):
        closure, batches = closures(model, t)
        loss = opt.step(closure, batches if t % every == 0 else None)
        assert loss.isfinite()
        seeds = [direction_seed(9, t, j) for j in range(q)]
        options = eps, noise_scales, two_sided
        if t % every == 0:
            anchor = [w.clone() for w in weights]
            slopes = [
                [plain_slope(want, anchor, s, *options, batch) for batch in range(50, 50 + ALL)]
                for s in seeds
            ]
            full = [(s, sum(c) / ALL / q) for s, c in zip(seeds, slopes, strict=True)]
            terms, rate = full, lr * scale
        else:
            now = [plain_slope(want, weights, s, *options, t) for s in seeds]
            then = [plain_slope(want, anchor, s, *options, t) for s in seeds]
            changes = [(a - b) / q for a, b in zip(now, then, strict=True)]
            corrections += changes
            terms, rate = [*zip(seeds, changes, strict=True), *full], lr
        for i, w in enumerate(weights):
            move = sum(c * noise_scales[i] * reference.noise(w.shape, s, i) for s, c in terms)
            w.copy_((1 - lr * decay) * w - rate * move)
    for p, w in zip(params, weights, strict=True):
        # Losses about 2 have a relative error of 2^-23. Divided by eps, it is 2.4e-5 of each of up
        # to 2 q + q coefficients. There are eight steps, lr is 0.05, and the noise has scale 2 and
        # is at most 3.
        torch.testing.assert_close(p.detach(), w, rtol=0, atol=2e-4)
    # All corrections would be 0 if the anchor were the weights themselves.
    assert max(map(abs, corrections)) > 1e-2


def test_the_first_step_after_the_anchor_sees_the_old_weights():
    """The anchor is a copy: the slopes at it are those before the step that moved the weights."""
    model = small_model()
    opt = MeZOSVRG(model, 0.1, 1e-2, anchor_every=4, seed=1)
    before = [p.detach().clone() for p in model.parameters()]
    opt.step(*closures(model, 0))
    for p, was in zip(model.parameters(), before, strict=True):
        assert torch.equal(opt.state[p]["anchor"], was) and not torch.equal(p, was)
    measured = opt.measure(closures(model, 1)[0])
    seed = direction_seed(1, 1, 0)
    want = plain_slope(model, before, seed, 1e-2, [1.0] * 4, True, 1)
    # The error of the losses, derived above, is divided by 2 eps.
    assert abs(float(measured.at_anchor) - float(want)) < 2e-5
    assert abs(float(measured.slopes) - float(measured.at_anchor)) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_resumes_and_replays_to_the_bit(dtype, tmp_path):
    model = small_model().to(dtype)
    base = copy.deepcopy(model)
    opt = MeZOSVRG(model, 0.02, 1e-2, anchor_every=3, anchor_scale=2.0, weight_decay=0.1, seed=2)
    with Journal(tmp_path / "run.pzj", opt):
        for t in range(5):  # the next step is within a cycle: it needs the anchor of step 3
            opt.step(*closures(model, t, dtype))
        torch.save(opt.state_dict(), tmp_path / "opt.pt")
        resumed = copy.deepcopy(model)
        for t in range(5, 9):
            opt.step(*closures(model, t, dtype))
    again = MeZOSVRG(resumed, 0.5)  # the state replaces all of its settings
    again.load_state_dict(torch.load(tmp_path / "opt.pt", weights_only=True))
    assert not again.sets_anchor
    for t in range(5, 9):
        again.step(*closures(resumed, t, dtype))
    assert equal(model, resumed)
    assert replay(tmp_path / "run.pzj", base) == 9
    assert equal(model, base)


def test_a_state_that_was_loaded_is_not_written():
    models = [small_model(), small_model()]
    opts = [MeZOSVRG(model, 0.05, 1e-2, anchor_every=1) for model in models]
    for opt, model in zip(opts, models, strict=True):
        opt.step(*closures(model, 0))
    anchors = [opts[0].state[p]["anchor"].clone() for p in models[0].parameters()]
    opts[1].load_state_dict(opts[0].state_dict())
    opts[1].step(*closures(models[1], 1))
    assert all(
        torch.equal(opts[0].state[p]["anchor"], anchor)
        for p, anchor in zip(models[0].parameters(), anchors, strict=True)
    )


@pytest.mark.parametrize("call", range(4))
def test_an_interrupted_pass_leaves_the_weights(call):
    """Passes 2 and 3 are at the anchor."""
    model, other = small_model(), small_model()
    opt, undisturbed = (MeZOSVRG(m, 0.05, 1e-2, anchor_every=4, seed=3) for m in (model, other))
    for t in range(2):
        opt.step(*closures(model, t))
        undisturbed.step(*closures(other, t))
    closure, calls = closures(model, 2)[0], []

    def interrupted():
        calls.append(1)
        loss = closure()
        if len(calls) == call + 1:
            raise KeyboardInterrupt
        return loss

    with pytest.raises(KeyboardInterrupt):
        opt.step(interrupted)
    assert equal(model, other) and not known_passes(model).active
    for t in range(2, 6):
        opt.step(*closures(model, t))
        undisturbed.step(*closures(other, t))
    assert equal(model, other)


def test_batches_that_are_not_finite_do_not_count():
    models = [small_model(), small_model()]
    opts = [MeZOSVRG(m, 0.05, 1e-2, seed=3) for m in models]
    opts[0].step(*closures(models[0], 0))
    closure, batches = closures(models[1], 0)
    opts[1].step(closure, lambda: [lambda: float("nan"), *batches()])
    assert equal(*models)
    assert opts[1].skipped_steps == 0
    opts[1].load_state_dict(MeZOSVRG(models[1], 0.05, 1e-2).state_dict())
    with pytest.warns(UserWarning, match=r"1 step\(s\) skipped"):
        opts[1].step(closure, lambda: [lambda: closure() * float("inf")] * 2)
    before = copy.deepcopy(models[1])
    opts[1].step(closures(models[1], 1)[0])
    # The full gradient g(a) is 0, and at the anchor itself the two estimates are the same.
    assert equal(before, models[1])


def test_a_weight_without_an_anchor_gets_one():
    model = small_model()
    frozen = model[0].weight.requires_grad_(False)
    opt = MeZOSVRG(model.parameters(), 0.05, 1e-2, model=model, anchor_every=10)
    opt.step(*closures(model, 0))
    assert frozen not in opt.state and not opt.sets_anchor
    frozen.requires_grad_()
    assert opt.sets_anchor
    with pytest.raises(TypeError, match="step 1 sets the anchor and needs batches"):
        opt.step(closures(model, 1)[0])
    opt.step(*closures(model, 1))
    model[2].bias.requires_grad_(False)
    assert not opt.sets_anchor
    opt.step(*closures(model, 2))
    opt.anchor_every = 1  # the new anchor leaves out the weight that is now frozen
    opt.step(*closures(model, 3))
    assert frozen in opt.state and model[2].bias not in opt.state


def test_it_is_mezo_where_every_step_sets_the_anchor():
    """If the anchor is measured on the same batch, the update is MeZO's, to the bit."""
    models = [small_model(), small_model()]
    svrg, mezo = MeZOSVRG(models[0], 0.02, 1e-2, anchor_every=1), MeZO(models[1], 0.02, 1e-2)
    for t in range(3):
        closure = closures(models[0], t)[0]
        svrg.step(closure, lambda closure=closure: [closure])
        mezo.step(closures(models[1], t)[0])
    assert equal(*models)


@pytest.mark.parametrize("options, match", [
    ({"anchor_every": 0}, "anchor_every must be an int of at least 1, got 0"),
    ({"anchor_scale": 0.0}, "anchor_scale must be positive, got 0"),
    ({"directions": 0}, "directions must be an int of at least 1, got 0"),
    ({"capture": True}, "leave capture off"),
])  # fmt: skip
def test_bad_options(options, match):
    with pytest.raises(ValueError, match=match):
        MeZOSVRG(small_model(), **options)


def test_bad_input():
    model = small_model()
    with pytest.raises(ValueError, match="needs the model"):
        MeZOSVRG(model.parameters())
    opt = MeZOSVRG(model)
    before = copy.deepcopy(model)
    with pytest.raises(TypeError, match="needs a closure"):
        opt.step(3.0)
    with pytest.raises(ValueError, match="gave no batch"):
        opt.step(closures(model, 0)[0], lambda: [])
    assert equal(model, before) and opt.steps == 0
