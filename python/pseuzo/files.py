"""Writing results so that a crash leaves the old or the new, never half."""

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
