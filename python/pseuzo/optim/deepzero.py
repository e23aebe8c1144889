"""DeepZero: finite differences along single weights, at a sparse pattern that changes.

A step estimates the gradient of n weights, g_i = (L(x + eps e_i) - L(x)) / eps, and moves those
weights alone, x_i <- x_i - lr g_i. It costs 1 + n forward passes, so it is for small models.

Each layer (each tensor of weights) has a share of the n. The shares are decided once, at the first
step, by scores of all weights. Which weights of a layer are estimated is drawn at random, again and
again.

Source: Chen et al., "DeepZero: scaling up zeroth-order optimization for deep model training" (ICLR
2024): coordinate-wise estimates (Eq. 2), ZO-GraSP scores (Eq. 4) and the dynamic pattern
(Algorithm 1). This version differs in four points:

- A step is plain gradient descent; theirs is SGD with momentum.
- Weights are drawn again at every step unless `redraw` says otherwise; theirs at every epoch.
- Each layer has at least one weight where n allows it, because biases that are 0 have a score of 0.
- A pass runs the whole model. Theirs reuses the features before the layer of the weight, and passes
  run in parallel.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

from pseuzo.optim import groups
from pseuzo.optim.base import ZeroOrder
from pseuzo.optim.clip import clip_slopes
from pseuzo.optim.estimator import Measured
from pseuzo.optim.mezo import as_losses, check_closure, check_same_batch
from pseuzo.optim.passes import Passes, without_autograd
from pseuzo.optim.seeds import ROUNDING_DOMAIN, direction_seed, step_seed
from pseuzo.optim.update import Direction, Update, rounded, rounding_bits, step_and_keep, writes
from pseuzo.perturb.in_place import filled
from pseuzo_kernels import add_noise
from pseuzo_kernels.bits import hash_seed
from pseuzo_kernels.checks import check_count

SCORES = ("grasp", "magnitude", "random")
MOST_PASSES = 10_000  # in a step, unless `coordinates` asks for more
DRAW_DOMAIN = 0x636F6F7264  # keeps the weights that are drawn apart from the bits that perturb


class KeepingPasses(Passes):
    """Passes at weights that are written in place: `restore` puts their values back, exactly."""

    def __init__(self, optimizer: ZeroOrder):
        super().__init__(optimizer, capture=False)
        self._kept: list[tuple[Tensor, Tensor]] = []

    def keep(self, places: Iterable[Tensor]) -> list[Tensor]:
        """Copy weights, or parts of them, that are about to be written; return the copies."""
        self._kept = [(place, place.clone()) for place in places]
        return [value for _, value in self._kept]

    def unshift(self) -> None:
        """Take back the noise of a pass, which bare parameters still hold."""
        super().restore()

    def restore(self) -> None:
        super().restore()
        with without_autograd():
            for place, value in self._kept:
                place.copy_(value)
            torch.clear_autocast_cache()
        self._kept = []


@dataclass(frozen=True)
class Coordinates(Measured):
    """Estimates of dL/dx_i for the weights that a step drew.

    drawn: parameters -> the indices of the drawn weights. slopes: [n] fp32 in the same order, 0
    where not finite. finite: [] bool, whether all losses and slopes are finite. counts: see
    DeepZero; None if the scores were not finite.
    """

    drawn: Mapping[Tensor, list[int]]
    slopes: Tensor
    finite: Tensor
    counts: dict[int, int] | None


@dataclass(frozen=True)
class SparseDirection(Direction):
    """drawn: parameters -> the indices of the drawn weights, and their estimates, [n] fp32."""

    drawn: Mapping[Tensor, tuple[list[int], Tensor]] = field(default_factory=dict)


class DeepZero(ZeroOrder):
    """x_i <- x_i - lr (L(x + eps e_i) - L(x)) / eps, for n weights i that are drawn at each step.

    coordinates: n; a step costs 1 + n forward passes (two_sided: 1 + 2 n, with differences
    (L(x + eps e_i) - L(x - eps e_i)) / (2 eps)). None: all weights, up to 10,000 of them.
    ValueError where a model has more, or fewer than n.
    scores: how the first step divides the n among the layers. "random": by size. "magnitude": as
    the n weights with the largest |x| are divided. "grasp": as the n weights with the lowest score
    -x_i (H g)_i are divided; removing these would lower the norm of the gradient g the most. H g is
    the change of a gradient estimate between x and x + eps g / rms(g), along the same `directions`
    random directions at both points. It costs 2 * directions + 1 passes, once, and a copy of the
    weights. Each layer has at least one of the n, if there are enough.
    redraw: for how many steps the drawn weights stay the same.

    The weight is written in place and put back from a copy of its value, exactly, also after an
    interrupt. The difference is divided by the change of x_i as the dtype rounded it. In a group
    with noise scale s, the change is s eps, and the weights move by -lr s^2 g_i. clip_examples
    clamps each example's part of g_i. Weight decay applies to all trained weights, drawn or not,
    and lr is that of gradient descent. 16-bit weights are rounded stochastically. capture is
    refused, and so is a journal, because the updates are not sums of seeded noise. Only the first
    step waits for the device, if it makes scores. One number per layer is kept between steps.
    Further options: see MeZO. Source: see the module.
    """

    offloads = False

    passes: KeepingPasses
    recordable = False
    in_ranks = False
    own_settings = ("coordinates", "two_sided", "scores", "directions", "redraw")

    def __init__(
        self,
        params: nn.Module | Iterable,
        lr: float = 1e-3,
        eps: float = 1e-3,
        *,
        coordinates: int | None = None,
        two_sided: bool = False,
        scores: str = "grasp",
        directions: int = 16,
        redraw: int = 1,
        capture: bool = False,
        **options: Any,
    ):
        given = {"coordinates": 1 if coordinates is None else coordinates}
        for key, value in (given | {"directions": directions, "redraw": redraw}).items():
            check_count("DeepZero", key, value)
        if scores not in SCORES:
            raise ValueError(f"DeepZero: scores must be one of {', '.join(SCORES)}, got {scores!r}")
        if capture:
            raise ValueError("DeepZero: capture records passes that write no weights; leave it off")
        self.coordinates, self.two_sided = coordinates, two_sided
        self.scores, self.directions, self.redraw = scores, directions, redraw
        self.counts: dict[int, int] | None = None  # stream of a layer -> weights drawn per step
        super().__init__(params, lr=lr, eps=eps, **options)
        self.passes = KeepingPasses(self)
        self._count(groups.trained("DeepZero", self.param_groups))

    def step(  # type: ignore[override]  # torch's closure returns a float
        self, closure: Callable[[], Any] | None = None, *, size: float | None = None
    ) -> Tensor | None:
        """closure() -> loss, a scalar tensor or a number, or per-example losses [B]; called once
        and then once (two_sided: twice) for each weight that is estimated.

        Returns the loss at x, on the device. Without a closure, applies the last estimate;
        RuntimeError if there is none. If a loss is NaN or infinite, the update is skipped, counted
        (`skipped_steps`) and warned about.
        """
        return super().step(closure, size=size)

    def measure(self, closure: Callable[[], Any]) -> Coordinates:
        """Run the passes of a step; see step."""
        check_closure(self, closure)
        return self.passes.run("loss", (closure,), partial(self._measured_at, closure))

    def _measured_at(self, closure: Callable[[], Any]) -> Coordinates:
        layers = groups.trained("DeepZero.step", self.param_groups)
        clean = as_losses(self, self.passes.clean(closure))
        ok, slopes = clean.isfinite().all(), []
        counts, kept = self._layer_counts(layers, closure, clean)
        drawn = self._draw(layers, counts)
        for group, params in layers:
            change = self.eps * group["noise_scale"]
            for p in params:
                for i in drawn[p]:
                    slope = self._slope(closure, clean, p.detach().view(-1)[i : i + 1], change)
                    ok = ok & slope.isfinite().all()
                    slopes.append(slope.mean())
        c = torch.stack(slopes)
        c = torch.where(ok, c, torch.zeros_like(c))
        return Coordinates(clean.mean(), "loss", drawn, c, ok, counts if kept else None)

    def _slope(self, closure: Callable[[], Any], clean: Tensor, x: Tensor, change: float) -> Tensor:
        """dL/dx_i, [], or [B] for per-example losses. x: [1], a view of the weight."""
        (value,) = self.passes.keep([x])
        points = []
        for by in (change, -change)[: 1 + self.two_sided]:
            x.copy_(value.float() + by)
            torch.clear_autocast_cache()
            held = x.to(torch.float32, copy=True)
            points.append((as_losses(self, self.passes.clean(closure)), held))
        if not self.two_sided:
            points.append((clean, value.float()))
        (plus, upper), (minus, lower) = points
        self.passes.restore()
        check_same_batch(plus, minus)
        moved = (upper - lower).to(plus.device).view(())
        slope = torch.where(moved == 0, torch.zeros_like(plus), (plus - minus) / moved)
        return clip_slopes(slope, self.clip_examples)

    # Which weights a step estimates

    def _count(self, layers: list[tuple[dict[str, Any], list[Tensor]]]) -> int:
        """How many weights a step estimates. ValueError if these are too many."""
        total = sum(p.numel() for _, params in layers for p in params)
        if self.coordinates is None and total > MOST_PASSES:
            raise ValueError(
                f"DeepZero: a step would be {1 + total} forward passes, one for each weight and "
                f"one, and more than {MOST_PASSES} are made only if asked for; give coordinates, "
                "how many weights a step estimates"
            )
        if self.coordinates is not None and self.coordinates > total:
            raise ValueError(
                f"DeepZero: coordinates is {self.coordinates}, but only {total} weights are trained"
            )
        return total if self.coordinates is None else self.coordinates

    def _layer_counts(
        self,
        layers: list[tuple[dict[str, Any], list[Tensor]]],
        closure: Callable[[], Any],
        clean: Tensor,
    ) -> tuple[dict[int, int], bool]:
        """Stream of a layer -> how many of its weights a step draws, and whether to keep that."""
        n = self._count(layers)
        params = [p for _, params in layers for p in params]
        streams, sizes = [self.streams[p] for p in params], [p.numel() for p in params]
        known = self.counts
        if known is not None and list(known) == streams and sum(known.values()) == n:
            return known, True
        counts = shared(n, sizes)
        found: list[Tensor] | None = None
        if self.scores == "magnitude":
            found = [-p.detach().float().abs().flatten() for p in params]
        elif self.scores == "grasp" and n < sum(sizes):
            found = grasp_scores(self, layers, closure, clean)
            if not all(bool(score.isfinite().all()) for score in found):
                return dict(zip(streams, counts, strict=True)), False
            if not any(bool(score.any()) for score in found):
                found = None  # the losses did not change, so the scores say nothing: divide by size
        if found is not None:
            counts = counts_of_lowest(n, found)
        return dict(zip(streams, at_least_one(counts), strict=True)), True

    def _draw(
        self, layers: list[tuple[dict[str, Any], list[Tensor]]], counts: Mapping[int, int]
    ) -> dict[Tensor, list[int]]:
        """Draw the indices of each layer's weights by the seed."""
        seed = step_seed(self.seed, self.steps // self.redraw, DRAW_DOMAIN)
        drawn = {}
        for stream, p in ((self.streams[p], p) for _, params in layers for p in params):
            random = Random(hash_seed(seed + stream) % (1 << 64))
            drawn[p] = sorted(random.sample(range(p.numel()), counts[stream]))
        return drawn

    # The update

    def coefficients(self, measured: Coordinates) -> SparseDirection:
        m = measured
        parts = m.slopes.split([len(numbers) for numbers in m.drawn.values()])
        drawn = {
            p: (numbers, part)
            for (p, numbers), part in zip(m.drawn.items(), parts, strict=True)
            if numbers
        }
        return SparseDirection(
            filled([0], torch.int64, self.device),
            m.slopes,
            (~m.finite).float().view(1),
            m.kind,
            state=m.counts,
            stats={"projected_grad": m.slopes, "momentum": 0.0, "window": 0},
            drawn=drawn,
        )

    def prepare(self, direction: SparseDirection) -> Update:  # type: ignore[override]
        rounding_seed = step_seed(self.seed, self.steps, ROUNDING_DOMAIN)
        launches, slot = [], {}  # type: ignore[var-annotated]
        for group, params in groups.trained("DeepZero.step", self.param_groups):
            for p in params:
                drawn = direction.drawn.get(p)
                if drawn is None and not group["lr"] * group["weight_decay"]:
                    continue
                stochastic = self.rounding == "stochastic"
                bits = rounding_bits(p, rounding_seed, self.streams[p], stochastic)
                compute = partial(moved, p, group, drawn, direction.found_inf, bits)
                launches += writes([p], compute, slot)
        launches.append(torch.clear_autocast_cache)
        return Update(launches, moved=[], unused=set(), rounding_seed=rounding_seed)

    def keep(self, state: dict[int, int] | None) -> None:
        self.counts = state

    def own_state(self) -> dict[str, Any]:
        settings = {name: getattr(self, name) for name in self.own_settings}
        return super().own_state() | {"deepzero": settings | {"counts": self.counts}}

    def load_own_state(self, own: Mapping[str, Any]) -> None:
        for name, value in own["deepzero"].items():
            setattr(self, name, value)


def shared(n: int, sizes: list[int]) -> list[int]:
    """n divided in proportion to the sizes; the largest remainders are rounded up."""
    total = sum(sizes)
    counts = [n * size // total for size in sizes]
    by_remainder = sorted(range(len(sizes)), key=lambda i: n * sizes[i] % total, reverse=True)
    for i in by_remainder[: n - sum(counts)]:
        counts[i] += 1
    return counts


def counts_of_lowest(n: int, scores: list[Tensor]) -> list[int]:
    """How many of the n lowest scores are in each of the flat tensors. Waits for the device."""
    device = scores[0].device
    lowest = torch.cat([score.to(device) for score in scores]).topk(n, largest=False).indices
    ends = torch.tensor([len(score) for score in scores], device=device).cumsum(0)
    owners = torch.bucketize(lowest, ends, right=True)
    return torch.bincount(owners, minlength=len(scores)).tolist()


def at_least_one(counts: list[int]) -> list[int]:
    """Take one from the largest count for each that is 0, if there are enough."""
    counts = list(counts)
    if sum(counts) >= len(counts):
        for i, count in enumerate(counts):
            if not count:
                counts[counts.index(max(counts))] -= 1
                counts[i] = 1
    return counts


def grasp_scores(
    optimizer: DeepZero,
    layers: list[tuple[dict[str, Any], list[Tensor]]],
    closure: Callable[[], Any],
    clean: Tensor,
) -> list[Tensor]:
    """-x * (H g) for each parameter, flat."""
    o = optimizer
    placed = [(p, group["noise_scale"]) for group, params in layers for p in params]
    seeds = [direction_seed(o.seed, o.steps, j) for j in range(o.directions)]

    def sums(coefs: Tensor, of: list[Tensor]) -> list[Tensor]:
        return [
            add_noise(x, seeds, coefs.to(x.device) * scale, o.streams[p], noise=o.noise)
            for x, (p, scale) in zip(of, placed, strict=True)
        ]

    def slopes(at: Tensor) -> Tensor:
        losses = [
            as_losses(o, o.passes.perturbed(seed, o.eps, "loss", closure)).mean() for seed in seeds
        ]
        o.passes.unshift()
        return (torch.stack(losses) - at.mean()) / o.eps

    places = [p.detach() for p, _ in placed]
    x = o.passes.keep(places)
    here = slopes(clean)
    for place, value in zip(places, sums(o.eps * here / here.norm(), x), strict=True):
        place.copy_(value)
    there = slopes(as_losses(o, o.passes.clean(closure)))
    o.passes.restore()
    zeros = [torch.zeros_like(p, dtype=torch.float32, requires_grad=False) for p in places]
    change = sums(there - here, zeros)
    # The noise op is skipped if a coefficient is not finite, so the scores alone would not show it.
    sign = torch.where((there - here).isfinite().all(), -1.0, float("nan"))
    return [(sign.to(h.device) * v * h).flatten() for v, h in zip(x, change, strict=True)]


def moved(
    p: Tensor,
    group: dict[str, Any],
    drawn: tuple[list[int], Tensor] | None,
    found_inf: Tensor,
    generator: torch.Generator | None,
) -> tuple[Tensor]:
    """The new weights of a layer. generator: see rounding_bits."""
    x, (step, keep) = p.detach().float(), step_and_keep(group)
    y = keep * x
    if drawn is not None:
        numbers, slopes = drawn
        at = filled(numbers, torch.int64, p.device)
        y.view(-1).index_add_(0, at, step * group["noise_scale"] ** 2 * slopes.to(p.device))
    y = torch.where(found_inf.to(p.device) != 0, x, y)
    return (rounded(y, p.dtype, generator),)
