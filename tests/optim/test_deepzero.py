"""DeepZero agrees with its formula: which weights it shifts, by how much, and that it restores
each."""

import copy
from itertools import pairwise
from random import Random

import pytest
import torch
from optimizers import MAKERS, Broken, arguments, data, equal, head_for, small_model
from pseuzo import DeepZero, Journal
from pseuzo.optim.deepzero import DRAW_DOMAIN, at_least_one, counts_of_lowest, shared
from pseuzo.optim.seeds import direction_seed, step_seed
from torch import nn

from pseuzo_kernels import noise, reference

SIZES = [48, 8, 40, 5]  # of small_model


@torch.no_grad()
def loss_at(model, x, y, *changes):
    """Return the loss after changes, each a parameter, the index of a weight, and an amount."""
    other = copy.deepcopy(model)
    params = list(other.parameters())
    for i, number, by in changes:
        params[i].view(-1)[number] += by
    return float(head_for(y)(other(x)).double())


def drawn(seed, step, counts):
    """Return the indices of the drawn weights of each parameter, as documented."""
    seeds = [reference.hash_seed(step_seed(seed, step, DRAW_DOMAIN) + i) % 2**64 for i in range(4)]
    return [
        sorted(Random(s).sample(range(n), k)) for s, n, k in zip(seeds, SIZES, counts, strict=True)
    ]


@pytest.mark.parametrize("two_sided", [False, True])
@pytest.mark.parametrize("redraw", [1, 2])
def test_the_formula(two_sided, redraw):
    model = small_model()
    lr, eps, decay, scales = 0.05, 1e-2, 0.1, [2.0, 2.0, 1.0, 1.0]
    params = list(model.parameters())
    groups = [{"params": params[:2], "noise_scale": 2.0}, {"params": params[2:], "maximize": True}]
    options = {"redraw": redraw, "two_sided": two_sided, "weight_decay": decay, "seed": 5}
    opt = DeepZero(groups, lr, eps, coordinates=9, scores="random", model=model, **options)
    assert sum(shared(9, SIZES)) == 9 and shared(9, SIZES) == [4, 1, 4, 0]
    counts = at_least_one(shared(9, SIZES))
    assert counts == [3, 1, 4, 1]
    for t in range(4):
        x, y = data(t)
        before = [p.detach().clone() for p in params]
        want = [(1 - lr * decay) * p.double() for p in before]
        clean, passes = loss_at(model, x, y), 0
        for i, numbers in enumerate(drawn(5, t // redraw, counts)):
            for number in numbers:
                by = eps * scales[i]
                up = loss_at(model, x, y, (i, number, by))
                down = loss_at(model, x, y, (i, number, -by)) if two_sided else clean
                slope = (up - down) / (2 * by if two_sided else by)
                want[i].view(-1)[number] -= (1 if i < 2 else -1) * lr * scales[i] ** 2 * slope

        def closure(x=x, y=y):
            nonlocal passes
            passes += 1
            return head_for(y)(model(x))

        got = opt.step(closure)
        assert passes == (19 if two_sided else 10)
        assert float(got) == pytest.approx(clean, abs=1e-6)
        for p, w in zip(params, want, strict=True):
            # Two losses below 4 are rounded by 2.4e-7 and divided by eps 0.01, and the change of a
            # weight below 1 is rounded by 6e-8. So a slope (below 4) has an error of at most 5e-5 +
            # 4 * 1.2e-5, and lr * scale^2 is 0.2.
            torch.testing.assert_close(p.detach().double(), w, rtol=1e-6, atol=2e-5)


def test_all_coordinates_are_the_gradient():
    """Differences in all coordinates give the gradient of a smooth loss, the mean over 4 rows. A
    one-sided difference would have an error of eps / 2 times a second derivative. The error of a
    two-sided one is of order eps^2."""
    model = small_model()
    x, y = data(0)
    head_for(y)(model(x)).backward()
    start = [p.detach().clone() for p in model.parameters()]
    opt = DeepZero(model, 1.0, 1e-2, two_sided=True, seed=1)
    assert opt.counts is None
    opt.step(lambda: head_for(y)(model(x)))
    assert opt.counts == dict(enumerate(SIZES))
    for p, was in zip(model.parameters(), start, strict=True):
        # The rounding error is 2 * 2.4e-7 / 0.02. The truncation error is 1e-4 / 6 times a third
        # derivative below 20.
        torch.testing.assert_close(was - p.detach(), p.grad, rtol=0, atol=4e-4)


def test_losses_that_are_all_the_same_divide_the_coordinates_by_size():
    model = small_model()
    opt = DeepZero(model, 0.02, 1e-2, coordinates=20)
    opt.step(lambda: 0.5)
    assert list(opt.counts.values()) == [9, 2, 8, 1]  # of 48, 8, 40 and 5


@pytest.mark.parametrize("bare", [False, True])
def test_grasp_divides_the_coordinates_as_its_formula_says(bare):
    model = small_model()
    x, y = data(0)
    start, q, eps = [p.detach().clone() for p in model.parameters()], 6, 1e-2
    given = model.parameters() if bare else model
    opt = DeepZero(given, 1e-9, eps, coordinates=20, directions=q, seed=3)
    passes = 0

    def closure():
        nonlocal passes
        passes += 1
        return head_for(y)(model(x))

    opt.step(closure)
    assert passes == 1 + 2 * q + 1 + 20
    for p, was in zip(model.parameters(), start, strict=True):
        torch.testing.assert_close(p.detach(), was, rtol=0, atol=1e-7)

    z = [
        [noise(p.shape, direction_seed(3, 0, j), i) for i, p in enumerate(start)] for j in range(q)
    ]

    @torch.no_grad()
    def slopes(at):
        other = copy.deepcopy(model)

        def loss(by, direction):
            for p, w, zi in zip(other.parameters(), at, direction, strict=True):
                p.copy_(w + by * zi)
            return head_for(y)(other(x)).double()

        return torch.stack([(loss(eps, d) - loss(0.0, d)) / eps for d in z])

    c = slopes(start)
    moved = [
        w + eps / float(c.norm()) * sum(float(cj) * zj[i] for cj, zj in zip(c, z, strict=True))
        for i, w in enumerate(start)
    ]
    change = slopes(moved) - c
    scores = [
        -(w * sum(float(h) * zj[i] for h, zj in zip(change, z, strict=True))).flatten()
        for i, w in enumerate(start)
    ]
    kept = torch.cat(scores).sort().indices[:20]
    edges = torch.tensor([0, 48, 56, 96, 101])
    want = [int(((kept >= a) & (kept < b)).sum()) for a, b in pairwise(edges)]
    assert list(opt.counts.values()) == at_least_one(want)
    assert opt.counts != dict(enumerate(at_least_one(shared(20, SIZES)))), "no effect"
    opt.step(closure)
    assert passes == 1 + 2 * q + 1 + 20 + 21


def test_magnitude_counts_the_largest_weights():
    scores = [-torch.tensor([3.0, 1.0]), -torch.tensor([2.0]), -torch.tensor([0.5, 0.1])]
    assert counts_of_lowest(2, scores) == [1, 1, 0]
    assert counts_of_lowest(3, scores) == [2, 1, 0] and at_least_one([2, 1, 0]) == [1, 1, 1]
    assert at_least_one([2, 0, 0]) == [2, 0, 0], "two weights cannot be shared by three layers"
    model = small_model()
    nn.init.constant_(model[2].weight, 5.0)
    opt = DeepZero(model, coordinates=12, scores="magnitude")
    opt.step(*arguments(opt, model, 0))
    assert opt.counts == {0: 1, 1: 1, 2: 9, 3: 1}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_weights_take_the_difference_that_they_can_hold(dtype):
    """A weight of 1 does not move, since eps is a third of its ulp. A weight of 2^-4 moves by eps
    rounded to its spacing, and the slope of a linear loss is exact."""
    eps = torch.finfo(dtype).eps / 3
    model = nn.Linear(2, 1, bias=False).to(dtype)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 2.0**-4]]))
    opt = DeepZero(model, 0.25, eps, rounding="nearest")
    loss = lambda: (model.weight.double() @ torch.tensor([3.0, 0.5]).double()).sum()  # noqa: E731
    opt.step(loss)
    # The losses are fp32. Near 3 they are rounded by 2.4e-7, and the change is 5 ulps.
    assert opt.stats["projected_grad"][0] == 0
    assert float(opt.stats["projected_grad"][1]) == pytest.approx(0.5, abs=4.8e-7 / eps)
    assert model.weight[0, 0] == 1.0


