"""The plan of many ranks adds up latency, bytes and rank 0's own time, and knows the maxima."""

import importlib
import math
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def plan(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("ranks_plan")


def test_a_round_is_latency_bytes_and_own_time(plan):
    link, costs = plan.Link("link", 0.5, 100.0), plan.Costs(30, 20, own=4.0, per_rank=0.25)
    assert plan.seconds(link, 2, costs) == 3 * 0.5 + 50 / 100 + 4 + 0.25
    assert plan.seconds(link, 5, costs) == 3 * 0.5 + 4 * 50 / 100 + 4 + 4 * 0.25


def test_the_slowest_of_several_ranks(plan):
    assert plan.slowdown(8, 0.0) == 1 and plan.slowdown(8, 0.0, 2.0) == 2
    # E max(t1, t2) = E t1 + E |t1 - t2| / 2 = 2 Phi(s / sqrt 2) E t, for log-normal t of spread s
    expected = 1 + math.erf(0.2 / 2)
    # The standard error of 4000 draws is below 0.2 / sqrt(4000).
    assert plan.slowdown(2, 0.2) == pytest.approx(expected, abs=5 * 0.2 / math.sqrt(4000))


def test_the_tables_of_measured_bytes(plan, capsys, monkeypatch):
    def launch(name, ranks, steps):
        return [plan.Found(700, 300, 0.001 * ranks, 1.0)] * ranks

    monkeypatch.setattr(plan, "launch", launch)
    monkeypatch.setattr("sys.argv", "ranks_plan.py --only bytes --only times --cases mezo".split())
    plan.main()
    lines = capsys.readouterr().out.splitlines()
    assert "| mezo | 700 B | 300 B | 7 kB | 63 kB | 1.02 MB |" in lines
    assert "mezo: rank 0 takes 1 ms and 1 ms a rank" in lines
    # 3 round trips of 0.1 s, 7 kB at 12.5 MB/s, 8 ms
    assert any(line.startswith("| mezo | internet | 309 ms |") for line in lines)


@pytest.mark.slow
def test_the_bytes_of_two_ranks(plan):
    mezo = plan.launch("mezo", 2, 1)
    assert [(found.up, found.down) for found in mezo] == [(168, 72), (72, 168)]
    grouped = plan.launch("pseuzo, groups", 2, 1)[1]
    assert grouped.up == 48 + 124 + 8 * plan.GROUPS * (plan.WIDTH + 2)
    assert grouped.down == 152 + 12 * plan.WINDOW + 4
