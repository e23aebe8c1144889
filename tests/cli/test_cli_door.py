"""The command line refuses mistakes with exit code 2, and `info` checks the ops."""

import functools
import re
from pathlib import Path

import pytest
import torch
from helpers import (
    SMALL,
    pseuzo,
    weights,
)
from pseuzo.cli.run import model_path

import pseuzo_kernels

pytestmark = pytest.mark.slow


REFUSED = {
    "unknown task": (["--task", "sst3"], "sst3"),
    "lr zero": (["--lr", "0"], "lr"),
    "lr negative": (["--lr", "-1"], "lr"),
    "lr not a number": (["--lr", "fast"], "fast"),
    "no such model": (["--model", "./no/such/folder"], "no/such/folder"),
    "unknown placement": (["--noise-on", "no_such_layer"], "no_such_layer"),
    "unknown device": (["--device", "cuda:99"], "cuda:99"),
    "keep best without evaluation": (["--eval-every", "0", "--keep", "best"], "--keep"),
    "metric under pseuzo": (["--objective", "metric"], "objective"),
    "journal of a first-order run": (["--method", "fo-sgd", "--journal", "j.pzj"], "journal"),
    "directions under pseuzo": (["--directions", "2"], "directions"),
    "head under pseuzo": (["--mode", "head"], "fo-adam"),
    "no step": (["--steps", "0"], "steps"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refusals_are_one_sentence_and_exit_code_2(tmp_path, what):
    args, word = REFUSED[what]
    out = tmp_path / "run"
    text = pseuzo("train", *SMALL, *args, "--output", out, code=2)
    error = text.strip().splitlines()[-1]
    assert error.startswith("Error: ") and word in error and "Traceback" not in text
    assert not out.exists() or not any(out.glob("model*"))


def test_refuses_a_folder_that_is_not_empty_and_loses_nothing(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    assert "not empty" in pseuzo("train", *SMALL, "--output", tmp_path / "run", code=2)
    assert [f.name for f in (tmp_path / "run").iterdir()] == ["thesis.txt"]


def test_refuses_a_pickle(tmp_path):
    folder = tmp_path / "pickled"
    folder.mkdir()
    for file in Path(model_path("demo")).iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    torch.save(weights(Path(model_path("demo"))), folder / "pytorch_model.bin")
    text = pseuzo("train", *SMALL, "--model", folder, "--output", tmp_path / "run", code=2)
    assert "safetensors" in text


def test_refuses_a_config_with_an_unknown_option(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("model: demo\ntask: demo\nlearning_rat: 1\n")
    assert "learning_rat" in pseuzo(
        "train", "--config", config, "--output", tmp_path / "run", code=2
    )
    config.write_text("- model\n")
    assert "option: value" in pseuzo(
        "train", "--config", config, "--output", tmp_path / "run", code=2
    )
    config.write_text("steps: many\nmodel: demo\ntask: demo\n")
    assert "many" in pseuzo("train", "--config", config, "--output", tmp_path / "run", code=2)


def test_info():
    text = pseuzo("info")
    assert (
        "DIFFERS" not in text and "self-test, hadamard on cpu: same bits as the reference" in text
    )
    assert "normal on cpu: as the reference" in text and "window on cpu: as the reference" in text


ALL_BITS = ["hadamard", "hadamard-fp16", "rademacher"]


BROKEN = {  # the broken op, its replacement, and the lines that report it
    "noise": ("noise", lambda op, *args, **k: op(*args, **k) * (1 + 1e-5), ["normal"]),
    "window": (
        "EmaWindow",
        lambda op, *args, momentum, **k: op(*args, momentum=momentum * (1 - 1e-4), **k),
        ["window"],
    ),
    "last seed": (
        "update_",
        lambda op, x, seeds, coefs, **k: op(x, seeds[:-1], coefs[:-1], **k),
        ALL_BITS,
    ),
    "rounding": ("update_", lambda op, *args, rounding, **k: op(*args, **k), ALL_BITS),
    "one noise": (
        "update_",
        lambda op, *args, noise, **k: op(*args, noise=noise.removesuffix("-fp16"), **k),
        ["hadamard-fp16"],
    ),
    "nothing": ("update_", lambda *args, **k: None, ALL_BITS),
}


@pytest.mark.parametrize("what", BROKEN)
def test_info_notices_an_op_that_is_wrong(monkeypatch, what):
    name, wrong, lines = BROKEN[what]
    monkeypatch.setattr(
        pseuzo_kernels, name, functools.partial(wrong, getattr(pseuzo_kernels, name))
    )
    text = pseuzo("info", code=2)
    assert (
        re.findall("self-test, (.*) on cpu: DIFFERS", text) == lines
        and "disagree with the reference" in text
    )
