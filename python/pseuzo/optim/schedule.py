"""Schedules of lambda, the momentum of PseuZO's window. A schedule maps the step (from 0) to lambda
in 0 .. 1.

lambda 0 means that the step is a plain two-sided MeZO step on the loss.
"""

import math


def _fraction(name: str, value: float) -> float:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be in 0 .. 1, got {value}")
    return float(value)


class Schedule:
    """Base class: override __call__, and clears where the window is to be emptied."""

    steps: int | None = None  # what it was planned for, if it was

    def __call__(self, step: int) -> float:
        raise NotImplementedError

    def clears(self, step: int) -> bool:
        """Is the window emptied before this step?"""
        return False

    def plan(self) -> str | None:
        """One line that says what will happen, or None where nothing would surprise."""
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
    """lambda from start at step 0 to end at step `steps`, and end from there on."""

    steps: int

    def __init__(self, start: float, end: float, steps: int):
        if steps < 1:
            raise ValueError(f"Linear: steps must be at least 1, got {steps}")
        self.start, self.end = _fraction("Linear: start", start), _fraction("Linear: end", end)
        self.steps = steps

    def __call__(self, step: int) -> float:
        return self.start + (self.end - self.start) * min(step / self.steps, 1.0)


class CyclicHyperbola(Schedule):
    """The published schedule, "cyclic_hyperbola", over E epochs in two cycles of E // 2.

    At epoch t, with u = t % (E // 2): lambda = 1 / (1 + 10 u) while u <= 10 and t < 2 (E // 2),
    else 0. The window is emptied before each step with lambda = 1. In a default run (10000 steps,
    64 an epoch) 1408 steps are PseuZO. Source: the code published with PseuZO (NeurIPS 2025).

    epochs: E. steps_per_epoch: 1 makes "epochs" mean steps. steps: the length of the run if its
    last epoch is cut short.
    """

    def __init__(self, epochs: int, steps_per_epoch: int = 1, *, steps: int | None = None):
        if epochs < 1 or steps_per_epoch < 1:
            raise ValueError(
                f"CyclicHyperbola: epochs and steps_per_epoch must be at least 1, got {epochs} and "
                f"{steps_per_epoch}"
            )
        self.epochs, self.steps_per_epoch = epochs, steps_per_epoch
        self.steps = epochs * steps_per_epoch if steps is None else steps

    @classmethod
    def from_steps(cls, steps: int, steps_per_epoch: int) -> "CyclicHyperbola":
        """For a run of that many steps, as in 10000 steps of 64 an epoch."""
        return cls(math.ceil(steps / steps_per_epoch), steps_per_epoch, steps=steps)

    def __call__(self, step: int) -> float:
        epoch, cycle = step // self.steps_per_epoch, self.epochs // 2
        if epoch >= 2 * cycle or epoch % cycle > 10:
            return 0.0
        return 1 / (1 + 10 * (epoch % cycle))

    def clears(self, step: int) -> bool:
        return self(step) == 1.0


def as_schedule(momentum: float | Schedule) -> Schedule:
    """A schedule as it is, a number as a constant."""
    return momentum if isinstance(momentum, Schedule) else Constant(momentum)
