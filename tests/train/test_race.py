"""A race halves its field by the dev loss within its budget, and leaves no trace in the weights."""

import math

import pytest
import torch
from pseuzo import MeZO, PseuZO
from pseuzo.optim.together import Together
from pseuzo.train.race import Race, Runner
from pseuzo.train.track import Track
from torch import nn


def runners(n: int) -> list[Runner]:
    return [Runner(str(i), [str(i)], 1e-3, 1e-3) for i in range(n)]


class Measured:
    """A race whose dev losses are known: runner i has i at the end of its first `late` steps, and
    afterwards n - i. It notes who was taken where, and adds up the price."""

    def __init__(self, budget: int, late: float = math.inf, longest: int = 1000):
        self.calls: list[tuple[str, int]] = []
        self.paid, self.late = 0, late
        price = lambda before, to: 2 * (to - before) + 3  # noqa: E731
        self.race = Race(self.go, price, lambda n: 5 * n, budget, longest)

    def run(self, n: int, challengers=lambda winner: [], expected=0) -> Runner:
        self.started = self.race.plan(n, expected)
        self.race.spent += 5 * self.started
        self.paid += 5 * self.started
        return self.race.run(runners(self.started), challengers)

    def go(self, runner: Runner, steps: int) -> float:
        self.calls.append((runner.name, steps))
        self.paid += 2 * (steps - max(runner.losses, default=0)) + 3
        return float(runner.name) if steps <= self.late else -float(runner.name)


def test_the_worse_half_drops_out_of_each_round():
    m = Measured(budget=800)
    winner = m.run(6)
    first, second, third = m.race.stops
    assert (second, third) == (3 * first, 7 * first)  # each round is twice as long
    assert m.calls == [
        *((str(i), first) for i in range(6)),
        *((str(i), second) for i in range(3)),
        *((str(i), third) for i in range(2)),
    ]
    assert winner.name == "0" and m.race.spent == m.paid <= 800
    # Longer stops would not fit: a step more in the first round is 6 + 2 * 3 + 4 * 2 = 20 more.
    assert m.paid + 20 * 2 > 800


def test_those_that_are_left_are_judged_anew():
    m = Measured(budget=400, late=30)
    assert m.run(4).name == "1"
    assert [name for name, _ in m.calls] == ["0", "1", "2", "3", "0", "1"]


# Of 4: 4 (2 * 8 + 3) + 2 (2 * 16 + 3) + 4 * 5 = 166; of 3: 3 * 19 + 2 * 35 + 15 = 142; of 2:
# 2 (2 * 16 + 3) + 10 = 80.
@pytest.mark.parametrize("budget, started", [(166, 4), (165, 3), (142, 3), (141, 2), (80, 2)])
def test_a_small_budget_has_fewer_runners_and_is_never_overdrawn(budget, started):
    m = Measured(budget)
    assert m.run(4).name == "0"
    assert m.started == started == len(m.race.seen)
    assert m.paid == m.race.spent <= budget
    assert m.calls[0][1] >= 8 and m.calls[-1][1] >= 16, "so few steps tell nothing"


def test_without_a_budget_for_two_the_first_is_taken():
    m = Measured(budget=79)
    assert m.run(4).name == "0" and m.started == 1 and not m.calls


def test_no_runner_goes_further_than_the_run():
    m = Measured(budget=10**6, longest=30)
    m.run(4)
    assert max(steps for _, steps in m.calls) == 30


def test_losses_that_are_not_finite_lose():
    race = Race(lambda r, n: math.nan if r.name == "0" else 1.0, lambda a, b: 1, int, 9, 99)
    assert race.plan(2) == 2
    assert race.run(runners(2), lambda winner: []).name == "1"
    assert race.seen[0].losses == {99: math.inf}


