"""Errors of the user become one sentence, and our own errors keep their traceback."""

import errno
import json
import os
import subprocess
import sys

import pytest
import torch
import yaml
from cli_refusals import BASE, raising, refused
from click.testing import CliRunner
from helpers import SMALL, pseuzo
from pseuzo.cli import compare
from pseuzo.cli import run as runs
from pseuzo.cli.commands import main
from pseuzo.optim import MeZO
from pseuzo.train.contest import Contest
from safetensors import SafetensorError
from safetensors.torch import load_file

pytestmark = pytest.mark.slow


def own_error(**kwargs):
    parameter = torch.nn.Parameter(torch.zeros(3))
    MeZO([parameter], lr=1e-3, eps=1e-3).step()  # without an estimate


def damaged(folder):
    (folder / "x.safetensors").write_bytes(b"\xff" * 50)
    return lambda given: load_file(folder / "x.safetensors")


@pytest.mark.parametrize(
    "error, words",
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
            "a smaller --batch-size",
        ),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
            "a 16-bit --dtype",
        ),
        (MemoryError(), "out of memory"),
        (yaml.YAMLError("a colon too many"), "a colon too many"),
        (ValueError("two\nlines"), "two lines"),
        (
            OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
            "the disk is full, or a limit on files was hit",
        ),
        (
            SafetensorError(
                "Error while serializing: I/O error: No space left on device (os error 28)"
            ),
            "make room",
        ),
    ],
)
def test_one_sentence(tmp_path, monkeypatch, error, words):
    monkeypatch.setattr(runs, "train", raising(error))
    assert words in refused("train", *BASE, "--output", tmp_path / "run")
    monkeypatch.setattr(runs, "evaluate_run", raising(error))
    assert "--batch-size" not in refused("eval", *BASE)


def test_a_full_disk_does_not_end_a_run_for_good(tmp_path):
    """The disk fills up in the middle of a checkpoint's weights (4.3 MB) or Adam's state (8.6)."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for most in (1_000_000, 6_000_000):
        out = tmp_path / str(most)
        args = [
            "train",
            *SMALL,
            *"--method fo-adam --steps 2 --save-every 1".split(),
            "--output",
            out,
        ]
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
        try:
            text = refused(*args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert (
            text.startswith("the disk is full, or a limit on files was hit")
            and "--resume continues the run" in text
        )
        pseuzo(*args, "--resume")
        assert json.loads((out / "results.json").read_text())["steps"] == 2


def test_a_model_that_cannot_be_saved_is_refused_before_anything_is_tried(tmp_path, monkeypatch):
    """No candidate races either, although a race saves nothing itself."""
    load = runs.load_model

    def unsavable(*args, **kwargs):
        model, tokenizer = load(*args, **kwargs)
        model.generation_config.temperature = 0.9
        return model, tokenizer

    monkeypatch.setattr(runs, "load_model", unsavable)
    monkeypatch.setattr(Contest, "run", raising(AssertionError("a race began")))
    out = tmp_path / "run"
    text = refused(
        *("train", *SMALL, "--output", out),
        *"--steps 2 --noise-on auto --save-every 0 --keep last".split(),
    )
    assert "could not be saved, so no step is made" in text and "`temperature`" in text
    assert not list(out.iterdir())


def test_errors_of_our_own_and_of_safetensors_are_sentences(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "train", lambda given: own_error())
    assert "estimate" in refused("train", *BASE, "--output", tmp_path / "run")
    monkeypatch.setattr(runs, "train", damaged(tmp_path))
    assert "safetensors" in refused("train", *BASE, "--output", tmp_path / "run")
    (tmp_path / "ledger.jsonl").write_text('{"kind": "plan", "hash": ""}\n')  # edited by hand
    text = refused("compare", "--report", "--output", tmp_path)
    assert "'cells' is missing in the results of a run" in text


def test_what_our_ops_refuse_is_a_sentence(tmp_path, monkeypatch):
    """The traceback of a C++ error of ours ends in torch, which our code called for an op."""
    source = (
        "import torch\n"
        "def run(given): torch.ops.aten.mm.default(torch.zeros(2, 3), torch.zeros(2, 3))"
    )
    for module, code in (("pseuzo_kernels.ops", 2), ("somebody.elses", 1)):
        made = {"__name__": module}
        exec(source, made)
        monkeypatch.setattr(runs, "train", made["run"])
        assert (
            "cannot be multiplied"
            in pseuzo("train", *BASE, "--output", tmp_path / "run", code=code)
            or code == 1
        )


def test_an_instruction_set_that_is_not_there_is_refused_at_the_start(tmp_path):
    pytest.importorskip("pseuzo_kernels._C", reason="the C++ extension is not built")
    done = subprocess.run(
        [sys.executable, "-m", "pseuzo", "train", *SMALL, "--output", tmp_path / "run"],
        env=os.environ | {"PSEUZO_CPU_ISA": "avx3"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr and not any(tmp_path.iterdir())
    assert done.stderr.strip().splitlines()[-1].startswith("Error: PSEUZO_CPU_ISA: must be one of ")


def test_a_sentence_is_not_as_long_as_what_it_quotes(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "train", raising(ValueError(f"this {'x' * 10**6} is wrong; do that")))
    sentence = refused("train", *BASE, "--output", tmp_path / "run")
    assert (
        len(sentence) < 2000
        and sentence.startswith("this xxx")
        and sentence.endswith("xxx is wrong; do that")
    )


@pytest.mark.parametrize(
    "bug",
    [
        lambda given: torch.zeros(2, 3) @ torch.zeros(2, 3),
        lambda given: {}["key"],
        lambda given: [][0],
    ],
)
def test_a_bug_is_not_hidden(tmp_path, monkeypatch, bug):
    monkeypatch.setattr(runs, "train", bug)
    result = CliRunner().invoke(main, ["train", *BASE, "--output", str(tmp_path / "run")])
    assert result.exit_code == 1 and isinstance(
        result.exception, (RuntimeError, KeyError, IndexError)
    )


def during_import(given):
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt as error:
        raise ModuleNotFoundError("Could not import module 'OPTForCausalLM'") from error


def test_interruptions(tmp_path, monkeypatch):
    from pseuzo.demo import run as demo

    for module, name in (
        (runs, "train"),
        (runs, "evaluate_run"),
        (demo, "run"),
        (compare, "compare"),
    ):
        monkeypatch.setattr(module, name, raising(KeyboardInterrupt()))
    said = {
        "train": pseuzo("train", *BASE, "--output", tmp_path / "run", code=130),
        "eval": pseuzo("eval", *BASE, code=130),
        "demo": pseuzo("demo", "--out", tmp_path / "demo", code=130),
        "compare": pseuzo("compare", *BASE, "--output", tmp_path / "compared", code=130),
    }
    assert "--resume" in said["train"] and "the same command" in said["compare"]
    assert said["eval"] == said["demo"] == "interrupted\n"
    monkeypatch.setattr(runs, "train", during_import)
    pseuzo("train", *BASE, "--output", tmp_path / "run", code=130)


@pytest.mark.parametrize("command", ["train", "eval"])
def test_sequences_longer_than_the_model(command, tmp_path):
    """Such lengths are refused if they are asked for. The default is the model's own length."""
    sizes = [
        *"--train-size 4 --dev-size 4 --test-size 4 --device cpu".split(),
        *"--max-length 129".split(),
    ]
    output = ["--output", tmp_path / "run"] if command == "train" else []
    text = refused(command, *BASE, *sizes, *output)
    assert "--max-length 129 is more than the model has positions for, 128" in text
    assert not any(tmp_path.glob("run/*"))
