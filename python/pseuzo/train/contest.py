"""Which placements of the noise race in a run, and what is made of the winner.

No candidate needs a rate found for it, as all have theirs in units of 1 / T, with T the curvature
along their own noise: see pseuzo.optim.curvature.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from pseuzo.models import placement, probe
from pseuzo.optim.curvature import RELATIVE_LR
from pseuzo.train.arguments import PseuZOTrainingArguments
from pseuzo.train.noise_on import eps_of
from pseuzo.train.race import Race, Runner
from pseuzo.train.track import Track


@dataclass
class Contest:
    """A search for what args leave open: where the noise goes, and whether there is any.

    track: where candidates train. If it fits a readout, a candidate at rate 0 races too, whose
    weights stay. steps: those of this run, if it searched for nothing. clean: makes a clean pass of
    a batch.
    """

    args: PseuZOTrainingArguments
    track: Track
    steps: int
    clean: Callable[[], Any]

    def __post_init__(self) -> None:
        args, self.fits = self.args, self.track.readout is not None
        self.places = {", ".join(args.noise_on): list(args.noise_on)}
        self.everywhere = args.noise_on == ["auto"]  # whether the placement is searched for
        if self.everywhere:
            self.places = placement.candidates(self.track.model)
        self.whole, self.start = self.track.forwards(self.steps), math.inf
        budget = int(args.search_share * self.whole)
        self.race = Race(self._go, self.track.price, self._entry, budget, self.steps)

    def run(self) -> dict[str, Any]:
        """Return noise_on, lr and eps, the forward passes that finding them took, and what ran."""
        race = self.race
        n = race.plan(len(self.places) + self.everywhere + self.fits, 2 * self.everywhere)
        field, left_out = self._field(n)
        with self.track.reserved():
            if race.stops:
                self.start = self.track.loss()
                race.spent += self.track.evaluation
            winner = race.run(field, self._halves)
        self._tell(winner, left_out)
        found = {"noise_on": winner.where, "lr": winner.lr, "eps": winner.eps}
        found |= {"forwards": race.spent, "start": self.start}
        return found | {"table": [asdict(runner) for runner in race.seen]}

    def _go(self, runner: Runner, steps: int) -> float:
        # One whose weights stay has more steps, as each takes one pass.
        return self.track.go(runner, steps if runner.lr else self.track.forwards(steps))

    def _entry(self, n: int) -> int:
        """The forward passes before n runners start."""
        return self.track.evaluation + (n - self.fits > len(self.places))

    def _field(self, n: int) -> tuple[list[Runner], list[str]]:
        """The n runners that start, after the one whose weights stay; and the placements for which
        the budget is too small."""
        places = dict(self.places)
        if n - self.fits > len(places):
            model, clean = self.track.model, self.clean
            dominant = self.track.together.of_root(lambda: probe.first_outliers(model, clean))
            places = placement.candidates(model, dominant)
            self.race.spent += 1
        runners = [self._runner(name, where) for name, where in places.items()]
        if self.fits:
            first = next(iter(places.values()))
            runners.insert(0, Runner("no weights", first, 0.0, self.args.eps))
        return runners[:n], [runner.name for runner in runners[n:]]

    def _runner(self, name: str, where: list[str]) -> Runner:
        return Runner(name, where, RELATIVE_LR, eps_of(self.args, self.track.model, where))

    def _halves(self, winner: Runner) -> list[Runner]:
        """The halves of a winner's layers, which may beat it."""
        if not (self.everywhere and winner.lr):
            return []
        halves = placement.halves(self.track.model, winner.where)
        known = [runner.where for runner in self.race.seen]
        if any(where in known for where in halves.values()):
            return []
        return [self._runner(f"{winner.name}, {half}", where) for half, where in halves.items()]

    def _tell(self, winner: Runner, left_out: list[str]) -> None:
        settings = f"noise on {winner.name}, eps {winner.eps:.3g}"
        if not winner.lr:
            settings = "the weights stay, and the readout alone learns"
        budget = f"{self.race.budget} of the run's {self.whole} forward passes"
        if not winner.losses:
            why = f"{budget} are too few for a race" if left_out else "there is no other candidate"
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