def test_challengers_race_against_the_winner_while_the_budget_lasts():
    waves = [[Runner("-1", [], 1, 1), Runner("9", [], 1, 1)], [Runner("-2", [], 1, 1)]]
    m = Measured(budget=800)
    asked = []

    def challengers(winner):
        asked.append(winner.name)
        return waves[len(asked) - 1]

    winner = m.run(2, challengers, expected=2)
    # The second wave is beyond the budget, of which the first one's part was set aside.
    assert asked == ["0", "-1"] and winner.name == "-1"
    assert m.paid == m.race.spent <= 800
    (stop,) = m.race.stops
    assert [call for call in m.calls if call[0] == "0"] == [("0", stop)], "winners do not run again"


class Net(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.out = nn.Linear(7, 5), nn.Linear(5, 2)
        self.to(dtype)

    def forward(self, x):
        return self.out(self.body(x).tanh()).float().square().mean(1)


OPTIMIZERS = {
    "curvature": lambda net: MeZO(net, lr=0.05, eps=1e-2, curvature_window=3),
    "mezo": lambda net: MeZO(net, lr=0.05, eps=1e-2, weight_decay=0.1),
    "mezo-momentum": lambda net: MeZO(net, lr=0.05, eps=1e-2, momentum=0.9, window=3, directions=2),
    "part": lambda net: MeZO([net.out.weight], lr=0.05, eps=1e-2, noise_scale=2.0, model=net),
}


def tracked(net, name, passes=lambda n: 2 * n):
    xs = [torch.randn(4, 7, generator=torch.Generator().manual_seed(i)) for i in range(9)]
    xs = [x.to(net.out.weight.dtype) for x in xs]

    def step(optimizer, i):
        each = optimizer.curvature_window
        optimizer.step(lambda: net(xs[i]) if each else net(xs[i]).mean())

    dev = [lambda: net(xs[7]).mean(), lambda: net(xs[8]).mean()]
    make = OPTIMIZERS[name]
    return Track(net, lambda c: make(net), step, dev, passes, Together()), step


def bits(net):
    return [p.detach().clone() for p in net.parameters()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_candidates_that_take_turns_train_as_if_each_were_alone(name, dtype):
    net = Net(dtype)
    before = bits(net)
    track, step = tracked(net, name)
    found, trained = {}, {}
    with track.reserved():
        for stop in (2, 5):
            for candidate in "ab":
                found[candidate, stop] = track.go(candidate, stop)
                trained[candidate, stop] = bits(net)
    assert all(map(torch.equal, bits(net), before)), "the race left something in the weights"
    alone = OPTIMIZERS[name](net)
    for i in range(5):
        step(alone, i)
        for candidate in "ab":
            if (mine := trained.get((candidate, i + 1))) is not None:
                assert all(map(torch.equal, bits(net), mine)), (candidate, i + 1)
    assert found["a", 5] == found["b", 5] == track.loss()
    assert track.evaluation == 2
    assert track.price(2, 5) == 6 + 2


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_race_that_is_cut_short_leaves_the_base(error):
    net = Net(torch.float32)
    before, calls = bits(net), []
    track, _ = tracked(net, "mezo")

    def hook(*unused):
        calls.append(1)
        if len(calls) == 6:
            raise error

    handle = net.register_forward_pre_hook(hook)
    with pytest.raises(error), track.reserved():
        track.go("a", 9)
    handle.remove()
    assert all(map(torch.equal, bits(net), before))


def test_a_window_goes_on_where_it_was():
    """PseuZO keeps output changes, which no seed gives back: the optimizer itself must stay."""
    net = Net(torch.float32)
    head = lambda o: o.square().mean()  # noqa: E731
    make = lambda: PseuZO([net.body.weight], lr=0.05, eps=1e-2, model=net, window=3)  # noqa: E731
    x = torch.randn(4, 7, generator=torch.Generator().manual_seed(1))

    def step(optimizer, i):
        optimizer.step(lambda: net.body(x * (1 + i)).tanh(), lambda o: head(net.out(o)))

    loss = [lambda: net(x).mean()]
    track = Track(net, lambda c: make(), step, loss, lambda n: 2 * n, Together())
    with track.reserved():
        for stop in (1, 3, 5):
            for candidate in "ab":
                track.go(candidate, stop)
        raced = bits(net)
    alone = make()
    for i in range(5):
        step(alone, i)
    assert all(map(torch.equal, bits(net), raced))
