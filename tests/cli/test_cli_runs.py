"""Runs of the command line write the right files, and can be replayed."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from cli_runs import OWN, ROWS
from helpers import (
    SMALL,
    ZERO_ORDER,
    assert_same_weights,
    last_json,
    pseuzo,
    weights,
)
from pseuzo.cli.commands import stood_still, train_defaults
from pseuzo.cli.run import model_path
from pseuzo.cli.settings import could_take_auto
from safetensors.torch import load_file

pytestmark = pytest.mark.slow


METHODS = {
    "pseuzo": ["--groups", "label"],
    "pseuzo, published": ["--groups", "row", "--schedule", "cyclic-hyperbola"],
    "pseuzo, in cycles": (
        "--schedule reciprocal --cycles 2 --pseuzo-epochs 1 --weighting mean --train-size 6".split()
    ),
    "mezo": ["--directions", "2", "--one-sided"],
    "mezo-momentum": ["--window", "3", "--momentum", "0.7"],
    "fo-sgd": ["--momentum", "0.5"],
    "fo-adam": [],
}


@pytest.mark.parametrize("name", METHODS)
def test_train_writes_a_run(tmp_path, name):
    method = name.split(",")[0]
    out = tmp_path / "run"
    rate = ["--lr", "1e-3"] if method.startswith("fo-") else [*ZERO_ORDER, "--clip-examples", "2"]
    text = pseuzo(
        "train", *SMALL, "--method", method, "--steps", 5, *rate, *METHODS[name], "--output", out
    )
    assert "accuracy" in text
    results = json.loads((out / "results.json").read_text())
    assert results["steps"] == 5 and 0 <= results["test"]["accuracy"] <= 1
    passes = {"pseuzo": 2, "mezo": 3, "mezo-momentum": 2}.get(method, 3)
    assert results["forwards"] == 5 * passes
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert config["method"] == method and config["eval_every"] == 1
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    logged = [row for row in results["history"] if "loss" in row]
    assert len(logged) == 5 and all(row["tokens_per_second"] > 0 for row in logged)
    if not method.startswith("fo-"):
        assert {
            "projected_grad",
            "momentum",
            "window",
            "skipped_steps",
            "update_ulps_float32",
        } <= logged[-1].keys()
    start = weights(Path(model_path("demo")))
    assert any(
        not torch.equal(p, start[n]) for n, p in weights(out / "model").items() if n in start
    )
    again = tmp_path / "again"  # the resolved settings make the same run
    pseuzo("train", "--config", out / "config.yaml", "--output", again)
    assert_same_weights(out / "model", again / "model")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_journal_of_a_run_replays_to_its_weights(tmp_path, dtype):
    out, journal = tmp_path / "run", tmp_path / "run.pzj"
    pseuzo(
        "train",
        *SMALL,
        *ZERO_ORDER,
        "--dtype",
        dtype,
        "--steps",
        7,
        "--keep",
        "last",
        "--journal",
        journal,
        "--weight-decay",
        "0.1",
        "--output",
        out,
    )
    pseuzo(
        "replay",
        "--base",
        model_path("demo"),
        "--journal",
        journal,
        "--output",
        tmp_path / "replayed",
    )
    assert_same_weights(out / "model", tmp_path / "replayed")
    pseuzo(
        "replay",
        "--base",
        out / "model",
        "--journal",
        journal,
        "--output",
        tmp_path / "other",
        code=2,
    )
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    "mode, method",
    [
        ("lora", "pseuzo"),
        ("prefix", "mezo"),
        pytest.param("prompt", "pseuzo", marks=pytest.mark.slow),
        ("head", "mezo"),
        ("scales", "pseuzo"),
    ],
)
def test_modes_train_replay_and_load_again(tmp_path, mode, method):
    out, journal = tmp_path / "run", tmp_path / "run.pzj"
    pseuzo(
        "train",
        *SMALL,
        "--method",
        method,
        "--mode",
        mode,
        *"--lr 1e-3 --steps 4 --keep last".split(),
        "--journal",
        journal,
        "--output",
        out,
    )
    pseuzo(
        "replay", "--base", out / "start", "--journal", journal, "--output", tmp_path / "replayed"
    )
    name = f"{'' if mode in ('head', 'scales') else 'adapter_'}model.safetensors"
    start, end, again = (
        load_file(d / name) for d in (out / "start", out / "model", tmp_path / "replayed")
    )
    assert any(not torch.equal(start[k], end[k]) for k in start)
    assert all(torch.equal(again[k], end[k]) for k in end)
    figures = last_json(
        pseuzo("eval", "--model", out / "model", *SMALL[2:4], "--test-size", 24, "--quiet")
    )
    results = json.loads((out / "results.json").read_text())
    assert figures["test"]["loss"] == pytest.approx(results["test"]["loss"], rel=1e-4)


def test_a_step_that_is_skipped_does_not_spoil_the_curves(tmp_path):
    out = tmp_path / "run"
    pseuzo(
        "train",
        *SMALL,
        *"--method mezo --dtype fp16 --lr 80 --steps 6 --eval-every 0 --keep last".split(),
        "--output",
        out,
    )
    text = (out / "results.json").read_text()
    assert "NaN" not in text and "Infinity" not in text
    results = json.loads(text)
    assert results["skipped_steps"] > 0 and results["test"]["accuracy"] == 0, (
        "scores that are not finite were counted as right"
    )
    losses = [row["loss"] for row in results["history"] if "loss" in row]
    assert losses[0] is not None and len(losses) == 6


def test_prefix_adapters_are_evaluated_at_the_length_that_is_left(tmp_path):
    (tmp_path / "task.yaml").write_text(OWN)
    rows = [row | {"text": "long " * 300 + row["text"]} for row in ROWS]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sizes = [*"--train-size 20 --dev-size 10 --test-size 30 --quiet".split()]
    common = ["--task", tmp_path / "task.yaml", *sizes]
    pseuzo(
        "train",
        "--model",
        "demo",
        *common,
        "--steps",
        1,
        "--mode",
        "prefix",
        "--output",
        tmp_path / "run",
    )
    scored = last_json(pseuzo("eval", "--model", tmp_path / "run" / "model", *common))
    assert scored["test"] == json.loads((tmp_path / "run" / "results.json").read_text())["test"], (
        "the rows differ"
    )


def test_plot_overlays_runs(tmp_path):
    for seed in (0, 1):
        pseuzo(
            "train",
            *SMALL,
            *ZERO_ORDER,
            "--steps",
            2,
            "--seed",
            seed,
            "--output",
            tmp_path / f"run{seed}",
        )
    png = tmp_path / "both.png"
    pseuzo("plot", tmp_path / "run0", tmp_path / "run1", "--output", png)
    assert png.read_bytes().startswith(b"\x89PNG")
    (tmp_path / "empty").mkdir()
    assert "not the folder of a finished run" in pseuzo("plot", tmp_path / "empty", code=2)


def test_cycles_that_do_not_fit_are_refused_before_a_search(tmp_path):
    # An epoch has 8 steps, and the race may take a quarter of the 20.
    args = "--steps 20 --noise-on auto --cycles 2 --pseuzo-epochs 2".split()
    words = "pseuzo_epochs is 2, but a cycle has 1 epoch(s): the run has 2, in 2 cycle(s)"
    assert words in pseuzo("train", *SMALL, *args, "--output", tmp_path / "run", code=2)
    assert list((tmp_path / "run").iterdir()) == []


def test_auto_is_decided_by_a_race_within_the_run(tmp_path):
    out, args = (
        tmp_path / "run",
        "--method mezo --noise-on auto --search-share 0.5".split(),
    )
    text = pseuzo("train", *SMALL, *args, "--steps", 120, "--output", out)
    found, results = (
        json.loads((out / f"{name}.json").read_text()) for name in ("found", "results")
    )
    assert results["search_forwards"] == found["forwards"] and 72 < found["forwards"] <= 120
    assert results["forwards"] == found["forwards"] + 2 * results["steps"] in (239, 240)
    assert results["lr"] == found["lr"] and results["eps"] == found["eps"]
    assert "the best of 2 that raced" in text and f"eps {found['eps']:.3g}" in text
    rows = [row["forwards"] for row in results["history"] if "eval_loss" in row]
    assert rows[0] == found["forwards"] and rows[-1] == results["forwards"]
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert config["lr"] == "auto" and config["noise_on"] == ["auto"] and config["eval_every"] == 6


def test_reports_to_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    pseuzo(
        "train",
        *SMALL,
        *ZERO_ORDER,
        "--steps",
        3,
        "--report-to",
        "tensorboard",
        "--output",
        tmp_path / "run",
    )
    (events,) = (tmp_path / "run").rglob("events.out.tfevents*")
    log = EventAccumulator(str(events)).Reload()
    losses = [e.value for e in log.Scalars("train/loss")]
    history = json.loads((tmp_path / "run" / "results.json").read_text())["history"]
    assert (
        losses == pytest.approx([row["loss"] for row in history if "loss" in row])
        and len(losses) == 3
    )
    assert "train/projected_grad" in log.Tags()["scalars"]


@pytest.mark.parametrize(
    "losses, still",
    [
        ([1.0] * 10, True),
        ([1.0] * 8 + [0.97] * 2, False),
        ([1.0, 1.0, 1.0, 1.2], False),  # too few to tell
        ([1.0] * 5 + [float("nan")] * 5, False),  # which another sentence is about
    ],
)
def test_a_run_whose_loss_stands_still_is_known(losses, still):
    rows = [{"loss": loss} for loss in losses] + [{"eval_loss": 3.0}, {"loss": None}]
    assert stood_still({"history": rows}) == still


@pytest.mark.parametrize(
    "given, could",
    [
        ({}, True),
        ({"lr": 1e-4}, True),
        ({"lr": "auto"}, False),
        ({"noise_on": ("auto",)}, False),  # which has such a rate
        ({"lr": 0, "readout": "fit"}, False),  # the weights stay
        ({"weight_decay": 0.1}, False),
        ({"method": "mezo", "objective": "metric"}, False),
        ({"method": "fzoo"}, False),
    ],
)
def test_lr_auto_is_suggested_to_runs_that_could_have_it(given, could):
    assert could_take_auto(train_defaults() | given) == could
