"""Every method gets the same trials and budget, and a comparison goes on where it was."""

import math

import pytest
from ledgers import CODE
from pseuzo.compare.comparison import TUNING_SEED, Cell, Comparison
from pseuzo.compare.ledger import Ledger

METHODS = {
    "mezo": {"method": "mezo"},
    "fo-sgd": {"method": "fo-sgd"},
    "evolution": {"method": "evolution"},
    "forward-gradient": {"method": "forward-gradient"},
    "fixed": {"method": "mezo", "lr": 1e-4, "eps": 1e-2},
    "half fixed": {"method": "mezo", "eps": 1e-2},
    "auto": {"method": "mezo", "lr": "auto"},
    "race": {"method": "mezo", "noise_on": ["auto"], "lr": "auto"},
}


def cells(methods=METHODS, trials=6, tasks=("easy",), budget=100):
    common = {"mode": "full", "noise_on": ["all"]}
    return [
        Cell(task, title, common | own, budget, trials, budget // 2, "rows")
        for task in tasks
        for title, own in methods.items()
    ]


class Runs:
    """What execute was asked, and figures for it: the loss is least at lr 0.02 and eps 1.1e-3."""

    def __init__(self, stop_after=math.inf, failing=()):
        self.asked, self.stop_after, self.failing = [], stop_after, failing

    def __call__(self, kind, settings, budget):
        if len(self.asked) >= self.stop_after:
            raise KeyboardInterrupt
        self.asked.append((kind, settings, budget))
        if (kind, settings["method"]) in self.failing:
            return {"status": "failed", "reason": "no luck"}
        if kind == "calibration":
            found = {"curvature": 50.0, "eps": 2e-3, "noise_on": ["v_proj"], "forwards": 9}
            return {"status": "done", **found}
        lr, eps = settings.get("lr"), settings.get("eps") or 1e-3
        lr = 0.01 if lr == "auto" else lr
        loss = math.log(lr / 0.02) ** 2 + math.log(eps / 1.1e-3) ** 2
        own = {"dev": {"loss": loss}, "forwards": budget, "lr": lr, "eps": eps}
        return {"status": "done", "metric": "accuracy", **own} | (
            {"test": {"accuracy": 0.5}} if kind == "final" else {}
        )


def run(path, runs, seeds=3, of=None, said=None):
    ledger = Ledger(path, CODE)
    comparison = Comparison(of or cells(), seeds, ledger, [].append if said is None else said)
    comparison.plan({"references": {"easy": "mezo"}})
    comparison.run(runs)
    return ledger.lines


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    return run(tmp_path_factory.mktemp("compared") / "ledger.jsonl", Runs())


def of(lines, kind, method):
    return [line for line in lines if (line["kind"], line.get("method")) == (kind, method)]


def test_all_methods_that_are_tuned_get_the_same_trials_and_all_the_same_budget(lines):
    for method in METHODS:
        trials, finals = of(lines, "trial", method), of(lines, "final", method)
        assert len(trials) == (0 if method in ("fixed", "auto", "race") else 6)
        assert {line["budget"] for line in trials} <= {50}
        assert {line["seed"] for line in trials} <= {TUNING_SEED}
        assert [(line["budget"], line["seed"]) for line in finals] == [(100, s) for s in range(3)]
        assert len({(line["lr"], line["eps"]) for line in trials}) == len(trials)
        assert all("test" not in line for line in trials) and all("test" in x for x in finals)


def test_final_runs_have_the_best_point_of_the_trials(lines):
    for method in ("mezo", "fo-sgd", "evolution", "half fixed"):
        trials = of(lines, "trial", method)
        best = min(trials, key=lambda line: line["dev"]["loss"])
        for line in of(lines, "final", method):
            assert (line["lr"], line["eps"]) == (best["lr"], best["eps"])
    assert {line["eps"] for line in of(lines, "trial", "half fixed")} == {1e-2}
    assert {line["settings"]["lr"] for line in of(lines, "final", "fixed")} == {1e-4}
    for method in ("auto", "race"):
        assert {line["settings"]["lr"] for line in of(lines, "final", method)} == {"auto"}


def test_first_points_come_from_the_curvature_where_it_sets_the_rate(lines):
    firsts = {method: of(lines, "trial", method)[0] for method in ("mezo", "evolution", "fo-sgd")}
    assert (firsts["mezo"]["lr"], firsts["mezo"]["eps"]) == (0.125 / 50, 2e-3)
    assert (firsts["evolution"]["lr"], firsts["evolution"]["eps"]) == (1e-5, 2e-3)
    assert firsts["fo-sgd"]["lr"] == 1e-3 and not of(lines, "calibration", "fo-sgd")
    assert all("eps" not in line["settings"] for line in of(lines, "trial", "forward-gradient"))


@pytest.mark.parametrize(
    "own, over",
    [
        ({"method": "pseuzo"}, 14.0),
        ({"method": "pseuzo", "weighting": "mean"}, 1.0),
        ({"method": "pseuzo", "momentum": 0.5, "window": 2}, 1.5),
        ({"method": "mezo-momentum", "window": 3}, 1 + 0.9 + 0.81),
    ],
)
def test_the_first_rate_of_an_update_that_sums_a_window(tmp_path, own, over):
    lines = run(tmp_path / "ledger.jsonl", Runs(), of=cells({"sums": own}))
    first = next(line for line in lines if line["kind"] == "trial")
    assert first["lr"] == pytest.approx(0.125 / 50 / over, rel=5e-3)


def test_a_comparison_that_was_stopped_anywhere_goes_on_with_the_same_lines(tmp_path, lines):
    path = tmp_path / "ledger.jsonl"
    made = 0
    for _ in range(len(lines)):
        runs = Runs(stop_after=11)
        try:
            after = run(path, runs)
            break
        except KeyboardInterrupt:
            made += len(runs.asked)
    assert made + len(runs.asked) == len(lines) - 1  # one is the plan
    undated = [[line | {"date": ""} for line in some] for some in (after, lines)]
    assert undated[0] == undated[1]
    again = Runs()
    run(path, again)
    assert not again.asked


def test_more_seeds_and_methods_add_their_runs_alone(tmp_path):
    path, few = tmp_path / "ledger.jsonl", {"mezo": METHODS["mezo"]}
    run(path, Runs(), of=cells(few))
    more = Runs()
    run(path, more, seeds=4, of=cells(few | {"fixed": METHODS["fixed"]}))
    assert [(kind, c.get("lr") == 1e-4, c["seed"]) for kind, c, _ in more.asked] == [
        ("final", True, 0),
        ("final", True, 1),
        ("final", True, 2),
        ("final", False, 3),
        ("final", True, 3),
    ]
    other = Runs()
    run(path, other, of=cells(few, budget=200))
    assert len(other.asked) == 1 + 6 + 3, "another budget is another comparison"


def test_a_run_that_fails_is_a_line_and_stops_no_other(tmp_path):
    path, said = tmp_path / "ledger.jsonl", []
    failing = [(kind, "fo-sgd") for kind in ("trial", "final")]
    lines = run(path, Runs(failing=failing), said=said.append)
    assert any("failed: no luck" in line for line in said)
    assert len(of(lines, "final", "fo-sgd")) == 3 and len(of(lines, "final", "race")) == 3
    rates = [line["lr"] for line in of(lines, "trial", "fo-sgd")]
    assert rates == sorted(rates, reverse=True), "where everything fails, rates go down"
    mended = Runs()
    run(path, mended)
    assert [(kind, c["method"]) for kind, c, _ in mended.asked] == [("final", "fo-sgd")] * 3
