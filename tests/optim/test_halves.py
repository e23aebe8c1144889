"""The two halves of a step, estimate() and applying it, together equal step()."""

import copy
import warnings

import pytest
import torch
from optimizers import LABELS, MAKERS, NEED_MODEL, Broken, arguments, equal, small_model
from pseuzo import (
    PseuZO,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name, bare", [
    (name, bare) for name in MAKERS for bare in (False, True) if not (bare and name in NEED_MODEL)
])  # fmt: skip
def test_estimate_and_step_are_a_step(name, bare, dtype):
    """The weights do not change between the two calls, and an estimate that was not applied leaves
    no trace."""
    whole, halves = small_model().to(dtype), small_model().to(dtype)
    one, two = (MAKERS[name](m.parameters() if bare else m) for m in (whole, halves))
    exact = not bare or dtype is torch.bfloat16  # bare fp32 is restored up to rounding
    for t in range(5):
        before = copy.deepcopy(halves)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loss = one.step(*arguments(one, whole, t, poison=t == 3))
            if t % 2 == 0:
                two.estimate(*arguments(two, halves, 50 + t))  # the next estimate replaces it
            assert two.estimate(*arguments(two, halves, t, poison=t == 3)).isnan() == (t == 3)
            for p, was in zip(halves.parameters(), before.parameters(), strict=True):
                torch.testing.assert_close(p, was, rtol=0, atol=0 if exact else 1e-6)
            assert two.step() is None
        assert (two.steps, two.skipped_steps) == (one.steps, one.skipped_steps)
        assert two.stats.keys() == one.stats.keys() >= {"projected_grad", "momentum", "window"}
        if exact:
            assert equal(whole, halves) and loss.dim() == 0
        for p, q in zip(whole.parameters(), halves.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=2e-4)
        with pytest.raises(RuntimeError, match="there is no estimate to apply"):
            two.step()
    assert not equal(halves, small_model().to(dtype)) and two.skipped_steps == 1


@pytest.mark.filterwarnings("ignore:.*skipped")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", MAKERS)
def test_a_skipped_step_changes_no_bit(name, dtype):
    """The sign of a zero does not change either."""
    model = small_model().to(dtype)
    opt = MAKERS[name](model)
    opt.step(*arguments(opt, model, 0))
    with torch.no_grad():
        for p in model.parameters():
            p.view(-1)[:3] = -0.0
    before = [p.detach().clone() for p in model.parameters()]
    opt.step(*arguments(opt, model, 1, poison=True))
    assert opt.skipped_steps == 1
    for p, was in zip(model.parameters(), before, strict=True):
        assert torch.equal(p.detach().view(torch.uint8), was.view(torch.uint8))


@pytest.mark.parametrize("bare", [False, True], ids=["module", "bare parameters"])
def test_a_failed_estimate_drops_the_one_before(bare):
    model = small_model().to(torch.bfloat16)
    opt = MAKERS["mezo momentum"](model.parameters() if bare else model)
    before = copy.deepcopy(model)
    opt.estimate(*arguments(opt, model, 0))
    calls = []

    def fails():
        calls.append(1)
        if len(calls) == 3:  # in the second direction, while bare parameters hold the first
            raise Broken
        return arguments(opt, model, 1)[0]()

    with pytest.raises(Broken):
        opt.estimate(fails)
    with pytest.raises(RuntimeError, match="there is no estimate"):
        opt.step()
    opt.estimate(*arguments(opt, model, 0))
    opt.param_groups[0]["lr"] = -1.0
    with pytest.raises(ValueError, match="lr must be finite and not negative"):
        opt.estimate(*arguments(opt, model, 1))
    opt.param_groups[0]["lr"] = 0.1
    with pytest.raises(RuntimeError, match="there is no estimate"):
        opt.step()
    assert equal(model, before) and opt.steps == 0


def test_an_error_in_the_second_half_puts_bare_parameters_back():
    model = small_model().to(torch.bfloat16)
    opt = PseuZO(model.parameters(), 0.1, 1e-2)
    forward, head, _ = arguments(opt, model, 0)
    opt.step(forward, head, LABELS)
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match="the window holds entries with groups"):
        opt.step(forward, head)
    assert equal(model, before) and opt.steps == 1
