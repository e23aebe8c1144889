"""`pseuzo train --offload cpu` makes the run that it makes without, and says at the door what it
cannot do."""

import json

import pytest
from cli_refusals import BASE, refused
from helpers import assert_same_weights, pseuzo
from pseuzo.models import offloading
from pseuzo.train.methods import methods_with
from pseuzo.train.options import OFFLOADS

pytestmark = pytest.mark.slow
SMALL = "--train-size 24 --dev-size 8 --test-size 8 --batch-size 4 --steps 4 --eval-every 2 --quiet"
UNTIMED = ("loss", "projected_grad", "eval_loss", "eval_accuracy", "update_ulps_float32")


def test_a_resumed_run_is_the_same_with_and_without(tmp_path):
    histories = []
    for where in OFFLOADS:
        args = ["train", *BASE, *SMALL.split(), "--method", "mezo", "--log-every", 1]
        out = ["--output", tmp_path / where, "--offload", where, "--device", "cpu"]
        pseuzo(*args, *out)
        pseuzo(*args, *out, "--resume", "--steps", 6)
        results = json.loads((tmp_path / where / "results.json").read_text())
        histories.append([{k: row[k] for k in UNTIMED if k in row} for row in results["history"]])
        histories[-1].append(results["test"])
    assert histories[0] == histories[1]
    assert_same_weights(*(tmp_path / where / "model" for where in OFFLOADS))


def test_what_cannot_be_is_said_before_the_model_is_loaded(tmp_path, monkeypatch):
    def run(*more):
        return refused("train", *BASE, "--output", tmp_path / "run", "--offload", "cpu", *more)

    monkeypatch.setattr(offloading, "available_memory", lambda: 1 << 20)
    monkeypatch.setattr("pseuzo.cli.run.load", None)  # it is not called
    assert "GiB of host memory, and 0.0 GiB are available" in run("--method", "mezo")
    assert "capture needs" in run("--method", "mezo", "--capture")
    for method in ("zo-adam", "deepzero", "fo-sgd"):
        assert method not in methods_with("offload")
        assert f"not for {method}" in run("--method", method)
    assert not list((tmp_path / "run").iterdir())
