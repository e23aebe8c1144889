"""Evolution strategies and FZOO agree with their formulas, also with ties, rewards and batches in
parts."""

import copy
import itertools
import statistics
from functools import partial

import numpy as np
import pytest
import torch
from optimizers import data, equal, head_for, losses_beside, small_model
from pseuzo import FZOO, Evolution, Journal, MeZO, replay
from pseuzo.optim.population import WEIGHTS, centered_ranks
from pseuzo.optim.seeds import direction_seed

from pseuzo_kernels import reference


def plain_ranks(values):
    """Return the ranks of the values, scaled to -1/2 .. 1/2. Ties get the mean of their ranks."""
    ordered = sorted(values)
    places = {v: [i for i, w in enumerate(ordered) if w == v] for v in values}
    return [sum(places[v]) / len(places[v]) / (len(values) - 1) - 0.5 for v in values]


def plain_scores(weights, pairs, eps, two_sided, split):
    """Return the scores. pairs: for each direction, the loss at x + eps z, and at x - eps z or
    x."""
    differences = [a - b for a, b in pairs]
    slopes = [d / (2 * eps if two_sided else eps) for d in differences]
    if weights == "raw":
        return slopes
    if two_sided:
        centers = [(a + b) / 2 if split else 0.0 for a, b in pairs]
        values = [a - m for (a, _), m in zip(pairs, centers, strict=True)]
        values += [b - m for (_, b), m in zip(pairs, centers, strict=True)]
    else:
        values = differences if split else [a for a, _ in pairs]
    spread, mean = statistics.pstdev(values), statistics.fmean(values)
    if weights == "rank":
        scored = plain_ranks(values)
    elif weights == "zscore":
        scored = [(v - mean) / spread for v in values]
    elif two_sided:
        scored = [v / spread for v in values]
    else:
        return [d / spread for d in differences]
    if not two_sided:
        return scored
    half = len(pairs)
    return [(a - b) / 2 for a, b in zip(scored[:half], scored[half:], strict=True)]


@pytest.mark.parametrize("bare", [False, True], ids=["module", "bare parameters"])
@pytest.mark.parametrize("split", [False, True], ids=["whole", "parts"])
@pytest.mark.parametrize("two_sided", [False, True], ids=["one-sided", "two-sided"])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_the_formula(weights, two_sided, split, bare):
    """The number of directions, q, is odd. The parts have 3, 2 and 2 of 7 rows."""
    lr, eps, decay, q, cuts = 0.02, 1e-2, 0.3, 3, (0, 3, 5, 7)
    model, want = small_model(), small_model()
    opt = Evolution(
        model.parameters() if bare else model,
        lr,
        eps,
        directions=q,
        two_sided=two_sided,
        weights=weights,
        split_batch=split,
        weight_decay=decay,
        seed=9,
    )
    for t in range(4):
        x, y = data(t, rows=7)
        calls = []

        def closure(a=0, b=7, x=x, y=y, calls=calls):
            calls.append(b - a)
            return head_for(y[a:b])(model(x[a:b]))

        spans = list(itertools.pairwise(cuts)) if split else [(0, 7)] * q
        parts = [lambda a=a, b=b, f=closure: f(a, b) for a, b in spans]
        loss = opt.step(parts, [3, 2, 2]) if split else opt.step(closure)
        once = 7 if split else 7 * q
        assert sum(calls) == (2 * once if two_sided else once + 7)
        pairs, z = [], []
        for j, (a, b) in enumerate(spans):
            seed = direction_seed(9, t, j)
            z.append([reference.noise(p.shape, seed, i) for i, p in enumerate(want.parameters())])
            at = (eps, -eps if two_sided else 0.0)
            pairs.append([float(v) for v in losses_beside(want, z[j], at, x[a:b], y[a:b])])
        shares = [(b - a) / 7 for a, b in spans] if split else [1 / q] * q
        middles = [(a + b) / 2 if two_sided else b for a, b in pairs]
        assert float(loss) == pytest.approx(np.dot(shares, middles), abs=4e-5)
        scores = plain_scores(weights, pairs, eps, two_sided, split)
        with torch.no_grad():
            for i, p in enumerate(want.parameters()):
                terms = zip(shares, scores, z, strict=True)
                update = sum(w * a * zj[i].double() for w, a, zj in terms)
                p.copy_((1 - lr * decay) * p.double() - lr * update)
    for p, start, known in zip(
        model.parameters(), small_model().parameters(), want.parameters(), strict=True
    ):
        # Losses about 2 have a relative error of 2^-23. Divided by eps, it is an error of 2.4e-5 of
        # a slope. Divided by a spread of 2e-3 or more, it is 1.2e-4 of a score. There are four
        # steps, lr is 0.02, z is below 4, and the shares sum to 1.
        torch.testing.assert_close(p, known, rtol=0, atol=4e-5)
        assert (p - start).abs().max() > 5e-3


