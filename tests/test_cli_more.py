"""The command line on tasks of plain rows, with reports, code that comes with a model, kills and Ctrl-C."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pseuzo.runs import model_path
from pseuzo.trainer import last_checkpoint
from test_cli import SMALL, ZERO_ORDER, _killed, _last_json, _run, assert_same_weights, pseuzo

import pseuzo_kernels

QUESTIONS = [(f"line {i} has the number", str(i % 3), [str(i % 3), f"not {i % 3}"]) for i in range(40)]
ROWS = {
    "classification": [{"prompt": q, "options": ["0", "1", "2"], "answer": int(a)} for q, a, _ in QUESTIONS],
    "choice": [{"prompt": q, "options": options, "answer": a} for q, a, options in QUESTIONS],
    "generation": [{"prompt": q, "answers": [a]} for q, a, _ in QUESTIONS],
}


@pytest.mark.parametrize("kind", ROWS)
def test_a_task_of_plain_rows_trains_and_scores_with_shots(tmp_path, kind):
    task = tmp_path / "rows.jsonl"
    task.write_text("".join(json.dumps(row) + "\n" for row in ROWS[kind]))
    common = ["--task", task, "--train-size", 16, "--dev-size", 8, "--test-size", 8, "--device", "cpu", "--quiet"]
    out = tmp_path / "run"
    pseuzo("train", "--model", "demo", *common, *ZERO_ORDER, "--steps", 2, "--batch-size", 4, "--output", out)
    results = json.loads((out / "results.json").read_text())
    assert results["metric"] == ("f1" if kind == "generation" else "accuracy") and results["task"] == "rows"
    zero, few = (
        _last_json(pseuzo("eval", "--model", out / "model", *common, "--shots", shots, "--seed", 0)) for shots in (0, 3)
    )
    assert zero["test"] == pytest.approx(results["test"], rel=1e-4) and zero["shots_mean"] == 0
    assert few["shots_mean"] == 3 == few["shots_least"] and few["test"]["loss"] != zero["test"]["loss"]


def test_reports_to_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    pseuzo("train", *SMALL, *ZERO_ORDER, "--steps", 3, "--report-to", "tensorboard", "--output", tmp_path / "run")
    (events,) = (tmp_path / "run").rglob("events.out.tfevents*")
    log = EventAccumulator(str(events)).Reload()
    losses = [e.value for e in log.Scalars("train/loss")]
    history = json.loads((tmp_path / "run" / "results.json").read_text())["history"]
    assert losses == pytest.approx([row["loss"] for row in history if "loss" in row]) and len(losses) == 3
    assert "train/projected_grad" in log.Tags()["scalars"]


@pytest.mark.parametrize("kind", ["opt", "unheard-of"])
def test_code_that_comes_with_a_model_is_never_run(tmp_path, kind):
    folder, ran = tmp_path / "model", tmp_path / "ran"
    folder.mkdir()
    for file in Path(model_path("demo")).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    auto = {"AutoConfig": "custom.Config", "AutoModelForCausalLM": "custom.Model"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": kind, "auto_map": auto}))
    (folder / "custom.py").write_text(
        f"open({str(ran)!r}, 'w').close()\nfrom transformers import OPTConfig as Config, OPTForCausalLM as Model\n"
    )
    known = kind == "opt"  # then Transformers' own code is used
    text = pseuzo("eval", *SMALL[2:4], "--model", folder, "--test-size", 8, "--quiet", code=0 if known else 2)
    assert not ran.exists()
    assert known or text.strip().splitlines()[-1].startswith("Error: ")


def test_killed_and_resumed_first_order_run_ends_with_the_same_bits(tmp_path):
    base = ["train", *SMALL, "--method", "fo-adam", "--lr", "1e-3", "--noise-on", "auto", "--clip-examples", "2",
            "--steps", "24", "--keep", "last", "--eval-every", "0", "--save-every", "4"]  # fmt: skip
    whole, out = tmp_path / "whole", tmp_path / "killed"
    _run([*base, "--output", str(whole)])
    args = [*base, "--output", str(out)]
    _killed(args, lambda: last_checkpoint(out) is not None)
    decided = (out / "noise_on.json").read_text()
    _run([*args, "--resume"])
    assert (out / "noise_on.json").read_text() == decided, "it is not decided again"
    assert_same_weights(whole / "model", out / "model")


def test_ctrl_c_ends_with_130_and_the_run_can_go_on(tmp_path):
    out = tmp_path / "run"
    args = ["train", *SMALL, *ZERO_ORDER, "--steps", "100000", "--eval-every", "0", "--save-every", "5", "--keep",
            "last", "--output", str(out)]  # fmt: skip
    process = subprocess.Popen([sys.executable, "-m", "pseuzo", *args], stderr=subprocess.PIPE, text=True,
                               env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    try:
        until = time.monotonic() + 120
        while not (out.exists() and last_checkpoint(out)):
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and "interrupted; the run goes on from its last checkpoint" in errors
    assert "Traceback" not in errors and last_checkpoint(out) is not None


@pytest.mark.parametrize("broken", ["noise", "EmaWindow"])
def test_info_notices_an_op_that_is_wrong(monkeypatch, broken):
    text = pseuzo("info")
    assert "DIFFERS" not in text and "normal on cpu: as the reference" in text and "window on cpu: as the ref" in text
    right = getattr(pseuzo_kernels, broken)
    if broken == "noise":
        wrong = lambda *args, **kwargs: right(*args, **kwargs) * (1 + 1e-5)  # noqa: E731
    else:
        wrong = lambda *args, momentum, **kwargs: right(*args, momentum=momentum * (1 - 1e-4), **kwargs)  # noqa: E731
    monkeypatch.setattr(pseuzo_kernels, broken, wrong)
    text = pseuzo("info", code=2)
    assert text.count("DIFFERS") == 1 and "disagree with the reference" in text
