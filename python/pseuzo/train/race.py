"""A race of placements: they train side by side, and the worse half drops out.

    race = Race(go, price, entry, budget=150, longest=300)
    n = race.plan(5, 2)  # as many runners as the budget is enough for, and two challengers
    winner = race.run(runners[:n], challengers)

This is successive halving (Jamieson and Talwalkar 2016). All runners begin at the same weights and
see the same batches, noise and dev rows, so that little but where the noise goes tells them apart.
Nothing here knows what a runner trains: see pseuzo.train.track.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

# The fewest steps after which a race may end, and after which some may drop out of it: single
# directions are noisy, and fewer of them tell little.
LEAST, FIRST = 16, 8
LONG = 4 * LEAST  # with as many, a race rather compares more than longer


@dataclass(eq=False)
class Runner:
    """A candidate: noise on `where`, as patterns for place(), at these lr and eps.

    losses: its dev loss by steps made.
    """

    name: str
    where: list[str]
    lr: float
    eps: float
    losses: dict[int, float] = field(default_factory=dict)


class Race:
    """Halves a field of runners by their dev loss, within a budget of forward passes.

    go: takes a runner on to a number of steps and returns its dev loss there. price: the forward
    passes for taking one from one number of steps on to another, with the evaluation. entry: those
    that a field of n runners takes before it starts. longest: the most steps that a runner may
    make. spent: the passes so far, to which whoever measures something adds its own. seen: all that
    have run, in their order.
    """

    def __init__(
        self,
        go: Callable[[Runner, int], float],
        price: Callable[[int, int], int],
        entry: Callable[[int], int],
        budget: int,
        longest: int,
    ):
        self.go, self.price, self.entry = go, price, entry
        self.budget, self.longest = budget, longest
        self.spent = 0
        self.seen: list[Runner] = []
        self.stops: list[int] = []  # the numbers of steps at which runners are compared

    def plan(self, most: int, challengers: int = 0) -> int:
        """Return how many runners may start, of `most`, such that they get as far as possible; 1 if
        the budget is too small for a race.

        challengers: how many are expected in the next heat. The budget for them is set aside if
        runners still get a long way.
        """
        for n in range(most, 1, -1):
            if self._fits(n, challengers, LONG) or self._fits(n, 0, LEAST):
                return n
        self.stops = []
        return 1

    def _fits(self, runners: int, challengers: int, least: int) -> bool:
        """Choose the longest stops for which the budget is enough; False if there are none of at
        least `least` steps in the end."""
        heats, left = _heats(runners), self.budget - self.spent - self.entry(runners)

        def cost(first: int) -> int:
            self.stops = [first * (2**i - 1) for i in range(1, heats + 1)]
            return self._cost(runners, 0) + self._cost(challengers, 1)

        firsts = range(1, self.longest // (2**heats - 1) + 1)
        first = bisect_right(firsts, left, key=cost)  # how many of them are cheap enough
        if not first or cost(first) > left:
            return False
        return self.stops[-1] >= least and (heats == 1 or first >= FIRST)

    def run(
        self, field: Sequence[Runner], challengers: Callable[[Runner], Sequence[Runner]]
    ) -> Runner:
        """Return the winner of a field that was planned. challengers: gives those that race against
        a winner next, as long as there are any and the budget lasts."""
        winner = self._heat(list(field))
        while self.stops and (new := challengers(winner)):
            if self.spent + self._cost(len(new), 1) > self.budget:
                break
            winner = self._heat([winner, *new])
        return winner

    def _cost(self, new: int, old: int) -> int:
        """The most passes of a heat of `new` runners that begin and `old` that have been there."""
        cost = before = 0
        for stop, size in self._sizes(new + old):
            cost += min(new, size) * self.price(before, stop)
            before = stop
        return cost

    def _sizes(self, runners: int) -> list[tuple[int, int]]:
        """The stops of a heat, the last of all, with how many runners go there."""
        sizes = []
        for stop in self.stops[max(0, len(self.stops) - _heats(runners)) :]:
            sizes.append((stop, runners))
            runners = -(-runners // 2)
        return sizes

    def _heat(self, field: list[Runner]) -> Runner:
        """Halve the field until one is left. Of equal ones, the first stays."""
        for stop, _ in self._sizes(len(field)):
            for runner in field:
                if stop not in runner.losses:
                    before = max(runner.losses, default=0)
                    loss = self.go(runner, stop)
                    runner.losses[stop] = loss if math.isfinite(loss) else math.inf
                    self.spent += self.price(before, stop)
            self.seen += [runner for runner in field if runner not in self.seen]
            field = sorted(field, key=lambda runner: runner.losses[stop])[: -(-len(field) // 2)]
        return field[0]


def _heats(runners: int) -> int:
    """How often a field is halved until one is left."""
    return max(runners - 1, 0).bit_length()