def test_fzoo_is_the_published_step():
    """The step is x - lr sum_j (l_j - l_0) / (q sigma) z_j, and the scale of the losses does not
    matter."""
    models = small_model(), small_model()
    x, y = data(0)
    for model, scale in zip(models, (1.0, 1024.0), strict=True):
        opt = FZOO(model, 0.05, 1e-2, seed=4, noise="rademacher")
        opt.step(lambda m=model, s=scale: head_for(y)(m(x)) * s)
    assert equal(*models)
    want = small_model()
    z = [
        [
            reference.noise(p.shape, direction_seed(4, 0, j), i, noise="rademacher")
            for i, p in enumerate(want.parameters())
        ]
        for j in range(8)
    ]
    (at_x,) = losses_beside(want, z[0], (0.0,), x, y)
    losses = torch.stack([losses_beside(want, zj, (1e-2,), x, y)[0] for zj in z])
    coefs = (losses - at_x) / (8 * losses.std(correction=0))
    for i, (p, q) in enumerate(zip(models[0].parameters(), want.parameters(), strict=True)):
        moved = q - 0.05 * sum(c * zj[i] for c, zj in zip(coefs, z, strict=True))
        torch.testing.assert_close(p, moved.float(), rtol=0, atol=2e-5)


def test_raw_is_mezo_to_the_bit():
    models = small_model(), small_model()
    for two_sided in (True, False):
        own = {"directions": 3, "two_sided": two_sided, "seed": 1}
        opts = Evolution(models[0], 0.02, weights="raw", **own), MeZO(models[1], 0.02, **own)
        for opt, model in zip(opts, models, strict=True):
            x, y = data(0)
            opt.step(lambda m=model, x=x, y=y: head_for(y)(m(x)))
    assert equal(*models)


def test_ties_have_the_mean_of_their_ranks():
    values = torch.tensor([3.0, 1.0, 2.0, 2.0, 9.0, 2.0, -4.0])
    assert centered_ranks(values).tolist() == pytest.approx(plain_ranks(values.tolist()))
    assert centered_ranks(torch.tensor([5.0, 5.0])).tolist() == [0.0, 0.0]
    assert centered_ranks(torch.tensor([1.0, 0.0])).tolist() == [0.5, -0.5]


def steps_of(rewards, **options):
    """Return the optimizer and its model after one step whose passes give these numbers."""
    model, results = small_model(), iter(rewards)
    opt = Evolution(model, 0.5, 0.1, weight_decay=0.1, **options)
    opt.step(lambda: (model(data(0)[0]), next(results))[1])
    assert next(results, None) is None
    return opt, model


def test_ranks_of_numbers_with_ties():
    """The pairs 1 1 and 1 0 have four values. The rank of each 1 is 1/6, and that of 0 is -1/2."""
    opt, _ = steps_of([np.float32(1), True, 1, 0.0], directions=2)
    coefs = opt._last[0]
    torch.testing.assert_close(coefs, torch.tensor([0.0, (1 / 6 + 1 / 2) / 2 / 2]))


@pytest.mark.parametrize("weights", ["spread", "zscore", "rank"])
@pytest.mark.parametrize("value", [0.1, float("nan"), float("inf")])
@pytest.mark.parametrize("two_sided", [True, False])
def test_rewards_that_are_the_same_or_not_finite_skip_the_step(weights, value, two_sided):
    """The loss at x differs from the others, so that FZOO's differences are not 0."""
    rewards = [value] * 6 if two_sided else [0.7, *[value] * 3]
    with pytest.warns(UserWarning, match=r"1 step.s. skipped so far: the losses that are compared"):
        opt, model = steps_of(rewards, directions=3, weights=weights, two_sided=two_sided)
    assert equal(model, small_model()) and opt.skipped_steps == 1


def test_raw_scores_of_the_same_rewards_move_nothing_and_are_no_skip():
    opt, model = steps_of([0.1] * 4, directions=2, weights="raw")
    assert opt.skipped_steps == 0
    for p, q in zip(model.parameters(), small_model().parameters(), strict=True):
        torch.testing.assert_close(p, 0.95 * q)


