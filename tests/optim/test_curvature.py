"""Rates in units of 1 / T: T comes from the slopes and losses of the examples of the last steps."""

import copy
import math
from functools import partial

import pytest
import torch
from optimizers import LABELS, data, small_model
from pseuzo import MeZO, PseuZO, ZOAdam, ZOConservative, ZOSign
from pseuzo.optim.curvature import RELATIVE_LR, square_of
from pseuzo.optim.seeds import direction_seed, step_seed
from torch import nn
from torch.nn.functional import cross_entropy

from pseuzo_kernels import noise

EPS, WINDOW, SEED = 1e-2, 3, 5


def losses_of(model, t):
    x, y = data(t)
    return cross_entropy(model(x), y, reduction="none")


def factors(squares, window=WINDOW):
    """What multiplies the rate in each step, from the mean squares of the steps (None: skipped)."""
    found = []
    for t in range(len(squares)):
        known = [s for s in squares[max(0, t + 1 - window) : t + 1] if s is not None]
        found.append(len(known) / window / (sum(known) / len(known)) if known else 0.0)
    return found


def odds(losses):
    """What squares of slopes are multiplied by: p / (1 - p) where that is above 1."""
    p = (-losses.double()).exp()
    return (p / (1 - p)).clamp(min=1)


def given(model, slopes, loss=1.0):
    """A closure with these slopes, whatever the noise."""
    losses = iter([loss + slopes * EPS, loss - slopes * EPS])

    def closure():
        model(torch.zeros(1, model.in_features))  # a pass must use weights
        return next(losses)

    return closure


@pytest.mark.parametrize(
    "own",
    [{}, {"two_sided": False}, {"directions": 2}, {"clip_examples": 1.5}],
    ids=lambda own: next(iter(own), "plain"),
)
def test_mezo_steps_are_over_the_mean_square_slope(own):
    """An optimizer with a plain rate makes the same steps if it is given that rate."""
    model, plain = small_model(), small_model()
    opt = MeZO(model, 0.1, EPS, seed=SEED, curvature_window=WINDOW, **own)
    beside = MeZO(plain, 1.0, EPS, seed=SEED, **own)
    squares = []
    for t in range(6):
        measured = beside.measure(partial(losses_of, plain, t))
        slopes = [(a - b).double() for a, b in measured.pairs]
        slopes = [s / (EPS if own.get("two_sided") is False else 2 * EPS) for s in slopes]
        one_sided = own.get("two_sided") is False
        losses = [b if one_sided else (a + b) / 2 for a, b in measured.pairs]
        found = [s.square() * odds(x) for s, x in zip(slopes, losses, strict=True)]
        squares.append(float(sum(x.mean() for x in found) / len(found)))
        factor = factors(squares)[-1]
        beside.param_groups[0]["lr"] = 0.1 * factor
        opt.step(partial(losses_of, model, t))
        beside.step(partial(losses_of, plain, t))
        known = squares[-WINDOW:]
        assert float(opt.stats["curvature"]) == pytest.approx(sum(known) / len(known), rel=1e-4)
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            # Slopes have the rounding of losses over eps, 1e-5 of their size; 6 steps share it.
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_momentum_keeps_the_size_of_a_step():
    """With equal slopes in all steps, K terms at mu^age sum to as much as one."""
    model = nn.Linear(2, 2)
    opt = MeZO(model, 1.0, EPS, momentum=0.5, window=3, curvature_window=1)
    slopes = torch.tensor([3.0, -1.0, 4.0])
    for _ in range(4):
        opt.step(given(model, slopes))
    coefs = opt._last[0]
    want = slopes.mean() / slopes.square().mean() * torch.tensor([0.25, 0.5, 1.0]) / 1.75
    torch.testing.assert_close(coefs, want, rtol=1e-4, atol=0)


