"""Evolution strategies and FZOO: losses along q directions, compared with each other.

A direction z_j moves the weights by its share w_j of the step times a score a_j,
x <- x - lr sum_j w_j a_j z_j, where w_j = 1 / q. The scores are made from the losses that the
directions lead to, without a derivative, so a loss may be any number that a program computes.

With split_batch, direction j is measured on part j of the batch alone, so q directions cost two
forward passes of the batch. w_j is then the share of the batch that is in part j, so that the mean
is right for parts of different sizes.

Sources: Salimans et al., "Evolution strategies as a scalable alternative to reinforcement learning"
(2017), for ranks and pairs; Tang et al., "Zeroth-order optimization meets human feedback: provable
learning via ranking oracles" (ICLR 2024), for learning from ranks alone; Dang et al., "FZOO: fast
zeroth-order optimizer for fine-tuning large language models towards Adam-scale speed" (2025), for
the spread. Their code has x <- x - lr sum_j (l_j - l_0) / (q sigma) z_j, with sigma^2 the mean of
(l_j - mean of l)^2.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from pseuzo.optim.base import ZeroOrder
from pseuzo.optim.mezo import Slopes, mean_direction, measure_slopes
from pseuzo.optim.passes import without_autograd
from pseuzo.optim.skips import NOT_FINITE
from pseuzo.optim.update import Direction
from pseuzo.perturb.in_place import filled
from pseuzo_kernels.checks import check_count

WEIGHTS = ("raw", "spread", "zscore", "rank")
SKIP_REASON = (
    "the losses that are compared were all the same (as a metric on a small batch often is: a "
    f"larger batch or eps helps), or {NOT_FINITE}"
)


@dataclass(frozen=True)
class Population(Slopes):
    """Slopes. shares: [q] fp32, each direction's share of the batch; None: each has all of it."""

    shares: Tensor | None


