"""The place of this process among those that torchrun or accelerate launched, as they say it in the
environment. This module does not import torch."""

import os


def launched() -> int:
    """Return how many processes were launched together; 1 without a launcher."""
    return max(1, _number("WORLD_SIZE", 1)) if "LOCAL_RANK" in os.environ else 1


def rank() -> int:
    """Return the rank of this process; 0 without a launcher."""
    return _number("RANK", 0) if launched() > 1 else 0


def is_first_of_machine() -> bool:
    """Return whether this is the first of the processes on its machine."""
    return launched() == 1 or _number("LOCAL_RANK", 0) == 0


def refuse_launched(what: str) -> None:
    """Raise ValueError if several processes were launched."""
    if launched() > 1:
        raise ValueError(
            f"{what} runs in one process, but {launched()} were launched: only pseuzo train runs "
            "under torchrun or accelerate; start it without them"
        )


def _number(name: str, usual: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else usual
