"""pseuzo_kernels needs torch alone, and imports nothing of pseuzo."""

import subprocess
import sys

import pytest

ALONE = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top in ("triton", "numpy", "pseuzo") or name == "pseuzo_kernels._C":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Missing())
import torch
import pseuzo_kernels as pk

assert pk._C is None and pk.ops.launch is None
x, want = torch.ones(300), torch.ones(300)
pk.perturb_(x, 1, 0.5)
pk.reference.perturb_(want, 1, 0.5)
assert torch.equal(x, want) and not (x == 1).all()
repeated = pk.ops.RepeatedPerturb(
    [x], torch.tensor([1]), torch.tensor([0.5]), [0], [1.0], "hadamard", [want]
)
repeated()
assert not torch.equal(x, want)
window = pk.EmaWindow(2, eps=1.0)
assert window.step(7, None, torch.ones(2, 3), torch.ones(2, 3))[1].tolist() == [6.0]
with pk.ops.tables_of_a_graph() as tables:
    assert tables == {}
from pseuzo_kernels.adapters import SeededWeights, mezo

SeededWeights([("x", x)]).update([1, 2], [0.5, 0.25], lr=0.1)
assert not {"numpy", "triton", "pseuzo"} & set(sys.modules)
"""


@pytest.mark.slow
def test_torch_is_enough():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ALONE], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
