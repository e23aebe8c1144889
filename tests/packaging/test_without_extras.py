"""The kernels and optimizers run without the extra `train`; the rest says how to install it."""

import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from pseuzo import extras
from pseuzo.extras import TRAIN_MODULES, how_to_install

ROOT = Path(__file__).parents[2]
IMPORT_NAMES = {"pyyaml": "yaml"}  # distributions whose modules have another name
WITHOUT = f"import sys; sys.modules.update(dict.fromkeys({TRAIN_MODULES}));"  # None hides a module
INSTALL = 'pip install "pseuzo[train]"'
KERNELS = """
import torch, pseuzo_kernels as pk
x, window = torch.zeros(100), pk.EmaWindow(2)
pk.update_(x, [1, 2], [0.5, -0.5], lr=0.1)
seeds, coefs = window.step(1, torch.zeros(2, 3), torch.ones(2, 3), torch.ones(2, 3))
assert x.any() and coefs.isfinite().all()
assert not any(name.partition(".")[0] == "pseuzo" for name in sys.modules)
"""
OPTIMIZERS = """
import torch, pseuzo, pseuzo_kernels
from pseuzo import Constant, CyclicHyperbola, Journal, Linear, MeZO, PseuZO, perturbed, replay
model, x = torch.nn.Linear(3, 1), torch.ones(4, 3)
before = model.weight.clone()
MeZO(model, lr=1e-3, eps=1e-3).step(lambda: model(x).square().mean())
start = {name: value.clone() for name, value in model.state_dict().items()}
optimizer = PseuZO(model, lr=1e-3, eps=1e-3, momentum=Linear(0.9, 0.0, 10))
with Journal(sys.argv[1], optimizer):
    loss = optimizer.step(lambda: model(x), lambda o: o.square().mean())
with perturbed(model, 1, 1e-3):
    model(x)
assert loss.isfinite() and not torch.equal(model.weight, before)
again = torch.nn.Linear(3, 1)
again.load_state_dict(start)
replay(sys.argv[1], again)
assert torch.equal(again.weight, model.weight)
assert pseuzo.__version__ == pseuzo_kernels.__version__
"""


def python(code: str, *args: str | Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", WITHOUT + code, *map(str, args)], capture_output=True, text=True
    )


@pytest.mark.slow
@pytest.mark.parametrize("code", [KERNELS, OPTIMIZERS], ids=["kernels", "optimizers"])
def test_runs_without_the_extra(tmp_path, code):
    done = python(code, tmp_path / "journal")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_what_needs_the_extra_says_so():
    code = """
import pseuzo
for name in ("PseuZOTrainer", "PseuZOTrainingArguments", "tasks"):
    try:
        getattr(pseuzo, name)
    except ImportError as error:
        print(error)
"""
    lines = python(code).stdout.splitlines()
    assert len(lines) == 3
    for name, line in zip(
        ("PseuZOTrainer", "PseuZOTrainingArguments", "tasks"), lines, strict=True
    ):
        assert line.startswith(f"pseuzo.{name} needs ") and line.endswith(INSTALL)


@pytest.mark.parametrize("args", [[], ["--help"], ["train", "--model", "demo"]], ids=" ".join)
def test_the_command_line_needs_the_extra(args):
    done = python("from pseuzo.__main__ import main; main()", *args)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1 and done.stderr.strip().endswith(INSTALL)


def test_the_sentence_names_what_is_missing():
    assert how_to_install("x", ["yaml"]) == f"x needs yaml, which is not installed: {INSTALL}"
    several = how_to_install("x", ["click", "yaml"])
    assert several == f"x needs click, yaml, which are not installed: {INSTALL}"


def test_a_transformers_that_another_library_pins_is_named(monkeypatch):
    """The kernels and the optimizers run beside it."""
    monkeypatch.setattr(extras, "version", lambda name: "4.28.1")
    needed = "transformers>=5.4 (not 4.28.1)"
    assert extras.missing_train_modules()[-1] == needed
    with pytest.raises(ImportError, match=re.escape(f"pseuzo.models needs {needed}")):
        runpy.run_path(str(ROOT / "python/pseuzo/models/__init__.py"))
    for installed in ("5.4.0", "5.10.0.dev0", "main"):
        monkeypatch.setattr(extras, "version", lambda name, installed=installed: installed)
        assert extras.outdated() == []
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "transformers>=5.4" in project["optional-dependencies"]["train"]


def test_the_modules_are_those_of_the_extra():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    names = [re.match(r"[\w-]+", requirement)[0] for requirement in extras["train"]]
    assert sorted(IMPORT_NAMES.get(name, name) for name in names) == sorted(TRAIN_MODULES)


def test_the_changelog_has_the_version():
    source = (ROOT / "pseuzo_kernels" / "__init__.py").read_text()
    (version,) = re.findall(r'^__version__ = "(\d+\.\d+\.\d+)"$', source, re.MULTILINE)
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()


def test_every_extra_is_pinned():
    """make installs under constraints.txt. A package that is not in it could change from day to
    day."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = {
        line.split("==")[0].lower()
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    wanted = [project["dependencies"], *project["optional-dependencies"].values()]
    names = {re.match(r"[\w-]+", line)[0].lower() for part in wanted for line in part} - {"pseuzo"}
    assert not names - pinned, names - pinned


@pytest.mark.slow
def test_nothing_below_the_trainer_imports_its_packages():
    """A step of a user's own loop must not wait for Transformers to be imported."""
    code = f"""
import sys, pseuzo.optim, pseuzo.perturb, pseuzo.machine, pseuzo.files, pseuzo.train.journal
print(*sorted({set(TRAIN_MODULES) - {"tqdm"}} & sys.modules.keys()))  # torch imports tqdm
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stdout + done.stderr
