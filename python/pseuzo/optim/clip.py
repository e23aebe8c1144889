"""Clipping of examples whose projected gradient is much larger than that of the others."""

import torch
from torch import Tensor


def clip_limit(sizes: Tensor, ratio: float, counted: Tensor | None = None) -> Tensor:
    """[1]: ratio times the median of sizes [B], infinite where that is 0.

    The median of an even number of sizes is the lower one, and NaN counts as the largest. counted:
    [B] bool, the sizes that the median is taken over.
    """
    counted = torch.ones_like(sizes, dtype=torch.bool) if counted is None else counted
    ordered = torch.where(counted, sizes, float("inf")).sort().values
    median = ordered.gather(0, (counted.sum() - 1).view(1) // 2)
    return torch.where(median > 0, ratio * median, float("inf"))


def clip_slopes(slopes: Tensor, ratio: float | None) -> Tensor:
    """Projected gradients [B] of examples, clamped to `clip_limit`; None: as they are."""
    if ratio is None:
        return slopes
    limit = clip_limit(slopes.abs(), ratio)
    return slopes.clamp(-limit, limit)


def clip_rows(e: Tensor, change: Tensor, ratio: float, examples: Tensor | None) -> Tensor:
    """e [B, ...] in fp32, rows scaled so that no example's <change_i, e_i> is over the limit."""
    factors = row_factors((change * e.float()).flatten(1).sum(1), ratio, examples)
    return e.float() * factors.view(-1, *[1] * (e.dim() - 1))


def row_factors(rows: Tensor, ratio: float, examples: Tensor | None) -> Tensor:
    """[n]: factors of n rows so that no example's |sum of rows| exceeds `clip_limit` of all sizes.

    Rows with the same number in examples belong to one example and are scaled alike. None: each row
    is an example.
    """
    sizes, first = example_sizes(rows, examples)
    limit = clip_limit(sizes, ratio, first)
    return torch.where(sizes > limit, limit / sizes, 1.0)


def example_sizes(rows: Tensor, examples: Tensor | None) -> tuple[Tensor, Tensor]:
    """[n]: |sum of rows| of the example that each row belongs to; [n] bool: whether the row is the
    first of its example. examples: see row_factors."""
    n = len(rows)
    if examples is None:
        examples = torch.arange(n, device=rows.device)
    examples = torch.as_tensor(examples).to(rows.device, non_blocking=True)
    if examples.shape != (n,) or examples.dtype.is_floating_point:
        raise ValueError(
            f"PseuZO.step: examples must be {n} integers, one per row of the output, got shape "
            f"{tuple(examples.shape)} {examples.dtype}"
        )
    # A matrix of pairs sums in a fixed order, where index_add would use atomics.
    same = examples[:, None] == examples[None, :]
    sizes = torch.where(same, rows, 0.0).sum(1).abs()
    return sizes, same.int().argmax(1) == torch.arange(n, device=rows.device)
