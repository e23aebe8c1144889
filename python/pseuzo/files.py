"""Writing results so that a crash leaves the old or the new, never half."""

import os
import tempfile
from pathlib import Path

from torch import nn
from transformers import AutoTokenizer


def write_atomically(path: Path, text: str) -> None:
    """Either the old file or the whole new one is there, whenever it is looked at."""
    scratch = path.with_name(path.name + ".new")
    scratch.write_text(text)
    os.replace(scratch, path)


def save_model(model: nn.Module, tokenizer_folder: Path, target: Path) -> None:
    """A folder that Transformers loads: safetensors, config, and another folder's tokenizer if it has one.

    Complete or not there.
    """
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        new = Path(scratch) / "new"
        model.save_pretrained(new)
        if any(Path(tokenizer_folder).glob("tokenizer*")):
            AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(new)
        if target.exists():
            target.rename(Path(scratch) / "old")
        new.rename(target)
