"""--resume continues killed, interrupted and finished runs of the command line with the same
bits."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from helpers import SMALL, ZERO_ORDER, assert_same_weights, killed, pseuzo, run, weights
from pseuzo.cli import run as runs
from pseuzo.tasks import evaluate
from pseuzo.train.checkpoints import last_checkpoint
from pseuzo.train.journal_file import framed, held, owner, read_journal
from pseuzo.train.trainer import PseuZOTrainer


def records(journal):
    """Return all but the header, which has the identifier of its run."""
    content = journal.read_bytes()
    return content[8 + 12 + int.from_bytes(content[8:12], "little") :]


pytestmark = pytest.mark.slow


@pytest.mark.parametrize("method", ["pseuzo", "mezo-momentum"])
def test_killed_and_resumed_run_ends_with_the_same_bits(tmp_path, method):
    base = [
        "train",
        *SMALL,
        *ZERO_ORDER,
        "--method",
        method,
        *"--steps 30 --keep last --eval-every 0 --save-every 4 --dtype bf16".split(),
        *"--window 5 --lr-scheduler linear".split(),
    ]
    whole, journal = tmp_path / "whole", tmp_path / "whole.pzj"
    run([*base, "--output", str(whole), "--journal", str(journal)])
    out, again = tmp_path / "killed", tmp_path / "killed.pzj"
    args = [*base, "--output", str(out), "--journal", str(again)]

    record = "pseuzo.train.journal.Journal.record"
    killed(args, record, 10)  # the weights are updated, but only 9 steps are in the journal
    assert sum(1 for _ in read_journal(again)[1]) == 9 and last_checkpoint(out).endswith(
        "checkpoint-8"
    )
    killed([*args, "--resume"], record, 11)
    assert sum(1 for _ in read_journal(again)[1]) == 18 and last_checkpoint(out).endswith(
        "checkpoint-16"
    )
    killed([*args, "--resume"], "transformers.trainer_callback.TrainerState.save_to_json", 2)
    torn = out / "checkpoint-24"
    assert (torn / "model.safetensors").exists() and not (torn / "trainer_state.json").exists()
    assert last_checkpoint(out).endswith("checkpoint-20")
    run([*args, "--resume"])
    assert_same_weights(whole / "model", out / "model")
    assert records(again) == records(journal)


@pytest.mark.parametrize(
    "own",
    [
        "--method fo-adam --lr 1e-3 --noise-on attention-out --clip-examples 2 --steps 12",
        "--method mezo --noise-on auto --steps 60 --search-share 0.8",
    ],
    ids=["first order", "race"],
)
def test_killed_and_resumed_run_without_a_journal_ends_with_the_same_bits(tmp_path, own):
    base = ["train", *SMALL, *own.split()]
    base += "--keep last --eval-every 0 --save-every 4".split()
    whole, out = tmp_path / "whole", tmp_path / "killed"
    run([*base, "--output", str(whole)])
    args = [*base, "--output", str(out)]
    killed(args, "pseuzo.train.trainer.PseuZOTrainer.training_step", 7)
    assert last_checkpoint(out).endswith("checkpoint-4")
    found = out / "found.json"
    decided = found.read_text() if "auto" in own else "{}"
    assert "auto" not in own or len(json.loads(decided)["table"]) > 1, "there was no race"
    run([*args, "--resume"])
    assert not found.exists() or found.read_text() == decided, "there was a second decision"
    assert_same_weights(whole / "model", out / "model")


def test_ctrl_c_ends_with_130_and_the_run_can_go_on(tmp_path):
    out = tmp_path / "run"
    args = [
        "train",
        *SMALL,
        *ZERO_ORDER,
        *"--steps 100000 --eval-every 0 --save-every 5 --keep last".split(),
        "--output",
        str(out),
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "pseuzo", *args],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    try:
        until = time.monotonic() + 120
        while not (out.exists() and last_checkpoint(out)):
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (
        process.returncode == 130
        and "interrupted; --resume continues the run from its last checkpoint" in errors
    )
    assert "Traceback" not in errors and last_checkpoint(out) is not None


def test_resuming_a_run_that_is_over_makes_no_more_steps(tmp_path):
    out, journal = tmp_path / "run", tmp_path / "run.pzj"
    args = [
        "train",
        *SMALL,
        *ZERO_ORDER,
        *"--steps 5 --save-every 5 --keep last".split(),
        "--journal",
        journal,
        "--lr-scheduler",
        "linear",
        "--output",
        out,
    ]
    pseuzo(*args)
    before, recorded = weights(out / "model"), journal.read_bytes()
    results = json.loads((out / "results.json").read_text())
    assert results["lr"] == 2e-4, "the rate is not the one at the start"
    (out / "results.json").unlink()  # killed while the test rows were evaluated
    pseuzo(*args, "--resume")
    assert all(torch.equal(p, before[n]) for n, p in weights(out / "model").items())
    assert journal.read_bytes() == recorded
    again = json.loads((out / "results.json").read_text())
    assert again["steps"] == 5 and again["test"] == results["test"] and again["lr"] == 2e-4


def test_a_run_that_cannot_follow_its_journal_begins_anew_before_its_first_checkpoint(tmp_path):
    """The anchor of MeZO-SVRG is a copy of weights that its journal does not give. The recorded
    steps are kept: together with the first weights they are all that is left."""
    out, journal = tmp_path / "run", tmp_path / "run.pzj"
    args = [
        "train",
        *SMALL,
        *ZERO_ORDER,
        *"--method mezo-svrg --anchor-batches 2 --steps 4 --save-every 0 --keep last".split(),
        "--journal",
        journal,
        "--output",
        out,
    ]
    pseuzo(*args)
    before, recorded = weights(out / "model"), journal.read_bytes()
    text = pseuzo(*args, "--resume")
    assert (
        "no whole checkpoint" in text
        and f"the 4 step(s) in {journal} can be replayed from {journal}.1, " in text
    )
    assert all(torch.equal(p, before[n]) for n, p in weights(out / "model").items())
    assert (tmp_path / "run.pzj.1").read_bytes() == recorded and records(journal) == records(
        tmp_path / "run.pzj.1"
    )
    assert owner(journal) == owner(tmp_path / "run.pzj.1")

    other = recorded.replace(owner(journal)[0].encode(), b"another run's id")
    start = 8 + 12 + int.from_bytes(other[8:12], "little")
    journal.write_bytes(other[:8] + framed(other[20:start]) + other[start:])
    other = journal.read_bytes()
    assert f"and {journal} is the journal of another run: put its file back" in pseuzo(
        *args, "--resume", code=2
    )
    assert journal.read_bytes() == other and (tmp_path / "run.pzj.1").read_bytes() == recorded


def test_a_run_goes_on_with_its_own_journal_alone(tmp_path, monkeypatch):
    out, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    elsewhere.mkdir()
    args = [
        "train",
        *SMALL,
        *ZERO_ORDER,
        "--save-every",
        2,
        "--keep",
        "last",
        "--output",
        out,
        "--journal",
        "run.pzj",
    ]
    monkeypatch.chdir(tmp_path)
    pseuzo(*args, "--steps", 4)
    assert yaml.safe_load((out / "config.yaml").read_text())["journal"] == str(tmp_path / "run.pzj")
    longer = [*args, "--steps", 6, "--resume"]

    monkeypatch.chdir(elsewhere)  # a relative path names another file here
    gone = f"{elsewhere}/run.pzj is not there, or empty: put its file"
    words = f"records its steps in {tmp_path}/run.pzj, and {gone}"
    assert words in pseuzo(*longer, code=2)
    assert not list(elsewhere.iterdir())
    os.rename(tmp_path / "run.pzj", elsewhere / "moved.pzj")
    monkeypatch.chdir(tmp_path)
    assert f"and {tmp_path}/run.pzj is not there, or empty" in pseuzo(*longer, code=2)
    assert not (tmp_path / "run.pzj").exists()
    text = pseuzo("train", "--config", out / "config.yaml", "--output", out, "--resume", code=2)
    assert "take the line `journal:` out of" in text

    with held(elsewhere / "moved.pzj"):
        assert "is in use by another run" in pseuzo(
            *longer, "--journal", elsewhere / "moved.pzj", code=2
        )
    pseuzo(*longer, "--journal", elsewhere / "moved.pzj")
    pseuzo(
        "replay",
        "--base",
        "demo",
        "--journal",
        elsewhere / "moved.pzj",
        "--output",
        tmp_path / "replayed",
    )
    assert_same_weights(out / "model", tmp_path / "replayed")

    (elsewhere / "moved.pzj").unlink()
    config = (out / "config.yaml").read_text().replace(f"journal: {elsewhere}/moved.pzj\n", "")
    (out / "config.yaml").write_text(config)
    pseuzo("train", "--config", out / "config.yaml", "--output", out, "--steps", 7, "--resume")
    assert not (elsewhere / "moved.pzj").exists()


def test_two_runs_are_given_one_journal(tmp_path, monkeypatch):
    """The second is refused at any time, and does not remove the file of the first."""
    journal, out = tmp_path / "run.pzj", tmp_path / "run"
    args = ["train", *SMALL, *ZERO_ORDER, "--steps", 2, "--journal", journal, "--output", out]
    with held(journal), monkeypatch.context() as patched:  # the first run loads its model
        patched.setattr(runs, "load_model", None)  # the second run must not load its own
        assert "run.pzj is in use by another run" in pseuzo(*args, code=2)
        assert journal.exists() and not list(out.iterdir())
    journal.unlink()

    def overtaken(trainer, resume_from_checkpoint):
        journal.write_bytes(b"of the other run")
        return train(trainer, resume_from_checkpoint)

    train = PseuZOTrainer.train
    monkeypatch.setattr(PseuZOTrainer, "train", overtaken)
    assert "is not a journal" in pseuzo(*args, code=2)
    assert journal.read_bytes() == b"of the other run" and not list(out.iterdir())


def test_resuming_with_other_settings_is_refused(tmp_path):
    out = tmp_path / "run"
    args = [
        "train",
        *SMALL,
        *ZERO_ORDER,
        *"--steps 4 --save-every 2 --keep last".split(),
        "--output",
        out,
    ]
    pseuzo(*args)
    config = (out / "config.yaml").read_text()
    for other in (
        ["--lr", "1e-4"],
        ["--batch-size", "4"],
        ["--method", "mezo"],
        ["--window", "3"],
        ["--seed", "7"],
        ["--noise-on", "last-half"],
    ):
        text = pseuzo(*args, *other, "--resume", code=2)
        assert (
            other[0].strip("-").replace("-", "_") in text.splitlines()[-1]
            and "own settings" in text
        )
    assert (out / "config.yaml").read_text() == config
    pseuzo(*args, "--steps", 6, "--resume")  # a longer run is the same run
    assert json.loads((out / "results.json").read_text())["steps"] == 6


def test_a_best_checkpoint_that_is_gone_is_not_said_to_be_in_model(tmp_path, monkeypatch):
    out, journal = tmp_path / "run", tmp_path / "run.pzj"
    # The accuracies fall, so that rounding does not decide which step is the best.
    accuracies = (1 / n for n in itertools.count(1))
    monkeypatch.setattr(
        "pseuzo.train.reporting.evaluate",
        lambda *a, **k: evaluate(*a, **k) | {"accuracy": next(accuracies)},
    )
    args = [
        "train",
        *SMALL,
        *"--method mezo --lr 1e-2 --steps 5 --eval-every 1".split(),
        "--journal",
        journal,
        "--output",
        out,
    ]
    text = pseuzo(*args)
    results = json.loads((out / "results.json").read_text())
    best = results["best_step"]
    assert best == 1 and f"model/ is step {best}, the best checkpoint on the dev rows" in text
    assert_same_weights(out / "model", out / f"checkpoint-{best}")
    shutil.rmtree(out / f"checkpoint-{best}")
    text = pseuzo(*args, "--resume")
    results = json.loads((out / "results.json").read_text())
    assert results["best_step"] is None and results["steps"] == 5 and "model/ is step" not in text
    assert (
        f"checkpoint-{best}, the best checkpoint, cannot be loaded: it is not there; the weights "
        "are those" in text
    )
    assert f"step, 5 (pseuzo replay --until {best} makes those of the best)\n" in text
    pseuzo("replay", "--base", "demo", "--journal", journal, "--output", tmp_path / "replayed")
    assert_same_weights(out / "model", tmp_path / "replayed")


def test_a_refused_try_does_not_block_the_next(tmp_path):
    out = tmp_path / "run"
    args = ["train", *SMALL, "--steps", 2, "--output", out, "--method", "mezo"]
    pseuzo(*args, "--noise-on", "no_such_layer", code=2)
    text = pseuzo(*args, "--noise-on", "attention-out", "--resume")
    assert "no run to resume" in text
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    assert "not the folder of a run" in pseuzo(
        *args[:-4], "--output", tmp_path / "mine", "--resume", code=2
    )
