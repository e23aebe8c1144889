"""Where the loss of a batch is: at which positions, in which rows, and how padding moves them.

A *plan* is a batch as the objective uses it: the inputs of the model, with `positions` and
`targets` [R, P] of the loss and, for a choice between options, `option_rows` and `answers`.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORED = -100  # a label that carries no loss, as everywhere in Transformers
# What a batch holds for the objective and the optimizer. The model gets the rest.
NOT_INPUTS = frozenset(
    ("labels", "answers", "examples", "groups", "rows", "option_rows", "positions", "targets")
)


def predicted(labels: Tensor, mask: Tensor | None) -> Tensor:
    """labels [R, T], -100 where the token before is padding.

    Such a token is the first of its text, which nothing predicts: what a model makes of the padding
    before it is noise that differs between attention backends.
    """
    if mask is None:
        return labels
    return labels.masked_fill(F.pad(mask[:, :-1], (1, 0), value=1) == 0, IGNORED)


def loss_positions(labels: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """positions, targets [R, P]: where the next token carries a loss, and that token.

    Both are aligned to the right, with positions -1 and targets -100 where a row has fewer than P,
    which is at least 1. mask [R, T] is 0 for padding, on which no position lies. This waits for the
    device that labels [R, T] are on.
    """
    shifted = F.pad(predicted(labels, mask)[:, 1:], (0, int(labels.shape[1] < 2)), value=IGNORED)
    carries = shifted != IGNORED
    count = max(int(carries.sum(1).max()), 1)
    # A stable sort puts the positions with a loss last and keeps their order.
    order = torch.argsort(carries.to(torch.int8), dim=1, stable=True)[:, -count:]
    there = carries.gather(1, order)
    return torch.where(there, order, -1), torch.where(there, shifted.gather(1, order), IGNORED)


def last_positions(inputs: Mapping[str, Tensor]) -> Tensor:
    """[R, 1]: the last position with attention in each row, whichever side is padded."""
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask")
    if mask is None:
        return torch.full((ids.shape[0], 1), ids.shape[1] - 1, device=ids.device)
    places = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    return (places * (mask != 0)).argmax(1, keepdim=True)


def rows_of_options(examples: Tensor, n: int) -> Tensor:
    """[n, most options]: the rows of the options of each of n examples, -1 where one has fewer.

    examples [R] says of each row which example it is an option of. This waits for the device that
    they are on.
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
    """A collator whose batches also have `positions` and `targets` (see loss_positions).

    They have labels only where a token is predicted (see predicted), and no attention_mask if there
    is no padding. All of that is found on the CPU, so that CausalLMObjective need not wait for the
    device to find it. Only batches of token ids to predict, labels [B, T], are changed; others are
    left as they are. The objective keeps `positions` and `targets` from the model, and a loss of
    your own has to do that too.
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
    """The names of the model's inputs that have an entry for each token."""
    shape = plan["input_ids"].shape
    return [
        k
        for k, x in plan.items()
        if k not in NOT_INPUTS and isinstance(x, Tensor) and x.shape[:2] == shape
    ]


def padded(plan: Mapping[str, Tensor], length: int, count: int) -> dict[str, Tensor]:
    """The plan of a batch with its length a multiple of `length` and its number of loss positions
    one of `count`, so that batches come in a few shapes.

    Rows are filled up on the left. The loss is the same, to rounding.
    """
    ids, positions = plan["input_ids"], plan["positions"]
    several = plan["targets"].dim() == 2  # a choice of label words has one position a row
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
    """The plan with the padding on the left of its rows moved to the right. Waits for no device."""
    mask, positions = plan["attention_mask"] != 0, plan["positions"]
    rows, length = mask.shape
    # The remainder makes 0 of a row that is padding alone.
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
