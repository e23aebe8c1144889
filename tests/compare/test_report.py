"""Tables and plots of ledgers whose figures are known."""

import json
import math

import numpy as np
import pytest
from ledgers import final, plan, trial
from pseuzo.compare.plots import curve, draw, slug
from pseuzo.compare.report import aligned, markdown, overall, rows_of, summarise
from pseuzo.compare.statistics import over_seeds

RIGHT = {"mezo": (10, 11, 12), "fo-sgd": (18, 18, 19), "level": (11, 10, 12), "bad": (2, 1, 1)}


def outcomes(right: int) -> list[int]:
    return [1] * right + [0] * (20 - right)


def ledger(tasks=("easy",), methods=tuple(RIGHT), seeds=3):
    lines = [plan(list(methods), tasks=tasks)]
    for task in tasks:
        for method in methods:
            eps = None if method.startswith("fo-") else 1e-3
            lines += [trial(method, lr, eps, loss, task) for lr, loss in ((0.1, 1.0), (0.4, 2.0))]
            for seed in range(seeds):
                ends = RIGHT[method][seed] / 20
                curve = [0.5, (0.5 + ends) / 2, ends, ends, ends]
                lines.append(final(method, seed, curve, outcomes(RIGHT[method][seed]), task))
    return lines


@pytest.fixture(scope="module")
def summary():
    return summarise(ledger())


def test_rows_have_means_intervals_and_words(summary):
    rows = summary["tasks"]["easy"]["methods"]
    test = [n / 20 for n in RIGHT["fo-sgd"]]
    assert rows["fo-sgd"]["test"] == test
    assert rows["fo-sgd"]["test_interval"]["half"] == pytest.approx(over_seeds(test).half)
    words = {title: row["difference"]["word"] for title, row in rows.items() if title != "mezo"}
    assert words == {"fo-sgd": "better", "level": "within noise of MeZO", "bad": "worse"}
    gain = np.mean(RIGHT["fo-sgd"]) - np.mean(RIGHT["mezo"])
    assert rows["fo-sgd"]["difference"]["mean"] == pytest.approx(gain / 20)
    assert "difference" not in rows["mezo"]


def test_forwards_to_the_reference_and_dev_at_equal_time(summary):
    rows = summary["tasks"]["easy"]["methods"]
    assert rows["mezo"]["forwards_to_reference"] == 20
    assert rows["bad"]["forwards_to_reference"] is None
    assert rows["fo-sgd"]["forwards_to_reference"] == 10
    slow = [
        line | {"evaluations": [[s, f, 3 * t, x, y] for s, f, t, x, y in line["evaluations"]]}
        if line["kind"] == "final" and line["method"] == "fo-sgd"
        else line
        for line in ledger()
    ]
    rows = summarise(slow)["tasks"]["easy"]["methods"]
    ends = np.mean(RIGHT["fo-sgd"]) / 20
    assert rows["fo-sgd"]["dev_at_equal_time"] == pytest.approx((0.5 + ends) / 2)


def test_the_report_says_what_was_tuned_over_which_values(summary):
    text = markdown(summary)
    assert "| fo-sgd | lr | 2 | 0.1 0.4 |  | 106 |" in text
    assert "| level | lr, eps | 2 | 0.1 0.4 | 0.001 | 106 |" in text
    assert "40 forward passes" in text and "2 trials of 50 forward passes" in text
    assert "Code: 1.0 (c0de)." in text and "several versions" not in text
    assert "within noise of MeZO" in text and "the reference" in text


