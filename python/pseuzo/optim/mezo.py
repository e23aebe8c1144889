"""MeZO: two forward passes and one seed a step.

Source: Malladi et al., "Fine-tuning language models with just forward passes" (2023), Algorithms 1
and 2.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pseuzo.optim.base import ZeroOrder
from pseuzo.optim.clip import clip_slopes
from pseuzo.optim.curvature import Curvature, of_examples, square_of
from pseuzo.optim.estimator import Measured
from pseuzo.optim.merging import merged_losses
from pseuzo.optim.passes import Passes, without_autograd
from pseuzo.optim.seeds import direction_seed
from pseuzo.optim.update import Direction
from pseuzo.perturb.in_place import filled
from pseuzo_kernels.checks import check_count


@dataclass(frozen=True)
class Slopes(Measured):
    """The projected gradients along q directions.

    seeds: of the directions. slopes: [q] fp32, 0 where not finite. finite: [] bool, whether all
    losses and slopes of the step are finite. pairs: for each direction the losses at x + eps z_j,
    and those at x - eps z_j, or at x if one-sided; [] or [B] fp32, before examples are clipped.
    square: [] fp32, the curvature along the directions, where the optimizer scales by it.
    """

    seeds: tuple[int, ...]
    slopes: Tensor
    finite: Tensor
    pairs: Sequence[tuple[Tensor, Tensor]]
    square: Tensor | None = field(default=None, kw_only=True)


class Point(NamedTuple):
    """A pass: call() at x + scale * z(seed), or at x if scale is None."""

    call: Callable[[], Any]
    seed: int = 0
    scale: float | Tensor | None = None

    def run(self, passes: Passes) -> Any:
        if self.scale is None:
            return passes.clean(self.call)
        return passes.perturbed(self.seed, self.scale, "loss", self.call)


def measure_slopes(
    optimizer: ZeroOrder,
    key: tuple,
    loss_of: Callable[[], Any] | Sequence[Callable[[], Any]],
    two_sided: bool = True,
    directions: int = 1,
) -> Slopes:
    """c_j = (L(x + eps z_j) - L(x - eps z_j)) / (2 eps), along `directions` z_j.

    key: tells the passes apart, for CUDA graphs. loss_of: L, or a loss L_j for each direction, such
    as that of a part of the batch. two_sided False: (L(x + eps z_j) - L(x)) / eps.
    """
    o, eps = optimizer, optimizer.eps
    seeds = tuple(direction_seed(o.seed, o.steps, j) for j in range(directions))
    losses_of = [loss_of] * directions if callable(loss_of) else list(loss_of)
    scales = (eps, -eps) if two_sided else (eps,)
    # Clean passes are first, because perturbed ones leave bare parameters shifted.
    clean = [] if two_sided else [loss_of] if callable(loss_of) else losses_of
    points = [Point(call) for call in clean]
    points += [
        Point(call, seed, scale)
        for seed, call in zip(seeds, losses_of, strict=True)
        for scale in scales
    ]
    losses = losses_at(o, (two_sided, *key), points)
    if losses is None:
        return unknown_slopes(o, "loss", seeds)
    if two_sided:
        pairs = list(zip(losses[::2], losses[1::2], strict=True))
    else:
        at_x = losses[: len(clean)] * (directions // len(clean))
        pairs = list(zip(losses[len(clean) :], at_x, strict=True))
    with without_autograd():
        return slopes_of(o, seeds, pairs, two_sided)


def losses_at(optimizer: ZeroOrder, key: tuple, points: Sequence[Point]) -> list[Tensor] | None:
    """The losses at each of the points, [] or [B] fp32, of the global batch.

    None on ranks that do not know them, which are all but the root. key: see measure_slopes.
    """
    o, exchange = optimizer, optimizer.exchange
    mine = points if exchange is None else [points[i] for i in exchange.mine(len(points))]

    def run() -> list[Tensor]:
        found = o.passes.together([partial(point.run, o.passes) for point in mine])
        return [as_losses(o, loss) for loss in found]

    losses = o.passes.run("loss", key, run)
    if exchange is None:
        return losses
    merged = merged_losses(exchange, [[x] for x in losses], len(points), "loss")
    return None if merged is None else [x for (x,) in merged]


def slopes_of(
    optimizer: ZeroOrder,
    seeds: tuple[int, ...],
    pairs: Sequence[tuple[Tensor, Tensor]],
    two_sided: bool,
) -> Slopes:
    """The slopes along the seeds, from the losses at both points of each."""
    eps, losses, found, squares = optimizer.eps, [], [], []
    ok = torch.ones((), dtype=torch.bool, device=optimizer.device)
    for plus, minus in pairs:
        check_same_batch(plus, minus)
        slope = (plus - minus) / (2 * eps if two_sided else eps)
        loss = (plus + minus) / 2 if two_sided else minus
        ok = ok & slope.isfinite().all() & loss.isfinite().all()
        losses.append(of_examples(loss).mean())
        found.append(clip_slopes(of_examples(slope), optimizer.clip_examples).mean())
        if optimizer.curvature_window:
            squares.append(square_of(slope, loss))
    c = torch.stack(found)
    ok = ok & c.isfinite().all()
    loss = torch.stack(losses).mean()
    square = torch.stack(squares).mean() if squares else None
    slopes = torch.where(ok, c, torch.zeros_like(c))
    return Slopes(loss, "loss", seeds, slopes, ok, pairs, square=square)


def unknown_slopes(optimizer: ZeroOrder, kind: str, seeds: tuple[int, ...]) -> Slopes:
    """What a rank has that does not know the losses of the global batch: nothing is read of it but
    the kind of its passes."""
    unknown = torch.full((), float("nan"), device=optimizer.device)
    return Slopes(unknown, kind, seeds, unknown.expand(len(seeds)), unknown.isfinite(), ())


def mean_direction(optimizer: ZeroOrder, measured: Slopes) -> Direction:
    """The mean of c_j z_j over the directions."""
    c = measured.slopes
    return Direction(
        filled(measured.seeds, torch.int64, optimizer.device),
        c / len(measured.seeds),
        (~measured.finite).float().view(1),
        measured.kind,
        stats={"projected_grad": c, "momentum": 0.0, "window": 0},
    )


def check_closure(optimizer: ZeroOrder, closure: Any) -> None:
    """Raise TypeError if a step is not given what it can call."""
    if not callable(closure):
        raise TypeError(f"{type(optimizer).__name__}.step: needs a closure that returns the loss")


def as_losses(optimizer: ZeroOrder, loss: Any) -> Tensor:
    """The loss in fp32 on the device: [] for a scalar tensor or a number, [B] for per-example
    losses; [B, P] for those of their tokens, where the optimizer measures curvature."""
    exchange = optimizer.exchange
    if exchange is not None and exchange.size == 0:  # what a part without rows finds is ignored
        return torch.full((), math.nan, device=optimizer.device)
    if isinstance(loss, Tensor):
        most = 2 if optimizer.curvature_window else 1
        if loss.numel() != 1 and not (1 <= loss.dim() <= most and loss.numel()):
            raise ValueError(
                "step: the loss must be a scalar, or a vector of per-example losses, got shape "
                f"{tuple(loss.shape)}; reduce it, e.g. .mean()"
            )
        loss = loss.detach().to(device=optimizer.device, dtype=torch.float32)
        loss = loss if 1 <= loss.dim() <= most else loss.reshape(())
    elif isinstance(loss, Real):  # NumPy's numbers, too
        loss = torch.full((), float(loss), dtype=torch.float32, device=optimizer.device)
    else:
        raise TypeError(
            f"step: the closure must return a scalar tensor or a number, got {type(loss).__name__}"
        )
    each = "clip_examples", "curvature_window"
    if loss.dim() == 0 and (needs := [name for name in each if getattr(optimizer, name)]):
        raise ValueError(
            f"step: {needs[0]} needs the loss of each example, [B], and got one number; return "
            f"the losses before their mean, or leave {needs[0]} off"
        )
    return loss


def check_same_batch(plus: Tensor, minus: Tensor) -> None:
    """Raise ValueError if the losses of two passes differ in shape."""
    if plus.shape != minus.shape:
        raise ValueError(
            f"step: the passes of a step gave losses of shapes {tuple(plus.shape)} and "
            f"{tuple(minus.shape)}; they must run on the same batch"
        )


def check_curvature_window(optimizer: ZeroOrder, window: Any) -> None:
    """Raise ValueError if the optimizer cannot have rates in units of 1 / T."""
    name = type(optimizer).__name__
    if not isinstance(window, int) or isinstance(window, bool) or window < 0:
        raise ValueError(f"{name}: curvature_window must be a number of steps, got {window!r}")
    if not window:
        return
    if isinstance(optimizer, MeZO) and type(optimizer) is not MeZO:
        raise ValueError(f"{name}: curvature_window is for the updates of MeZO and PseuZO")
    if not isinstance(optimizer, MeZO) and optimizer.exchange is not None:
        raise ValueError(
            f"{name}: curvature_window needs the slope of each example, which ranks pool; use one "
            "process, or MeZO"
        )


def check_decay(optimizer: ZeroOrder) -> None:
    """Raise ValueError if lr is in units of 1 / T, and weights decay by it."""
    if optimizer.curvature_window and any(g["weight_decay"] for g in optimizer.param_groups):
        raise ValueError(
            f"{type(optimizer).__name__}: weight_decay is multiplied by lr, which curvature_window "
            "makes a number of another kind; leave off one of the two"
        )


def curvature_of(optimizer: ZeroOrder, squares: Tensor | None = None) -> Curvature:
    """What measures T for an optimizer whose rates are in units of 1 / T. squares: of a state."""
    curvature = Curvature(optimizer.curvature_window, optimizer.device)
    if squares is not None:
        curvature.squares = squares.to(optimizer.device)
    return curvature


# What a step leaves: the seeds and coefficients of the last steps, and what they say of T.
State = tuple[tuple[Tensor, Tensor] | None, Tensor | None]


class MeZO(ZeroOrder):
    """x <- x - lr * (L(x + eps z) - L(x - eps z)) / (2 eps) * z: two forward passes and one seed.

    params: a module, whose weights a perturbation never writes (see pseuzo.perturbed), or
    parameters or parameter groups as in every torch optimizer, which are perturbed in place; give
    `model` to have them perturbed exactly. Options of a group: lr, weight_decay (decoupled, applied
    once), noise_scale (multiplies z; 0 freezes the group), maximize.
    eps: size of the perturbation. two_sided False: (L(x + eps z) - L(x)) / eps. noise, rounding:
    see pseuzo_kernels; rounding applies to bf16 and fp16 weights. seed: that of the run; step t
    perturbs with a seed made from (seed, t).
    directions: q; the update is the mean over q perturbations (2 q passes, or q + 1 if not
    two_sided).
    momentum: mu; the update is the sum of mu^age * (the update of `age` steps ago) over the last
    `window` steps, K of them. This is SGD's momentum cut off after K steps, kept as seeds and
    coefficients in place of a buffer of the model's size. An update makes the noise of K * q seeds.
    A skipped step counts as a step with gradient 0.
    clip_examples: r; the projected gradient of each example is clamped to r times the batch's
    median size, unless that is 0. The closure must then return per-example losses, [B].
    curvature_window: over so many steps the curvature T of the loss along the noise is measured,
    and lr is in units of 1 / T (0.1 is a good one, and momentum does not change it), see
    pseuzo.optim.curvature; 0: lr is the rate. The closure must return negative log likelihoods of
    the examples, [B], or where the loss is a mean over tokens, of these, [B, P], as square_of there
    wants them. stats["curvature"] is T. ValueError with weight decay, whose rate is lr.
    capture: record the passes as CUDA graphs, from the third step with the same closure on, and
    replay them, which saves hundreds of launches (bits: see pseuzo.perturb.graphs). The closure
    must then be the same object at every step (or one of a few), read its batch from tensors that
    you write before the step (tensor.copy_(...)), and never wait for the device. lr, weight decay
    and eps may change; the weights and all else that the closure reads must stay where they are in
    memory.
    The passes of a step run with the module in eval mode; with bare parameters the caller sets the
    mode. Under torch.autocast no step uses or leaves a cached cast, wherever the autocast block
    begins and ends. direction_ranks: see pseuzo.optim.ranks. Where the process group has several
    ranks, each gives the losses of its own rows, and all make the same step. Source: Malladi et al.
    2023, Algorithms 1 and 2.
    """

    own_settings: tuple[str, ...] = ("directions", "momentum", "window", "curvature_window")

    def __init__(
        self,
        params: nn.Module | Iterable,
        lr: float = 1e-6,
        eps: float = 1e-3,
        *,
        two_sided: bool = True,
        directions: int = 1,
        momentum: float = 0.0,
        window: int = 14,
        curvature_window: int = 0,
        **options: Any,
    ):
        name = type(self).__name__
        for key, value in (("directions", directions), ("window", window)):
            check_count(name, key, value)
        if not 0 <= momentum <= 1:
            raise ValueError(f"{name}: momentum must be in 0 .. 1, got {momentum}")
        self.curvature_window = curvature_window
        self.two_sided, self.directions = two_sided, directions
        self.momentum, self.window = float(momentum), window
        # Seeds and coefficients of the last steps, [n, q], the newest last.
        self._past: tuple[Tensor, Tensor] | None = None
        super().__init__(params, lr=lr, eps=eps, **options)
        check_curvature_window(self, curvature_window)
        check_decay(self)
        self._curvature = curvature_of(self)

    def step(  # type: ignore[override]  # torch's closure returns a float
        self, closure: Callable[[], Any] | None = None, *, size: float | None = None
    ) -> Tensor | None:
        """closure() -> loss, a scalar tensor or a number, or per-example losses [B]; called twice.

        Returns the mean of both (the clean loss if not two_sided), on the device: reading it waits.
        Without a closure, applies the last estimate; RuntimeError if there is none. If a loss is
        NaN or infinite, the update is skipped, counted (`skipped_steps`) and warned about. size: of
        this rank's part of the batch, see pseuzo.optim.ranks.
        """
        return super().step(closure, size=size)

    def measure(self, closure: Callable[[], Any]) -> Slopes:
        """Run the passes of a step; see step."""
        check_closure(self, closure)
        check_decay(self)
        return measure_slopes(self, (closure,), closure, self.two_sided, self.directions)

    def coefficients(self, measured: Slopes) -> Direction:
        terms = sum(self.momentum**age for age in range(self.window))
        now, squares = self._curvature.scaled(
            mean_direction(self, measured), measured.square, terms
        )
        if not self.momentum:
            return replace(now, state=(None, squares))
        seeds, coefs = self.window_with(now.seeds, now.coefs)
        ages = torch.arange(len(coefs) - 1, -1, -1, device=coefs.device)
        decays = torch.full_like(ages, self.momentum, dtype=torch.float64)
        faded = (coefs * torch.pow(decays, ages)[:, None]).float().flatten()
        return replace(
            now,
            seeds=seeds.flatten(),
            coefs=torch.where(now.found_inf != 0, 0.0, faded),
            state=((seeds, coefs), squares),
            stats={**now.stats, "momentum": self.momentum, "window": len(coefs)},
        )

    def window_with(self, seeds: Tensor, coefs: Tensor) -> tuple[Tensor, Tensor]:
        """Seeds and coefficients of the last steps and of this one, [n, q], the newest last."""
        past = self._past
        if past is None:
            past = seeds.new_empty(0, self.directions), coefs.new_empty(0, self.directions)
        seeds, coefs = (
            torch.cat([old, new[None]])[-self.window :]
            for old, new in zip(past, (seeds, coefs), strict=True)
        )
        return seeds, coefs

    def keep(self, state: State | None) -> None:
        past, squares = state or (None, None)
        if past is not None:
            self._past = past
        if squares is not None:
            self._curvature.squares = squares

    @property
    def history(self) -> int | None:
        return self.curvature_window

    def recall(self, seeds: Tensor, coefs: Tensor, state: Any) -> Any:
        """The newest coefficients of a record have not decayed: they are those of its own step."""
        past = None
        if self.momentum:
            past = self.window_with(seeds[-self.directions :], coefs[-self.directions :])
        return past, None if state is None else state[1]

    def own_state(self) -> dict[str, Any]:
        seeds, coefs = self._past or (None, None)
        past = {
            "seeds": seeds,
            "coefs": coefs,
            "directions": self.directions,
            "momentum": self.momentum,
            "window": self.window,
            "curvature_window": self.curvature_window,
            "squares": self._curvature.squares,
        }
        return super().own_state() | {"past": past}

    def check_own_state(self, own: Mapping[str, Any]) -> None:
        check_curvature_window(self, own["past"].get("curvature_window", 0))

    def load_own_state(self, own: Mapping[str, Any]) -> None:
        past = own["past"]
        self.directions, self.momentum = past["directions"], past["momentum"]
        self.window, self._past = past["window"], None
        if past["seeds"] is not None:
            self._past = past["seeds"].to(self.device), past["coefs"].to(self.device)
        self.curvature_window = past.get("curvature_window", 0)  # older versions lack it
        self._curvature = curvature_of(self, past.get("squares"))
