"""Whether a model can be offloaded, found out before its weights are loaded."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pseuzo.machine import available_memory
from pseuzo.models.kinds import auto_class
from pseuzo.perturb.mapped import saved_weights
from pseuzo.perturb.regions import find_layers


def check_before_loading(
    name: str, dtype: torch.dtype, kind: str = "auto", few: bool = False
) -> None:
    """Raise ValueError if the host has too little memory for the weights of a model, or if the
    layers of the model cannot be found.

    name: of a folder, or on the hub. few: only few weights are trained; then those that a folder
    has in this dtype stay in its files, and take no memory. What is wrong with the model itself,
    loading it will tell.
    """
    model = skeleton(name, dtype, kind)
    if model is None:
        return
    find_layers(model)
    needed, other = sum(p.nbytes for p in model.parameters()), "bf16 or fp16 if it is not"
    if few and (saved := saved_weights(base_name(name))):
        copied = (math.prod(x.shape) for x in saved.values() if x.dtype is not dtype)
        needed, other = sum(copied) * dtype.itemsize, "the dtype of its files"
    available = available_memory()
    if available is not None and needed > available:
        raise ValueError(
            f"offload: the weights of {name} take {needed / 2**30:.1f} GiB of host memory, and "
            f"{available / 2**30:.1f} GiB are available; load it in {other}, or use a machine with "
            "more memory"
        )


def base_name(name: str) -> str:
    """The model that an adapter's folder is for; another name as it is."""
    adapter = Path(name).expanduser() / "adapter_config.json"
    if adapter.is_file():
        return json.loads(adapter.read_text())["base_model_name_or_path"]
    return name


def skeleton(name: str, dtype: torch.dtype, kind: str = "auto") -> nn.Module | None:
    """The model of a config, or the base of an adapter's, on the meta device: with shapes, and
    without numbers. None if it cannot be made, or if it is quantised, so that its shapes are not
    those of its config."""
    from transformers import AutoConfig

    try:
        name = base_name(name)
        config: Any = AutoConfig.from_pretrained(name, trust_remote_code=False)
        if getattr(config, "quantization_config", None) is not None:
            return None
        with torch.device("meta"):
            return auto_class(name, config, kind).from_config(config, dtype=dtype)
    except Exception:  # a config may be wrong in any way; load_model says in which one
        return None
