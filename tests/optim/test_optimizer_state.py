"""The state of an optimizer holds all that a resumed run needs."""

import copy

import pytest
import torch
from optimizers import LABELS, MAKERS, arguments, data, equal, head_for, small_model
from pseuzo import (
    CyclicHyperbola,
    DeepZero,
    MeZO,
    PseuZO,
)
from pseuzo.train.journal import Journal
from pseuzo.train.replay import replay
from tiny_models import Tied
from torch import nn
from torch.nn.functional import cross_entropy

from pseuzo_kernels import reference


@pytest.mark.parametrize(
    "make",
    [
        lambda m: PseuZO(m, 0.02, 1e-2, 3, 0.9, 0.1, seed=2),
        lambda m: PseuZO(m.parameters(), 0.02, 1e-2, 3, CyclicHyperbola(6), seed=2),
        lambda m: PseuZO(m, 0.02, 1e-2, 3, 0.9, seed=2, weighting="mean"),
        lambda m: MeZO(m, 0.02, 1e-2, seed=2),
        lambda m: MeZO(m, 0.2, 1e-2, seed=2, curvature_window=7),
        lambda m: PseuZO(m, 0.2, 1e-2, 3, 0.9, seed=2, curvature_window=7),
        lambda m: DeepZero(m, 0.02, 1e-2, coordinates=5, directions=2, redraw=2, seed=2),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_state_dict_then_equal_steps(make, dtype, tmp_path):
    def run(opt, model, steps):
        for t in steps:
            x, y = data(t)
            if isinstance(opt, PseuZO):
                opt.step(lambda x=x: model(x.to(dtype)), head_for(y), groups=LABELS)
            elif opt.curvature_window:
                opt.step(lambda x=x, y=y: cross_entropy(model(x.to(dtype)), y, reduction="none"))
            else:
                opt.step(lambda x=x, y=y: head_for(y)(model(x.to(dtype))))

    model = small_model().to(dtype)
    opt = make(model)
    run(opt, model, range(5))
    torch.save(opt.state_dict(), tmp_path / "opt.pt")
    resumed = copy.deepcopy(model)
    again = make(resumed)
    again.load_state_dict(torch.load(tmp_path / "opt.pt", weights_only=True))
    run(opt, model, range(5, 10))
    run(again, resumed, range(5, 10))
    assert all(
        torch.equal(p, q) for p, q in zip(model.parameters(), resumed.parameters(), strict=True)
    )


def test_load_state_dict_refuses_others():
    model = small_model()
    opt = PseuZO(model)
    for state in (torch.optim.SGD(model.parameters(), 0.1).state_dict(), MeZO(model).state_dict()):
        with pytest.raises(ValueError, match="not a state of PseuZO, it lacks"):
            opt.load_state_dict(state)


@pytest.mark.parametrize("make", [PseuZO, MeZO])
@pytest.mark.parametrize(
    "dtype, rounding",
    [
        (torch.bfloat16, "stochastic"),
        (torch.float16, "stochastic"),
        (torch.bfloat16, "nearest"),
        (torch.float32, "stochastic"),
    ],
)
def test_a_state_of_another_rounding_rule(make, dtype, rounding):
    """Its 16-bit weights would continue under another rule. All other weights have the same bits
    under every rule."""
    opt = make(small_model().to(dtype), rounding=rounding)
    for written in (None, 99):
        state, before = copy.deepcopy(opt.state_dict()), copy.deepcopy(opt.state_dict())
        own = state["state"]["zero_order"]
        assert own.pop("rounding_version") == reference.ROUNDING_VERSION
        # Version 1 was not written to the state.
        own |= {"step": 7} if written is None else {"step": 7, "rounding_version": written}
        same = written is None and reference.ROUNDING_VERSION == 1
        if same or dtype is torch.float32 or rounding == "nearest":
            opt.load_state_dict(state)
            assert opt.state_dict()["state"]["zero_order"]["step"] == 7
            continue
        with pytest.raises(
            ValueError,
            match=f"16-bit weights were rounded stochastically by version {written or 1} ",
        ):
            opt.load_state_dict(state)
        assert (
            opt.state_dict()["state"]["zero_order"]["step"] == before["state"]["zero_order"]["step"]
        )


@pytest.mark.parametrize("name", MAKERS)
def test_a_state_saved_between_estimate_and_step_is_that_before_the_estimate(name):
    model = small_model()
    opt = MAKERS[name](model)
    for t in range(4):
        opt.step(*arguments(opt, model, t))
    opt.estimate(*arguments(opt, model, 4))
    state, resumed = copy.deepcopy(opt.state_dict()), copy.deepcopy(model)
    opt.step()
    again = MAKERS[name](resumed)
    again.load_state_dict(state)
    with pytest.raises(RuntimeError, match="there is no estimate"):
        again.step()
    for t in range(4, 8):
        again.step(*arguments(again, resumed, t))
        if t > 4:
            opt.step(*arguments(opt, model, t))
    assert equal(model, resumed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.filterwarnings("ignore:.*skipped")
def test_directions_and_momentum_resume_and_replay_to_the_bit(dtype, tmp_path):
    def make(m):
        return MeZO(m, 0.02, 1e-2, weight_decay=0.1, seed=2, directions=2, momentum=0.7, window=3)

    model = small_model().to(dtype)
    base = copy.deepcopy(model)
    opt = make(model)
    with Journal(tmp_path / "run.pzj", opt):
        for t in range(5):
            opt.step(*arguments(opt, model, t, poison=t == 1))
        torch.save(opt.state_dict(), tmp_path / "opt.pt")
        resumed = copy.deepcopy(model)
        for t in range(5, 9):
            opt.step(*arguments(opt, model, t))
    again = MeZO(resumed, 0.5)  # the state replaces all of its settings
    again.load_state_dict(torch.load(tmp_path / "opt.pt", weights_only=True))
    for t in range(5, 9):
        again.step(*arguments(again, resumed, t))
    assert equal(model, resumed)
    assert replay(tmp_path / "run.pzj", base) == 9
    assert equal(model, base)


class Experts(nn.Module):
    """Runs one of two large layers, depending on the data: x[0, 0] > 0 selects the second."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(6)
        self.first, self.second, self.out = (
            nn.Linear(6, 20_000),
            nn.Linear(6, 20_000),
            nn.Linear(20_000, 5),
        )

    def forward(self, x):
        return self.out(self.second(x) if x[0, 0] > 0 else self.first(x)) / 100


@pytest.mark.parametrize("name", ["pseuzo", "mezo"])
def test_a_resumed_run_knows_which_weights_were_used(name, tmp_path):
    """The second expert ran before the state was saved, but not after it. A run without a break
    still decays its weights, and so must the resumed one."""
    model = Experts()

    def step(opt, m, t):
        x, y = data(t)
        x[0, 0] = 1.0 if t == 1 else -1.0
        forward, head = lambda: m(x), head_for(y)
        opt.step(forward, head) if isinstance(opt, PseuZO) else opt.step(lambda: head(forward()))

    opt = MAKERS[name](model)
    never = model.second.weight.clone()
    step(opt, model, 0)
    assert torch.equal(model.second.weight, never)
    for t in range(1, 4):
        step(opt, model, t)
    kind = "output" if name == "pseuzo" else "loss"
    state = copy.deepcopy(opt.state_dict())
    assert state["state"]["zero_order"]["used"] == {kind: [0, 1, 2, 3, 4, 5]}
    resumed = copy.deepcopy(model)
    again = MAKERS[name](resumed)
    again.load_state_dict(state)
    assert again.state_dict()["state"]["zero_order"]["used"] == {kind: [0, 1, 2, 3, 4, 5]}
    for t in range(4, 7):
        step(opt, model, t)
        step(again, resumed, t)
        assert equal(model, resumed)
    # A new optimizer knows nothing of the passes that the model has run before.
    fresh = MAKERS[name](model)
    before = model.second.weight.clone()
    step(fresh, model, 4)
    assert torch.equal(model.second.weight, before)
    old = copy.deepcopy(state)
    del old["state"]["zero_order"]["used"]
    with pytest.raises(ValueError, match="it lacks used"):
        again.load_state_dict(old)


def test_a_second_optimizer_finds_weights_used_outside_their_module():
    """The second optimizer sees which weights are used, although the passes of the first have
    already learned this about the model."""
    model = Tied()
    ids = torch.randint(0, 300, (3, 5))
    for seed in range(2):
        opt = PseuZO(model, 1e-5, 1e-2, seed=seed)
        for _ in range(4):
            before = {name: p.clone() for name, p in model.named_parameters()}
            opt.step(lambda: model(ids), lambda o: o.square().mean())
            assert not any(torch.equal(p, before[name]) for name, p in model.named_parameters())
