"""Intervals against known quantiles, and against simulated runs with known parts of the noise."""

import math

import numpy as np
import pytest
from pseuzo.compare.statistics import Interval, mean_of, over_seeds, paired, t_quantile


@pytest.mark.parametrize("df", [1, 2, 2.5, 10, 1e3, 1e6])
def test_quantiles_of_t(df):
    stats = pytest.importorskip("scipy.stats")
    assert t_quantile(0.975, df) == pytest.approx(stats.t.ppf(0.975, df), rel=1e-6)
    assert t_quantile(0.5, df) == pytest.approx(0, abs=1e-9)


def test_quantiles_outside_their_range_are_refused():
    for probability, df in ((0.4, 3), (1.0, 3), (0.9, 0.5)):
        with pytest.raises(ValueError, match="t_quantile"):
            t_quantile(probability, df)


def test_the_interval_over_seeds_is_that_of_t():
    one = over_seeds([0.8, 0.9, 1.0])
    assert one.mean == pytest.approx(0.9) and one.df == 2
    assert one.half == pytest.approx(4.3026527 * 0.1 / math.sqrt(3), rel=1e-5)
    assert math.isnan(over_seeds([0.5]).half)


@pytest.mark.parametrize("seed, row, rest", [(0.0, 0.0, 0.5), (0.02, 0.3, 0.4), (0.0, 0.5, 0.1)])
def test_paired_intervals_contain_a_true_difference_as_often_as_they_say(seed, row, rest):
    """The share of 400 intervals that contain 0.1 has a standard error of .011 at .95; what is
    tested is that it is not below .95 by four of them. Intervals over seeds alone would contain it
    in far fewer cases where rows differ, since all seeds have the same rows."""
    draw = np.random.default_rng(0)
    contained = 0
    for _ in range(400):
        noise = seed * draw.normal(size=(3, 1)) + row * draw.normal(size=(1, 200))
        one = paired(0.1 + noise + rest * draw.normal(size=(3, 200)), np.zeros((3, 200)))
        contained += abs(one.mean - 0.1) <= one.half
    assert contained / 400 > 0.95 - 4 * 0.011


def test_paired_intervals_by_hand():
    d = np.array([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]])  # 3 seeds, 2 rows
    one = paired(d, np.zeros_like(d))
    a = 2 * np.var([0.5, 0, 1], ddof=1)
    b = 3 * np.var([2 / 3, 1 / 3], ddof=1)
    c = ((d - d.mean(1, keepdims=True) - d.mean(0) + d.mean()) ** 2).sum() / 2
    df = (a + b) ** 2 / (a**2 / 2 + b**2)
    assert one.mean == pytest.approx(0.5) and one.df == pytest.approx(df)
    assert one.half == pytest.approx(t_quantile(0.975, df) * math.sqrt(max(a + b - c, a, b) / 6))


def test_words():
    assert Interval(0.1, 0.05, 2).word == "better" and Interval(-0.1, 0.05, 2).word == "worse"
    for level in (Interval(0.1, 0.1, 2), Interval(0.1, math.nan, 0), Interval(0.0, 0.0, 2)):
        assert level.word == "within noise of MeZO"
    same = np.ones((3, 4))
    assert paired(same, same) == (0, 0, 2)
    with pytest.raises(ValueError, match="paired: shapes"):
        paired(same, same[:2])


def test_the_mean_over_tasks_adds_squared_errors():
    errors = [0.02, 0.01]
    parts = [Interval(0.1, t_quantile(0.975, 2) * error, 2.0) for error in errors]
    one = mean_of(parts)
    df = (0.02**2 + 0.01**2) ** 2 / ((0.02**4 + 0.01**4) / 2)
    assert one.mean == pytest.approx(0.1) and one.df == pytest.approx(df)
    assert one.half == pytest.approx(t_quantile(0.975, df) * math.hypot(*errors) / 2)
    assert mean_of(parts[:1]) == parts[0] and math.isnan(mean_of([*parts, over_seeds([1])]).half)
