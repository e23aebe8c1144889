"""Perturbs bare parameters, which belong to no known module, by writing them.

The interface is `pseuzo.perturb.interface.Perturbing`. The parameters stay shifted until
`restore()`, or until an update takes the shift back in the same pass over the weights. fp32 is
restored through the noise op, up to rounding. bf16 and fp16 are restored from a copy of x, to the
bit, because their rounding errors would add up to the size of the updates.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from operator import call
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pseuzo.interrupts import uninterrupted
from pseuzo.perturb.masks import Masks, mask_of, op_in_place, op_out
from pseuzo.perturb.perturbation import Base


class Part(NamedTuple):
    """Parameters of one device that are shifted in one launch."""

    params: list[Tensor]
    streams: list[int]
    scale: float
    device: torch.device


class Shift(NamedTuple):
    """What the parameters hold in place of x: x + offset * z(seed)."""

    seed: int
    offset: float


class InPlace:
    """Shifts bare parameters to x + scale * noise_scale * z(seed) and back.

    on_first: called before the first shift away from x; on_change: called after every shift.
    """

    replaced = 0  # no scratch memory is ever replaced

    def __init__(
        self, noise: str, on_first: Callable[[], None], on_change: Callable[[], None]
    ) -> None:
        # Sums in half precision would not restore x. "hadamard" has the same z with fp32 sums.
        self.noise = noise.removesuffix("-fp16")
        self._on_first, self._on_change = on_first, on_change
        self._masks: Masks | None = None
        self._fp32: list[Part] = []
        self._half: list[Part] = []
        self._shifts: list[Shift] = []  # of each part of _fp32
        # While an fp32 shift is made: the launches so far, and the shifts that they lead to.
        self._moving: tuple[list[None], list[Shift]] | None = None
        self._copies: dict[Tensor, Tensor] = {}  # of bf16 and fp16 parameters: x while _copied
        self._copied = False
        self._aim = Shift(0, 0.0)  # what was asked for last

    def serve(
        self,
        groups: Iterable[tuple[float, Sequence[Tensor]]],
        streams: Mapping,
        masks: Masks | None = None,
    ) -> None:
        """Say which parameters are shifted from now on: (noise scale, parameters) by group.

        Parameters that an interrupted clean-up left shifted are restored first. masks: they must be
        random for fp32 parameters, because a shift changes which elements are small.
        """
        self.restore()
        self._masks = masks
        parts = [
            Part(part, [streams[p] for p in part], scale, device)
            for scale, params in groups
            for device in {p.device for p in params}
            for half in (False, True)
            if (part := [p for p in params if p.device == device and _is_half(p) == half])
        ]
        self._fp32 = [part for part in parts if not _is_half(part.params[0])]
        self._half = [part for part in parts if _is_half(part.params[0])]
        self.forget()

    @torch.no_grad()
    def aim(self, seed: int, scale: float | Tensor) -> None:
        """Shift the parameters to x + scale * z(seed)."""
        scale = float(scale)
        if not self._aim.offset:
            self._on_first()
            for p in (p for part in self._half for p in part.params):
                if p not in self._copies:
                    self._copies[p] = torch.empty_like(p, requires_grad=False)
                self._copies[p].copy_(p)
            self._copied = True
        self._move(Shift(seed, scale))

    def passing(self, kind: str = "any", base: Base | None = None) -> AbstractContextManager[None]:
        """A context for a pass. It does nothing: the parameters themselves are shifted."""
        assert base is None, "optimizers that need another base refuse bare parameters"
        return nullcontext()

    @torch.no_grad()
    def restore(self) -> None:
        """Put x back. Idempotent; it also puts back the parts that an interrupted shift reached."""
        if self._aim.offset:
            self._move(Shift(self._aim.seed, 0.0))

    def together(self, calls: Sequence[Callable[[], Any]]) -> list[Any]:
        """Return the results of calls, each of which makes one pass."""
        return [call() for call in calls]

    def pending(self) -> tuple[Shift, Mapping[Tensor, Tensor]] | None:
        """What an update must undo: the shift of fp32 parameters, and the copies of the others."""
        return (self._aim, self._copies) if self._aim.offset else None

    def forget(self) -> None:
        """Note that the parameters hold x, because an update took the shift back. Idempotent."""
        self._shifts, self._moving = [Shift(0, 0.0)] * len(self._fp32), None
        self._copied, self._aim = False, Shift(self._aim.seed, 0.0)

    def settled(self, kind: str) -> bool:
        return True

    def unused(self, kind: str) -> set[Tensor]:
        """No parameter counts as unused, because it is not known which ones a pass used."""
        return set()

    def _move(self, to: Shift) -> None:
        """Shift every part to `to`, and record which parts an interrupted shift reached."""
        if to.offset:  # so that restore() has something to do from now on
            self._aim = to
        self._settle()
        made: list[None] = []
        launches = [
            self._fp32_launch(part, old, to)
            for part, old in zip(self._fp32, self._shifts, strict=True)
        ]
        self._moving = made, [to] * len(launches)
        # 16-bit parameters are shifted from copies: that can be repeated, so it is not recorded.
        launches += [launch for part in self._half for launch in self._half_launches(part, to)]
        uninterrupted(made.extend, map(call, launches))
        self._settle()
        torch.autograd.graph.increment_version(
            [p for part in (*self._fp32, *self._half) for p in part.params]
        )
        # A pass that turns autocast's cache on itself leaves casts of the old weights.
        torch.clear_autocast_cache()
        self._on_change()
        self._aim = to

    def _settle(self) -> None:
        """Take note of which parts the last shift reached."""
        if self._moving is not None:
            made, led_to = self._moving
            n = len(made)
            self._shifts, self._moving = led_to[:n] + self._shifts[n:], None

    def _fp32_launch(self, part: Part, old: Shift, to: Shift) -> Callable[[], Any]:
        if old.offset == to.offset == 0:
            return int  # does nothing: adding 0 * z would turn -0 into 0
        if not old.offset or old.seed == to.seed:
            terms = [(to.seed, to.offset - old.offset)]
        else:
            terms = [(old.seed, -old.offset), (to.seed, to.offset)]
        arguments = self._arguments(part, terms)
        return partial(op_in_place(self._masks), part.params, *arguments)

    def _half_launches(self, part: Part, to: Shift) -> list[Callable[[], Any]]:
        if not self._copied:
            return []
        copies = [self._copies[p] for p in part.params]
        if not to.offset:
            return [partial(p.copy_, x) for p, x in zip(part.params, copies, strict=True)]
        arguments = self._arguments(part, [(to.seed, to.offset)])
        return [partial(op_out(self._masks), copies, *arguments, out=part.params)]

    def _arguments(self, part: Part, terms: list[tuple[int, float]]) -> tuple[Any, ...]:
        seeds, coefs = zip(*terms, strict=True)
        n = len(part.params)
        return (
            filled(seeds, torch.int64, part.device),
            filled(coefs, torch.float32, part.device),
            *(part.streams, [1.0] * n, [part.scale] * n, self.noise, False, 0, None),
            *mask_of(self._masks, part.params),
        )


def filled(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of a few numbers. Kernels fill them in, as a copy from the host would wait."""
    parts = [torch.full((1,), value, dtype=dtype, device=device) for value in values]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _is_half(p: Tensor) -> bool:
    return p.dtype is not torch.float32
