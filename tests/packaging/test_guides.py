"""The code of the guides runs as it stands, and their commands run with smaller numbers."""

import contextlib
import re
import shlex
import warnings
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
SMALLER = {"--steps 300": "--steps 4", "--steps 60": "--steps 4"}
SIZES = "--dev-size 8 --test-size 8 --quiet".split()
FEW = "--batch-size 4 --train-size 16 --eval-every 2 --save-every 2".split()


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / "docs" / page).read_text()
    return re.findall(rf"^ *```{language}\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", ["guide-kernels.md", "guide-libraries.md"])
def test_the_code_runs_as_it_stands(page):
    names: dict = {}
    state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for code in blocks(page, "python"):
            exec(compile(code, page, "exec"), names)
    torch.set_rng_state(state)
    assert "reference" in names or "slope" in names, "the last lines ran"


@pytest.mark.slow
def test_the_commands_run(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    from pseuzo.cli import run
    from pseuzo.cli.commands import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "plot_runs", lambda *args: None)  # `pseuzo plot` draws one below
    text = "".join(blocks("guide-training.md", "sh")).replace("\\\n", " ")
    for old, new in SMALLER.items():
        text = text.replace(old, new)
    ran = 0
    for line in text.splitlines():
        program, *words = shlex.split(line)
        if program == "pseuzo":
            few = {"train": FEW + SIZES, "eval": SIZES}.get(words[0], [])
            with contextlib.redirect_stdout(None):
                main([*words, *few], standalone_mode=False)
            ran += 1
        elif program == "cmp":
            ours, theirs = (Path(word).read_bytes() for word in words)
            assert ours == theirs
        else:
            assert (program, words[0]) == ("python", "-c")
            exec(words[1])
    assert ran >= 10 and Path("curves.png").exists()
