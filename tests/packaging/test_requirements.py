"""Installing the package beside other libraries forces no version of theirs to change."""

import runpy
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from pseuzo_kernels.implementations import TRITON

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
# The versions that libraries for zeroth-order training pin, and torch's with which they are used.
PINNED = {"transformers": ("4.28.1", "4.51.3"), "torch": ("2.6.0", "2.7.1", "2.13.0")}


def requirements(lines: list[str]) -> list[Requirement]:
    return [Requirement(line) for line in lines]


def test_the_base_needs_torch_and_numpy_alone():
    base = requirements(PROJECT["dependencies"])
    assert sorted(r.name for r in base) == ["numpy", "torch"]
    for r in base:  # a build of torch for GPUs needs one version of triton, so ours could conflict
        assert not r.extras and not r.marker and not r.url
        for version in PINNED.get(r.name, ()):
            assert r.specifier.contains(version), f"{r} forbids {version}"


@pytest.mark.parametrize("extra", ["base", "train"])
def test_no_requirement_has_an_upper_bound(extra):
    lines = PROJECT["dependencies"] if extra == "base" else EXTRAS[extra]
    for r in requirements(lines):
        assert {s.operator for s in r.specifier} <= {">="}, r


def test_the_triton_of_the_tests_is_one_that_compiles_the_kernels():
    (triton,) = (r for r in requirements(EXTRAS["test"]) if r.name == "triton")
    (bound,) = triton.specifier
    assert (bound.operator, bound.version) == (">=", ".".join(map(str, TRITON)))


@pytest.mark.parametrize("version, refused", [("3.3.1", True), ("3.10.0+git1", False)])
def test_an_older_triton_is_refused_at_import(version, refused, monkeypatch):
    """The ops then run in plain torch, and say so."""
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton, "__version__", version)
    device = str(ROOT / "pseuzo_kernels/triton/device.py")
    if refused:
        with pytest.raises(ImportError, match=r"do not compile with Triton 3\.3\.1"):
            runpy.run_path(device)
    else:
        runpy.run_path(device)
