"""How many tokens the rows of a run may have, and which prompts are cut."""

import sys
from typing import Any

import torch

from pseuzo.models.kinds import max_positions
from pseuzo.tasks import TaskData


def cut_prompts(data: TaskData, split: str) -> dict[str, float]:
    """Return data.fit of what is trained on or measured, and print a line on stderr if prompts lost
    their beginning."""
    fit = data.fit(data.train_on if split == "train" else None)
    if fit["cut_prompts"]:
        many = f"{fit['cut_prompts']} of {len(data)} prompts of the {split} split were too long"
        print(
            f"{many} for {data.max_length} tokens and lost their beginning",
            file=sys.stderr,
            flush=True,
        )
    return fit


def max_length(model: torch.nn.Module, wanted: int | None = None) -> int:
    """Return the largest number of tokens of a sequence: wanted, or at most 2048. ValueError if the
    model, without the positions of a learned prefix, has fewer than wanted."""
    adapter: Any = getattr(model, "active_peft_config", None)
    reserved = adapter.num_virtual_tokens if getattr(adapter, "is_prompt_learning", False) else 0
    positions = max_positions(model)
    most = positions - reserved if positions else None
    if wanted and most and wanted > most:
        raise ValueError(f"--max-length {wanted} is more than the model has positions for, {most}")
    return wanted or min(2048, most or 2048)
