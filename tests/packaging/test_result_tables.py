"""The tables of measurements on the pages are those that their files give."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))


def load():
    spec = importlib.util.spec_from_file_location("result_tables", ROOT / "tools/result_tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tables = load()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_has_the_numbers_of_its_files(page):
    text = page.read_text()
    assert tables.filled(text) == text, "run python tools/result_tables.py"
    assert text.count("<!-- table: ") == len(tables.PLACE.findall(text)), "a table has no end"


def test_every_table_is_on_a_page():
    found = [p for page in PAGES for p in tables.PLACE.finditer(page.read_text())]
    places = [(p["name"], p["file"]) for p in found]
    assert len(places) == len(set(places))
    # Those of comparisons are for any file, whether a page has one or not.
    assert {name for name in tables.TABLES if "comparison" not in name} <= {
        name for name, _ in places
    }


def test_a_table_is_replaced_by_what_its_file_gives(tmp_path, monkeypatch):
    def runs(rows):
        return tables.table("a | b", ([row["a"], row["b"]] for row in rows))

    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setitem(tables.TABLES, "runs", runs)
    lines = [json.dumps({"a": a, "b": 2 * a}) for a in (1, 2)]
    (tmp_path / "runs.jsonl").write_text("\n".join(lines))
    page = "text\n\n<!-- table: runs, from runs.jsonl -->\nold\n<!-- end of the table -->\n\nmore\n"
    once = tables.filled(page)
    assert "| a | b |\n|---|---|\n| 1 | 2 |\n| 2 | 4 |\n" in once and "old" not in once
    assert once.startswith("text\n") and once.endswith("\nmore\n") and tables.filled(once) == once


def test_the_table_of_a_ledger(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tests/compare"))
    from ledgers import final, plan, trial

    lines = [plan(["mezo", "fo-sgd"], tasks=("easy", "hard"))]
    for task in ("easy", "hard"):
        for method, right in (("mezo", 10), ("fo-sgd", 18)):
            lines.append(trial(method, 0.1, 1e-3 if method == "mezo" else None, 1.0, task))
            for seed in range(3):
                curve = [0.5, 0.5, right / 20, right / 20, right / 20]
                lines.append(final(method, seed, curve, [1] * right + [0] * (20 - right), task))
    easy, hard = tables.TABLES["comparison"](lines).split("\n\n")
    assert easy == hard and easy.startswith("| method | lr | eps | test accuracy |")
    assert "| 0.900" in easy and "| 0.500" in easy and len(easy.splitlines()) == 4
    overall = tables.TABLES["comparison-overall"](lines)
    assert overall.startswith("| method | easy | hard | all |") and "+0.400" in overall


def test_the_last_of_repeated_measurements_counts():
    rows = [{"x": "1", "y": "old"}, {"x": "2", "y": "only"}, {"x": "1", "y": "new"}]
    assert [row["y"] for row in tables.latest(rows, "x").values()] == ["new", "only"]


@pytest.mark.parametrize(
    "value, n, text",
    [(9.6006, 3, "9.60"), (132.29, 3, "132"), (0.914, 2, "0.91"), (18.97, 2, "19")],
)
def test_significant_digits(value, n, text):
    assert tables.digits(value, n) == text


def test_the_steps_of_the_readme_are_those_of_the_page():
    readme = (ROOT / "README.md").read_text()
    rows = tables.read(ROOT / "bench/results/steps.csv")
    found = tables.latest([row for row in rows if row["model"] == "opt-125m"], "impl", "part")
    seconds = {key: float(row["ms_p50"]) / 1e3 for key, row in found.items()}
    floor = seconds["inference", "two forwards"]
    for name, method in (("PseuZO, K = 14", "PseuZO"), ("MeZO", "MeZO")):
        both = [seconds[f"pseuzo {method}", "step"], seconds[f"{method} as published", "step"]]
        times, ratios = (
            [f(s) for s in both] for f in (tables.digits, lambda s: f"{s / floor:.2f}")
        )
        assert f"| {name} / as published | {' / '.join(times)} | {' / '.join(ratios)} |" in readme


def test_the_predictions_in_the_text_are_those_of_the_file():
    """ms on an H100, for OPT-1.3B in bf16: an update at K = 14, and a step beyond its forwards."""
    rows = tables.read(ROOT / "bench/results/predicted.csv")
    found = tables.latest(rows, "chip", "model", "what", "noise", "K", "tokens")

    def ms(what, noise="", K="", tokens=""):
        return float(found["H100 SXM", "opt-1.3b", what, noise, K, tokens]["ms"])

    update, fp16 = (ms("update", noise, "14") for noise in ("hadamard", "hadamard-fp16"))
    beyond = ms("perturb", "hadamard", "1") + update + ms("window", K="14")
    text = " ".join((ROOT / "docs/results.md").read_text().split())
    assert f"takes {update:.1f} ms on an H100" in text and f"({fp16:.1f} with" in text
    share = beyond / (beyond + 2 * ms("forward", tokens="4096"))
    assert f"takes {beyond:.1f} ms beyond its two forwards, {share:.0%}".replace("%", " %") in text