@pytest.mark.parametrize("weighting, terms", [("sum", 1 + 0.8 + 0.64), ("mean", 1.0)])
@pytest.mark.parametrize("options", [1, 2], ids=["rows", "two rows an example"])
def test_pseuzo_steps_are_over_the_mean_square_change(weighting, terms, options):
    model, plain = small_model(), small_model()
    numbers = (EPS, 3, 0.8)
    opt = PseuZO(model, 0.1, *numbers, seed=SEED, weighting=weighting, curvature_window=WINDOW)
    beside = PseuZO(plain, 1.0, *numbers, seed=SEED, weighting=weighting)
    squares = []
    for t in range(6):
        x, y = data(t)
        examples = torch.arange(len(y)) // options
        n = int(examples.max()) + 1

        def head(o, y=y, options=options):
            return cross_entropy(o, y, reduction="none").view(-1, options).sum(1)

        before = plain(x).detach()
        e = torch.autograd.grad(head(o := before.clone().requires_grad_()).mean(), o)[0].double()
        with torch.no_grad():
            moved = copy.deepcopy(plain)
            for i, p in enumerate(moved.parameters()):
                p.add_(noise(p.shape, step_seed(SEED, t), i), alpha=EPS)
            change = (moved(x) - before).double()
        slopes = (change * e).sum(1).view(-1, options).sum(1) * n / EPS
        squares.append(float(slopes.square().mean() * odds(head(before).mean())))
        beside.param_groups[0]["lr"] = 0.1 * factors(squares)[-1] / terms
        for o, m in ((opt, model), (beside, plain)):
            o.step(lambda m=m, x=x: m(x), head, groups=LABELS, examples=examples)
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_the_curvature_of_small_losses_is_known_where_slopes_vanish():
    """Two labels, one logit: -log p has the slope 1 - p and the curvature p (1 - p). A squared
    residual r^2 has the slope 2 r and the curvature 2."""
    p = torch.tensor([0.5, 0.6, 0.9, 0.999], dtype=torch.float64)
    for one in p:
        found = square_of((1 - one).view(1), -one.log().view(1))
        assert float(found) == pytest.approx(float(one * (1 - one)), rel=1e-9)
    assert float(square_of(torch.tensor([0.8]), -torch.tensor([0.2]).log())) == pytest.approx(0.64)
    for r in (1e-3, 1e-1):
        found = square_of(torch.tensor([2 * r]), torch.tensor([r * r]))
        assert 2 <= float(found) <= 4
    for loss in (0.0, -1.0):  # not a negative log likelihood
        assert float(square_of(torch.tensor([3.0]), torch.tensor([loss]))) == 9


@pytest.mark.filterwarnings("ignore:.*skipped so far")
def test_skipped_steps_count_as_unknown():
    model = nn.Linear(2, 2)
    opt = MeZO(model, 1.0, EPS, curvature_window=3)
    slopes, found = torch.tensor([3.0, -1.0]), []
    for factor in (1, math.nan, 1, 2, 1):
        opt.step(given(model, factor * slopes))
        found.append(float(opt._last[0][0]))
    squares = [5.0, None, 5.0, 20.0, 5.0]
    want = [f * s for f, s in zip(factors(squares), (1, 0, 1, 2, 1), strict=True)]
    assert found == pytest.approx(want, rel=1e-4)
    steep = MeZO(model, 1.0, EPS, curvature_window=3)
    for factor in (1, 1e25):  # the second is finite, but its square is not
        steep.step(given(model, factor * slopes))
    assert float(steep._last[0][0]) == 0 and float(steep.stats["curvature"]) > 0
    flat = MeZO(model, 1.0, EPS, curvature_window=3)
    before = [p.clone() for p in model.parameters()]
    flat.step(given(model, torch.zeros(2)))  # a loss without a slope has no curvature to divide by
    assert all(map(torch.equal, model.parameters(), before))


def of_tokens(losses):
    """[4, 3] from losses of 10 tokens: rows have 3, 1, 3 and 3, and their sums have the mean of the
    losses of the tokens."""
    found = torch.zeros(4, 3, dtype=losses.dtype)
    rows, places = torch.tensor([0, 0, 0, 1, 2, 2, 2, 3, 3, 3]), [0, 1, 2, 2, 0, 1, 2, 0, 1, 2]
    return found.index_put((rows, torch.tensor(places)), losses * (4 / 10))