def test_fixed_searched_and_failed_methods_are_called_so():
    lines = ledger(methods=("mezo", "level", "bad", "fo-sgd"))
    cells = {cell["method"]: cell for cell in lines[0]["cells"]}
    cells["level"] |= {"tuned": ["lr"], "fixed": {"eps": 0.001}}
    cells["bad"] |= {"tuned": [], "searches_itself": True}
    lines = [
        line | {"status": "failed", "reason": "no luck", "test": None}
        if (line["kind"], line.get("method")) == ("final", "fo-sgd")
        else line
        for line in lines
    ]
    lines[-4]["status"] = "diverged"  # the last of the method "bad", whose lines come before
    lines[2]["code"] = {"version": "1.1", "digest": "0ther"}
    summary = summarise(lines)
    table = {row[0]: row for row in rows_of(summary["tasks"]["easy"])}
    assert table["level"][2] == "0.001 fixed" and table["bad"][1] == "0.1 / T"
    assert table["fo-sgd"][5] == "failed: no luck"
    text = markdown(summary)
    assert "eps fixed at 0.001" in text and "lr is from the curvature" in text
    assert "several versions of the code" in text
    assert "fo-sgd" not in overall(summary)


def test_runs_of_another_setup_or_seed_are_left_out():
    lines = ledger()
    stale = [line | {"setup": "old", "outcomes": outcomes(20)} for line in lines[1:]]
    fourth = final("fo-sgd", 3, [0.5, 0.0], outcomes(0))
    before, after = summarise(lines), summarise(stale + lines + [fourth])
    assert json.dumps(before) == json.dumps(after)


def test_a_comparison_that_is_not_done_is_reported_on_the_seeds_that_both_have():
    lines = ledger(methods=("mezo", "fo-sgd"))
    part = summarise(lines[:-2])["tasks"]["easy"]["methods"]["fo-sgd"]  # it has seed 0 alone
    assert part["seeds"] == [0] and part["difference"]["seeds"] == [0]
    assert math.isnan(part["difference"]["half"])
    assert part["difference"]["word"] == "within noise of MeZO"
    with pytest.raises(ValueError, match="no plan"):
        summarise(lines[1:])


def test_overall_has_the_mean_over_tasks():
    summary = summarise(ledger(tasks=("easy", "hard")))
    row = overall(summary)["fo-sgd"]
    assert row["all"]["mean"] == pytest.approx(row["easy"]["mean"])
    assert row["all"]["half"] < row["easy"]["half"] and row["all"]["word"] == "better"
    assert "Differences from MeZO" in markdown(summary)


def test_curves_of_different_steps_are_interpolated():
    a = [[0, 0, 0.0, 1.0, 0.0], [5, 10, 1.0, 1.0, 1.0]]
    b = [[0, 4, 0.0, 1.0, 0.5], [3, 10, 1.0, 1.0, 0.5]]
    xs, table = aligned([a, b], 1)
    np.testing.assert_allclose(xs, [4, 10])
    np.testing.assert_allclose(table, [[0.4, 1.0], [0.5, 0.5]])
    xs, table = aligned([a, [[0, 0, 0.0, 1.0, 0.2], [5, 12, 3.0, 1.0, None]]], 2)
    np.testing.assert_allclose(xs, [0, 2])
    np.testing.assert_allclose(table, [[0.0, 1.0], [0.2, math.nan]])


@pytest.mark.slow
def test_plots_are_drawn_from_the_ledger(tmp_path):
    lines = ledger(tasks=("easy", "A hard: one"), methods=("mezo", "fo-sgd", "bad"))
    made = draw(lines, summarise(lines), tmp_path)
    names = ["forwards-easy", "seconds-easy", "forwards-a-hard-one", "seconds-a-hard-one"]
    assert [path.stem for path in made] == [*names, "differences"]
    for path in made:
        content = path.read_bytes()
        width = int.from_bytes(content[16:20], "big")
        assert content.startswith(b"\x89PNG") and width == 1200
    assert slug("mezo:noise_on=auto") == "mezo-noise-on-auto"
    runs = {line["seed"]: line for line in lines if line.get("method") == "fo-sgd"}
    xs, means, _ = curve({seed: runs[seed] for seed in range(3)}, 1)
    np.testing.assert_allclose(xs, [0, 10, 20, 30, 40])
    assert means[-1] == pytest.approx(np.mean(RIGHT["fo-sgd"]) / 20)
