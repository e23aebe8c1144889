"""Checks of PseuZOTrainer's arguments, made before the model is prepared."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from pseuzo.models.split import head_parameters
from pseuzo.tasks import TaskData
from pseuzo.train.arguments import PseuZOTrainingArguments

NOT_TAKEN = {  # arguments of Transformers' Trainer, and what to do instead
    "model_init": "make the model and give it as model",
    "compute_loss_func": "give objective, a callable batch -> (forward, head)",
    "optimizer_cls_and_kwargs": (
        "the optimizer is that of args.method, or give optimizers=(optimizer, None)"
    ),
}
WITH_TASK_DATA = {  # the only values that these may have when the data is a TaskData
    "compute_metrics": None,
    "preprocess_logits_for_metrics": None,
    "remove_unused_columns": False,
    "train_sampling_strategy": "random",
}


def check_arguments(args: Any, given: Mapping[str, Any]) -> None:
    """Raise for arguments that the trainer does not support. given: its further arguments."""
    if not isinstance(args, PseuZOTrainingArguments):
        raise TypeError(
            f"PseuZOTrainer: args must be PseuZOTrainingArguments, got {type(args).__name__}"
        )
    for name, instead in NOT_TAKEN.items():
        if given.get(name) is not None:
            raise ValueError(f"PseuZOTrainer: {name} is not supported; {instead}")


def task_data(train_dataset: Any, eval_dataset: Any) -> TaskData | None:
    """Return the TaskData among the data sets, or None. ValueError if only some are TaskData."""
    some = eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset]
    given = [d for d in (train_dataset, *some) if d is not None]
    data = next((d for d in given if isinstance(d, TaskData)), None)
    if data is not None and not all(isinstance(d, TaskData) for d in given):
        raise ValueError(
            "PseuZOTrainer: train_dataset and eval_dataset must both be TaskData, or neither"
        )
    return data


def check_task_data(args: PseuZOTrainingArguments, given: Mapping[str, Any]) -> None:
    """Raise ValueError for arguments that have no effect with a TaskData."""
    for name, only in WITH_TASK_DATA.items():
        if (given.get(name) if only is None else getattr(args, name)) != only:
            raise ValueError(
                f"PseuZOTrainer: {name} has no effect with a TaskData, which makes its own batches "
                "and is evaluated by its task's metric"
            )


def check_not_empty(train_dataset: Any) -> None:
    if train_dataset is None or not hasattr(train_dataset, "__len__"):
        return
    if len(train_dataset) == 0:
        raise ValueError("PseuZOTrainer: train_dataset is empty")


def check_parts(args: PseuZOTrainingArguments, train_dataset: Any) -> None:
    """Raise ValueError if the last batch of an epoch cannot be split."""
    if not args.split_batch or not hasattr(train_dataset, "__len__") or args.dataloader_drop_last:
        return
    n, q = len(train_dataset), args.directions or 1
    last = n % args.global_batch_size
    if 0 < last < q:
        raise ValueError(
            f"split_batch needs an example for each of the {q} directions, and the last batch of "
            f"the {n} has {last}: choose a batch size that divides {n}, or fewer directions"
        )


@contextmanager
def head_alone(model: Any) -> Iterator[None]:
    """Let Transformers train the output head of a quantised model, if nothing else is trained.

    Transformers allows only adapters on such a model, although its head is not quantised.
    """
    trained = set()
    if getattr(model, "is_quantized", False):
        trained = {p for p in model.parameters() if p.requires_grad}
    if not trained or not trained <= set(head_parameters(model)):
        yield
        return
    model.is_quantized = False
    try:
        yield
    finally:
        model.is_quantized = True
