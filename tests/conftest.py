"""Before triton is imported: its interpreter where there is no GPU. gpu tests are skipped there, with the reason."""

import gc
import os

import pytest
import torch

pytest.register_assert_rewrite("helpers")
if "PYTEST_XDIST_WORKER" in os.environ:
    # There are as many processes as cores, so each has one thread, and so has what it starts, unless told otherwise.
    os.environ["OMP_NUM_THREADS"] = os.environ.get("PSEUZO_TEST_THREADS", "1")
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


def pytest_collection_finish():
    gc.freeze()  # what was imported by now: trainers and searches for lr collect garbage, and need not look there


def pytest_sessionfinish():
    gc.unfreeze()
