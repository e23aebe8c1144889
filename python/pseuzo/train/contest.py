"""Which placements and rates race in a run, and what is made of the winner.

The curvature T of the loss along the noise of a placement gives the scale of its rates: the largest
stable one is about 1 / T. So placements race at MIDDLE / T, or at what a given rate is for noise on
all weights, with an eps such that their noise changes the loss as much. Rates race on a ladder
around that; where a step is not the slope along noise times the rate, around the default rate.

A short race favours rates at which a long run diverges. Two rules correct for that: a rate above
the middle is taken only if the next one on the ladder survived too, and the middle or a lower one
is halved if the next one did not survive.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn

from pseuzo.models import placement, probe
from pseuzo.optim.seeds import step_seed
from pseuzo.optim.together import Together
from pseuzo.train.arguments import PseuZOTrainingArguments
from pseuzo.train.methods import METHODS
from pseuzo.train.noise_on import probed
from pseuzo.train.race import Race, Runner
from pseuzo.train.track import Track

LADDER = 4.0  # the ratio of neighbouring rates
MIDDLE = 0.1  # the middle rate, in units of 1 / T
# The fewest and the most batches that measure T: along few directions its error is not known.
FEWEST, PROBED = 8, 32
SURVIVED = 1.05  # a rate that raises the dev loss by more than this factor does not survive
Curvature = tuple[float | None, float, float]  # see _curvature


@dataclass
class Contest:
    """A search for what args leave open: the placement, the rate, or both.

    track: where candidates train. forwards: the passes of the first n steps of a run. steps: those
    of this run, if it searched for nothing. losses: n -> the losses of n batches, as closures.
    of_examples: whether these are the losses of each example. fits: whether a readout is fitted; if
    a rate is searched for, then a candidate at rate 0 races too, whose weights stay.
    """

    model: nn.Module
    args: PseuZOTrainingArguments
    track: Track
    forwards: Callable[[int], int]
    steps: int
    losses: Callable[[int], list[Callable[[], Any]]]
    of_examples: bool
    together: Together
    fits: bool = False

    def __post_init__(self) -> None:
        args, method = self.args, METHODS[self.args.method]
        self.places = {", ".join(args.noise_on): list(args.noise_on)}
        if auto := args.noise_on == ["auto"]:
            self.places = placement.candidates(self.model)
        self.everywhere = len(self.places) > 1  # whether the placement is searched for
        self.by_slope = method.zeroth_order and method.rate == "lr"
        self.scales_eps = method.zeroth_order and (auto or args.scale_eps)
        self.measures = self.scales_eps or (self.by_slope and args.find_lr)
        self.whole, self.start = self.forwards(self.steps), math.inf
        self.rests = self.fits and args.find_lr
        budget = int(args.search_share * self.whole)
        self.race = Race(self._go, self.track.price, self._entry, budget, self.steps)

    def run(self) -> dict[str, Any]:
        """Return noise_on, lr and eps, the forward passes that finding them took, and what ran."""
        race, expected = self.race, ([1] if self.args.find_lr else [], [2] * self.everywhere)
        most = len(self.places) + 1 if self.everywhere else len(self._rungs) + 1
        n = race.plan(most + self.rests, *expected)
        if n == 1 and self.everywhere and not self.rests:
            raise ValueError(
                f"noise_on=auto needs a race, for which {race.budget} of the run's {self.whole} "
                "forward passes are too few: make more steps, raise search_share, or name a "
                "placement"
            )
        field, left_out = self._field(n - self.rests)
        # The probe may have left more than was set aside for it.
        race.entry = lambda n: self.track.evaluation
        starting = field[: race.plan(len(field), *expected)]
        with self.track.reserved():
            if race.stops:
                self.start = self.track.loss()
                race.spent += self.track.evaluation
            winner = race.run(starting, self._challengers)
        lr = self._settled(winner)
        left_out += [str(runner) for runner in field if runner not in (*race.seen, winner)]
        self._tell(winner, lr, left_out)
        found = {"noise_on": winner.where, "lr": lr, "eps": winner.eps, "forwards": race.spent}
        return found | {"start": self.start, "table": [asdict(runner) for runner in race.seen]}

    def _go(self, runner: Runner, steps: int) -> float:
        # One whose weights stay has more steps, as each takes one pass.
        return self.track.go(runner, steps if runner.lr else self.forwards(steps))

    # The candidates

    def _entry(self, n: int) -> int:
        """The forward passes before n runners start."""
        n = max(1, n - self.rests) if self.everywhere else 1
        clean = n > len(self.places)
        batches, each = self._probe_of(n)
        return clean + batches * each + self.track.evaluation

    def _probe_of(self, places: int) -> tuple[int, int]:
        """How many batches at most measure T of so many placements, an even number, and the passes
        for each of them."""
        if not self.measures:
            return 0, 0
        others = self.scales_eps and not self.everywhere  # all weights are another placement
        each = 2 * (places + others) + (not self.of_examples)
        # At most a third of the budget, the rest of which is for the race.
        return min(PROBED, 2 * max(1, self.race.budget // 3 // (2 * each))), each

    @property
    def _rungs(self) -> tuple[int, ...]:
        """The rates that race at first, beside the middle one, if there is one placement alone."""
        if not self.args.find_lr:
            return ()
        return (1,) if self.by_slope else (1, 2, -1)

    def _field(self, n: int) -> tuple[list[Runner], list[str]]:
        """The runners that start: n placements, or the rates at the one placement that args name,
        after the one whose weights stay; and the placements for which the budget is too small."""
        args, places = self.args, dict(self.places)
        still = Runner("no weights", next(iter(places.values())), 0.0, args.eps)
        if n < 1:
            return [still], list(places)
        if n > len(places) and self.everywhere:
            (clean,) = self.losses(1)
            dominant = self.together.of_root(lambda: probe.first_outliers(self.model, clean))
            places = placement.candidates(self.model, dominant)
            self.race.spent += 1
        here = dict(list(places.items())[:n])
        found: dict[str, Curvature] = {}
        if self.args.find_lr or len(here) > 1:
            found = self._curvatures({"all": ["all"]} | here if self.scales_eps else here)
        runners = []
        for name, where in here.items():
            t, error, _ = found.get(name, (None, 0.0, 0.0))
            ratio = _ratio(found["all"], found[name]) if "all" in found else 1.0
            lr, eps = args.learning_rate, args.eps * (math.sqrt(ratio) if self.scales_eps else 1.0)
            if self.by_slope and args.find_lr and t:
                lr = MIDDLE / (t + error) / _terms(args)
            elif self.by_slope:
                lr *= ratio
            runners.append(Runner(name, where, lr, eps))
        if not self.everywhere:
            runners += [self._on_rung(runners[0], rung) for rung in self._rungs]
        if self.rests:
            runners.insert(0, still)
        return runners, list(places)[n:]

    def _curvatures(self, places: dict[str, list[str]]) -> dict[str, Curvature]:
        """The curvature along the noise of each placement; {} if nothing depends on it, or if the
        budget is too small. Batches are added until all are known well enough, or are too many."""
        most, each = self._probe_of(len(places) - (self.scales_eps and not self.everywhere))
        if not most or self.race.spent + most * each > self.race.budget:
            return {}
        groups = {name: placement.place(self.model, where) for name, where in places.items()}
        closures = self.losses(most)

        def measure() -> tuple[dict[str, Curvature], int]:
            samples: dict[str, list[probe.Row]] = {name: [] for name in groups}
            for first in range(0, most, 2):
                some, seed = closures[first : first + 2], step_seed(self.args.seed, first)
                for row in probed(
                    self.model, self.args, some, groups, seed=seed, clean=not self.of_examples
                ):
                    samples[row.name].append(row)
                found = {name: _curvature(rows) for name, rows in samples.items()}
                known = all(t and error < t / 4 for t, error, _ in found.values())
                if known and first + 2 >= FEWEST:
                    break
            return found, min(first + 2, most)

        found, batches = self.together.of_root(measure)
        self.race.spent += batches * each
        return found

    def _challengers(self, winner: Runner) -> list[Runner]:
        """Those that may beat a winner: another rate, and then the halves of its layers."""
        if not winner.lr:
            return []
        rung = self._next_rung(winner) if self.args.find_lr else None
        return self._halves(winner) if rung is None else [self._on_rung(winner, rung)]

    def _next_rung(self, winner: Runner) -> int | None:
        """The rate above a winner's, if it has not run; if it ran and did not survive, the one
        below."""
        same = {r.rung for r in self.race.seen if r.where == winner.where and r.lr}
        if winner.rung + 1 not in same:
            return winner.rung + 1
        return None if self._survived_above(winner) or winner.rung - 1 in same else winner.rung - 1

    @staticmethod
    def _on_rung(runner: Runner, rung: int) -> Runner:
        lr = runner.lr * LADDER ** (rung - runner.rung)
        return replace(runner, lr=lr, rung=rung, losses={})

    def _halves(self, winner: Runner) -> list[Runner]:
        """The halves of a winner's layers. T of a half is taken for proportional to its size."""
        halves = placement.halves(self.model, winner.where) if self.everywhere else {}
        known = [runner.where for runner in self.race.seen]
        if any(where in known for where in halves.values()):
            return []
        whole, runners = self._size(winner.where), []
        for name, where in halves.items():
            ratio = whole / self._size(where)
            lr = winner.lr * (ratio if self.by_slope else 1.0)
            eps = winner.eps * (math.sqrt(ratio) if self.scales_eps else 1.0)
            runners.append(Runner(f"{winner.name}, {name}", where, lr, eps, winner.rung))
        return runners

    def _size(self, where: list[str]) -> float:
        """The number of weights of a placement, each with the square of its noise scale."""
        placed = placement.place(self.model, where)
        return sum(p.numel() * scale * scale for p, scale in placed.items())

    # The result

    def _survived_above(self, winner: Runner) -> bool | None:
        """Whether the rate above a winner's survived; None if it did not run."""
        same = (r for r in self.race.seen if r.where == winner.where and r.lr)
        above = next((runner for runner in same if runner.rung == winner.rung + 1), None)
        return None if above is None else max(above.losses.values()) < SURVIVED * self.start

    def _settled(self, winner: Runner) -> float:
        """The rate to run at: see the rules at the top of this file."""
        known = winner.losses and winner.lr
        if not self.args.find_lr or not known or self._survived_above(winner):
            return winner.lr
        if winner.rung > 0:
            return winner.lr / LADDER
        return winner.lr if self._survived_above(winner) is None else winner.lr / 2

    def _tell(self, winner: Runner, lr: float, left_out: list[str]) -> None:
        settings = f"noise on {winner.name}, lr {lr:.3g}"
        if not lr:
            settings = "the weights stay, and the readout alone learns"
        elif self.args.zeroth_order:
            settings += f", eps {winner.eps:.3g}"
        if not winner.losses:
            why = "there is no other candidate"
            if left_out:
                share = f"{self.race.budget} of the run's {self.whole} forward passes"
                why = f"{share} are too few for a race"
            print(f"{settings}: {why}", flush=True)
            return
        after, loss = list(winner.losses.items())[-1]
        line = (
            f"{settings}: the best of {len(self.race.seen)} that raced, dev loss {loss:.4f} after "
            f"{after} steps, {self.start:.4f} before; {self.race.spent} of the run's {self.whole} "
            "forward passes"
        )
        if left_out:
            line += f"; these are too few for {', '.join(left_out)}"
        print(line, flush=True)


