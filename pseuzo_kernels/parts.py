"""The op that has everything, in plain torch, which defines what is correct: noise on parts of
tensors, under masks of three kinds, or only its sign.

A part is what one process holds of a tensor. The noise, the random masks and the stochastic
rounding of an element depend on its position in the whole tensor, so a part becomes what the same
elements of the whole tensor become, to the bit, wherever it begins.

    x <- keep * x + scale * sum_k coefs[k] z(seeds[k], stream)          sign False
    x <- keep * x + scale * sgn(sum_k coefs[k] z(seeds[k], stream))     sign True

sgn of 0 and of NaN leaves keep * x as it is. Its sum is the fp32 one of `reference.noise_sum`, with
a noise_scale of 1.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pseuzo_kernels import masks, reference
from pseuzo_kernels.bits import hash_seeds
from pseuzo_kernels.laws import resolve
from pseuzo_kernels.selection import Part


class Run(NamedTuple):
    """Elements that follow each other in a shard and in the whole tensor."""

    begin: int  # in the shard
    end: int
    offset: int  # of the first one in the whole tensor


def runs(n: int, part: Part) -> Iterator[Run]:
    """The runs of a shard of n elements."""
    width = part.width or n
    for i, begin in enumerate(range(0, n, width or 1)):
        yield Run(begin, begin + width, part.offset + i * part.stride)


def parts_of(places: list[int], n: int) -> list[Part]:
    """The parts of n tensors from the flat list that the op takes, which is empty for whole
    tensors."""
    if not places:
        return [Part()] * n
    return [Part(*places[i : i + 3]) for i in range(0, 3 * n, 3)]


class Masked(NamedTuple):
    """The masks of the tensors of a call, as the ops take them: none where all three are empty."""

    limits: Sequence[float]
    mask_seed: Tensor | None
    takes: Sequence[Tensor]

    def saved(self, x: Tensor) -> Tensor:
        """x, flat, as restore needs it once an op has written: a copy if there are masks."""
        return x.view(-1).clone() if self.limits or self.takes else x.view(-1)

    def restore(self, t: int, y: Tensor, x: Tensor | None, part: Part, stream: int) -> None:
        """Write x over the elements of y, tensor t of the call, that take no noise."""
        if x is None or not (self.limits or self.takes):
            return
        flat = y.view(-1)
        for begin, end, offset in runs(flat.numel(), part):
            run, before = flat[begin:end], x[begin:end]
            if self.limits:
                mask = stream, self.limits[t], self.mask_seed
                chosen = masks.takes_noise(before, *mask, offset=offset)
                run.copy_(torch.where(chosen, run, before))
            if self.takes:
                run.copy_(torch.where(self.takes[t].view(-1)[begin:end], run, before))


def sign_sum(noise, q, stream, hashes, coefs, step) -> Tensor:
    """step * sgn of the sum, as reference.noise_sum makes it, [16, n] fp32; -0 changes nothing."""
    d = reference.noise_sum(noise, q, stream, hashes, coefs, 1.0)
    up = torch.tensor(step, dtype=torch.float32, device=d.device)
    return torch.where(d > 0, up, torch.where(d < 0, -up, -0.0))


def add_noise_parts_out(
    xs,
    seeds,
    coefs,
    streams,
    keeps,
    scales,
    noise,
    stochastic,
    rounding_seed,
    found_inf,
    places,
    limits,
    mask_seed,
    takes,
    sign,
    *,
    out,
):
    """The op pseuzo::add_noise_parts_out: reference.add_noise_list_out for parts of tensors.

    places: offset, width and stride of each tensor (see Part), or none for whole tensors. limits
    and mask_seed: the mask of masks.add_noise_masked_list_out, or no limits without one. takes: for
    each tensor a contiguous bool mask of its elements, or none. An element takes noise if both
    masks say so; any other becomes that of x. They need xs, and so does sign.
    """
    resolve(noise, "add_noise_parts_out")
    if not any(y.numel() for y in out):
        return
    hashes = hash_seeds(seeds)
    rounding_hash = hash_seeds(torch.tensor(rounding_seed, device=seeds.device))
    skipped = reference.flagged(reference.prepared_coefs(noise, coefs)[1].isnan(), found_inf)
    shared = noise, stochastic, rounding_hash, skipped, sign_sum if sign else reference.noise_sum
    masked = Masked(limits, mask_seed, takes)
    for t, (y, part) in enumerate(zip(out, parts_of(places, len(out)), strict=True)):
        keep = torch.tensor(keeps[t], dtype=torch.float32, device=y.device)
        flat, x = y.view(-1), masked.saved(xs[t]) if xs else None
        for begin, end, offset in runs(flat.numel(), part):
            before = None if x is None else x[begin:end]
            terms = streams[t], hashes, coefs, keep, scales[t], *shared
            reference.add_noise_into(flat[begin:end], before, *terms, offset)
        masked.restore(t, y, x, part, streams[t])


def add_noise_parts_(
    xs,
    seeds,
    coefs,
    streams,
    keeps,
    scales,
    noise,
    stochastic,
    rounding_seed,
    found_inf,
    places,
    limits,
    mask_seed,
    takes,
    sign,
    *,
    run=add_noise_parts_out,
):
    """The op pseuzo::add_noise_parts_: the same in place.

    Where scales[t] is 0, nothing is made or written. run: makes the others.
    """
    ts = [t for t, scale in enumerate(scales) if scale]
    places = [places[3 * t + i] for t in ts for i in range(3)] if places else []
    chosen = ([column[t] for t in ts] if column else [] for column in (limits, takes))
    limits, takes = chosen
    xs, streams, keeps, scales = ([c[t] for t in ts] for c in (xs, streams, keeps, scales))
    how = noise, stochastic, rounding_seed, found_inf, places, limits, mask_seed, takes, sign
    run(xs, seeds, coefs, streams, keeps, scales, *how, out=xs)
