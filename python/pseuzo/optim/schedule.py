"""Schedules of lambda, the momentum of PseuZO's window.

A schedule maps the step (from 0) to lambda in 0 .. 1. At lambda 0 the step is a plain two-sided
MeZO step on the loss.
"""

import math
from collections.abc import Callable


def _fraction(name: str, value: float) -> float:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be in 0 .. 1, got {value}")
    return float(value)


class Schedule:
    """Base class: override __call__, and clears where the window is to be emptied."""

    steps: int | None = None  # the length of the run that it was planned for, if it was

    def __call__(self, step: int) -> float:
        raise NotImplementedError

    def clears(self, step: int) -> bool:
        """Is the window emptied before this step?"""
        return False

    def plan(self) -> str | None:
        """One line that says which steps are PseuZO's, or None if all of them are."""
        if self.steps is None:
            return None
        active = sum(self(step) > 0 for step in range(self.steps))
        if active == self.steps:
            return None
        return f"PseuZO active in {active} of {self.steps} steps, MeZO in the rest"


class Constant(Schedule):
    """lambda = value."""

    def __init__(self, value: float = 1.0):
        self.value = _fraction("Constant: value", value)

    def __call__(self, step: int) -> float:
        return self.value


class Linear(Schedule):
    """lambda goes from start at step 0 to end at step `steps`, and stays there."""

    steps: int

    def __init__(self, start: float, end: float, steps: int):
        if steps < 1:
            raise ValueError(f"Linear: steps must be at least 1, got {steps}")
        self.start, self.end = _fraction("Linear: start", start), _fraction("Linear: end", end)
        self.steps = steps

    def __call__(self, step: int) -> float:
        return self.start + (self.end - self.start) * min(step / self.steps, 1.0)


