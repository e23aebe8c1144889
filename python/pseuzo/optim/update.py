"""One update of the weights, x <- keep * x + sum_k c_k z(s_k), prepared group by group and then
run.

Everything that can be refused is refused while the update is prepared, before a weight is written.
Then every launch is made exactly once, even if `run` is interrupted and called again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import partial
from operator import call
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pseuzo.optim.skips import NOT_FINITE
from pseuzo.perturb.masks import mask_of, op_in_place, op_out
from pseuzo.perturb.offloaded import store_of
from pseuzo_kernels.ops import add_noise_list_out
from pseuzo_kernels.reference import hash_seed, round_stochastically

if TYPE_CHECKING:
    from pseuzo.optim.base import ZeroOrder

CHUNK = 1 << 22  # elements of an exact gradient's update at a time, which bounds its temporaries


@dataclass(frozen=True)
class Direction:
    """The update that a step makes: x <- keep x - lr sum_k coefs[k] z(seeds[k]).

    seeds: [n] int64. coefs: [n] fp32, zero where found_inf ([1] fp32) is 1. kind: that of the
    passes that measured it. state: what the estimator keeps once the weights have moved, see
    `ZeroOrder.keep`. stats: the next `ZeroOrder.stats`. gradients: parameters of exact_gradient
    groups -> dg/dx. skip_reason: why, for the warning about skipped steps.
    """

    seeds: Tensor
    coefs: Tensor
    found_inf: Tensor
    kind: str
    state: Any = None
    stats: Mapping[str, Any] = field(default_factory=dict)
    gradients: Mapping[Tensor, Tensor] = field(default_factory=dict)
    skip_reason: str = NOT_FINITE


class Update:
    """Launches that move the weights, and how many of them were made.

    moved: the parameters that take noise with their lr * noise_scale, by group. unused: those that
    were skipped. rounding_seed: of stochastic rounding.
    """

    def __init__(
        self,
        launches: Sequence[Callable[[], Any]],
        moved: list[tuple[list[Tensor], float]],
        unused: Set[Tensor],
        rounding_seed: int,
    ) -> None:
        self._launches = launches
        self._made: list[Any] = []
        self.moved, self.unused, self.rounding_seed = moved, unused, rounding_seed

    @property
    def begun(self) -> bool:
        """Whether a weight may have been written."""
        return bool(self._made)

    def after(self, launches: Sequence[Callable[[], Any]]) -> Update:
        """Return this update with other launches before its own."""
        return Update([*launches, *self._launches], self.moved, self.unused, self.rounding_seed)

    def run(self) -> None:
        """Make the launches that were not made yet.

        Python code between a launch and its count could be interrupted. `extend` and `map` run
        none.
        """
        self._made.extend(map(call, self._launches[len(self._made) :]))


def prepare(
    optimizer: ZeroOrder,
    groups: Iterable[tuple[Mapping[str, Any], list[Tensor]]],
    direction: Direction,
    rounding_seed: int,
    unused: Set[Tensor],
    exact_groups: Iterable[Mapping[str, Any]] = (),
) -> Update:
    """x <- (1 - lr * weight_decay) x - lr * noise_scale * sum_k coefs[k] z(seeds[k]) for all
    groups, each with its parameters.

    The update takes back in the same launch what bare parameters are shifted by, skips the
    parameters in `unused`, because noise is all that they would get, and changes nothing but the
    shift where found_inf is 1. Elements that the optimizer's masks leave out stay as they are,
    without decay. The store of an offloaded model makes the launches region by region, before it
    uploads them. exact_groups: those with parameters in direction.gradients.
    """
    streams, masks, noise = optimizer.streams, optimizer.masks, optimizer.noise
    store, stochastic = store_of(optimizer.model), optimizer.rounding == "stochastic"
    seeds, coefs, found_inf = direction.seeds, direction.coefs, direction.found_inf
    shift, copies = optimizer.passes.pending() or (None, {})
    together: dict[tuple, tuple[list[Tensor], list[float], list[float]]] = {}
    moved: list[tuple[list[Tensor], float]] = []
    for group, params in groups:
        params = [p for p in params if p not in unused] if unused else params
        moved.append((params, group["lr"] * group["noise_scale"]))
        step, keep = step_and_keep(group)
        for device, copied, part in _alike(params, copies):
            # What is taken back decays with its weight, so that a launch has one keep.
            back = keep if shift is not None and not copied else None
            for region, some in [(None, part)] if store is None else store.by_region(part):
                key = (step, back, copied, device, region)
                members, keeps, scales = together.setdefault(key, ([], [], []))
                members += some
                keeps += [keep] * len(some)
                scales += [group["noise_scale"]] * len(some)
    launches: list[Callable[[], Any]] = []
    for (step, back, copied, device, region), (members, keeps, scales) in together.items():
        s, c = seeds.to(device), (coefs * step).to(device)
        # The op sets its flag where coefs * step overflows. That concerns one launch; the step's
        # own flag stays as it is.
        skip = found_inf.to(device, copy=abs(step) > 0.25)
        at, mask = [streams[p] for p in members], mask_of(masks, members)
        if back is None or shift is None:
            arguments = (s, c, at, keeps, scales, noise, stochastic, rounding_seed, skip, *mask)
            if copied:
                from_copies = [copies[p] for p in members]
                launches.append(partial(op_out(masks), from_copies, *arguments, out=members))
            else:
                launch = partial(op_in_place(masks), members, *arguments)
                launches.append(launch if store is None else partial(store.defer, region, launch))
            continue
        exact_sums = noise.removesuffix("-fp16")  # sums in half precision would not restore x
        s = torch.cat([s, s.new_full((1,), shift.seed)])
        c = torch.cat([c, c.new_full((1,), -shift.offset * keeps[0])])
        arguments = (s, c, at, keeps, scales, exact_sums, stochastic, rounding_seed, skip, *mask)
        launches.append(partial(op_in_place(masks), members, *arguments))
        taken_back = (s[-1:], at, scales, exact_sums, shift.offset, skip, masks)
        launches.append(partial(_take_back_if_skipped, members, *taken_back))
    launches += _descents(exact_groups, direction, streams, stochastic, rounding_seed)
    written = [p for params, _ in moved for p in params]
    launches.append(partial(torch.autograd.graph.increment_version, written))
    launches.append(torch.clear_autocast_cache)  # it holds casts of the old weights
    return Update(launches, moved, unused, rounding_seed)


def _take_back_if_skipped(members, seed, at, scales, noise, offset, skip, masks) -> None:
    """Take the shift back if the launch before was skipped; otherwise it did so itself."""
    only_if_skipped = torch.full_like(skip, float("nan")).masked_fill_(skip != 0, -offset)
    keeps = [1.0] * len(members)
    arguments = (seed, only_if_skipped, at, keeps, scales, noise, False, 0, None)
    op_in_place(masks)(members, *arguments, *mask_of(masks, members))


def _alike(
    params: list[Tensor], copies: Mapping[Tensor, Tensor]
) -> Iterator[tuple[torch.device, bool, list[Tensor]]]:
    """Split params by device, and by whether a copy of them holds x."""
    devices = {p.device for p in params}
    for device in devices:
        there = params if len(devices) == 1 else [p for p in params if p.device == device]
        copied = [p for p in there if p in copies] if copies else []
        if copied:
            yield device, True, copied
            there = [p for p in there if p not in copies]
        if there:
            yield device, False, there


def _descents(
    groups: Iterable[Mapping[str, Any]],
    direction: Direction,
    streams: Mapping[Tensor, int],
    stochastic: bool,
    rounding_seed: int,
) -> Iterator[Callable[[], Any]]:
    """x <- (1 - lr * weight decay) x - lr * gradient, rounded like every update."""
    gradients, found_inf = direction.gradients, direction.found_inf
    for group in groups:
        step, keep = step_and_keep(group)
        for p in group["params"]:
            if p not in gradients:
                continue
            bits = rounding_bits(p, rounding_seed, streams[p], stochastic)
            skip = found_inf.to(p.device) != 0
            slot: dict[str, Any] = {}
            chunks = zip(
                p.view(-1).split(CHUNK), gradients[p].reshape(-1).split(CHUNK), strict=True
            )
            for x, gradient in chunks:
                compute = partial(descended, x, gradient, keep, step, skip, bits)
                yield from writes([x], compute, slot)


def step_and_keep(group: Mapping[str, Any]) -> tuple[float, float]:
    """The factors of the direction and of x in the update of a group: -lr (lr to maximize), and
    1 - lr * weight_decay."""
    lr = group["lr"]
    return lr if group["maximize"] else -lr, 1.0 - lr * group["weight_decay"]


def estimate_of(p: Tensor, terms: tuple[Any, ...], chunk: int, slot: dict[str, Any]) -> Tensor:
    """A chunk of sum_k c_k z_k in the shape of p, fp32, flat.

    terms: seeds, coefs, [stream], [keep], [scale] and noise, as the ops take them. All of it is
    made once for a parameter, and `slot` keeps it until another parameter's replaces it.
    """
    if slot.get("of") is not p:
        slot.pop("estimate", None)
        g = torch.empty(p.numel(), dtype=torch.float32, device=p.device)
        add_noise_list_out([], *terms, False, 0, None, out=[g])
        slot.update(of=p, estimate=g.split(CHUNK))
    return slot["estimate"][chunk]


def rounding_bits(
    p: Tensor, rounding_seed: int, stream: int, stochastic: bool
) -> torch.Generator | None:
    """The generator of bits that round a parameter stochastically; None: it rounds to nearest."""
    if not stochastic or p.dtype is torch.float32:
        return None
    return torch.Generator(p.device).manual_seed(hash_seed(rounding_seed + stream))


def descended(
    x: Tensor,
    gradient: Tensor,
    keep: float,
    step: float,
    skip: Tensor,
    generator: torch.Generator | None,
) -> tuple[Tensor]:
    """keep * x + step * gradient, or x where skip ([1] bool), for `writes` to write to x.

    generator: see rounding_bits.
    """
    y = torch.where(skip, x.float(), keep * x.float() + step * gradient.float())
    return (rounded(y, x.dtype, generator),)


def rounded(y: Tensor, dtype: torch.dtype, generator: torch.Generator | None) -> Tensor:
    """y rounded stochastically to dtype; without a generator y itself, fp32, which the copy to the
    weight rounds to nearest."""
    if generator is None:
        return y
    dither = torch.empty(y.shape, dtype=torch.int64, device=y.device)
    return round_stochastically(y, dither.random_(1 << 16, generator=generator), dtype)


def writes(
    targets: Sequence[Tensor], compute: Callable[[], Sequence[Tensor]], slot: dict[str, Any]
) -> list[Callable[[], None]]:
    """Launches that write the results of compute() to the targets.

    The first launch computes them once. `slot` keeps them until another computation with the same
    slot replaces them, so a launch that is made again after an interrupt writes the same numbers,
    and only one computation's results are in memory.
    """
    key = object()
    return [partial(_write, i, x, key, compute, slot) for i, x in enumerate(targets)]


def _write(i, x, key, compute, slot) -> None:
    if slot.get("key") is not key:
        slot.update(key=key, values=compute())
    x.copy_(slot["values"][i])  # this line is last, so that nothing comes between it and its count
