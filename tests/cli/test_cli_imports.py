"""Ctrl-C works while libraries are imported, and the package imports only what is needed."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

HOOK = """
import os, sys
class AtAnImport:
    def find_spec(self, name, path=None, target=None):
        if name == os.environ.get("INTERRUPTED_AT"):
            del os.environ["INTERRUPTED_AT"]
            raise KeyboardInterrupt
sys.meta_path.insert(0, AtAnImport())
"""


MODULE, SCRIPT = ["-m", "pseuzo"], ["-c", "from pseuzo.__main__ import main; main()"]


@pytest.mark.parametrize(
    "start, module",
    [
        *(
            (MODULE, name)
            for name in (
                "click",
                "pseuzo.cli.commands",
                "yaml",
                "numpy",
                "torch",
                "transformers.trainer",
            )
        ),
        *((SCRIPT, name) for name in ("click", "pseuzo.cli.commands", "torch")),
    ],
    ids=lambda x: x if isinstance(x, str) else x[0],
)
def test_ctrl_c_during_the_imports(tmp_path, start, module):
    """At any time the command ends with 130 and one line. This also holds before the command line
    is imported, and if an import mistakes the interrupt for a missing module."""
    (tmp_path / "sitecustomize.py").write_text(HOOK)
    (tmp_path / "config.yaml").write_text("model: demo\n")
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, *start, "eval", "--config", tmp_path / "config.yaml", "--task", "demo"],
        env=os.environ | {"INTERRUPTED_AT": module, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    # The first part is what libraries print while they are imported.
    libraries, line = done.stderr.split("interrupted\n")
    assert (done.returncode, done.stdout, line) == (130, "", "") and "Traceback" not in libraries
    assert not libraries or module == "transformers.trainer"


def test_the_package_imports_what_is_asked_for():
    """It imports nothing else, since torch takes seconds."""
    code = """
import sys
import pseuzo, pseuzo.cli.commands
assert "torch" not in sys.modules and {"PseuZO", "perturbed"} <= set(dir(pseuzo))
from pseuzo import perturbed
assert perturbed.__name__ == "perturbed"
assert pseuzo.optim.MeZO is pseuzo.MeZO and "transformers" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
