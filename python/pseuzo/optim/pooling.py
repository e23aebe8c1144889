"""PseuZO's step over several ranks: output changes are pooled on each, and again on the root.

With groups, a rank sends for each group that it has rows of the sums of do and of e, 2 G P D fp32
numbers, and <do, e> of its own rows, exactly. Without groups, rows are paired by their number in
the global batch, so it sends its rows of do and e, 2 B P D. Where the two or three passes of a step
are on several ranks, these first send their outputs, [B, P, D], to the first rank of their part.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from pseuzo.optim.clip import clip_limit, example_sizes
from pseuzo.optim.estimator import Measured
from pseuzo.optim.exchange import Exchange, Part
from pseuzo.optim.merging import added, shares
from pseuzo.optim.outputs import Outputs, as_output, head_gradients
from pseuzo.optim.passes import without_autograd

if TYPE_CHECKING:
    from pseuzo.optim.pseuzo import PseuZO

KIND = "output"


def pooled_outputs(
    o: PseuZO,
    exchange: Exchange,
    seed: int,
    momentum: float,
    forward: Callable[[], Tensor],
    head: Callable[[Tensor], Tensor],
    groups: Tensor | list[int] | None,
    examples: Tensor | None,
) -> Measured:
    """On the root: the pooled outputs of the global batch; elsewhere only the kind is known.

    seed, momentum: those of the step. Other arguments: see PseuZO.step.
    """
    eps, two_sided = o.eps, o.two_sided
    scales = (0.0, eps, -eps) if two_sided else (0.0, eps)
    rows_of_loss: list[int] = []
    of_head: list[Tensor] = []  # the loss and e, once the clean pass has run

    def counted(output: Tensor) -> Tensor:
        loss = head(output)
        rows_of_loss.append(loss.numel() if isinstance(loss, Tensor) else 1)
        return loss

    def clean() -> tuple[Tensor, ...]:
        output = as_output(forward())
        if exchange.size == 0:  # what a part without rows finds is ignored
            return (output,)
        return output, *head_gradients(counted, output, [])

    def run() -> list[Tensor]:
        mine = exchange.mine(len(scales))
        calls = [
            partial(o.passes.clean, clean)
            if i == 0
            else partial(o.passes.perturbed, seed, scales[i], KIND, forward)
            for i in mine
        ]
        found = []
        for i, output in zip(mine, o.passes.together(calls), strict=True):
            if i == 0:
                output, *of_head[:] = output
            found.append(as_output(output))
        return found

    def measured() -> list[Tensor]:
        return o.passes.run(KIND, (forward, head), run)

    outputs = exchange.of_part(measured, len(scales))
    with without_autograd():
        mine: list[Tensor] = []
        if outputs and exchange.size != 0:
            base, *moved = (x.to(o.device) for x in outputs)
            moved = [as_output(x, like=base).float() for x in moved]
            change = (moved[0] - moved[1]) / 2 if two_sided else moved[0] - base.float()
            loss, e = of_head
            mine = [loss, change, e.float()]
        size = float(rows_of_loss[0]) if rows_of_loss else None
        if o.clip_examples is not None:
            mine = _clipped(exchange, mine, o.clip_examples, examples, size)
        parts = exchange.gather(*_pooled(mine, groups), kind=KIND, size=size)
        if parts is None:
            return Measured(torch.full((), math.nan, device=o.device), KIND)
        loss, newest, *merged = (x.to(o.device) for x in _merged(parts, eps))
        output, e, *ids = merged
        finite = torch.where(newest.isfinite(), loss, math.nan)
        groups = ids[0] if ids else None
        numbers = momentum, eps, newest.view(1)
        return Outputs(loss, KIND, seed, None, output, e, groups, finite, {}, *numbers)


def _pooled(mine: list[Tensor], groups: Tensor | list[int] | None) -> list[Tensor]:
    """loss, <do, e> in fp64, do and e as [rows, P, D] fp32; with groups their sums over each group,
    the groups, and how many rows each has."""
    if not mine:
        return []
    loss, change, e = mine
    dot = (change.double() * e.double()).sum()
    change, e = (x if x.dim() == 3 else x[:, None] for x in (change, e))
    if groups is None:
        return [loss, dot, change, e]
    groups = torch.as_tensor(groups).to(change.device)
    if groups.dtype.is_floating_point or groups.shape != (len(change),):
        raise ValueError(
            f"PseuZO.step: groups must be one integer per row of the output, {len(change)}, got "
            f"shape {tuple(groups.shape)} {groups.dtype}"
        )
    ids = groups.unique()
    # A product with a matrix of 0 and 1 sums in a fixed order, where index_add would use atomics.
    member = (groups[None] == ids[:, None]).double()
    sums = [torch.einsum("gr,rpd->gpd", member, x.double()).float() for x in (change, e)]
    return [loss, dot, *sums, ids.long(), member.sum(1).long()]


def _merged(parts: Sequence[Part], eps: float) -> list[Tensor]:
    """loss and the newest coefficient, [] fp32; do and e [rows, P, D] fp32; with groups do is the
    mean over the rows of a group, and the groups follow."""
    kept = [part for part in parts if part.direction == 0 and part.size != 0]
    weights = shares([part.size or 0.0 for part in kept])
    if len({len(part.tensors) for part in kept}) > 1:
        raise ValueError("PseuZO.step: some ranks gave groups, and others none; give them on all")
    losses, dots, changes, es, *grouped = zip(*(part.tensors for part in kept), strict=True)
    loss = added(w * float(x) for w, x in zip(weights, losses, strict=True))
    newest = added(w * float(x) for w, x in zip(weights, dots, strict=True)) * (1.0 / eps)
    numbers = [torch.tensor(x, dtype=torch.float64).float() for x in (loss, newest)]
    if len({x.shape[2] for x in changes}) > 1:
        widths = ", ".join(str(x.shape[2]) for x in changes)
        raise ValueError(f"PseuZO.step: the outputs of the ranks have widths {widths}")
    positions = max(x.shape[1] for x in changes)
    wide = [_widened(x, positions) for x in changes]
    slopes = [w * _widened(x, positions) for w, x in zip(weights, es, strict=True)]
    if not grouped:
        return [*numbers, torch.cat(wide).float(), torch.cat(slopes).float()]
    ids = torch.cat(grouped[0]).unique()
    change, e = torch.zeros(2, len(ids), *wide[0].shape[1:], dtype=torch.float64)
    counts = torch.zeros(len(ids), dtype=torch.float64)
    for of_part, rows, do, slope in zip(*grouped, wide, slopes, strict=True):
        at = torch.searchsorted(ids, of_part)  # distinct, so each sum is made part by part
        change[at] += do
        e[at] += slope
        counts[at] += rows
    return [*numbers, (change / counts[:, None, None]).float(), e.float(), ids]


def _widened(x: Tensor, positions: int) -> Tensor:
    """x [rows, P, D] in fp64, with positions aligned from the right."""
    return F.pad(x.double(), (0, 0, positions - x.shape[1], 0))


def _clipped(
    exchange: Exchange,
    mine: list[Tensor],
    ratio: float,
    examples: Tensor | None,
    size: float | None,
) -> list[Tensor]:
    """mine with rows of e scaled as by clip_rows, with the median over the examples of all ranks.

    Each sends the sizes of its examples, [B] fp32, and the root answers with the limit. Examples
    with the same number on different ranks are different examples.
    """
    sent, sizes = [], torch.empty(0)
    if mine:
        sizes, first = example_sizes((mine[1] * mine[2]).flatten(1).sum(1), examples)
        sent = [sizes[first]]
    parts = exchange.gather(*sent, kind=KIND, size=size)
    found = []
    if parts is not None:
        kept = [part for part in parts if part.tensors]
        of_parts = [part.size or 0.0 for part in kept]
        scaled = [w * p.tensors[0].double() for w, p in zip(shares(of_parts), kept, strict=True)]
        limit = clip_limit(torch.cat(scaled).float(), ratio)
        found = [torch.tensor([float(limit), added(of_parts)], dtype=torch.float64)]
    ((limit_of_all, total),) = (x.tolist() for x in exchange.share(*found))
    if not mine:
        return mine
    loss, change, e = mine
    limit_here = limit_of_all * total / (size if exchange.size is None else exchange.size)
    factors = torch.where(sizes > limit_here, limit_here / sizes, 1.0)
    return [loss, change, e * factors.view(-1, *[1] * (e.dim() - 1))]
