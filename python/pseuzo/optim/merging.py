"""Losses of the global batch, from those that the ranks found on their parts of it.

Sums are made one after another in fp64, in the order of the parts, so they depend on neither an
instruction set nor a device.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from pseuzo.optim.exchange import Exchange


def merged_losses(
    exchange: Exchange, mine: Sequence[Sequence[Tensor]], n: int, kind: str
) -> list[list[Tensor]] | None:
    """On the root: what n passes found on the global batch; elsewhere None.

    mine: for each of the passes exchange.mine(n) its losses on this rank's rows (or their
    derivatives), each [], [B_r] or, of tokens, [B_r, P_r] fp32. kind: that of the passes. Numbers
    become sum_r size_r x_r / sum_r size_r, rounded once to fp32. Losses of examples follow each
    other in the order of the parts, scaled so that their mean is that number.
    """
    parts = exchange.gather(*(x for found in mine for x in found), kind=kind)
    if parts is None:
        return None
    d, merged = exchange.ranks.direction_ranks, []
    for i in range(n):
        those = [part for part in parts if part.direction == i % d]
        passes = len(range(i % d, n, d))
        each = [len(part.tensors) // passes for part in those]
        columns = zip(
            *(p.tensors[i // d * k : (i // d + 1) * k] for p, k in zip(those, each, strict=True)),
            strict=True,
        )
        sizes = [part.size for part in those]
        merged.append([_merged(sizes, column).to(exchange.device) for column in columns])
    return merged


def shares(sizes: Sequence[float]) -> list[float]:
    """size_r / sum_r size_r. ValueError if that is 0 / 0."""
    total = total_of(sizes)
    return [size / total for size in sizes]


def total_of(sizes: Iterable[float]) -> float:
    """The sum of sizes. ValueError if that is 0."""
    total = added(sizes)
    if not total:
        raise ValueError("no rank has rows, since all gave size 0; give one of them a batch")
    return total


def added(numbers: Iterable[float]) -> float:
    """The sum in fp64, made in order. Python's own may round otherwise in another version."""
    total = 0.0
    for x in numbers:
        total += x
    return total


def _merged(sizes: Sequence[float | None], column: Sequence[Tensor]) -> Tensor:
    rows_of = [len(x) if x.dim() else 1 for x in column]
    known = [n if size is None else size for size, n in zip(sizes, rows_of, strict=True)]
    kept = [(size, x) for size, x in zip(known, column, strict=True) if size > 0]
    total = total_of(size for size, _ in kept)
    if len({x.dim() for _, x in kept}) > 1:
        raise ValueError(
            "some ranks gave the losses of their examples, and others one number; give the same "
            "kind of loss on all"
        )
    if kept[0][1].dim() == 0:
        value = added(size * float(x) for size, x in kept) / total
        return torch.tensor(value, dtype=torch.float64).float()
    rows = sum(len(x) for _, x in kept)
    factors = [size * rows / (total * len(x)) for size, x in kept]
    found = [
        x if k == 1 else (x.double() * k).float() for k, (_, x) in zip(factors, kept, strict=True)
    ]
    if found[0].dim() == 2:  # parts whose longest rows differ; tokens end at the last position
        most = max(x.shape[1] for x in found)
        found = [nn.functional.pad(x, (most - x.shape[1], 0)) for x in found]
    return torch.cat(found)
