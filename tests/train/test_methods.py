"""A new method is an estimator and a row of METHODS, and everything else derives from the row."""

import json
import subprocess
import sys
from dataclasses import fields

import pytest
from helpers import SMALL
from pseuzo.models.modes import MODES
from pseuzo.train.methods import METHODS, ZEROTH_ORDER, default_rate, forwards_per_step
from pseuzo.train.options import OPTIONS, ZeroOrderOptions

# This is the file of the estimator, its builder and its row, as in a source tree.
NEW = """
import json
import sys
from dataclasses import replace

from pseuzo.train import builders, methods


def build(setup):
    from pseuzo.optim.base import ZeroOrder
    from pseuzo.optim.mezo import mean_direction, measure_slopes

    class SignMeZO(ZeroOrder):
        def measure(self, closure):
            return measure_slopes(self, (closure,), closure)

        def coefficients(self, measured):
            direction = mean_direction(self, measured)
            return replace(direction, coefs=direction.coefs.sign())

    return SignMeZO(setup.groups, **builders.zeroth_order_options(setup))


methods.METHODS["mezo-sign"] = methods.Method(
    help="MeZO with the sign of its projected gradient.",
    build=build,
    passes=lambda **options: 2,
    options=methods.PERTURBING,
)
methods.ZEROTH_ORDER += ("mezo-sign",)
from click.testing import CliRunner
from pseuzo.cli.commands import main

for command in json.loads(sys.argv[1]):
    result = CliRunner().invoke(main, command)
    print(json.dumps([result.exit_code, result.output]))
"""


def with_new(*commands):
    """Return the exit code and the output of each command of a package that has the new method.

    The commands share a new process, since the command line reads METHODS when it is imported.
    """
    commands = json.dumps([[str(arg) for arg in command] for command in commands])
    done = subprocess.run([sys.executable, "-c", NEW, commands], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_row_is_complete():
    names = {f.name for f in fields(ZeroOrderOptions)}
    for name, method in METHODS.items():
        assert set(method.options) <= names and method.help.endswith(".")
        assert all(default_rate(name, mode) > 0 for mode in MODES)
        assert method.zeroth_order == (name in ZEROTH_ORDER) == ("noise" in method.options)
    assert OPTIONS["method"].choices == tuple(METHODS)


@pytest.mark.parametrize("method, directions, two_sided, want", [
    ("pseuzo", 1, None, 2), ("pseuzo", 1, True, 3), ("mezo", 1, None, 2), ("mezo", 3, None, 6),
    ("mezo", 3, False, 4), ("mezo-momentum", 2, True, 4), ("fo-sgd", 1, None, 3),
    ("fo-adam", 1, None, 3),
])  # fmt: skip
def test_forwards_per_step(method, directions, two_sided, want):
    options = {"directions": directions, "two_sided": two_sided}
    assert forwards_per_step(method, options) == want


@pytest.mark.slow
def test_a_new_method_trains_resumes_and_replays(tmp_path):
    out, journal = tmp_path / "run", tmp_path / "run.pzj"
    train = ["train", *SMALL, *"--method mezo-sign --lr 1e-4 --eps 1e-3 --steps 4".split()]
    train += ["--keep", "last", "--save-every", 2, "--journal", journal, "--output", out]
    trained, replayed, listed, refused = with_new(
        train,
        ["replay", "--base", "demo", "--journal", journal, "--output", tmp_path / "m"],
        ["train", "--help"],
        ["train", *SMALL, "--method", "mezo-sign", "--window", 3, "--output", out],
    )
    assert trained[0] == 0, trained[1]
    results = json.loads((out / "results.json").read_text())
    assert results["method"] == "mezo-sign" and results["forwards"] == 8
    assert results["eps"] == 1e-3 and results["lr"] == 1e-4
    assert replayed[0] == 0, replayed[1]
    weights = (out / "model" / "model.safetensors").read_bytes()
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == weights
    assert "mezo-sign" in listed[1]
    assert refused[0] == 2
    assert "--window is for pseuzo, mezo-momentum and zo-adam, not for mezo-sign" in refused[1]
