"""The wheel and the source distribution hold the right files, and an installed wheel works."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_string
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BUILT = ".git .venv build dist site runs pseuzo-demo *.egg-info *.so __pycache__ .*_cache".split()
NOT_SOURCES = shutil.ignore_patterns(*BUILT)
BUILD = """
import sys
from setuptools import build_meta
folder = sys.argv[1]  # setuptools writes its own arguments to sys.argv
build_meta.build_sdist(folder)
build_meta.build_wheel(folder)
"""


def run(*command: str | Path, cwd: Path, **env: str) -> subprocess.CompletedProcess:
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env=os.environ | env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, Path]:
    """Build the source distribution and a wheel without C++, offline, from a copy of the
    sources."""
    folder = tmp_path_factory.mktemp("built")
    shutil.copytree(ROOT, folder / "sources", ignore=NOT_SOURCES)
    (folder / "dist").mkdir()
    run("-c", BUILD, folder / "dist", cwd=folder / "sources", PSEUZO_BUILD="none")
    (sdist,), (wheel,) = (folder / "dist").glob("*.tar.gz"), (folder / "dist").glob("*.whl")
    return sdist, wheel


def sources(*folders: str) -> set[str]:
    """Return the Python files of folders, relative to the root."""
    paths = (path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return {str(path.relative_to(ROOT)) for path in paths}


@pytest.mark.slow
def test_the_wheel_holds_the_packages_and_nothing_else(built):
    with zipfile.ZipFile(built[1]) as wheel:
        names = set(wheel.namelist())
    info = {name for name in names if ".dist-info/" in name}
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in info)
    assets = ROOT / "python" / "pseuzo" / "demo" / "assets"
    tasks = ROOT / "python" / "pseuzo" / "tasks" / "builtin"
    data = [path for path in (*assets.rglob("*"), *tasks.glob("*.yaml")) if path.is_file()]
    want = sources("pseuzo_kernels") | {"pseuzo_kernels/py.typed", "pseuzo/py.typed"}
    want |= {name.removeprefix("python/") for name in sources("python/pseuzo")}
    want |= {str(path.relative_to(ROOT / "python")) for path in data}
    assert names - info == want
    assert "pseuzo/demo/assets/NOTICE.md" in names and "pseuzo/tasks/builtin/sst2.yaml" in names


@pytest.mark.slow
def test_the_source_distribution_holds_what_builds_and_tests_it(built):
    with tarfile.open(built[0]) as sdist:
        names = {member.name.partition("/")[2] for member in sdist if member.isfile()}
    folders = [ROOT / name for name in ("csrc", "docs", "examples", "python", "pseuzo_kernels")]
    paths = {path for folder in folders for path in folder.rglob("*") if path.is_file()}
    unwanted = {"__pycache__", "pseuzo.egg-info"}
    want = {
        str(p.relative_to(ROOT)) for p in paths if p.suffix != ".so" and not unwanted & {*p.parts}
    }
    want |= sources("tests", "bench", "tools")
    want |= {
        "pyproject.toml",
        "setup.py",
        "MANIFEST.in",
        "Makefile",
        "constraints.txt",
        "mkdocs.yml",
    }
    want |= {"LICENSE", "README.md", "CHANGELOG.md", "CONTRIBUTING.md"}
    assert not want - names, want - names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


@pytest.mark.slow
def test_the_metadata(built):
    with zipfile.ZipFile(built[1]) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith("/METADATA"))
        metadata = message_from_string(wheel.read(name).decode())
    assert metadata["License-Expression"] == "Apache-2.0" and metadata["License-File"] == "LICENSE"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert {"train", "test", "docs"} <= set(metadata.get_all("Provides-Extra"))
    needed = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert sorted(line.split(">")[0] for line in needed) == ["numpy", "torch"]


@pytest.mark.slow
def test_an_installed_wheel_works(built, tmp_path):
    """The wheel is unpacked as pip installs it, into a new folder that comes first on the path."""
    where = tmp_path / "installed"
    quiet = ("--quiet", "--no-deps", "--no-index", "--disable-pip-version-check")
    run("-m", "pip", "install", *quiet, "--target", where, built[1], cwd=tmp_path)
    code = f"""
import pseuzo, pseuzo_kernels, pseuzo.optim
for package in (pseuzo, pseuzo_kernels):
    assert package.__file__.startswith({str(where)!r}), package.__file__
assert pseuzo_kernels.noise((4,), 1, 0).shape == (4,)
"""
    run("-c", code, cwd=tmp_path, PYTHONPATH=str(where))
    info = run("-m", "pseuzo", "info", cwd=tmp_path, PYTHONPATH=str(where)).stdout
    assert "reference" in info
    shown = run("-m", "pseuzo", "eval", "--help", cwd=tmp_path, PYTHONPATH=str(where)).stdout
    assert "--shots" in shown
