"""Which runs a comparison has, in which order they are made, and what each is allowed.

Every cell, a method on a task, gets the same: a search over lr and eps with the same number of
trials of the same number of forward passes, then a run per seed with the same number of passes.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

from pseuzo.compare.ledger import Ledger, digest
from pseuzo.compare.tuning import Point, best, next_point
from pseuzo.models.modes import MODES
from pseuzo.train.methods import METHODS, ZEROTH_ORDER, default_rate, methods_with, with_defaults
from pseuzo.train.options import OPTIONS

TUNING_SEED = 10_000  # no final run has it

# (what is run: calibration, trial or final; its settings; its budget in forwards) -> its figures
Execute = Callable[[str, dict[str, Any], int], dict[str, Any]]


@dataclass(frozen=True)
class Cell:
    """A method on a task.

    settings: those of `pseuzo train`; without lr and eps, these are tuned, unless lr or noise_on is
    "auto". budget: forward passes of a final run. trial_forwards: those of a trial. data: a hash of
    the rows.
    """

    task: str
    method: str
    settings: dict[str, Any]
    budget: int
    trials: int
    trial_forwards: int
    data: str

    @property
    def rate_from_curvature(self) -> bool:
        """Whether lr is 0.1 / T, so that nothing is tuned."""
        return self.settings.get("lr") == "auto" or self.settings.get("noise_on") == ["auto"]

    @property
    def tuned(self) -> tuple[str, ...]:
        """Which of lr and eps the search is over."""
        if self.rate_from_curvature:
            return ()
        still = self.settings.get("lr") == 0  # nothing but the readout learns
        has_eps = self.settings["method"] in methods_with("eps") and not still
        names = ("lr", "eps") if has_eps else ("lr",)
        return tuple(name for name in names if self.settings.get(name) is None)

    @property
    def fixed(self) -> dict[str, float]:
        """Those that were given."""
        given = {name: self.settings.get(name) for name in ("lr", "eps")}
        return {name: value for name, value in given.items() if value not in (None, "auto")}

    @cached_property
    def setup(self) -> str:
        """A hash of everything but the seeds."""
        own = {"settings": self.settings, "budget": self.budget, "data": self.data}
        return digest(own | {"trials": self.trials, "trial_forwards": self.trial_forwards})

    @property
    def calibrated(self) -> bool:
        """Whether the first rate and eps come from the curvature along the noise."""
        return (
            bool(self.tuned)
            and self.settings["method"] in ZEROTH_ORDER
            and self.settings.get("objective") != "metric"
        )

    def describe(self) -> dict[str, Any]:
        """What the report says of the cell."""
        return {
            "task": self.task,
            "method": self.method,
            "setup": self.setup,
            "forwards": self.budget,
            "trials": self.trials if self.tuned else 0,
            "trial_forwards": self.trial_forwards,
            "tuned": list(self.tuned),
            "fixed": self.fixed,
            "searches_itself": self.rate_from_curvature,  # this name is in ledgers
            "data": self.data,
        }


class Comparison:
    """Makes the runs that the ledger lacks. progress gets a line before each of them."""

    def __init__(
        self, cells: Sequence[Cell], seeds: int, ledger: Ledger, progress: Callable[[str], None]
    ):
        self.cells, self.seeds, self.ledger, self.progress = cells, seeds, ledger, progress

    def plan(self, more: Mapping[str, Any]) -> None:
        """Append what is compared, if it is not what the last plan of the ledger says."""
        plan = {"seeds": self.seeds, "cells": [cell.describe() for cell in self.cells], **more}
        key = digest(plan)
        plans = [line["hash"] for line in self.ledger.lines if line["kind"] == "plan"]
        if plans[-1:] != [key]:
            self._append({"kind": "plan", "hash": key, **plan})

    def run(self, execute: Execute) -> None:
        """Tune and run all methods on one task after another. On a task, all methods have a run
        with seed 0 before one has a run with seed 1."""
        for task in dict.fromkeys(cell.task for cell in self.cells):
            cells = [cell for cell in self.cells if cell.task == task]
            chosen = [self._tune(cell, execute) for cell in cells]
            for seed in range(self.seeds):
                for cell, own in zip(cells, chosen, strict=True):
                    self._final(cell, own, seed, execute)

    def _tune(self, cell: Cell, execute: Execute) -> dict[str, float]:
        """Return lr and eps for the final runs."""
        if not cell.tuned:
            return cell.fixed
        first = self._first(cell, execute)
        seen: list[tuple[Point, float]] = []
        axes = {"rate": "lr" in cell.tuned, "eps": "eps" in cell.tuned}
        while (point := next_point(seen, cell.trials, **axes)) is not None:
            own = _at(first, point)
            what = f"trial {len(seen) + 1} of {cell.trials}, {_shown(own)}"
            budget = cell.trial_forwards
            line = self._made(cell, "trial", own, TUNING_SEED, budget, what, execute)
            seen.append((point, _loss(line)))
        return _at(first, best(seen))

    def _first(self, cell: Cell, execute: Execute) -> dict[str, float]:
        """Return lr and eps of the first trial: the default of the method, or what the curvature T
        of the loss along its noise suggests.

        For a quadratic loss the best rate of a step is |g|^2 / (|g|^2 T + 2 g'Hg), nearly 1 / T;
        the first is an eighth of that, over how many directions an update sums. eps is scaled to
        the noise.
        """
        method, mode = cell.settings["method"], cell.settings["mode"]
        first = {"lr": default_rate(method, mode)}
        if method in methods_with("eps"):
            first["eps"] = MODES[mode].eps
        if cell.calibrated:
            given = {"eps": cell.settings.get("eps")}
            budget = cell.trial_forwards  # which a calibration does not exhaust
            line = self._made(cell, "calibration", given, TUNING_SEED, budget, "curvature", execute)
            curvature = line.get("curvature") or 0.0
            if METHODS[method].rate == "lr" and curvature > 0:
                first["lr"] = _rounded(0.125 / curvature / _summed(cell.settings))
            if "eps" in first and line.get("eps"):
                first["eps"] = _rounded(line["eps"])
        return first | cell.fixed

    def _final(self, cell: Cell, own: dict[str, float], seed: int, execute: Execute) -> None:
        what = f"seed {seed}, {_shown(own) or 'lr from the curvature'}"
        self._made(cell, "final", own, seed, cell.budget, what, execute)

    def _made(
        self,
        cell: Cell,
        kind: str,
        own: Mapping[str, Any],
        seed: int,
        budget: int,
        what: str,
        execute: Execute,
    ) -> dict[str, Any]:
        """Return the line of a run, which is made unless the ledger has it. A final run that failed
        is made again."""
        key = digest([cell.setup, cell.task, cell.method, kind, dict(own), seed])
        line = self.ledger.get(key)
        if line is not None and not (kind == "final" and line["status"] == "failed"):
            return line
        self.progress(f"{cell.task}: {cell.method}, {what}")
        settings = cell.settings | {**own, "seed": seed}
        figures = execute(kind, settings, budget)
        self.progress(f"  {_outcome(figures)}")
        names = {"kind": kind, "task": cell.task, "method": cell.method, "seed": seed}
        hashes = {"hash": key, "setup": cell.setup, "data": cell.data}
        whole = {"settings": settings, "config": digest(settings), "budget": budget}
        return self._append(names | hashes | whole | {"lr": None, "eps": None, **own} | figures)

    def _append(self, line: dict[str, Any]) -> dict[str, Any]:
        self.ledger.append(line | {"date": datetime.now(UTC).isoformat(timespec="seconds")})
        return self.ledger.lines[-1]


def _outcome(figures: Mapping[str, Any]) -> str:
    """What a run came to, in a few words."""
    if figures["status"] != "done":
        return f"{figures['status']}: {figures['reason']}"
    if "test" in figures:
        return f"test {figures['metric']} {figures['test'][figures['metric']]:.4g}"
    if "curvature" in figures:
        return f"curvature {figures['curvature']:.3g}"
    return f"dev loss {figures['dev']['loss']:.4g}"


def _loss(line: Mapping[str, Any]) -> float:
    """The dev loss that a trial ended with; inf if it diverged or failed."""
    value = (line.get("dev") or {}).get("loss")
    return math.inf if line["status"] != "done" or value is None else value


def _summed(settings: Mapping[str, Any]) -> float:
    """How many directions of one size the update of a method sums: lambda^age over its window."""
    method = settings["method"]
    if "momentum" not in METHODS[method].options or settings.get("weighting") == "mean":
        return 1.0
    momentum = with_defaults(method, {"momentum": settings.get("momentum")})["momentum"]
    window = settings.get("window") or OPTIONS["window"].default
    return sum(momentum**age for age in range(window))


def _at(first: Mapping[str, float], point: Point) -> dict[str, float]:
    factors = {"lr": 2.0**point.rate, "eps": 2.0**point.eps}
    return {name: _rounded(value * factors[name]) for name, value in first.items()}


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")


def _shown(own: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value:.3g}" for name, value in own.items() if value is not None)
