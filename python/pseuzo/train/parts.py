"""Cuts a batch into parts of whole examples."""

from typing import Any

import torch
from torch import Tensor

# In a batch with options, these tensors have a row for each example, and others for each option.
OF_EXAMPLES = ("rows", "answers", "option_rows")


def rows_in(batch: dict[str, Any]) -> int:
    """How many rows of a batch the model gets."""
    tensors = (batch.get("input_ids"), *batch.values())
    return next(len(x) for x in tensors if isinstance(x, Tensor) and x.dim())


def examples_in(batch: dict[str, Any]) -> int:
    """How many examples a batch has. Its rows are examples, or the options of examples."""
    return len(batch["answers"]) if "examples" in batch else rows_in(batch)


def cut(batch: dict[str, Any], parts: int) -> list[dict[str, Any]]:
    """Cut a batch into `parts` batches of whole examples, whose numbers differ by one at most.

    All keep the padding of the batch. Where its rows are options of examples, this waits for the
    device, to see which rows belong to which example. ValueError if there are fewer examples than
    parts, or if a tensor has another number of rows than the model gets.
    """
    n = examples_in(batch)
    if n < parts:
        raise ValueError(
            f"split_batch needs an example for each of the {parts} directions, and this batch has "
            f"{n}: give a larger batch, or fewer directions"
        )
    return [_examples(batch, n, *_span(n, i, parts)) for i in range(parts)]


def part_of(batch: dict[str, Any], part: int, parts: int) -> tuple[dict[str, Any], bool]:
    """Return one of the parts that cut gives, and whether it has examples.

    Where there are fewer examples than parts, some parts have none: they get the last example of
    the batch, for something to run on. Padding stays, as it is what the same rows have in one
    process.
    """
    n = examples_in(batch)
    first, end = _span(n, part, parts)
    if first < end:
        return _examples(batch, n, first, end), True
    return _examples(batch, n, n - 1, n), False


def _span(n: int, part: int, parts: int) -> tuple[int, int]:
    return n * part // parts, n * (part + 1) // parts


def _examples(batch: dict[str, Any], n: int, first: int, end: int) -> dict[str, Any]:
    if "examples" in batch:
        return _options(batch, first, end)
    return {k: _rows(k, x, slice(first, end), n) for k, x in batch.items()}


def _rows(name: str, x: Any, rows: Any, n: int) -> Any:
    if not isinstance(x, Tensor) or not x.dim():
        return x
    if len(x) != n:
        raise ValueError(f"a batch is cut by its {n} rows, but {name} has shape {tuple(x.shape)}")
    return x[rows]


def _options(batch: dict[str, Any], first: int, end: int) -> dict[str, Any]:
    """The examples first .. end - 1, with the rows of all their options."""
    of_examples = {k: batch[k][first:end] for k in OF_EXAMPLES if k in batch}
    rows = (batch["examples"] >= first) & (batch["examples"] < end)
    numbers = rows.cumsum(0) - 1  # row of the batch -> row of the part
    others = {k: x for k, x in batch.items() if k not in of_examples}
    part = {k: _rows(k, x, rows, len(rows)) for k, x in others.items()} | of_examples
    part["examples"] = part["examples"] - first
    part["answers"] = numbers[part["answers"]]
    if "option_rows" in part:
        given = part["option_rows"]
        part["option_rows"] = torch.where(given < 0, given, numbers[given.clamp(min=0)])
    return part
