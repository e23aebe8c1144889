"""What the public functions share: from their arguments to one call of an op.

The arguments are checked and normalised here, and no arithmetic on weights happens.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pseuzo_kernels.checks import (
    check_finite,
    check_found_inf,
    check_noise,
    check_not_negative,
    check_rounding,
    check_stream,
    per_tensor,
    seeds_and_coefs,
    signed64,
)
from pseuzo_kernels.lists import Checked, CheckedLists, Params, named
from pseuzo_kernels.selection import (
    Mask,
    Offset,
    Part,
    RandomMask,
    Selected,
    SmallMask,
    dtensors,
    local,
    part_of,
    places_of,
    selected,
)
from pseuzo_kernels.streams import StreamWatch, streams_of_names

Seeds = int | Sequence[int] | Tensor
Coefs = float | Sequence[float] | Tensor
Streams = Sequence[int] | str | None
Out = Tensor | Sequence[Tensor] | None
# The functions that move x itself by noise that is to be undone.
MOVING = ("perturb_", "restore_", "low_rank_perturb_")


class How(NamedTuple):
    """The options of a call that all functions have."""

    noise: str
    rounding: str
    rounding_seed: int | None
    found_inf: Tensor | None

    def resolved(
        self, op: str, device: torch.device, coefs: Coefs
    ) -> tuple[str, bool, int, Tensor | None]:
        """The last arguments of an op: noise, stochastic, rounding_seed, found_inf."""
        check_noise(op, self.noise)
        check_rounding(op, self.rounding)
        if self.rounding == "stochastic" and self.rounding_seed is None:
            raise ValueError(
                f'{op}: rounding="stochastic" needs a rounding_seed, another one at each call '
                "(such as the number of the step): with the same one all calls draw the same bits, "
                "and their errors add up"
            )
        rounding_seed = 0 if self.rounding_seed is None else signed64(op, self.rounding_seed)
        found_inf = check_found_inf(op, self.found_inf, coefs, device)
        return self.noise, self.rounding == "stochastic", rounding_seed, found_inf


def bump_versions(xs: Sequence[Tensor]) -> None:
    """Tell autograd that xs changed, so that a stale backward fails loudly instead of using new
    weights."""
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(xs)


def call_in_place(
    op: Callable, xs: Sequence[Tensor], *args: Any, known: Checked | None = None
) -> None:
    """op(xs, ...), which writes xs. One that is not contiguous is copied, alone, and copied back:
    the noise of an element depends on its position in the shape, not on its address."""
    if torch.compiler.is_compiling():
        xs = [x.detach() for x in xs]
    with torch.no_grad():
        contiguous = known.contiguous if known else all(map(Tensor.is_contiguous, xs))
        dense = xs if contiguous else [x.contiguous() for x in xs]
        op(dense, *args)
        if dense is not xs:
            for x, copy in zip(xs, dense, strict=True):
                if copy is not x:
                    x.copy_(copy)


def call_out(op: Callable, xs: Sequence[Tensor], out: Sequence[Tensor], *args: Any) -> None:
    """op(xs, ..., out=out), with copies of tensors that are not contiguous."""
    if torch.compiler.is_compiling():
        xs, out = [x.detach() for x in xs], [y.detach() for y in out]
    with torch.no_grad():
        if all(map(Tensor.is_contiguous, (*xs, *out))):
            op(xs, *args, out=out)
            return
        made = [y if y.is_contiguous() else y.new_empty(y.shape) for y in out]
        op([x.contiguous() for x in xs], *args, out=made)
        for y, new in zip(out, made, strict=True):
            if new is not y:
                y.copy_(new)


class Calls:
    """The calls of one implementation of the ops; `pseuzo_kernels.reference` defines them."""

    def __init__(
        self,
        add_noise_list_: Callable,
        add_noise_list_out: Callable,
        masked: tuple[Callable, ...] = (),
        parts: tuple[Callable, ...] = (),
    ):
        """Each pair of ops is one that writes in place, and one that writes out. masked, parts:
        add_noise_masked_list_ and add_noise_parts_."""
        self._plain, self._masked, self._parts = (
            (add_noise_list_, add_noise_list_out),
            masked,
            parts,
        )
        self._lists, self._watch = CheckedLists(), StreamWatch()

    def _op_for(
        self, chosen: Selected, places: list[int], sign: bool = False
    ) -> tuple[tuple[Callable, ...], tuple[Any, ...]]:
        """The pair of ops that does this, the simplest one, and its last arguments."""
        if places or chosen.takes or sign:
            return self._parts, (places, *chosen, sign)
        if chosen.limits:
            return self._masked, chosen[:2]
        return self._plain, ()

    def _streams_of(
        self, op: str, streams: Streams, names: tuple[str, ...] | None, n: int
    ) -> tuple[Sequence[int], bool]:
        """The streams of n tensors, and whether they were chosen here."""
        if streams is None and names is None:
            return range(n), True
        if streams is None or isinstance(streams, str):
            if streams not in (None, "names"):
                raise ValueError(f'{op}: streams must be numbers or "names", got {streams!r}')
            if names is None:
                raise ValueError(
                    f'{op}: streams="names" needs pairs of a name and a tensor, as '
                    "named_parameters() has them"
                )
            return streams_of_names(op, names), True
        numbers = [check_stream(op, stream) for stream in streams]
        if len(numbers) != n:
            raise ValueError(f"{op}: one stream per tensor ({n}) is needed, got {len(numbers)}")
        return numbers, False

    def _one(
        self, op, x, seeds, coefs, stream, keep, scale, how, mask, offset
    ) -> tuple[tuple[Callable, ...], tuple[Any, ...]]:
        """The pair of ops for one tensor, and their arguments after the tensors."""
        keep = check_finite(op, "keep", keep)
        how = how.resolved(op, x.device, coefs)
        streams = [check_stream(op, stream)]
        if not isinstance(mask, Tensor | SmallMask | RandomMask) and mask is not None:
            raise TypeError(f"{op}: mask must be a bool tensor, a SmallMask or a RandomMask")
        ops, rest = self._op_for(selected(op, mask, [x]), places_of(op, offset, [x]))
        terms = seeds_and_coefs(op, seeds, coefs, x.device)
        return ops, (*terms, streams, [keep], [scale], *how, *rest)

    def _list(
        self,
        op: str,
        params: Params,
        seeds: Any,
        coefs: Coefs,
        streams: Streams,
        noise_scale: float | Sequence[float],
        how: How,
        *,
        lr: float | None = None,
        weight_decay: float | Sequence[float] = 0.0,
        out: Out = None,
        in_place: bool = True,
        mask: Mask = None,
        offset: Offset = None,
        sign: bool = False,
        run: Callable | None = None,
    ) -> Any:
        """Check the arguments, and call the op once.

        in_place: params are written; else out is, which is made if it is None, and returned: a
        tensor for a tensor, a list for a list. run: is called instead of the op, with coefs as
        they are, and with places, limits, mask_seed and takes as its last arguments; the op gets
        coefs times -lr.
        """
        xs, names = named(op, params)
        ys = None
        if out is not None:
            ys = [out] if isinstance(out, Tensor) else list(out)
        by_hand = offset is not None  # two shards may have one stream and other noise
        if sharded := dtensors(xs):
            if offset is not None:
                raise ValueError(f"{op}: DTensors know their offset; pass tensors, or no offset")
            pairs = zip(xs, sharded, strict=True)
            offset = [part_of(x) if is_shard else Part() for x, is_shard in pairs]
            xs, ys = list(map(local, xs)), ys and list(map(local, ys))
        known = self._lists.check(op, xs, "params", ys)
        if ys is None and not in_place:
            ys = [torch.empty_like(x, requires_grad=False) for x in xs]
        n = len(xs)
        numbers, by_us = self._streams_of(op, streams, names, n)
        scales = per_tensor(op, "noise_scale", noise_scale, n)
        keeps = _keeps(op, lr, weight_decay, n)
        if not all(scales):  # a tensor without noise is left alone: nothing decays it either
            keeps = [keep if k else 1.0 for keep, k in zip(keeps, scales, strict=True)]
        if xs:
            device = xs[0].device
            if not isinstance(seeds, int | Tensor) and isinstance(seeds, Iterable):
                seeds = list(seeds)
            rest = how.resolved(op, device, coefs)
            s, c = seeds_and_coefs(op, seeds, coefs, device)
            if by_us and known is not None and not by_hand:
                repeats = "perturb" not in op
                self._watch.note(op, seeds, numbers, known.tensors, names, repeats)
            if lr is not None and run is None and not sign:
                c = c * -lr
            chosen = selected(op, mask, xs, in_place_noise=op in MOVING)
            places = places_of(op, offset, xs)
            ops, more = (
                self._op_for(chosen, places, sign) if run is None else ((), (places, *chosen))
            )
            if sign and lr is not None:
                scales = [-lr * scale for scale in scales]
            args = s, c, list(numbers), keeps, scales, *rest, *more
            written = xs if all(scales) else [x for x, k in zip(xs, scales, strict=True) if k]
            if ys is not None:
                call_out(run or ops[1], xs, ys, *args)
                bump_versions(ys)
            elif written:
                call_in_place(run or ops[0], xs, *args, known=known)
                bump_versions(written)
        return ys[0] if ys and isinstance(params, Tensor) else ys


def _keeps(op: str, lr: float | None, weight_decay: Any, n: int) -> list[float]:
    """1 - lr * weight_decay, for each of n tensors."""
    if lr is None:
        return [1.0] * n
    name = "1 - lr * weight_decay"
    if isinstance(weight_decay, int | float):
        decay = check_not_negative(op, "weight_decay", weight_decay)
        return [check_finite(op, name, 1 - lr * decay) if decay else 1.0] * n
    decays = per_tensor(op, "weight_decay", weight_decay, n)
    return [check_finite(op, name, 1 - lr * d) if d else 1.0 for d in decays]
