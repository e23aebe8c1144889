"""A folder has one owner, and a failed try adds nothing to it."""

import json
import subprocess
import sys

import pytest
import torch
from cli_refusals import BASE, raising, refused
from helpers import SMALL, pseuzo
from pseuzo import files
from pseuzo.optim import MeZO

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "there",
    [
        ("thesis.txt",),
        ("start/thesis.txt",),
        ("found.json",),
        ("config.yaml",),
        ("table.md",),
        ("compare.json", "runs/mine.txt"),
        ("model/thesis.txt",),
        ("summary.json", "metrics.jsonl"),
        (".pseuzo",),
    ],
)
def test_no_command_fills_a_folder_of_other_files(tmp_path, there):
    out = tmp_path / "out"
    for name in there:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("{}")
    before = sorted(out.rglob("*"))
    for command in (
        ["train", *BASE, "--output", out],
        ["train", *BASE, "--resume", "--output", out],
        ["compare", *BASE, "--output", out],
        ["demo", "--steps", 1, "--out", out],
    ):
        assert "is not empty, and not the folder of" in refused(*command)
        assert sorted(out.rglob("*")) == before and all(
            (out / name).read_text() == "{}" for name in there
        )


def test_a_folder_is_of_one_command(tmp_path):
    for _ in range(2):
        with files.claim(tmp_path / "out", "demo"):
            assert [f.name for f in (tmp_path / "out").iterdir()] == [files.MARKER]
    with pytest.raises(ValueError, match="not the folder of a run of pseuzo compare"):
        with files.claim(tmp_path / "out", "compare"):
            pass


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("command", ["train", "compare", "demo"])
def test_a_folder_at_work_is_left_alone(tmp_path, command):
    pytest.importorskip("fcntl")
    out = tmp_path / "out"
    journal = out / "run.pzj"
    args = {
        "train": [*MEZO, "--noise-on", "no_such", "--journal", journal],
        "compare": BASE,
        "demo": ["--steps", 1],
    }
    with files.claim(out, command):
        for name in ("found.json", "start/adapter_model.safetensors", "metrics.jsonl", "run.pzj"):
            (out / name).parent.mkdir(exist_ok=True)
            (out / name).write_bytes(b"" if name == "run.pzj" else b"{}")
        before = contents(out)
        for more in ([], ["--resume"]) if command == "train" else ([],):
            assert "is in use by another pseuzo process" in refused(
                command, *args[command], *more, "--output", out
            )
        assert contents(out) == before


