"""The results of a run, as results.json has them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from pseuzo.machine import hardware
from pseuzo.train.methods import methods_with
from pseuzo.train.trainer import PseuZOTrainer

if TYPE_CHECKING:
    from pseuzo.cli.run import Run


def results_of(
    run: Run, trainer: PseuZOTrainer, steps: int, test: dict[str, float], peak: float
) -> dict[str, Any]:
    c, history, optimizer = run.c, trainer.state.log_history, trainer.zero_order
    assert trainer.optimizer is not None, "it was made before the first step"
    seconds = [row["train_seconds"] for row in history if "train_seconds" in row]
    return {
        "task": run.task.name,
        "metric": run.task.metric,
        "model": c["model"],
        "method": c["method"],
        "mode": c["mode"],
        "test": test,
        "steps": steps,
        "forwards": trainer.forwards(steps),
        "search_forwards": trainer.search_forwards,
        "train_seconds": seconds[-1] if seconds else None,
        "lr": trainer.optimizer.defaults["lr"],
        "eps": optimizer.eps if optimizer and c["method"] in methods_with("eps") else None,
        "cut_prompts": run.cut,
        "best_step": trainer.kept_step,
        "seed": c["seed"],
        "peak_memory_mib": peak,
        "hardware": hardware(c["device"]),
        "ranks": run.together.size,
        "torch": torch.__version__,
        "skipped_steps": optimizer.skipped_steps if optimizer else 0,
        "history": history,
    }
