"""`pseuzo train` in several processes: how they find each other, and what they check together.

torchrun or accelerate launches them, and says in the environment who is who (pseuzo.launch).
pseuzo.meeting makes the process group, which Transformers and accelerate then find.
"""

from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import distributed

import pseuzo_kernels
from pseuzo.launch import launched, rank
from pseuzo.meeting import join_group
from pseuzo.optim.ranks import present_ranks
from pseuzo.optim.together import Together, one_speaks
from pseuzo.sentences import first_line

# Settings that may differ among machines, as paths do. Weights and rows are compared themselves.
OWN = {"model", "task", "data", "output", "journal", "resume", "device", "quiet"}


def row_parts(c: dict[str, Any]) -> int:
    """Return into how many parts the ranks divide a batch."""
    return launched() // c["direction_ranks"]


def join(device: str | None, seconds: int, direction_ranks: int) -> Together:
    """Make the process group of the launched processes. seconds: how long one waits for another."""
    if launched() == 1:
        return Together()
    from accelerate import PartialState

    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    with one_speaks(rank() == 0):
        try:
            join_group(name == "cpu", seconds)
            PartialState(cpu=name == "cpu", timeout=timedelta(seconds=seconds))
        except RuntimeError as error:
            raise ValueError(
                f"the {launched()} launched processes did not find each other: {first_line(error)}"
            ) from error
    ranks = present_ranks("pseuzo train", direction_ranks)
    if ranks is None:
        raise ValueError(
            f"{launched()} processes were launched, but accelerate made no process group for "
            f"--device {name}"
        )
    return Together(ranks)


def leave(together: Together) -> None:
    """Leave the process group at the end of a run."""
    if together.ranks is not None:
        distributed.destroy_process_group()


def facts(c: dict[str, Any]) -> dict[str, Any]:
    """Return what must be the same for all ranks before any of them loads a model."""
    versions = {"pseuzo": pseuzo_kernels.__version__, "transformers": transformers.__version__}
    versions["torch"] = torch.__version__.partition("+")[0]  # it may be built for another device
    return versions | {name: value for name, value in c.items() if name not in OWN}


def changes(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that differ."""
    return {name: value for name, value in after.items() if value != before.get(name)}


def check_shared(output: Path, rank: int) -> None:
    """Raise ValueError if rank 0 made the folder of the run on a disk that this rank cannot see."""
    if not output.is_dir():
        raise ValueError(
            f"rank {rank} does not see the folder {output} that rank 0 made: --output must be on a "
            "disk that all machines share"
        )