HOLD = """
import sys, time
from pathlib import Path
from pseuzo.files import claim
with claim(Path(sys.argv[1]), "train"):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_folder_is_free_again_when_its_process_was_killed(tmp_path):
    pytest.importorskip("fcntl")
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path / "out"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match="is in use by another pseuzo process"):
            with files.claim(tmp_path / "out", "train"):
                pass
    finally:
        process.kill()
        process.communicate()
    with files.claim(tmp_path / "out", "train"):
        pass


def test_a_try_that_fails_leaves_what_was_there(tmp_path):
    """What a killed try found stays, and so does a journal that another run has started
    meanwhile."""
    out, journal = tmp_path / "run", tmp_path / "run.pzj"
    with files.claim(out, "train"):
        (out / "found.json").write_text("{}")
    journal.touch()
    before = contents(tmp_path)
    args = [
        "train",
        *MEZO,
        "--mode",
        "head",
        "--noise-on",
        "no_such",
        *"--lr 1e-4 --eps 1e-3".split(),
        "--journal",
        journal,
        "--resume",
    ]
    assert "matches 'no_such'" in refused(*args, "--output", out)
    assert contents(tmp_path) == before


def test_a_checkpoint_that_is_not_there_is_refused(tmp_path):
    out = tmp_path / "out"
    args = ("train", *BASE, "--output", out, "--resume")
    assert f"{out}/checkpoint-3: that is no checkpoint of a run in {out}" in refused(
        *args, out / "checkpoint-3"
    )
    (tmp_path / "checkpoint-3").mkdir()
    # This folder is a checkpoint of another run.
    assert "that is no checkpoint of a run in" in refused(*args, tmp_path / "checkpoint-3")
    assert not out.exists()


MEZO = [*SMALL, "--method", "mezo"]


def test_a_try_that_fails_before_its_first_step_leaves_nothing(tmp_path, monkeypatch):
    """This holds whatever failed, since the next try may need other settings and its journal."""
    out, journal = tmp_path / "run", tmp_path / "run.pzj"
    args = ["train", *MEZO, "--mode", "head", "--steps", 2, "--journal", journal, "--output", out]
    with monkeypatch.context() as patched:
        patched.setattr(MeZO, "step", raising(torch.OutOfMemoryError("CUDA out of memory")))
        assert "out of memory" in refused(*args)
    assert not journal.exists() and not list(out.iterdir())
    assert "matches 'no_such'" in refused(*args, "--noise-on", "no_such") and not list(
        out.iterdir()
    )
    assert "auto is a value of noise_on alone" in refused(*args, "--noise-on", "auto=2")
    journal.mkdir()
    assert "is a directory" in refused(*args)
    journal.rmdir()
    pseuzo(*args, "--batch-size", 3)
    assert (out / "results.json").exists() and journal.stat().st_size > 0


def test_the_step_that_is_kept_is_said(tmp_path, settings):
    # The run makes 10 steps, and keeps the weights of an earlier one.
    args = [
        "train",
        *BASE,
        "--method",
        "mezo",
        "--steps",
    ]
    assert "model/ is step 5, the best checkpoint on the dev rows\n" in pseuzo(
        *args, 7, "--output", tmp_path / "run"
    )
    (tmp_path / "run.pzj").touch()
    text = pseuzo(*args, 7, "--journal", tmp_path / "run.pzj", "--output", tmp_path / "run")
    assert (
        "model/ is step 5, the best checkpoint on the dev rows: pseuzo replay --until 5 makes it"
        in text
    )
    assert "model/ is step" not in pseuzo(*args, 12, "--output", tmp_path / "run")
    assert "model/ is step" not in pseuzo(*args, 7, "--keep", "last", "--output", tmp_path / "run")


def test_what_is_scaled_to_the_noise_is_said(tmp_path):
    args = ["train", *MEZO, "--steps", 1, "--noise-on", "attention-out", "--output"]
    for name, own, scaled in (
        ("mezo", [], {"lr", "eps"}),
        ("eps given", ["--eps", "1e-3"], {"lr"}),
        ("fo-sgd", ["--method", "fo-sgd"], {"lr"}),
    ):
        text = pseuzo(*args, tmp_path / name, *own)
        assert {word for word in ("lr", "eps") if f"; {word} times " in text} == scaled


def test_a_run_that_diverged_says_so(tmp_path):
    args = ["train", *MEZO, *"--steps 2 --eval-every 0 --keep last --output".split()]
    text = pseuzo(*args, tmp_path / "far", "--lr", "1e30")
    assert "the run diverged: the loss on the test rows is nan" in text
    assert "the run diverged" not in pseuzo(*args, tmp_path / "near", "--lr", "1e-5")


def test_a_run_that_is_older_than_an_option_goes_on(tmp_path):
    out = tmp_path / "run"
    pseuzo("train", *SMALL, "--steps", 2, "--lr", 1e-4, "--output", out)
    lines = (out / "config.yaml").read_text().splitlines(keepends=True)
    older = [line for line in lines if line.split(":")[0] not in ("weighting", "cycles", "blocks")]
    assert len(older) == len(lines) - 3
    (out / "config.yaml").write_text("".join(older))
    resumed = ["train", "--config", out / "config.yaml", "--output", out, "--resume"]
    pseuzo(*resumed, "--steps", 3)
    assert json.loads((out / "results.json").read_text())["steps"] == 3
    assert "has weighting sum, not mean" in pseuzo(*resumed, "--weighting", "mean", code=2)