@pytest.mark.parametrize("own", [{}, {"clip_examples": 1.5}], ids=["plain", "clipped"])
def test_tokens_are_the_terms_of_a_loss_that_is_a_mean_over_them(own):
    """A run of tokens has the T of a run of as many examples; but the slopes that are clipped, and
    T is the same then, are those of the examples."""
    generator = torch.Generator().manual_seed(3)
    slopes, loss = torch.randn(10, generator=generator), torch.rand(10, generator=generator)
    model, beside = nn.Linear(2, 2), nn.Linear(2, 2)
    opt = MeZO(model, 1.0, EPS, curvature_window=1, **own)
    alone = MeZO(beside, 1.0, EPS, curvature_window=1)
    whole = of_tokens(slopes).sum(1)
    size = whole.abs()
    most = 1.5 * size.sort().values[1] if own else size.max()
    factors = (most / size).clamp(max=1)
    assert (factors < 1).any() == bool(own)
    opt.step(given(model, of_tokens(slopes), of_tokens(loss)))
    alone.step(given(beside, slopes, loss))
    # The slopes are differences of losses of about 1, over 2 eps: 1e-5 of their size.
    assert float(opt.stats["curvature"]) == pytest.approx(float(alone.stats["curvature"]), rel=1e-4)
    want = (whole * factors).mean() / opt.stats["curvature"]
    torch.testing.assert_close(opt._last[0][0], want.squeeze(), rtol=1e-4, atol=1e-6)


def test_tokens_of_pseuzo():
    """The slopes of tokens are those of the positions of the output; one of six has no loss."""
    torch.manual_seed(0)
    model, head, labels = nn.Linear(4, 5), nn.Linear(5, 3), torch.tensor([[0, 2], [1, 1], [-1, 0]])
    x = torch.randn(3, 2, 4)
    opt = PseuZO(model, 0.1, EPS, 3, 0.8, seed=SEED, curvature_window=1)

    def nll(o):
        losses = cross_entropy(
            head(o).flatten(0, 1), labels.flatten(), ignore_index=-1, reduction="none"
        )
        return losses.view(3, 2)

    before = model(x).detach()
    (e,) = torch.autograd.grad(nll(o := before.clone().requires_grad_()).sum(), o)
    with torch.no_grad():
        moved = copy.deepcopy(model)
        for i, p in enumerate(moved.parameters()):
            p.add_(noise(p.shape, step_seed(SEED, 0), i), alpha=EPS)
        slopes = ((moved(x) - before).double() * e.double()).sum(2) / EPS
    want = (slopes.square() * odds(nll(before).detach()))[labels >= 0].mean()
    loss = opt.step(lambda: model(x), lambda o: nll(o) * (3 / 5))
    assert float(loss) == pytest.approx(float(nll(before)[labels >= 0].mean()), rel=1e-6)
    assert float(opt.stats["curvature"]) == pytest.approx(float(want), rel=1e-4)
    with pytest.raises(
        ValueError, match=r"for each position of the output, \(3, 2\), got \(3, 1\)"
    ):
        opt.step(lambda: model(x), lambda o: nll(o)[:, 1:])
    with pytest.raises(ValueError, match="head must return a scalar loss"):
        opt.step(lambda: model(x), lambda o: 1.0)
    plain = PseuZO(model, 0.1, EPS, 3)
    with pytest.raises(ValueError, match="a vector of per-example losses"):
        plain.step(lambda: model(x), nll)


