"""Confidence intervals of a comparison: of a mean over seeds, and of a paired difference in which
both the seeds and the test rows are samples."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

LEVEL = 0.95
BETTER, WORSE, NO_DIFFERENCE = "better", "worse", "within noise of MeZO"


class Interval(NamedTuple):
    """mean +- half, at LEVEL. df: the degrees of freedom of Student's t. half is nan for one
    seed."""

    mean: float
    half: float
    df: float

    @property
    def word(self) -> str:
        """Whether the interval lies above 0, below it, or contains it."""
        if not abs(self.mean) > self.half:  # also if one of them is nan
            return NO_DIFFERENCE
        return BETTER if self.mean > 0 else WORSE


def t_quantile(probability: float, df: float) -> float:
    """Return the quantile of Student's t distribution with df >= 1 degrees of freedom, which need
    not be whole. With x = sqrt(df) tan(a), P(t <= x) is 1/2 plus an integral of cos^(df - 1), from
    0 to a, times Gamma((df + 1) / 2) / (sqrt(pi) Gamma(df / 2))."""
    if not (df >= 1 and 0.5 <= probability < 1):
        raise ValueError(f"t_quantile: needs df >= 1 and 0.5 <= p < 1, got {df}, {probability}")
    scale = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(math.pi)

    def above_half(angle: float) -> float:
        at = np.linspace(0.0, angle, 401)
        weights = np.ones(401)
        weights[1:-1:2], weights[2:-1:2] = 4.0, 2.0  # Simpson's rule
        return float(scale * angle / 1200 * (weights * np.cos(at) ** (df - 1)).sum())

    low, high = 0.0, min(math.pi / 2, 40 / math.sqrt(df))  # beyond, cos^(df - 1) is 0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if above_half(middle) < probability - 0.5 else (low, middle)
    return math.sqrt(df) * math.tan(low)


def over_seeds(values: Sequence[float]) -> Interval:
    """Return the interval of a mean over seeds: t * s / sqrt(S), S - 1 degrees of freedom."""
    n = len(values)
    mean = float(np.mean(values)) if n else math.nan
    if n < 2:
        return Interval(mean, math.nan, 0.0)
    error = float(np.std(values, ddof=1)) / math.sqrt(n)
    return Interval(mean, t_quantile((1 + LEVEL) / 2, n - 1) * error, float(n - 1))


def paired(method: ArrayLike, reference: ArrayLike) -> Interval:
    """Return the interval of the mean difference of two methods on the same seeds and test rows.

    method, reference: [S, n], what each test row adds to the metric under each seed. The difference
    d[s, i] is taken to be mean + seed[s] + row[i] + rest[s, i]: seeds share their rows, so the
    error that comes from the rows does not shrink with more seeds. With the mean squares of a
    two-way table without repetition,

        A = n * var_s(mean_i d)    B = S * var_i(mean_s d)    C = the rest's, (S - 1)(n - 1) df

    the variance of the mean has the unbiased estimate (A + B - C) / (S n) (Searle, Casella and
    McCulloch, Variance Components, 1992, ch. 4). C is not taken off below max(A, B), since an
    estimate below either part is chance. The degrees of freedom are Satterthwaite's,
    (A + B)^2 / (A^2 / (S - 1) + B^2 / (n - 1)). ValueError if the shapes differ.
    """
    if np.ndim(method) != 2 or np.shape(method) != np.shape(reference):
        raise ValueError(f"paired: shapes {np.shape(method)} and {np.shape(reference)} differ")
    d = np.asarray(method, dtype=float) - np.asarray(reference, dtype=float)
    seeds, rows = d.shape
    mean = float(d.mean())
    if seeds < 2 or rows < 2:
        return Interval(mean, math.nan, 0.0)
    of_seeds, of_rows = d.mean(1), d.mean(0)
    a = rows * float(np.var(of_seeds, ddof=1))
    b = seeds * float(np.var(of_rows, ddof=1))
    rest = d - of_seeds[:, None] - of_rows[None, :] + mean
    c = float((rest**2).sum()) / ((seeds - 1) * (rows - 1))
    if a + b == 0:
        return Interval(mean, 0.0, float(seeds - 1))
    variance = max(a + b - c, a, b) / (seeds * rows)
    df = (a + b) ** 2 / (a**2 / (seeds - 1) + b**2 / (rows - 1))
    return Interval(mean, t_quantile((1 + LEVEL) / 2, max(df, 1.0)) * math.sqrt(variance), df)


def mean_of(intervals: Sequence[Interval]) -> Interval:
    """Return the interval of the mean of independent differences, such as those of several tasks:
    the root of the sum of squared errors, with Satterthwaite's degrees of freedom."""
    if len(intervals) == 1:
        return intervals[0]
    n = len(intervals)
    mean = sum(one.mean for one in intervals) / n
    if any(one.df < 1 or math.isnan(one.half) for one in intervals):
        return Interval(mean, math.nan, 0.0)
    variances = [(one.half / t_quantile((1 + LEVEL) / 2, one.df)) ** 2 for one in intervals]
    total = sum(variances)
    if total == 0:
        return Interval(mean, 0.0, min(one.df for one in intervals))
    df = total**2 / sum(v * v / one.df for v, one in zip(variances, intervals, strict=True))
    return Interval(mean, t_quantile((1 + LEVEL) / 2, df) * math.sqrt(total) / n, df)