class Evolution(ZeroOrder):
    """x <- x - lr mean_j a_j z_j, with scores a_j of q directions made by comparing their losses.

    Let c_j be MeZO's slope along z_j, h_j = eps c_j, and v the values that are compared. weights
    chooses the score:

    - "raw": a_j = c_j, as in MeZO with q directions.
    - "spread": a_j = h_j / std(v), as in FZOO.
    - "zscore": a_j = (h_j - mean_j h) / std(v); two-sided h_j / std(v), because a pair has mean 0.
    - "rank": a_j = rank(v_j), or two-sided (rank(v_j+) - rank(v_j-)) / 2, by order alone. A rank is
      centered, from -1/2 for the least value to 1/2 for the largest: with n values it is
      (number below - number above) / (2 (n - 1)), so that ties have the mean of their ranks.

    std divides by n, the number of values. One-sided, v are the q losses L(x + eps z_j); two-sided,
    the 2 q losses on both sides. With split_batch, losses on different rows cannot be compared, so
    v are the differences along each direction: h_j one-sided, h_j and -h_j two-sided. Two-sided,
    std(v) is then the root mean square of h_j, and a score is the rank of |h_j| with the sign of
    h_j, as in a signed-rank test.

    All scores but raw do not depend on eps or on the scale of the losses, so lr is the size of a
    step. It moves each weight by about lr / sqrt(q) (root mean square; rank: 0.29 times that),
    whatever the slopes are; FZOO's scores are larger where all losses rise together. If all of v
    are equal, as happens with a metric on a small batch, there is nothing to compare. The step is
    then skipped, counted and warned about, like one whose loss is not finite.

    params, lr, eps, and further options: see MeZO. clip_examples clamps each example's part of h_j
    (split_batch: against the median of its part), and v are then made from the clamped h_j.
    directions: q, at least 2 if one-sided (except for raw), because one value has no other to be
    compared with. two_sided: 2 q passes, else q + 1. split_batch: a pass runs one part alone.
    maximize, an option of torch, treats the closure's value as a reward. Nothing is kept between
    steps.
    """

    own_settings = ("directions", "two_sided", "weights", "split_batch")

    def __init__(
        self,
        params: nn.Module | Iterable,
        lr: float = 1e-5,
        eps: float = 1e-3,
        *,
        directions: int = 8,
        two_sided: bool = True,
        weights: str = "rank",
        split_batch: bool = False,
        capture: bool = False,
        **options: Any,
    ):
        name = type(self).__name__
        check_count(name, "directions", directions)
        if weights not in WEIGHTS:
            raise ValueError(
                f"{name}: weights must be one of {', '.join(WEIGHTS)}, got {weights!r}"
            )
        if weights != "raw" and not two_sided and directions < 2:
            raise ValueError(
                f"{name}: weights {weights} compares the losses of one-sided directions, so "
                "directions must be at least 2"
            )
        if split_batch and capture:
            raise ValueError(
                f"{name}: capture records passes of one batch, and split_batch has passes of "
                "different parts; leave one of them off"
            )
        self.directions, self.two_sided = directions, two_sided
        self.weights, self.split_batch = weights, split_batch
        super().__init__(params, lr=lr, eps=eps, capture=capture, **options)

    @property
    def parts(self) -> int:  # type: ignore[override]  # it follows a loaded state
        return self.directions if self.split_batch else 1

    def step(  # type: ignore[override]  # torch's closure returns a float
        self,
        closure: Callable[[], Any] | Sequence[Callable[[], Any]] | None = None,
        sizes: Sequence[float] | Tensor | None = None,
        *,
        size: float | None = None,
    ) -> Tensor | None:
        """closure() -> loss, a scalar tensor or a number, or per-example losses [B]; called twice
        for each direction, or, if one-sided, once for each and once at x.

        With split_batch, closure is a list of q closures, one for the loss of each part of the
        batch. sizes: [q], how many examples the parts have; None: the number of losses that each
        closure returns. Returns the mean loss on the device (one-sided: that at x). Without a
        closure, applies the last estimate; RuntimeError if there is none. If a loss is NaN or
        infinite, or if all losses are equal, the update is skipped, counted (`skipped_steps`) and
        warned about.
        """
        return super().step() if closure is None else super().step(closure, sizes, size=size)

    def measure(
        self,
        closure: Callable[[], Any] | Sequence[Callable[[], Any]],
        sizes: Sequence[float] | Tensor | None = None,
    ) -> Population:
        """Run the passes of a step; see step."""
        name, q = type(self).__name__, self.directions
        if not self.split_batch:
            if not callable(closure) or sizes is not None:
                raise TypeError(
                    f"{name}.step: needs one closure that returns the loss; split_batch=True takes "
                    "a list of closures, and their sizes"
                )
            measured = measure_slopes(self, (closure,), closure, self.two_sided, q)
            return Population(**vars(measured), shares=None)
        if callable(closure) or len(closure) != q or not all(map(callable, closure)):
            got = "one" if callable(closure) else f"{len(closure)}"
            raise TypeError(
                f"{name}.step: split_batch needs a list of {q} closures, the loss of one part of "
                f"the batch for each direction, got {got}"
            )
        measured = measure_slopes(self, tuple(closure), closure, self.two_sided, q)
        with without_autograd():
            if sizes is None:
                sizes = [plus.numel() for plus, _ in measured.pairs]
            if len(sizes) != q:
                raise ValueError(f"{name}.step: sizes must be {q} numbers, got {len(sizes)}")
            if not isinstance(sizes, Tensor):
                sizes = filled(sizes, torch.float32, self.device)
            shares = sizes.to(self.device, torch.float32)
            shares = shares / shares.sum()
            plus, minus = _means(measured)
            loss = (shares * ((plus + minus) / 2 if self.two_sided else minus)).sum()
        return Population(**vars(measured) | {"loss": loss}, shares=shares)

    def coefficients(self, measured: Population) -> Direction:
        direction, shares = mean_direction(self, measured), measured.shares
        scores, usable = measured.slopes, measured.finite
        if self.weights != "raw":
            scores, differ = self._scores(measured)
            usable = usable & differ
        coefs = scores / len(scores) if shares is None else scores * shares
        usable = usable & coefs.isfinite().all()
        return replace(
            direction,
            coefs=torch.where(usable, coefs, 0.0),
            found_inf=(~usable).float().view(1),
            skip_reason=NOT_FINITE if self.weights == "raw" else SKIP_REASON,
        )

    def _scores(self, measured: Population) -> tuple[Tensor, Tensor]:
        """a_j [q] fp32, and whether the values that are compared differ, [] bool."""
        h = self.eps * measured.slopes
        if not self.two_sided:
            values = h  # the losses minus L(x), so their order and spread are the same
        elif self.split_batch:
            values = torch.cat([h, -h])
        else:
            plus, minus = _means(measured)
            if self.clip_examples is not None:
                middle = (plus + minus) / 2
                plus, minus = middle + h, middle - h
            values = torch.cat([plus, minus])
        # A spread above 0 could come from rounding alone, so equality is tested instead.
        differ = values.max() > values.min()
        if self.weights == "rank":
            scores = centered_ranks(values)
            if self.two_sided:
                plus, minus = scores.chunk(2)
                scores = (plus - minus) / 2
            return scores, differ
        h = h.double()
        if self.weights == "zscore" and not self.two_sided:
            h = h - h.mean()
        return (h / values.double().std(correction=0)).float(), differ

    def own_state(self) -> dict[str, Any]:
        settings = {name: getattr(self, name) for name in self.own_settings}
        return super().own_state() | {"population": settings}

    def load_own_state(self, own: Mapping[str, Any]) -> None:
        for name, value in own["population"].items():
            setattr(self, name, value)


class FZOO(Evolution):
    """x <- x - lr mean_j (L(x + eps z_j) - L(x)) / sigma z_j, sigma the spread of the losses.

    This is Evolution with one-sided directions and weights "spread": q + 1 passes per step. sigma^2
    is the mean over j of (L(x + eps z_j) - their mean)^2. As published: noise="rademacher", 8
    directions. Source: Dang et al. 2025; their batched passes of several perturbations are left
    out.
    """

    def __init__(
        self,
        params: nn.Module | Iterable,
        lr: float = 1e-5,
        eps: float = 1e-3,
        *,
        directions: int = 8,
        two_sided: bool = False,
        **options: Any,
    ):
        options = {"weights": "spread"} | options
        super().__init__(params, lr, eps, directions=directions, two_sided=two_sided, **options)


def centered_ranks(values: Tensor) -> Tensor:
    """Ranks of n >= 2 values, [n] fp32 in -1/2 .. 1/2: exact, so the same on every device."""
    below = (values[None, :] < values[:, None]).sum(1)
    above = (values[None, :] > values[:, None]).sum(1)
    return (below - above).float() / (2 * (len(values) - 1))


def _means(measured: Slopes) -> list[Tensor]:
    """The mean losses of the two points of each direction, [q] and [q]."""
    return [torch.stack([x.mean() for x in side]) for side in zip(*measured.pairs, strict=True)]
