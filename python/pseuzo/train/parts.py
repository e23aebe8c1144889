"""A batch cut into parts of whole examples."""

from typing import Any

import torch
from torch import Tensor

# Tensors of a batch with options that have an example, not an option, a row.
OF_EXAMPLES = ("rows", "answers", "option_rows")


def rows_in(batch: dict[str, Any]) -> int:
    """How many rows the model gets."""
    tensors = (batch.get("input_ids"), *batch.values())
    return next(len(x) for x in tensors if isinstance(x, Tensor) and x.dim())


def examples_in(batch: dict[str, Any]) -> int:
    """How many examples a batch has: its rows, or those whose options they are."""
    return len(batch["answers"]) if "examples" in batch else rows_in(batch)


def cut(batch: dict[str, Any], parts: int) -> list[dict[str, Any]]:
    """The batch in `parts` batches of whole examples, whose numbers differ by one at most.

    All are padded as the batch is. Where its rows are options of examples, this waits for the
    device to know which they are. ValueError for fewer examples than parts, or for a tensor that
    has not a row for each of the model's.
    """
    n = examples_in(batch)
    if n < parts:
        raise ValueError(
            f"split_batch needs an example for each of the {parts} directions, and this batch has "
            f"{n}: give a larger batch, or fewer directions"
        )
    spans = [(n * i // parts, n * (i + 1) // parts) for i in range(parts)]
    if "examples" in batch:
        return [_options(batch, first, end) for first, end in spans]
    return [{k: _rows(k, x, slice(*span), n) for k, x in batch.items()} for span in spans]


def _rows(name: str, x: Any, rows: Any, n: int) -> Any:
    if not isinstance(x, Tensor) or not x.dim():
        return x
    if len(x) != n:
        raise ValueError(
            f"split_batch cuts a batch by its rows, {n}, and {name} has shape {tuple(x.shape)}"
        )
    return x[rows]


def _options(batch: dict[str, Any], first: int, end: int) -> dict[str, Any]:
    """The examples first .. end - 1, with the rows of all their options."""
    of_examples = {k: batch[k][first:end] for k in OF_EXAMPLES if k in batch}
    rows = (batch["examples"] >= first) & (batch["examples"] < end)
    numbers = rows.cumsum(0) - 1  # of the rows in the part
    others = {k: x for k, x in batch.items() if k not in of_examples}
    part = {k: _rows(k, x, rows, len(rows)) for k, x in others.items()} | of_examples
    part["examples"] = part["examples"] - first
    part["answers"] = numbers[part["answers"]]
    if "option_rows" in part:
        given = part["option_rows"]
        part["option_rows"] = torch.where(given < 0, given, numbers[given.clamp(min=0)])
    return part
