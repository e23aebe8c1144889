"""The code on docs/extending.md runs unchanged, in the order of the page."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "extending.md"


@pytest.mark.slow
def test_the_code_of_the_page_runs_as_it_stands(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) >= 7
    (tmp_path / "page.py").write_text("\n\n".join(blocks))
    # The page is imported, so that the mode's function can be found by its name.
    command = [sys.executable, "-c", "import page"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    mean, variance, largest = map(float, re.findall(r"(-?\d+\.\d+)", done.stdout.split("\n")[0]))
    # With 100,000 values, the errors of the mean and the variance are both about 0.003.
    assert abs(mean) < 0.02 and abs(variance - 1) < 0.02 and largest < 1.733
    results = json.loads((tmp_path / "biases" / "results.json").read_text())
    assert (results["method"], results["mode"], results["steps"]) == ("normalized", "bias", 4)
    assert results["forwards"] == 4 * (1 + 1), "the default of the option is not one direction"
