"""The plan of offloaded models predicts the memory that a step takes."""

import importlib
from pathlib import Path

import pytest
import torch
from pseuzo import MeZO, device_bytes, offload
from pseuzo.perturb.regions import DeviceMemory
from transformers import OPTConfig, OPTForCausalLM

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def offload_plan(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("offload_plan")


def model_on(device: str) -> OPTForCausalLM:
    sizes = dict(vocab_size=1100, hidden_size=64, num_hidden_layers=4, num_attention_heads=4)
    config = OPTConfig(
        **sizes,
        ffn_dim=256,
        max_position_embeddings=64,
        word_embed_proj_dim=64,
        dropout=0.0,
        attn_implementation="eager",  # fused kernels take memory that depends on the device
    )
    with torch.device(device):
        return OPTForCausalLM(config).eval()


def test_the_memory_of_a_step_is_what_the_meta_device_predicts(offload_plan):
    rows, tokens = 4, 32
    predicted = offload_plan.activations(model_on("meta"), rows, tokens, passes=2)
    model, memory = model_on("cpu"), DeviceMemory(torch.device("cpu"))
    optimizer = MeZO(offload(model, "cpu", memory=memory))
    ids = torch.randint(3, 1100, (rows, tokens))

    def loss():
        return model.model(input_ids=ids, use_cache=False)[0].mean()

    optimizer.step(loss)
    live = offload_plan.Live()
    with live:
        optimizer.step(loss)
    numbers = 1024  # seeds, scales and losses
    assert predicted <= live.peak <= predicted + numbers
    assert memory.taken == device_bytes(model_on("meta"))


def test_a_plan_has_a_number_in_each_column(offload_plan, capsys, monkeypatch):
    monkeypatch.setattr(offload_plan, "update_rate", lambda terms: 1e9 / terms)
    monkeypatch.setattr("sys.argv", ["offload_plan.py", "--models", "opt-125m", "--cores", "4"])
    offload_plan.main()
    row = capsys.readouterr().out.splitlines()[-1].strip("| ").split(" | ")
    assert row[0] == "opt-125m" and len(row) == len(offload_plan.COLUMNS)
    host, buffers, _, upload, _, update, step, slow, slow_step = map(float, row[1:])
    assert host == pytest.approx(0.25, rel=0.01) and buffers < host
    assert upload == pytest.approx(host / 25, rel=0.01)
    assert update == pytest.approx(host / 2 / 4, rel=0.01) and slow > 13 * update
    assert step > update and slow_step > slow
