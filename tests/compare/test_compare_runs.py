"""Real runs of a comparison on the embedded model: their bits, their forward passes, and a
comparison that is killed."""

import json
import math
from itertools import count

import pytest
from helpers import SMALL, pseuzo
from pseuzo.cli import run as runs
from pseuzo.cli import worker
from pseuzo.cli.worker import Maker
from pseuzo.compare import plots as drawing
from pseuzo.compare.ledger import Ledger

assert runs  # what was imported before the first test is not searched for garbage
pytestmark = pytest.mark.slow

TASK = dict(
    model="demo",
    task="demo",
    train_size=48,
    dev_size=24,
    test_size=24,
    data_seed=0,
    batch_size=6,
    eval_batch_size=24,
    device="cpu",
    seed=3,
)
MEZO = {"method": "mezo", "lr": 4e-4, "eps": 1e-3}
# What differs between two runs with the same bits.
MEASURED = ("train_seconds", "search_seconds", "peak_memory_mib", "date", "evaluations", "code")


def bits(line):
    """Everything but what a clock says."""
    own = {name: value for name, value in line.items() if name not in MEASURED}
    return own | {"curve": [[s, f, x, y] for s, f, _, x, y in line["evaluations"]]}


def test_a_trial_has_the_same_bits_after_other_trials_as_alone(tmp_path):
    maker = Maker(tmp_path / "shared")
    others = [
        {"method": "fo-adam", "lr": 1e-3},
        {"method": "pseuzo", "lr": 1e-2, "eps": 1e-2, "noise_on": ["attention-out"]},
    ]
    first = maker("trial", TASK | MEZO, 24)
    for other in others:
        assert maker("trial", TASK | other, 12)["status"] == "done"
    again = maker("trial", TASK | MEZO, 24)
    alone = Maker(tmp_path / "alone")("trial", TASK | MEZO, 24)
    assert bits(first) == bits(again) == bits(alone) and first["steps"] == 12
    assert "test" not in first and first["judge_forwards"] == 4
    assert not (tmp_path / "shared").exists(), "a run leaves files behind"


def test_a_trial_diverges_from_the_dev_loss_of_the_model_as_loaded(tmp_path):
    """The loss of a batch would not do: that of an easy one may be a fraction of the mean."""
    maker = Maker(tmp_path)
    still = maker("trial", TASK | MEZO | {"lr": 1e-9}, 4)
    ((seed, before),) = maker._before.items()
    assert still["status"] == "done" and before == pytest.approx(still["dev"]["loss"], rel=1e-4)
    maker._before[seed] = before / 5
    moved = maker("trial", TASK | MEZO | {"lr": 1e-9}, 4)
    assert moved["status"] == "diverged" and "at first" in moved["reason"]


@pytest.mark.parametrize(
    "own, each",
    [
        ({"method": "mezo-svrg", "anchor_every": 3}, 17),
        ({"method": "pseuzo", "two_sided": True, "schedule": "cyclic-hyperbola"}, 3),
        ({"method": "mezo", "noise_on": ["auto"], "lr": "auto", "search_share": 0.7}, 2),
    ],
    ids=lambda own: own if isinstance(own, int) else "-".join(map(str, own.values())),
)
def test_a_run_uses_its_budget_up_with_all_that_it_searches(tmp_path, own, each):
    """each: more passes than this are never left."""
    searches, budget = "noise_on" in own, 165 if "noise_on" in own else 65
    line = Maker(tmp_path / "work")("final", TASK | MEZO | own, budget)
    assert line["status"] == "done", line
    assert budget - each < line["forwards"] <= budget
    assert (line["search_forwards"] > 0) == searches
    first, *_, last = line["evaluations"]
    assert first[:2] == [0, line["search_forwards"]]
    assert last[:2] == [line["steps"], line["forwards"]] and last[3] == line["dev"]["loss"]
    assert len(line["outcomes"]) == 24
    assert sum(line["outcomes"]) / 24 == pytest.approx(line["test"]["accuracy"])


@pytest.mark.parametrize("own", [{"lr": 0.0}, {"lr": "auto", "noise_on": ["attention-out"]}])
@pytest.mark.parametrize("budget, used", [(6, 6), (20, None)])
def test_a_readout_alone_has_a_pass_for_each_step(tmp_path, own, budget, used):
    """The budgets are too small for a race, after which a run has eight steps: each row once."""
    own = {"method": "mezo", "readout": "fit", "eps": 1e-3} | own
    line = Maker(tmp_path / "work")("final", TASK | own, budget)
    assert line["status"] == "done", line
    used = used or (8 if own["lr"] else 20)
    assert line["steps"] == line["forwards"] == used and line["search_forwards"] == 0
    assert line["lr"] == 0 and len(line["evaluations"]) <= 15


