"""What the ops run on is reported, and a slow one is said once."""

import subprocess
import sys
import warnings

import pytest
import torch
from cpu_ops import needs_native

import pseuzo_kernels as pk
from pseuzo_kernels import implementations
from pseuzo_kernels.laws import LAWS, SIGNS, Law


@needs_native
def test_the_report():
    report = pk.backends()
    assert (report.cpu.implementation, report.cpu.instructions) == ("c++", pk._C.cpu_isa())
    assert report.cpu.fast and not report.cpu.reason and report.cpu_window == report.cpu
    assert not report.other.fast and report.other.implementation == "torch"
    assert set(report.laws) >= {"hadamard", "normal", "rademacher"}
    assert f"CPU tensors: c++ ({pk._C.cpu_isa()})" in str(report)
    built = pk._C.build_info()["cuda"]
    assert report.cuda_window.fast == bool(built)


@pytest.mark.usefixtures("nothing_said")
def test_a_law_without_a_kernel_is_said_once(monkeypatch):
    monkeypatch.setitem(LAWS, "mine", Law(SIGNS))
    x = torch.zeros(30)
    with pytest.warns(pk.SlowWarning, match="no kernel implements the noise 'mine'") as said:
        pk.perturb_(x, 1, 1.0, noise="mine")
        pk.perturb_(x, 2, 1.0, noise="mine")
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", pk.SlowWarning)
        pk.reference.perturb_(x, 1, 1.0)  # whoever calls the reference knows
        pk.noise((3,), 1, 0, device="meta")


@pytest.fixture
def nothing_said(monkeypatch):
    monkeypatch.setattr(implementations, "_said", set())


WITHOUT = """
import sys, warnings

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton" or name == "pseuzo_kernels._C":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Missing())
import torch
import pseuzo_kernels as pk

report = pk.backends()
assert not report.cpu.fast and "PSEUZO_BUILD=cpu" in report.cpu.reason, report.cpu
assert not report.cuda.fast and "triton" in report.cuda.reason, report.cuda
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    for seed in range(3):
        pk.perturb_(torch.ones(3), seed, 1.0, streams=[0])
        pk.noise((3,), seed, 0)
        pk.EmaWindow(2).step(seed, None, torch.ones(2, 3), torch.ones(2, 3))
slow = [str(w.message) for w in said if w.category is pk.SlowWarning]
assert len(slow) == 1 and "add_noise_list_ runs in plain torch on cpu tensors" in slow[0], slow
"""


@pytest.mark.slow
def test_a_build_without_kernels_says_so_once():
    command = [sys.executable, "-c", WITHOUT]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
