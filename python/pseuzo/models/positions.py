"""Finds the loss of a batch: at which positions, in which rows, and how padding moves them.

A *plan* is a batch as the objective uses it: the inputs of the model, with `positions` and
`targets` [R, P] of the loss and, for a choice between options, `option_rows` and `answers`.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORED = -100  # a label that has no loss, as everywhere in Transformers
# The entries of a batch for the objective and the optimizer. The model gets the rest.
NOT_INPUTS = frozenset(
    ("labels", "answers", "examples", "groups", "rows", "option_rows", "positions", "targets")
)


def predicted(labels: Tensor, mask: Tensor | None) -> Tensor:
    """Return labels [R, T] with -100 at tokens that follow padding.

    Such a token is the first of its text, and nothing predicts it: the output of a model for the
    padding before it is arbitrary, and differs between attention backends.
    """
    if mask is None:
        return labels
    return labels.masked_fill(F.pad(mask[:, :-1], (1, 0), value=1) == 0, IGNORED)


def loss_positions(labels: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return positions, targets [R, P]: where the next token has a loss, and that token.

    Both are aligned to the right, with positions -1 and targets -100 if a row has fewer than P,
    which is at least 1. mask [R, T] is 0 at padding, which gets no position. This waits for the
    device of labels [R, T].
    """
    shifted = F.pad(predicted(labels, mask)[:, 1:], (0, int(labels.shape[1] < 2)), value=IGNORED)
    carries = shifted != IGNORED
    count = max(int(carries.sum(1).max()), 1)
    # A stable sort puts the positions with a loss last and keeps their order.
    order = torch.argsort(carries.to(torch.int8), dim=1, stable=True)[:, -count:]
    there = carries.gather(1, order)
    return torch.where(there, order, -1), torch.where(there, shifted.gather(1, order), IGNORED)


def last_positions(inputs: Mapping[str, Tensor]) -> Tensor:
    """Return [R, 1]: the last position with attention in each row, whichever side is padded."""
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask")
    if mask is None:
        return torch.full((ids.shape[0], 1), ids.shape[1] - 1, device=ids.device)
    places = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    return (places * (mask != 0)).argmax(1, keepdim=True)


def rows_of_options(examples: Tensor, n: int) -> Tensor:
    """Return [n, most options]: the rows of the options of n examples, -1 if one has fewer.

    examples [R] holds for each row the example that it is an option of. This waits for their
    device.
    """
    counts = torch.bincount(examples, minlength=n)
    if len(counts) > n or int(counts.min()) < 1:
        raise ValueError(
            f"CausalLMObjective: examples must give each of the {n} examples (one an answer) a "
            f"row, got {examples.tolist()}"
        )
    order = torch.argsort(examples, stable=True)
    owners = examples[order]
    place = torch.arange(len(owners), device=owners.device) - (counts.cumsum(0) - counts)[owners]
    rows = torch.full((n, int(counts.max())), -1, device=owners.device)
    rows[owners, place] = order
    return rows


def with_positions(collate: Callable[[Any], dict[str, Any]]) -> Callable[[Any], dict[str, Any]]:
    """Return a collator whose batches also have `positions` and `targets` (see loss_positions).

    They have labels only for tokens that are predicted (see predicted), and no attention_mask if
    there is no padding. All this is computed on the CPU, so that CausalLMObjective need not wait
    for the device. Only batches of token ids to predict, labels [B, T], are changed. The objective
    does not pass `positions` and `targets` to the model, and a loss of your own must not either.
    """
    return partial(_collated_with_positions, collate)


def _collated_with_positions(
    collate: Callable[[Any], dict[str, Any]], items: Any
) -> dict[str, Any]:
    batch = collate(items)
    labels = batch.get("labels")
    if (
        isinstance(labels, Tensor)
        and labels.dim() == 2
        and not {"examples", "positions", "targets"} & set(batch)
    ):
        mask = batch.get("attention_mask")
        batch["labels"] = predicted(labels, mask)
        batch["positions"], batch["targets"] = loss_positions(batch["labels"])
        if isinstance(mask, Tensor) and bool(mask.all()):
            del batch["attention_mask"]
    return batch


def token_inputs(plan: Mapping[str, Tensor]) -> list[str]:
    """List the names of the model's inputs that have an entry for each token."""
    shape = plan["input_ids"].shape
    return [
        k
        for k, x in plan.items()
        if k not in NOT_INPUTS and isinstance(x, Tensor) and x.shape[:2] == shape
    ]


def padded(plan: Mapping[str, Tensor], length: int, count: int) -> dict[str, Tensor]:
    """Return the plan with its length padded to a multiple of `length`, and its number of loss
    positions to one of `count`, so that batches have few different shapes.

    Rows are filled up on the left. The loss is the same, up to rounding.
    """
    ids, positions = plan["input_ids"], plan["positions"]
    several = plan["targets"].dim() == 2  # a choice of label words has one position per row
    more, more_positions = -ids.shape[1] % length, -positions.shape[1] % count if several else 0
    out = dict(plan)
    if more:
        out["attention_mask"] = plan.get("attention_mask", torch.ones_like(ids))
        for name in token_inputs(out):
            out[name] = F.pad(out[name], (0, 0) * (out[name].dim() - 2) + (more, 0))
    out["positions"] = F.pad(
        torch.where(positions < 0, positions, positions + more), (more_positions, 0), value=-1
    )
    if several:
        out["targets"] = F.pad(plan["targets"], (more_positions, 0), value=IGNORED)
    return out


def padded_on_the_right(plan: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the plan with left padding moved to the right of its rows, without waiting for the
    device."""
    mask, positions = plan["attention_mask"] != 0, plan["positions"]
    rows, length = mask.shape
    # The remainder is 0 for a row that is nothing but padding.
    left = (mask.cumsum(1) == 0).sum(1, keepdim=True) % length
    source = (
        torch.arange(rows, device=mask.device)[:, None],
        (torch.arange(length, device=mask.device) + left) % length,
    )
    moved = {k: plan[k][source] for k in token_inputs(plan)}
    moved["positions"] = torch.where(
        positions < 0, positions, positions - left.to(positions.device)
    )
    return {**plan, **moved}