@pytest.mark.parametrize("width", [1e-2, 1.0, 1e2])
def test_one_rate_learns_at_any_scale(width):
    """Logistic regression on inputs of any width: their curvatures differ by 10^8."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 10, generator=generator)
    y = (x @ torch.randn(10, generator=generator) > 0).long()
    model = nn.Linear(10, 2, bias=False)
    nn.init.zeros_(model.weight)
    opt = MeZO(model, RELATIVE_LR, 1e-3 / width, curvature_window=16)
    order = torch.Generator().manual_seed(1)
    for _ in range(400):
        rows = torch.randint(len(x), (16,), generator=order)
        opt.step(lambda r=rows: cross_entropy(model(width * x[r]), y[r], reduction="none"))
    accuracy = (model(width * x).argmax(1) == y).float().mean()
    assert accuracy > 0.9


@pytest.mark.parametrize("make", [MeZO, PseuZO])
def test_what_does_not_go_with_it_is_refused(make):
    model = small_model()
    with pytest.raises(ValueError, match="weight_decay is multiplied by lr"):
        make(model, 0.1, weight_decay=0.1, curvature_window=3)
    for wrong in (-1, 2.5, True):
        with pytest.raises(ValueError, match="curvature_window must be a number of steps"):
            make(model, 0.1, curvature_window=wrong)
    opt, before = make(model, 0.1, curvature_window=3), [p.clone() for p in model.parameters()]
    opt.param_groups[0]["weight_decay"] = 0.1
    inputs = (None,) * (1 + (make is PseuZO))
    with pytest.raises(ValueError, match="weight_decay is multiplied by lr"):
        opt.step(*(lambda *o: None for _ in inputs))
    assert all(map(torch.equal, model.parameters(), before)) and opt.steps == 0


@pytest.mark.parametrize("other", [ZOConservative, ZOSign])
def test_a_state_of_such_rates_is_refused_where_they_are(other):
    """It would otherwise be used at a rate of 0.1. Nothing is changed."""
    model = small_model()
    opt = MeZO(model, 0.1, curvature_window=3)
    opt.step(lambda: losses_of(model, 0))
    state = opt.state_dict()
    for group in state["param_groups"]:
        group["lr"] = 0.5
    into = other(model, 0.1)
    with pytest.raises(ValueError, match="is for the updates of MeZO and PseuZO"):
        into.load_state_dict(state)
    assert into.param_groups[0]["lr"] == 0.1 and into.steps == 0
    pseuzo = PseuZO(model, 0.1, curvature_window=3)
    many = PseuZO(model, 0.2)
    many.exchange = object()  # as on several ranks
    with pytest.raises(ValueError, match="which ranks pool"):
        many.load_state_dict(pseuzo.state_dict())
    assert many.param_groups[0]["lr"] == 0.2 and not many.curvature_window


def test_slopes_and_losses_that_are_extreme():
    """A slope of 0 has no curvature, however small the loss; slopes whose mean overflows are a step
    that is skipped."""
    slopes, losses = torch.tensor([0.0, 1.0]), torch.tensor([1e-45, 1.0])
    assert square_of(slopes, losses) == 0.5
    model = small_model()
    opt = MeZO(model, 0.1, 1e-3)
    signs = iter((1.0, -1.0))

    def closure():
        return torch.full_like(losses_of(model, 0), next(signs) * 3e35)

    before = [p.clone() for p in model.parameters()]
    with pytest.warns(UserWarning, match="skipped"):
        opt.step(closure)
        assert opt.skipped_steps == 1
    assert all(map(torch.equal, model.parameters(), before))


def test_one_loss_for_all_examples_and_other_updates_are_refused():
    model = small_model()
    opt = MeZO(model, 0.1, curvature_window=3)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match="curvature_window needs the loss of each example"):
        opt.step(lambda: losses_of(model, 0).mean())
    assert all(map(torch.equal, model.parameters(), before)) and opt.steps == 0
    for other in (ZOAdam, ZOSign):
        with pytest.raises(ValueError, match="is for the updates of MeZO and PseuZO"):
            other(model, curvature_window=3)


def test_the_first_seed_is_that_of_a_plain_step():
    """Nothing but the rate differs: the noise is that of a run without T."""
    model = small_model()
    opt = MeZO(model, 0.1, EPS, seed=SEED, curvature_window=3)
    assert opt.measure(partial(losses_of, model, 0)).seeds == (direction_seed(SEED, 0, 0),)
