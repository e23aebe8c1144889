"""Evolution and FZOO from the command line."""

import json

import pytest
from helpers import SMALL, assert_same_weights, pseuzo

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick")]


def trained(out, *args):
    pseuzo("train", *SMALL, *args, "--keep", "last", "--eval-every", 0, "--output", out)
    return json.loads((out / "results.json").read_text())


def test_evolution_trains_on_a_metric_in_parts(tmp_path):
    given = "--method evolution --objective metric --split-batch --directions 3 --steps 3"
    results = trained(tmp_path / "run", *given.split(), "--eps", 0.05, "--log-every", 1)
    assert (results["method"], results["lr"], results["forwards"]) == ("evolution", 1e-5, 6)
    # A loss is the mean accuracy at two points, over six rows in three parts of two.
    losses = [row["loss"] for row in results["history"] if "loss" in row]
    assert len(losses) == 3 and all(abs(12 * x - round(12 * x)) < 1e-3 for x in losses)


def test_fzoo_is_replayed_to_the_bit(tmp_path):
    journal = tmp_path / "run.pzj"
    results = trained(tmp_path / "run", *"--method fzoo --steps 3 --journal".split(), journal)
    assert results["forwards"] == 3 * (1 + 8) and results["skipped_steps"] == 0
    pseuzo("replay", "--base", "demo", "--journal", journal, "--output", tmp_path / "again")
    assert_same_weights(tmp_path / "run" / "model", tmp_path / "again")
