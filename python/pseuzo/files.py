"""Writing results so that a crash leaves the old or the new, never half."""

import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoTokenizer


def write_atomically(path: Path, text: str) -> None:
    """Either the old file or the whole new one is there, whenever it is looked at."""
    scratch = path.with_name(path.name + ".new")
    scratch.write_text(text)
    os.replace(scratch, path)


def write_json(path: Path, value: Any) -> None:
    """As write_atomically; numbers that are not finite become null, which JSON has no other word for."""
    write_atomically(path, json.dumps(_finite(value), indent=1, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: Path, *keys: str) -> dict[str, Any]:
    """A JSON object with these keys. ValueError if the file is none."""
    try:
        value = json.loads(path.read_text())
        for key in keys:
            value[key]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} cannot be used ({type(error).__name__}: {error}); delete it, or choose another folder"
        ) from None
    return value


def save_model(model: nn.Module, tokenizer: Any, target: Path) -> None:
    """A folder that Transformers (or peft, for an adapter) loads: safetensors, config, tokenizer.

    tokenizer: one, or the folder of a model that may have one. Complete or not there.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        new = Path(scratch) / "new"
        model.save_pretrained(new)
        if isinstance(tokenizer, str | Path):
            found = any(Path(tokenizer).glob("tokenizer*"))
            tokenizer = AutoTokenizer.from_pretrained(tokenizer) if found else None
        if tokenizer is not None:
            tokenizer.save_pretrained(new)
        if target.exists():
            target.rename(Path(scratch) / "old")
        new.rename(target)
