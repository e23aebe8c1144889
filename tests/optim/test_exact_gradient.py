"""An untied output head is trained by the exact gradient."""

import copy
import math

import pytest
import torch
from optimizers import LABELS, Headed, data, equal, exact_groups, head_for
from pseuzo import (
    CausalLMObjective,
    MeZO,
    PseuZO,
)
from pseuzo.train.journal import Journal
from tiny_models import batch_of, causal_lm


def headed_steps(model, opt, steps, poison=()):
    dtype = model.out.weight.dtype
    for t in steps:
        x, y = data(t)
        factor = float("nan") if t in poison else 1.0
        opt.step(
            lambda x=x: torch.tanh(model.body(x.to(dtype))),
            lambda o, y=y, f=factor: head_for(y)(model.out(o)) * f,
        )


@pytest.mark.filterwarnings("ignore:.*skipped")
@pytest.mark.parametrize("maximize", [False, True])
def test_exact_gradients_are_those_of_sgd(maximize):
    """The head is trained as by SGD, and the body as if the head were frozen. A skipped step decays
    nothing."""
    model = Headed()
    opt = PseuZO(
        exact_groups(model, maximize=maximize), 0.02, 1e-2, 3, seed=4, weight_decay=0.1, model=model
    )
    for t in range(5):
        before = copy.deepcopy(model)
        headed_steps(model, opt, [t], poison=(2,))
        if t == 2:
            assert equal(model, before)
            continue
        x, y = data(t)
        head_for(y)(before.out(torch.tanh(before.body(x)))).backward()
        for p, was in zip(model.out.parameters(), before.out.parameters(), strict=True):
            sign = -1 if maximize else 1
            torch.testing.assert_close(
                p, (1 - 0.05 * 0.2) * was - sign * 0.05 * was.grad, rtol=0, atol=1e-6
            )
        if t == 0:
            frozen = copy.deepcopy(before)
            twin = PseuZO(
                frozen.body.parameters(), 0.02, 1e-2, 3, seed=4, weight_decay=0.1, model=frozen
            )
            headed_steps(frozen, twin, [0])
            assert equal(model.body, frozen.body) and equal(before.out, frozen.out)
        assert not torch.equal(model.body.weight, before.body.weight)
    assert opt.skipped_steps == 1


def test_exact_gradients_round_stochastically_and_reproducibly():
    moved = []
    for _ in range(2):
        model = Headed(torch.bfloat16)
        with torch.no_grad():
            model.out.weight.fill_(1.0)
        opt = PseuZO(exact_groups(model, lr=1e-3, weight_decay=0.5), 0.0, 1e-2, model=model, seed=3)
        for t in range(64):  # a step decays by 5e-4, a fifteenth of the ulp below 1
            headed_steps(model, opt, [t])
        moved.append(model.out.weight.detach().float())
    assert torch.equal(*moved)
    # Rounding to nearest would lose the decay altogether. The gradient sums to 0 over the classes.
    # Each of 40 weights is rounded 64 times, up or down with probabilities 1/8 and 7/8, which has a
    # standard deviation of 2^-8 * sqrt(64 * 7 / 64).
    assert abs(float(moved[0].mean()) - (1 - 5e-4) ** 64) < 4 * 2.0**-8 * math.sqrt(7 / 40)
    assert moved[0].mean() < 0.99


def test_a_gradient_that_is_not_finite_skips_the_whole_step():
    model = Headed()
    opt = PseuZO(exact_groups(model), 0.02, 1e-2, model=model)
    before = copy.deepcopy(model)
    x, _ = data(0)
    with pytest.warns(UserWarning, match="skipped"):
        # The slope of sqrt at 0 is infinite, but the gradient of o is finite.
        opt.step(
            lambda: model.body(x),
            lambda o: model.out(o).square().mean() + (model.out.bias * 0).abs().sqrt().sum(),
        )
    assert equal(model, before) and opt.skipped_steps == 1


def test_exact_gradient_in_other_steps_and_places(tmp_path):
    model = Headed()
    opt = PseuZO(exact_groups(model), 0.02, 1e-2, momentum=0.0, model=model)
    before = copy.deepcopy(model)
    headed_steps(model, opt, range(2))  # these are MeZO steps
    assert equal(model.out, before.out) and not equal(model.body, before.body)
    with pytest.raises(ValueError, match="updates by exact_gradient are not sums of seeds"):
        Journal(tmp_path / "run.pzj", opt)
    with pytest.raises(
        ValueError, match="MeZO: exact_gradient=True needs the head that PseuZO differentiates"
    ):
        MeZO(exact_groups(model), model=model)
    wrong = PseuZO(
        [
            {"params": model.out.parameters()},
            {"params": model.body.parameters(), "exact_gradient": True},
        ],
        0.02,
        model=model,
    )
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=r"the head does not use a parameter of shape \(8, 6\)"):
        headed_steps(model, wrong, [0])
    assert equal(model, before)


@pytest.mark.parametrize("options", [[17, 4], None], ids=["options", "language modelling"])
def test_exact_gradient_of_a_causal_lm_head(options):
    model = causal_lm("llama")
    labels = LABELS if options else batch_of()["input_ids"]
    objective = CausalLMObjective(model, options)
    forward, head = objective({**batch_of(), "labels": labels})
    body = [p for n, p in model.named_parameters() if n != "lm_head.weight"]
    opt = PseuZO(
        [{"params": body}, {"params": [model.lm_head.weight], "lr": 0.5, "exact_gradient": True}],
        1e-4,
        1e-3,
        model=model,
    )
    before, weight = copy.deepcopy(model), model.lm_head.weight
    loss = opt.step(forward, head)
    f, h = CausalLMObjective(before, options)({**batch_of(), "labels": labels})
    (gradient,) = torch.autograd.grad(h(f()), before.lm_head.weight)
    torch.testing.assert_close(weight, before.lm_head.weight - 0.5 * gradient, rtol=0, atol=1e-6)
    assert gradient.abs().max() > 1e-3 and loss > 0
