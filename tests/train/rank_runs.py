"""Runs of the trainer that the tests of several ranks make, in one process or on each rank."""

import contextlib
import hashlib
import io
import os
from pathlib import Path

import rank_commands
import torch
from pseuzo.cli.run import max_length, model_path
from pseuzo.models.loading import load_model
from pseuzo.tasks import TaskData, load_task
from pseuzo.train.trainer import PseuZOTrainer
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from trainer_cases import arguments

ROWS = {"dev": 20, "test": 16}


def launched_as(rank: int) -> None:
    """Say in the environment what torchrun would say."""
    os.environ.update(rank_commands.launched_as(rank, distributed.get_world_size()))


def demo_data(seed: int = 0, train: int = 48) -> tuple[torch.nn.Module, dict[str, TaskData]]:
    task = load_task("demo")
    examples = task.load(None, train=train, **ROWS, seed=seed)
    model, tokenizer = load_model(model_path("demo"))
    return model, {
        k: TaskData(e, task, tokenizer, max_length=max_length(model)) for k, e in examples.items()
    }


def bits(model: torch.nn.Module) -> str:
    hashed = hashlib.sha256()
    for p in model.parameters():
        hashed.update(p.detach().numpy().tobytes())
    return hashed.hexdigest()


def train(folder: Path, resume=None, model=None, data=None, rows=48, **settings) -> dict:
    """Train as the settings say, and return what may be compared."""
    own, own_data = demo_data(train=rows)
    model, data = model or own, data or own_data
    args = arguments(folder, **settings)
    trainer = PseuZOTrainer(model, args, train_dataset=data["train"], eval_dataset=data["dev"])
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        trainer.train(resume_from_checkpoint=resume)
    history = trainer.state.log_history
    losses = [row["loss"] for row in history if "loss" in row]
    return {
        "bits": bits(model),
        "weights": [p.detach().numpy() for p in model.parameters()],
        "losses": losses,
        "metrics": [
            (row["eval_accuracy"], row["eval_loss"]) for row in history if "eval_loss" in row
        ],
        "network": [row.get("network_bytes") for row in history if "loss" in row],
        "flos": trainer.state.total_flos,
        "gradients": sum(p.grad is not None for p in model.parameters()),
        "wrapped": isinstance(trainer.model_wrapped, DistributedDataParallel),
        "printed": printed.getvalue(),
    }


def run(rank: int, cases: dict[str, dict]) -> dict[str, dict]:
    """Make several runs, and return what train returns of each."""
    launched_as(rank)
    return {name: train(**case) for name, case in cases.items()}


def run_with_other_data(rank: int, folder: Path) -> str:
    """Train with another data set on rank 1, and return the error."""
    launched_as(rank)
    model, data = demo_data(seed=rank)
    try:
        train(folder, model=model, data=data, method="mezo", max_steps=1)
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}"
    return ""
