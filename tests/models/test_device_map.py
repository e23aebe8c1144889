"""Models that accelerate has placed by a device_map: on several devices they train as on one, to
the bit; weights that it left on the host or the disk are refused."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from pseuzo import MeZO, PseuZO, offload, perturbed
from pseuzo.models.modes import tune
from tiny_models import batch_of, causal_lm

accelerate = pytest.importorskip("accelerate")
SCRIPT = Path(__file__).with_name("on_two_devices.py")


@pytest.mark.slow
def test_two_devices_give_the_bits_of_one(tmp_path):
    """The weights of two steps, by every method and in every mode, and those of the Trainer and of
    a replay."""
    file = tmp_path / "found.json"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, SCRIPT, file]
    subprocess.run(command, env=environment, check=True, timeout=600, capture_output=True)
    found = json.loads(file.read_text())
    # A derivative on the devices has zeros where one on the CPU has nothing: a few roundings of
    # weights below 1.
    assert found.pop("forward-gradient") < 1e-5
    assert len(found) > 15 and {case: what for case, what in found.items() if what != 0} == {}


def offloaded(where: str):
    """A model whose second layer is on the host or the disk until a forward needs it."""
    model = causal_lm("llama").eval()
    if where == "cpu":
        return accelerate.cpu_offload(model, "cpu")
    names = ("embed_tokens", "rotary_emb", "layers.0", "norm")
    places = {f"model.{name}": "cpu" for name in names} | {"lm_head": "cpu"}
    return accelerate.dispatch_model(
        model,
        places | {"model.layers.1": "disk"},
        main_device="cpu",
        offload_dir=tempfile.mkdtemp(dir=where),
    )


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_weights_that_accelerate_has_offloaded_are_refused(tmp_path, where):
    model = offloaded("cpu" if where == "cpu" else str(tmp_path))
    want = causal_lm("llama").eval()(**batch_of()).logits
    assert torch.equal(model(**batch_of()).logits, want)
    refused = r"\d+ weights are on the meta device, where accelerate leaves .* call pseuzo\.offload"
    for make in (MeZO, PseuZO):
        with pytest.raises(ValueError, match=refused):
            make(model)
        with pytest.raises(ValueError, match=refused):
            make(model.parameters())
    for mode in ("full", "lora", "scales", "head"):
        with pytest.raises(ValueError, match=f"tune: {refused}"):
            tune(model, mode)
    with pytest.raises(ValueError, match=f"perturbed: {refused}"):
        with perturbed(model, 1, 1e-3):
            pass
    with pytest.raises(ValueError, match="offload: a weight is on meta; load the model on the CPU"):
        offload(model, "cpu")
    assert torch.equal(model(**batch_of()).logits, want)