def test_a_run_that_cannot_be_made_says_why(tmp_path):
    line = Maker(tmp_path / "work")("final", TASK | MEZO | {"noise_on": ["no_such"]}, 24)
    assert line["status"] == "failed" and "no_such" in line["reason"]
    line = Maker(tmp_path / "work")("trial", TASK | MEZO, 1)
    assert line["status"] == "failed" and "1 forward passes are left" in line["reason"]
    line = Maker(tmp_path / "work")("trial", TASK | {"method": "fo-sgd", "lr": 1e9}, 12)
    assert line["status"] == "diverged" and "dev loss" in line["reason"]
    line = Maker(tmp_path / "work")("trial", TASK | MEZO | {"lr": 0.02}, 24)  # finite, and useless
    assert line["status"] == "diverged" and math.isfinite(line["dev"]["loss"]), line
    assert "the loss was 0." in line["reason"]


class InThisProcess(Maker):
    """In place of worker.Workers."""

    def __init__(self, folder, devices):
        super().__init__(folder / "work")

    def close(self):
        pass


def test_a_killed_comparison_goes_on_and_makes_its_report(tmp_path, monkeypatch):
    """The first runs are made in processes of their own, as always. The comparison ends before it
    keeps the second final run of MeZO, with the next line begun. The others are made in this
    process."""
    out = tmp_path / "compared"
    args = ["compare", *SMALL[:-1], "--methods", "fo-sgd", "--forwards", "24", "--trials", "2"]
    args = [str(word) for word in (*args, "--output", out)]
    append, calls = Ledger.append, count(1)

    def killed(self, line):
        if next(calls) == 9:
            raise KeyboardInterrupt
        append(self, line)

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "append", killed)
        assert "the same command continues" in pseuzo(*args, code=130)
    ledger = out / "ledger.jsonl"
    whole = ledger.read_bytes()
    kinds = [json.loads(line)["kind"] for line in whole.splitlines()]
    assert kinds == ["plan", "calibration", *["trial"] * 4, "final", "final"]
    ledger.write_bytes(whole + b'{"kind": "final", "hash": "')
    monkeypatch.setattr(worker, "Workers", InThisProcess)
    text = pseuzo(*args)
    assert "the last line was not written whole and is dropped" in text
    assert ledger.read_bytes().startswith(whole)
    lines = [json.loads(line) for line in ledger.read_text().splitlines()]
    assert len({line["hash"] for line in lines}) == len(lines) == 12

    finals = [line for line in lines if line["kind"] == "final"]
    trials = [line for line in lines if line["kind"] == "trial"]
    assert [line["seed"] for line in finals] == [0, 0, 1, 1, 2, 2]
    assert {line["forwards"] for line in finals} == {24}
    assert {line["forwards"] for line in trials} == {12}
    assert {line["status"] for line in lines[1:]} == {"done"}
    assert len({line["data"] for line in lines[1:]}) == 1
    for line in finals:
        assert line["peak_memory_mib"] > 0 and line["versions"]["torch"] and line["hardware"]
        assert line["settings"]["device"] == "cpu" and line["settings"]["mode"] == "full"
    # A run in its own process has the bits of one in this process.
    for line in (trials[-1], finals[1]):
        again = Maker(tmp_path / "again")(line["kind"], line["settings"], line["budget"])
        assert bits(line) | bits(json.loads(json.dumps(again))) == bits(line)

    rows = json.loads((out / "compare.json").read_text())["tasks"]["demo"]["methods"]
    assert [row["trials"] for row in rows.values()] == [2, 2]
    assert [len(row["test"]) for row in rows.values()] == [3, 3]
    plots = [out / f"{name}.png" for name in ("forwards", "seconds", "differences")]
    assert all(plot.exists() for plot in plots)
    made = ("table.md", "compare.json")
    before = {name: (out / name).read_bytes() for name in made}
    for name in made:
        (out / name).unlink()
    monkeypatch.setattr(drawing, "draw", lambda *args: plots)
    pseuzo("compare", "--report", "--output", out)
    assert before == {name: (out / name).read_bytes() for name in made}
