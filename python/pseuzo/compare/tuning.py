"""The search over lr and eps that every method gets, with the same number of trials.

It is a function of the trials so far, and keeps no state: whoever has the losses of all trials can
say which one is next. All factors are powers of 2, so points have integer or fractional exponents
relative to the first one.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

RATE_STEP, EPS_STEP = 2.0, 2.0  # in powers of 2: the first factors are 4


class Point(NamedTuple):
    """log2 of lr and eps relative to the first trial's."""

    rate: float = 0.0
    eps: float = 0.0


def reserved(trials: int) -> int:
    """Return how many trials of a search over both are kept for eps: a quarter."""
    return trials // 4


def next_point(
    seen: Sequence[tuple[Point, float]], trials: int, rate: bool = True, eps: bool = True
) -> Point | None:
    """Return the point of the next trial; None after `trials` of them.

    seen: the trials so far, with their dev losses (nan counts as inf). rate, eps: which of both is
    searched. lr moves by factors of 4 in the direction that is better until its best value lies
    between two worse ones, then by 2; a quarter of the trials is kept for eps, which then moves by
    4 and 1/4 at the best lr and goes on in a direction that helps. What is left refines lr, by
    factors of 2, then of their roots. ValueError if neither is searched.
    """
    if not (rate or eps):
        raise ValueError("next_point: neither lr nor eps is searched")
    if len(seen) >= trials:
        return None
    if not seen:
        return Point()
    at, tried = best(seen), [point for point, _ in seen]
    kept = reserved(trials) if rate and eps else 0
    up = any(math.isfinite(loss) for _, loss in seen)  # else everything is too large so far
    for point in _neighbours(at, rate, eps, len(seen) < trials - kept, up):
        if not any(_between(at, one, point) for one in tried):
            return point
    raise AssertionError("the search refines without end")


def _between(at: Point, one: Point, other: Point) -> bool:
    """Whether `one` lies on the way from `at` to `other`, which differ in one coordinate."""
    low, high = min(at, other), max(at, other)
    inside = low.rate <= one.rate <= high.rate and low.eps <= one.eps <= high.eps
    return inside and one != at


def best(seen: Sequence[tuple[Point, float]]) -> Point:
    """Return the point with the least loss; of equal ones, the one with the smallest lr and eps, so
    that a search goes down where everything diverges."""
    return min(seen, key=lambda one: (math.inf if math.isnan(one[1]) else one[1], one[0]))[0]


def _neighbours(at: Point, rate: bool, eps: bool, rate_first: bool, up: bool) -> Iterator[Point]:
    """Yield the points around the best one, in the order in which they are wanted."""
    rates = _around(at, "rate", RATE_STEP, up) if rate else []
    epses = _around(at, "eps", EPS_STEP, up) if eps else []
    halves = _around(at, "rate", RATE_STEP / 2, up) if rate else []
    yield from rates + halves + epses if rate_first else epses + halves + rates
    step = RATE_STEP / 4 if rate else EPS_STEP / 2
    while step > 0:
        yield from _around(at, "rate" if rate else "eps", step, up)
        step /= 2


def _around(at: Point, what: str, step: float, up: bool) -> list[Point]:
    moves = (step, -step) if up else (-step, step)
    if what == "rate":
        return [Point(at.rate + move, at.eps) for move in moves]
    return [Point(at.rate, at.eps + move) for move in moves]