class Reciprocal(Schedule):
    """lambda = start / (1 + rate * t) in epoch t, from 0.

    steps_per_epoch: 1 makes "epochs" mean steps. Source: PseuZO (NeurIPS 2025), ablation of lambda.
    """

    def __init__(self, start: float = 1.0, steps_per_epoch: int = 1, *, rate: float = 0.5):
        if steps_per_epoch < 1 or not 0 <= rate < math.inf:
            raise ValueError(
                "Reciprocal: steps_per_epoch must be at least 1 and rate finite and not negative, "
                f"got {steps_per_epoch} and {rate}"
            )
        self.start, self.rate = _fraction("Reciprocal: start", start), float(rate)
        self.steps_per_epoch = steps_per_epoch

    def __call__(self, step: int) -> float:
        return self.start / (1 + self.rate * (step // self.steps_per_epoch))


class Cycles(Schedule):
    """R cycles. The first steps of each follow `within` from its start; lambda is 0 (MeZO) in the
    rest.

    cycles: R. length: the steps of a cycle. active: how many of them follow `within`. Steps after
    the last cycle are MeZO steps. steps: the length of the run, if that is not R * length. Source:
    PseuZO (NeurIPS 2025), where a cycle begins with t_PseuZO epochs of PseuZO.
    """

    def __init__(
        self, within: Schedule, cycles: int, length: int, active: int, *, steps: int | None = None
    ):
        if cycles < 1 or not 1 <= active <= length:
            raise ValueError(
                "Cycles: cycles must be at least 1, and active in 1 .. length, got cycles "
                f"{cycles}, active {active} and length {length}"
            )
        self.within, self.cycles, self.length, self.active = within, cycles, length, active
        self.steps = cycles * length if steps is None else steps

    @classmethod
    def from_steps(
        cls,
        make: Callable[[int], Schedule],
        steps: int,
        steps_per_epoch: int,
        cycles: int = 1,
        pseuzo_epochs: int | None = None,
    ) -> "Cycles":
        """Make the schedule of a run with this many steps, E epochs. Each cycle has E // R epochs,
        and the first `pseuzo_epochs` of them (None: all) are PseuZO's. make: number of PseuZO's
        steps in a cycle -> `within`."""
        epochs = math.ceil(steps / steps_per_epoch)
        length, active = cycle_of(epochs, cycles, pseuzo_epochs)
        within = make(active * steps_per_epoch)
        length, active = length * steps_per_epoch, active * steps_per_epoch
        return cls(within, cycles, length, active, steps=steps)

    def __call__(self, step: int) -> float:
        return self.within(step % self.length) if self._follows(step) else 0.0

    def clears(self, step: int) -> bool:
        return self._follows(step) and self.within.clears(step % self.length)

    def _follows(self, step: int) -> bool:
        return step < self.cycles * self.length and step % self.length < self.active


def cycle_of(epochs: int, cycles: int, pseuzo_epochs: int | None) -> tuple[int, int]:
    """How many epochs a cycle has, and how many are PseuZO's. ValueError if they do not fit."""
    if cycles > epochs:
        raise ValueError(f"cycles: the run has {epochs} epoch(s), too few for {cycles} cycles")
    length = epochs // cycles
    if pseuzo_epochs is not None and pseuzo_epochs > length:
        raise ValueError(
            f"pseuzo_epochs is {pseuzo_epochs}, but a cycle has {length} epoch(s): the run has "
            f"{epochs}, in {cycles} cycle(s)"
        )
    return length, pseuzo_epochs or length


class CyclicHyperbola(Schedule):
    """The published schedule, "cyclic_hyperbola", over E epochs in R cycles of E // R.

    At epoch t, with u = t % (E // R): lambda = 1 / (1 + 10 u) in the first epochs of each cycle,
    else 0. The window is emptied before each step with lambda = 1. In a default run (10000 steps,
    64 per epoch) 1408 steps are PseuZO's. Source: the code published with PseuZO (NeurIPS 2025).

    epochs: E. steps_per_epoch: 1 makes "epochs" mean steps. cycles: R, by default 2. pseuzo_epochs:
    how many epochs at the start of each cycle are PseuZO's, by default 11, or all if the cycle is
    shorter. As published, all steps of a run of one epoch are MeZO's, unless cycles or
    pseuzo_epochs is given. steps: the length of the run, if its last epoch is cut short.
    """

    def __init__(
        self,
        epochs: int,
        steps_per_epoch: int = 1,
        *,
        cycles: int | None = None,
        pseuzo_epochs: int | None = None,
        steps: int | None = None,
    ):
        if epochs < 1 or steps_per_epoch < 1:
            raise ValueError(
                f"CyclicHyperbola: epochs and steps_per_epoch must be at least 1, got {epochs} and "
                f"{steps_per_epoch}"
            )
        self.steps_per_epoch, self.cycles = steps_per_epoch, cycles or 2
        if cycles is pseuzo_epochs is None:
            self.length, self.active = epochs // 2, 11
        else:
            self.length, active = cycle_of(epochs, self.cycles, pseuzo_epochs)
            self.active = min(active, pseuzo_epochs or 11)
        self.steps = epochs * steps_per_epoch if steps is None else steps

    @classmethod
    def from_steps(
        cls,
        steps: int,
        steps_per_epoch: int,
        cycles: int | None = None,
        pseuzo_epochs: int | None = None,
    ) -> "CyclicHyperbola":
        """Make the schedule of a run with this many steps, such as 10000 steps, 64 per epoch."""
        epochs = math.ceil(steps / steps_per_epoch)
        options = {"cycles": cycles, "pseuzo_epochs": pseuzo_epochs}
        return cls(epochs, steps_per_epoch, steps=steps, **options)

    def __call__(self, step: int) -> float:
        epoch = step // self.steps_per_epoch
        if epoch >= self.cycles * self.length or epoch % self.length >= self.active:
            return 0.0
        return 1 / (1 + 10 * (epoch % self.length))

    def clears(self, step: int) -> bool:
        return self(step) == 1.0


def as_schedule(momentum: float | Schedule) -> Schedule:
    """Return a schedule as it is, and a number as a constant schedule."""
    return momentum if isinstance(momentum, Schedule) else Constant(momentum)
