"""EmaWindow.propose and commit are the halves of a step. propose changes no entry that is held."""

import math

import pytest
import torch

from pseuzo_kernels import reference, window

WINDOWS = {"op": window.EmaWindow, "reference": reference.EmaWindow}


@pytest.fixture(params=WINDOWS)
def Window(request):
    return WINDOWS[request.param]


def draw(generator, rows=3, positions=2, width=8):
    return [torch.randn(rows, positions, width, generator=generator) for _ in range(3)]


def assert_same_state(a, b):
    assert a.keys() == b.keys()
    for name, want in b.items():
        got = a[name]
        if isinstance(want, torch.Tensor):
            torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
        else:
            assert got == want, name


def test_a_step_is_a_proposal_and_its_commit(Window):
    generator = torch.Generator().manual_seed(0)
    whole, halves = (Window(3, momentum=0.9) for _ in range(2))
    for step in range(8):
        inputs = draw(generator, 1 + step % 4, 1 + step % 3)
        loss = torch.tensor(math.nan if step == 4 else 1.0)
        seeds, coefs = whole.step(step, *inputs, loss=loss)
        proposal = halves.propose(step, *inputs, loss=loss)
        assert torch.equal(proposal.seeds, seeds) and torch.equal(proposal.coefs, coefs)
        assert torch.equal(proposal.found_inf, whole.found_inf)
        assert proposal.coefs.found_inf is proposal.found_inf
        halves.commit(proposal)
        assert halves.found_inf is proposal.found_inf and halves.skipped == whole.skipped
        assert_same_state(halves.state_dict(), whole.state_dict())


@pytest.mark.parametrize("held", [0, 1, 3, 5])
def test_a_proposal_that_is_not_committed_leaves_no_trace(Window, held):
    """This also holds if the step is not finite, grows the ring, or restarts with another width."""
    generator = torch.Generator().manual_seed(1)
    got, want = (Window(3, momentum=0.7) for _ in range(2))
    for step in range(held):
        inputs = draw(generator)
        got.step(step, *inputs), want.step(step, *inputs)
    before, found_inf = want.state_dict(), got.found_inf
    tried = [draw(generator), draw(generator, 7, 5), draw(generator)]
    tried[2][1][0, 0, 0] = math.inf
    for inputs in tried:
        got.propose(90, *inputs)
        assert len(got) == min(held, 3) and got.skipped == 0 and got.found_inf is found_inf
    got.propose(91, *draw(generator, 2, 2, 5), groups=[0, 1], restart=True)
    after = got.state_dict()
    for name in ("values", "groups", "counts") if held else ():  # the ring may have grown
        whole, rows = after[name], before["values"].shape[1]
        after[name] = (
            whole[:, :rows, -before[name].shape[2] :] if name == "values" else whole[:, :rows]
        )
    assert_same_state(after, before)
    for step in range(4):
        inputs = draw(generator)
        seeds, coefs = got.step(step, *inputs)
        want_seeds, want_coefs = want.step(step, *inputs)
        assert torch.equal(seeds, want_seeds) and torch.equal(coefs, want_coefs)


def test_committed_again_it_is_as_once(Window):
    generator = torch.Generator().manual_seed(2)
    got = Window(2)
    inputs = draw(generator)
    inputs[1][0] = math.nan
    proposal = got.propose(1, *inputs)
    got.commit(proposal)
    before = got.state_dict()
    got.commit(proposal)
    assert_same_state(got.state_dict(), before)
    assert got.skipped == 1


def test_only_the_latest_is_committed(Window):
    generator = torch.Generator().manual_seed(3)
    inputs = draw(generator)
    for change in (
        lambda w: w.propose(2, *inputs),
        lambda w: w.clear(),
        lambda w: w.load_state_dict(w.state_dict()),
        lambda w: w.step(2, *inputs),
    ):
        got = Window(2)
        proposal = got.propose(1, *inputs)
        change(got)
        with pytest.raises(ValueError, match="commit the latest"):
            got.commit(proposal)


@pytest.mark.parametrize("committed", [False, True])
def test_an_op_that_fails_voids_the_proposal_before_it(Window, committed):
    """The op may have written to the slot of that proposal, but not to what the window holds."""
    generator = torch.Generator().manual_seed(4)
    inputs = draw(generator)
    got, want = Window(2), Window(2)
    got.step(1, *inputs), want.step(1, *inputs)
    proposal = got.propose(2, *inputs)
    if committed:
        got.commit(proposal), want.step(2, *inputs)

    real = type(got)

    class Broken(real):
        @staticmethod
        def _op(*args):
            real._op(*args)
            raise ZeroDivisionError

    got.__class__ = Broken
    with pytest.raises(ZeroDivisionError):
        got.propose(3, *draw(generator))
    got.__class__ = real
    with pytest.raises(ValueError, match="commit the latest"):
        got.commit(proposal)
    assert_same_state(got.state_dict(), want.state_dict())


def test_momentum_eps_and_a_new_start(Window):
    """A proposal uses the given values like a window that was made or cleared with them.

    The window itself keeps its own values.
    """
    generator = torch.Generator().manual_seed(5)
    got, want = Window(3, momentum=1.0, eps=1.0), Window(3, momentum=0.5, eps=0.25)
    for step in range(5):
        inputs = draw(generator)
        if step == 3:
            want.clear()
        proposal = got.propose(step, *inputs, momentum=0.5, eps=0.25, restart=step == 3)
        got.commit(proposal)
        seeds, coefs = want.step(step, *inputs)
        assert torch.equal(proposal.seeds, seeds) and torch.equal(proposal.coefs, coefs)
        assert len(got) == len(want)
    assert (got.momentum, got.eps) == (1.0, 1.0)
    # A new start may change the width, and may introduce groups.
    proposal = got.propose(9, *draw(generator, 2, 1, 3), groups=[1, 1], restart=True)
    assert len(got) == 2
    got.commit(proposal)
    assert len(got) == 1 and got.state_dict()["seeds"].tolist() == [9, 0, 0]


@pytest.mark.parametrize("slot", range(4))
def test_a_state_of_as_many_slots_as_entries_is_loaded(Window, slot):
    """Windows without a free slot saved such states; the newest entry may be anywhere in them."""
    generator = torch.Generator().manual_seed(6)
    whole = Window(4, momentum=0.6)
    for step in range(6):
        whole.step(step, *draw(generator))
    state = whole.state_dict()
    turned = {**state, "slot": slot}
    for name in ("values", "seeds", "groups", "counts"):
        turned[name] = state[name].roll(slot - 3, 0)
    again = Window()
    again.load_state_dict(turned)
    assert_same_state(again.state_dict(), state)
    inputs = draw(generator)
    assert torch.equal(again.step(7, *inputs)[1], whole.step(7, *inputs)[1])
