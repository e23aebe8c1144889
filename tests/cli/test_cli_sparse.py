"""Sparse-MeZO from the command line."""

import json

import pytest
from helpers import SMALL, assert_same_weights, pseuzo


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_a_run_is_replayed_to_the_bit(tmp_path):
    journal, out = tmp_path / "run.pzj", tmp_path / "run"
    args = ["--method", "sparse-mezo", "--lr", "1e-3", "--steps", 3, "--journal", journal]
    pseuzo("train", *SMALL, *args, "--keep", "last", "--eval-every", 0, "--output", out)
    results = json.loads((out / "results.json").read_text())
    assert (results["forwards"], results["skipped_steps"]) == (6, 0)
    pseuzo("replay", "--base", "demo", "--journal", journal, "--output", tmp_path / "again")
    assert_same_weights(out / "model", tmp_path / "again")


@pytest.mark.parametrize("given, words", [
    ("--method sparse-mezo --sparsity 1", "sparsity 1 leaves no weight to train"),
    ("--method sparse-mezo --renew-mask", "--renew-mask"),
    ("--method mezo --sparsity 0.5", "--sparsity is for sparse-mezo, not for mezo"),
])  # fmt: skip
def test_what_does_not_go_together_is_refused(tmp_path, given, words):
    args = ["train", *SMALL, *given.split(), "--output", tmp_path / "run"]
    assert words in pseuzo(*args, code=2)
    assert not (tmp_path / "run").exists()
