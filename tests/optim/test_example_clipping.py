"""Steps can take a loss for each example, and clip the projected gradients of examples."""

import copy
from functools import partial

import pytest
import torch
from optimizers import MAKERS, data, equal, head_for, small_model
from pseuzo import (
    MeZO,
    PseuZO,
)
from pseuzo.optim.seeds import step_seed
from torch import nn

from pseuzo_kernels import reference


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
                head = partial(nn.functional.cross_entropy, target=y, reduction=reduction)
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
            # The losses have a relative error of 2^-23, which is divided by eps.
            torch.testing.assert_close(p, q, rtol=0, atol=2e-5)


@pytest.mark.parametrize("two_sided", [False, True], ids=["one-sided", "two-sided"])
@pytest.mark.parametrize(
    "values, want",
    [
        ([1.0, -2.0, 9.0, 3.0, -40.0], 1 - 2 + 6 + 3 - 6),  # the median of the sizes is 3
        ([1.0, -2.0, 9.0, -40.0], 1 - 2 + 4 - 4),  # the median is the lower one of 2 and 9
        ([0.0, 0.0, 7.0], 7),  # a median of 0 clips nothing
        ([5.0], 5),
    ],
)
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
    pseuzo = PseuZO(model, 0.1, momentum=0.0, clip_examples=2.0)  # this also clips its MeZO steps
    with pytest.raises(ValueError, match="clip_examples needs the loss of each example"):
        pseuzo.step(lambda: model(x), head_for(y))
    pseuzo.step(lambda: model(x), lambda o: nn.functional.cross_entropy(o, y, reduction="none"))


@pytest.mark.parametrize("two_sided", [False, True], ids=["one-sided", "two-sided"])
@pytest.mark.parametrize(
    "examples", [None, torch.tensor([7, 3, 7, 3, 5, 9])], ids=["rows", "examples"]
)
def test_pseuzo_clips_examples(examples, two_sided):
    """The newest coefficient is the sum of the clipped projected gradients, and older entries are
    projected on the same gradient."""
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