@pytest.mark.parametrize("two_sided", [True, False])
def test_examples_are_clipped_before_losses_are_compared(two_sided):
    """The compared losses are those whose differences are the clipped slopes."""
    outlier = torch.tensor([1.0, 2.0, 1.0, 90.0])
    at_x, slopes = torch.ones(4), (outlier, -outlier, torch.arange(4.0))
    sides = [(at_x + 0.1 * s, at_x - 0.1 * s) for s in slopes]
    rewards = [v for pair in sides for v in pair] if two_sided else [at_x, *(a for a, _ in sides)]
    opt, _ = steps_of(
        rewards, directions=3, weights="spread", two_sided=two_sided, clip_examples=2.0
    )
    clipped = torch.tensor([1 + 2 + 1 + 2, -6, 0 + 1 + 2 + 2.0]) / 4
    spread = clipped.square().mean().sqrt() if two_sided else clipped.std(correction=0)
    torch.testing.assert_close(opt._last[0], clipped / spread / 3)


def test_parts_have_the_sizes_of_the_losses_that_they_return():
    a, b = small_model(), small_model()
    x, y = data(0, rows=5)
    for model, reduction, sizes in ((a, "mean", torch.tensor([4, 1])), (b, "none", None)):
        opt = Evolution(model, 0.1, 1e-2, directions=2, weights="raw", split_batch=True)

        def closure(part, m=model, r=reduction):
            return torch.nn.functional.cross_entropy(m(x[part]), y[part], reduction=r)

        opt.step([partial(closure, slice(4)), partial(closure, slice(4, 5))], sizes)
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-5)


def test_a_reward_without_a_derivative_trains():
    """Ranks alone maximise the accuracy, a Python number, with three seeds. Training starts at
    chance."""
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
    y = (x @ torch.tensor([1.0, -2.0, 0.5, 1.5, -1.0, 0.3]) > 0).long()
    for seed in range(3):
        model = small_model()

        def accuracy(model=model):
            with torch.no_grad():
                return (model(x)[:, :2].argmax(1) == y).float().mean().item()

        opt = Evolution(model, 0.1, 0.05, directions=8, maximize=True, seed=seed)
        before = accuracy()
        for _ in range(40):
            opt.step(accuracy)
        assert accuracy() > max(0.85, before + 0.2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", [Evolution, FZOO])
@pytest.mark.filterwarnings("ignore:.*skipped")
def test_a_run_resumes_and_replays_to_the_bit(make, dtype, tmp_path):
    """The batch is in parts, and step 1 is skipped. The state holds all settings."""

    def step(opt, model, t):
        x, y = data(t, rows=6)
        spans = itertools.pairwise((0, 2, 4, 6))
        factor = 0.0 if t == 1 else 1.0
        opt.step(
            [lambda c=slice(*s): head_for(y[c])(model(x[c].to(dtype))) * factor for s in spans]
        )

    model = small_model().to(dtype)
    base = copy.deepcopy(model)
    opt = make(model, 0.02, 1e-1, directions=3, split_batch=True, weight_decay=0.1, seed=2)
    with Journal(tmp_path / "run.pzj", opt):
        for t in range(3):
            step(opt, model, t)
        torch.save(opt.state_dict(), tmp_path / "opt.pt")
        resumed = copy.deepcopy(model)
        for t in range(3, 5):
            step(opt, model, t)
    again = Evolution(resumed, 0.5)
    again.load_state_dict(torch.load(tmp_path / "opt.pt", weights_only=True))
    assert (again.parts, again.weights) == (3, opt.weights)
    for t in range(3, 5):
        step(again, resumed, t)
    assert equal(model, resumed) and opt.skipped_steps == again.skipped_steps == 1
    assert replay(tmp_path / "run.pzj", base) == 5 and equal(model, base)


@pytest.mark.parametrize(
    "options, sentence",
    [
        (dict(directions=0), "Evolution: directions must be an int of at least 1, got 0"),
        (dict(weights="best"), "weights must be one of raw, spread, zscore, rank, got 'best'"),
        (dict(directions=1, two_sided=False), "so directions must be at least 2"),
        (dict(split_batch=True, capture=True), "leave one of them off"),
    ],
)
def test_bad_options(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        Evolution(small_model(), **options)


def test_bad_closures():
    model = small_model()
    before = small_model()
    x, y = data(0)
    loss = lambda: head_for(y)(model(x))  # noqa: E731
    parts = Evolution(model, 0.1, directions=2, split_batch=True)
    for given in (loss, [loss], [loss] * 3, [loss, 1.0]):
        with pytest.raises(TypeError, match="split_batch needs a list of 2 closures, the loss of"):
            parts.step(given)
    with pytest.raises(ValueError, match="sizes must be 2 numbers, got 3"):
        parts.step([loss] * 2, [1, 2, 3])
    for given in (([loss] * 8,), (loss, [1.0])):
        with pytest.raises(TypeError, match="needs one closure that returns the loss"):
            FZOO(model, 0.1).step(*given)
    assert equal(model, before)
