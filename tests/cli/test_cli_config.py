"""--config files are read, and settings are written and read again."""

from pathlib import Path

import pytest
import yaml
from cli_refusals import BASE, refused
from helpers import pseuzo
from pseuzo.cli import folder
from pseuzo.cli import run as runs
from pseuzo.train.methods import METHODS
from pseuzo.train.recipes import RECIPES

pytestmark = pytest.mark.slow


BAD_CONFIGS = {
    "not UTF-8": (b"model: d\xe9mo\n", "cannot be read as YAML"),
    "not YAML": (b"model: [demo\n", "line 2"),
    "two documents": (b"model: demo\n---\nmodel: demo\n", "cannot be read as YAML"),
    "a bad date": (b"seed: 2001-99-99\n", "seed: '2001-99-99'"),
    "a list": (b"eps: [1, 2]\n", "eps: one plain value"),
    "a list of one": (b"two_sided: [1]\n", "two_sided: one plain value"),
    "a mapping": (b"eps: {a: 1}\n", "eps: one plain value"),
    "a list where a path is due": (b"journal: [a]\n", "journal: one plain value"),
    "a nested list": (b"noise-on: [[all]]\n", "noise-on: a list of plain values"),
    "inf steps": (b"window: .inf\n", "window: '.inf'"),
    "inf": (b"eps: inf\n", "eps: 'inf' is not a finite number"),
    "a fraction": (b"window: 2.7\n", "window: '2.7'"),
    "a switch's value": (b"clip_examples: true\n", "clip_examples: true is for switches"),
    "a value for a switch": (b"quiet: much\n", "quiet: 'much'"),
    "out of range": (b"steps: 0\n", "steps: 0 is not in the range"),
    "unknown choice": (b"method: adam\n", "method: 'adam'"),
    "unknown rate": (b"lr: fast\n", "lr: 'fast' is neither a number nor auto"),
    "unknown option": (b"learning_rat: 1\n", "unknown option 'learning_rat'"),
    "unhashable key": (b"? [a]\n: 1\n", "cannot be read as YAML"),
    "aliases": (
        b"model: &a demo\ntask: *a\n",
        "line 2: aliases (*name) are not read; write the value again",
    ),
    "deep": (b"model: " + b"[" * 9999, "line 1: there are more than 32 levels"),
    "large": (b"model: " + b"x" * 300_000, "it is larger than 262144 bytes"),
    "a seed below 0": (b"seed: -1\n", "seed: -1 is not in the range 0<=x<=4294967295"),
    "a seed too large": (
        b"data_seed: 99999999999999999999\n",
        "is not in the range 0<=x<=4294967295",
    ),
}


@pytest.mark.parametrize("what", BAD_CONFIGS)
def test_bad_config(tmp_path, settings, what):
    content, words = BAD_CONFIGS[what]
    file = tmp_path / "config.yaml"
    file.write_bytes(content)
    sentence = refused("train", *BASE, "--config", file, "--output", tmp_path / "run")
    assert str(file) in sentence and words in sentence and not settings


def test_config_path_that_is_not_there(tmp_path, settings):
    file = tmp_path / "config.yaml"
    file.write_text("data: 5\n")
    args = ("train", *BASE, "--config", file, "--output", tmp_path / "run")
    assert "'--data': Path '5' does not exist" in refused(*args)
    pseuzo(*args, "--data", tmp_path)
    assert settings["data"] == tmp_path


def test_config_values_are_read_as_on_the_command_line(tmp_path, settings):
    file = tmp_path / "config.yaml"
    file.write_text(
        "lr: 4e-4\neps: 1.0e-3\nclip_examples: 2\ntwo_sided: true\nnoise-on: v_proj\nquiet: "
        "no\nresume: true\n"
        "report_to: []\nmomentum: null\ndata_seed:\nmodel: demo\ntask: demo\noutput: "
        "2024-01-01\nwindow: 5\n"
    )
    pseuzo("train", "--config", file, "--window", 7)
    expected = {
        "lr": 4e-4,
        "eps": 1e-3,
        "clip_examples": 2.0,
        "two_sided": True,
        "noise_on": ("v_proj",),
        "quiet": False,
        "resume": "auto",
        "report_to": (),
        "momentum": None,
        "data_seed": None,
        "output": Path("2024-01-01"),
        "window": 7,
    }
    assert {k: settings[k] for k in expected} == expected
    file.write_text("resume: false\n")
    pseuzo("train", *BASE, "--config", file, "--output", tmp_path / "run")
    assert settings["resume"] is None


@pytest.mark.parametrize(
    "args",
    [["--method", m] for m in METHODS]
    + [
        ["--mode", "lora", "--lora-r", "3"],
        ["--method", "fo-adam", "--noise-on", "attention-out"],
        [
            *"--method mezo --noise-on auto --eps 1e-2 --noise normal".split(),
            *"--clip-examples 2".split(),
        ],
    ],
)
def test_resolved_settings_are_taken_again(tmp_path, settings, args):
    pseuzo("train", *BASE, *args, "--output", tmp_path / "run")
    first = runs.resolve(dict(settings))
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(folder.plain(first)))
    pseuzo("train", "--config", file)
    again = dict(settings)
    assert folder.plain(runs.resolve(again)) == folder.plain(first)


def test_a_recipe_gives_the_options_that_are_not_given(tmp_path, settings):
    file = tmp_path / "own.yaml"
    file.write_text("noise_on: last-half\nrecipe: best\n")
    args = ["--model", "demo", "--task", "demo", "--output", tmp_path / "run"]
    best = RECIPES["best"]
    pseuzo("train", *args, "--recipe", "best")
    assert {name: settings[name] for name in best} == best | {"noise_on": tuple(best["noise_on"])}
    for order in (["--recipe", "best", "--config", file], ["--config", file]):
        pseuzo("train", *args, *order, "--lr", "1e-3")
        assert settings["noise_on"] == ("last-half",)
        assert (settings["lr"], settings["readout"]) == (1e-3, best["readout"])
    assert "Invalid value for '--recipe'" in pseuzo("train", *args, "--recipe", "worst", code=2)
