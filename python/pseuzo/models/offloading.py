"""Whether a model can be offloaded, found out before its weights are loaded."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pseuzo.machine import available_memory
from pseuzo.models.kinds import auto_class
from pseuzo.perturb.regions import find_layers


def check_before_loading(name: str, dtype: torch.dtype, kind: str = "auto") -> None:
    """Raise ValueError if the host has too little memory for the weights of a model, or if the
    layers of the model cannot be found.

    name: of a folder, or on the hub. What is wrong with the model itself, loading it will tell.
    """
    model = skeleton(name, dtype, kind)
    if model is None:
        return
    find_layers(model)
    needed = sum(p.numel() * p.element_size() for p in model.parameters())
    available = available_memory()
    if available is not None and needed > available:
        raise ValueError(
            f"offload: the weights of {name} take {needed / 2**30:.1f} GiB of host memory, and "
            f"{available / 2**30:.1f} GiB are available; load it in bf16 or fp16 if it is not, or "
            "use a machine with more memory"
        )


def skeleton(name: str, dtype: torch.dtype, kind: str = "auto") -> nn.Module | None:
    """The model of a config, or the base of an adapter's, on the meta device: with shapes, and
    without numbers. None if it cannot be made, or if it is quantised, so that its shapes are not
    those of its config."""
    from transformers import AutoConfig

    adapter = Path(name).expanduser() / "adapter_config.json"
    try:
        if adapter.is_file():
            name = json.loads(adapter.read_text())["base_model_name_or_path"]
        config: Any = AutoConfig.from_pretrained(name, trust_remote_code=False)
        if getattr(config, "quantization_config", None) is not None:
            return None
        with torch.device("meta"):
            return auto_class(name, config, kind).from_config(config, dtype=dtype)
    except Exception:  # a config may be wrong in any way; load_model says in which one
        return None
