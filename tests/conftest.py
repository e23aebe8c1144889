"""Chooses Triton's interpreter, before triton is imported, and skips gpu tests if there is no GPU.

PSEUZO_EMULATE=90 pytest tests/kernels/test_triton_launches.py: without a GPU, the kernels are
compiled for compute capability 9.0, and their PTX is run on the CPU (ptx_emulator) in place of the
interpreter.
"""

import gc
import os
import signal

import pytest
import torch

pytest.register_assert_rewrite("helpers")
# Tests send SIGINT to themselves and to what they start, and a process that a shell runs in the
# background ignores it.
signal.signal(signal.SIGINT, signal.default_int_handler)
if "PYTEST_XDIST_WORKER" in os.environ:
    # There are as many processes as cores, so each of them, and what it starts, has one thread
    # unless PSEUZO_TEST_THREADS says otherwise.
    os.environ["OMP_NUM_THREADS"] = os.environ.get("PSEUZO_TEST_THREADS", "1")
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
if arch := os.environ.get("PSEUZO_EMULATE"):
    import ptx_emulator

    os.environ.pop("TRITON_INTERPRET", None)
    ptx_emulator.install(int(arch))
elif not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


def pytest_runtest_logfinish():
    """End a process in which a CUDA error occurred, since all its further calls would fail.
    pytest-xdist counts that against the test that just ran, and starts another process."""
    if "PYTEST_XDIST_WORKER" in os.environ and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(1)


def pytest_collection_finish():
    # Trainers and searches for a rate collect garbage. They need not scan modules that are already
    # imported.
    gc.freeze()


def pytest_sessionfinish():
    gc.unfreeze()


@pytest.fixture
def tapes(monkeypatch):
    """Return the tapes that replace CUDA graphs, in the order in which they were recorded."""
    from tape import record_on_tapes

    return record_on_tapes(monkeypatch)