@pytest.mark.parametrize("scores", ["grasp", "random"])
@pytest.mark.parametrize("bare", [False, True])
def test_a_pass_that_fails_leaves_the_weights_to_the_bit(scores, bare):
    model = small_model()
    x, y = data(0)
    start = copy.deepcopy(model)
    given = model.parameters() if bare else model
    opt = DeepZero(given, 0.1, 1e-2, coordinates=3, directions=2, scores=scores)
    passes = 1 + 3 if scores == "random" else 1 + 2 * 2 + 1 + 3
    for failing in range(1, passes + 1):
        calls = 0

        def closure(failing=failing):
            nonlocal calls
            calls += 1
            if calls == failing:
                raise Broken
            return head_for(y)(model(x))

        with pytest.raises(Broken):
            opt.step(closure)
        assert equal(model, start) and opt.steps == 0 and opt.counts is None
    opt.step(lambda: head_for(y)(model(x)))
    assert not equal(model, start) and opt.steps == 1


@pytest.mark.filterwarnings("ignore:.*skipped")
def test_a_loss_that_is_not_finite_skips_the_step_and_its_scores():
    model = small_model()
    start = copy.deepcopy(model)
    opt = DeepZero(model, 0.1, 1e-2, coordinates=3, directions=2, weight_decay=0.1)
    opt.step(*arguments(opt, model, 0, poison=True))
    assert equal(model, start) and opt.skipped_steps == 1 and opt.counts is None
    opt.step(*arguments(opt, model, 1))
    assert not equal(model, start) and sum(opt.counts.values()) == 3


def test_refusals(tmp_path):
    model = small_model()
    for options, match in (
        ({"coordinates": 102}, "coordinates is 102, but only 101 weights are trained"),
        ({"coordinates": 0}, "coordinates must be an int of at least 1, got 0"),
        ({"scores": "best"}, "scores must be one of grasp, magnitude, random, got 'best'"),
        ({"capture": True}, "capture"),
    ):
        with pytest.raises(ValueError, match=match):
            DeepZero(model, **options)
    with pytest.raises(ValueError, match=r"10202 forward passes, .* than 10000 .*coordinates"):
        DeepZero(nn.Linear(100, 101))
    with pytest.raises(ValueError, match="updates of DeepZero are not sums of seeds"):
        Journal(tmp_path / "run.pzj", MAKERS["deepzero"](model))
    with pytest.raises(TypeError, match="needs a closure"):
        DeepZero(model).step(3.0)
