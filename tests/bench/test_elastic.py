"""Ranks that are killed are started again, and the run ends as if nothing had happened."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ELASTIC = Path(__file__).parents[2] / "bench" / "elastic.py"


def test_a_run_whose_ranks_are_killed(tmp_path):
    """Real processes, by torchrun's agent: two ranks, one of which dies twice."""
    options = "--only kills --ranks 2 --steps 20 --kills 2 --jitter 0 --seed 3".split()
    command = [sys.executable, str(ELASTIC), *options, "--folder", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    kills = done.stdout.splitlines()[-1].split()
    assert kills[0] == "kills" and kills[-5:-1] == ["3", "yes", "yes", "yes"]
    assert not list(tmp_path.iterdir())
