"""The methods of ZO-Bench from the command line."""

import json

import pytest
from helpers import SMALL, assert_same_weights, pseuzo

RUNS = {  # arguments, and the forward passes of three steps
    "zo-sign": (["--noise", "rademacher", "--lr", "1e-4"], 6),
    "zo-conservative": (["--lr", "1e-3"], 15),
    "zo-blocks": (["--blocks", "2", "--one-sided", "--lr", "1e-3"], 6),
}


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("method", RUNS)
def test_a_run_is_replayed_to_the_bit(tmp_path, method):
    given, forwards = RUNS[method]
    journal, out = tmp_path / "run.pzj", tmp_path / "run"
    args = ["--method", method, *given, "--steps", 3, "--journal", journal, "--keep", "last"]
    pseuzo("train", *SMALL, *args, "--eval-every", 0, "--output", out)
    results = json.loads((out / "results.json").read_text())
    assert (results["forwards"], results["skipped_steps"]) == (forwards, 0)
    pseuzo("replay", "--base", "demo", "--journal", journal, "--output", tmp_path / "again")
    assert_same_weights(out / "model", tmp_path / "again")


@pytest.mark.parametrize("given, words", [
    ("--method zo-sign --journal run.pzj", "only with noise rademacher and directions 1"),
    ("--method zo-sign --noise rademacher --directions 2 --journal run.pzj", "a journal records"),
    ("--method zo-blocks --capture", "not for zo-blocks"),
    ("--method mezo --blocks 2", "--blocks is for zo-blocks, not for mezo"),
    ("--method zo-conservative --directions 2", "not for zo-conservative"),
])  # fmt: skip
def test_what_does_not_go_together_is_refused(tmp_path, given, words):
    args = ["train", *SMALL, *given.split(), "--output", tmp_path / "run"]
    assert words in pseuzo(*args, code=2)
    assert not (tmp_path / "run").exists()
