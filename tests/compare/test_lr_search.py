"""The search over lr and eps: equal numbers of trials, and the best of a known landscape."""

import math

import pytest
from pseuzo.compare.tuning import Point, best, next_point


def searched(loss, trials, **axes):
    seen = []
    while (point := next_point(seen, trials, **axes)) is not None:
        seen.append((point, loss(point)))
    return seen


@pytest.mark.parametrize("axes", [{}, {"eps": False}, {"rate": False}])
@pytest.mark.parametrize("trials", [1, 2, 5, 8, 13])
@pytest.mark.parametrize("far", [-40, -3, 0, 5.5, 40])
def test_every_search_has_its_number_of_trials_at_different_points(axes, trials, far):
    seen = searched(lambda at: abs(at.rate - far) + abs(at.eps - far), trials, **axes)
    points = [point for point, _ in seen]
    assert len(set(points)) == trials and points[0] == Point()
    assert all(point.rate == 0 for point in points) or axes.get("rate", True)
    assert all(point.eps == 0 for point in points) or axes.get("eps", True)


def test_lr_is_bracketed_by_4_and_refined_by_2_then_eps_moves_at_the_best_lr():
    seen = searched(lambda at: (at.rate - 3.2) ** 2 + (at.eps - 2) ** 2, 9)
    assert [point.rate for point, _ in seen[:6]] == [0, 2, 4, 6, 5, 3]
    assert [tuple(point) for point, _ in seen[6:8]] == [(3, 2), (3, 4)]
    assert best(seen) == (3, 2)


def test_all_trials_are_for_lr_where_there_is_no_eps():
    seen = searched(lambda at: (at.rate - 2.5) ** 2, 8, eps=False)
    assert best(seen).rate == 2.5


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_search_goes_down_from_where_everything_diverges(bad):
    seen = searched(lambda at: bad if at.rate > -5 else (at.rate + 6) ** 2, 8)
    assert best(seen).rate == -6
    assert best([(Point(1), bad), (Point(0), bad), (Point(2), bad)]) == Point(0)


def test_a_search_over_nothing_is_refused():
    with pytest.raises(ValueError, match="neither lr nor eps"):
        next_point([], 3, rate=False, eps=False)