def _terms(args: PseuZOTrainingArguments) -> float:
    """How many times at full size a step moves along a direction while it is in the window."""
    if args.method not in ("pseuzo", "mezo-momentum") or args.weighting == "mean":
        return 1.0
    decay = args.momentum or 0.0
    if args.method == "pseuzo" and args.schedule == "cyclic-hyperbola":
        return 1.0  # which empties the window, or lets old entries fade at once
    return sum(decay**age for age in range(args.window))


def _curvature(rows: list[probe.Row]) -> Curvature:
    """T, its standard error, and the number of parameters, from pairs of batches.

    T is the mean square slope of examples, which is never negative, if they have losses; else the
    curvature, None if that is not more than twice its error.
    """
    of_examples = all(math.isfinite(row.fisher) for row in rows)
    pairs = [(row.fisher, row.fisher_error) for row in rows]
    if not of_examples:
        pairs = [(row.curvature, row.curvature_error) for row in rows]
    t = sum(mean for mean, _ in pairs) / len(pairs)
    error = math.sqrt(sum(error**2 for _, error in pairs)) / len(pairs)
    known = t > 0 if of_examples else t > 2 * error
    return (t if known else None), error, rows[0].parameters


def _ratio(of: Curvature, over: Curvature) -> float:
    """The ratio of two T, a standard error against it; or, where one of them is not known, that of
    the numbers of parameters."""
    if of is over:
        return 1.0
    return of[0] / (over[0] + over[1]) if of[0] and over[0] else of[2] / over[2]
