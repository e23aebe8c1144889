"""DeepZero from the command line."""

import json

import pytest
from helpers import SMALL, pseuzo

pytestmark = pytest.mark.usefixtures("quick")
DEEPZERO = [*SMALL, *"--method deepzero --coordinates 3 --directions 2 --steps 3".split()]


@pytest.mark.slow
def test_deepzero_trains(tmp_path):
    out = tmp_path / "run"
    pseuzo("train", *DEEPZERO, "--keep", "last", "--eval-every", 0, "--output", out)
    results = json.loads((out / "results.json").read_text())
    assert (results["method"], results["forwards"], results["lr"]) == (
        "deepzero",
        3 * 4 + 2 * 2 + 1,
        1e-3,
    )
    assert results["skipped_steps"] == 0


@pytest.mark.parametrize(
    "given, why",
    [
        (
            ["--journal", "run.pzj"],
            "a journal replays sums of seeded noise, but deepzero moves single weights",
        ),
        (["--coordinates", 0], "0 is not in the range x>=1"),
    ],
)
def test_what_deepzero_refuses(given, why, tmp_path):
    said = pseuzo("train", *DEEPZERO, *given, "--output", tmp_path / "run", code=2)
    assert why in " ".join(said.replace("│", " ").split())
