"""Noise on a part of a tensor's elements, in plain torch, which defines what is correct.

A mask says which elements take noise. It is never stored; each op makes it again, from x itself or
from a seed:

    small    |x_i| <= limit, both in fp32. It is false for NaN.
    random   d(mask_seed, stream, i) < 65536 limit, both in fp32, where d are the 16 bits with which
             stochastic rounding would round element i with this seed, but with another Philox key.
             So limit is the share of the elements that take noise, in steps of 2^-16.

An element that takes noise becomes what the op without a mask makes of it. Any other stays as it
is, to the bit: no noise, no keep, no rounding. No noise depends on a mask, so an update changes
the elements that the perturbation changed if it sees the same x, or the same mask_seed.

The ops take the arguments of those in `pseuzo_kernels.reference`, and then a limit for each tensor
and mask_seed, [1] int64, or None for masks of small elements. They need xs.

Source of masks of small weights: Liu et al., "Sparse MeZO" (2024).
"""

import torch
from torch import Tensor

from pseuzo_kernels import reference
from pseuzo_kernels.bits import CHUNK, KEY_MASK, PLANE, hash_seeds, rounding_dither


def takes_noise(
    x: Tensor,
    stream: int,
    limit: float,
    mask_seed: Tensor | None,
    at: Tensor | None = None,
    offset: int = 0,
) -> Tensor:
    """The mask of the elements x, bool. at: their positions in their tensor, int64, of x's shape;
    None: they follow each other from the position `offset` on."""
    bound = torch.tensor(limit, dtype=torch.float32, device=x.device)
    if mask_seed is None:
        return x.float().abs() <= bound
    seed_hash = hash_seeds(mask_seed).view(())
    if at is not None:
        q = (at // CHUNK * PLANE + at % PLANE).flatten()
        planes = (at // PLANE % 16).flatten()
        bits = rounding_dither(q, stream, seed_hash, KEY_MASK).gather(0, planes[None])
        return (bits.float() < 65536 * bound).view(x.shape)
    mask = torch.empty(x.numel(), dtype=torch.bool, device=x.device)
    end = offset + x.numel()
    chunks, together = -(-end // CHUNK), reference.COUNTERS_AT_ONCE // PLANE
    for first in range(offset // CHUNK, chunks, together):
        last = min(first + together, chunks)
        q, elements = reference.columns_of_chunks(first, last, x.device)
        inside = (elements >= offset) & (elements < end)
        bits = rounding_dither(q, stream, seed_hash, KEY_MASK)
        mask[elements[inside] - offset] = (bits.float() < 65536 * bound)[inside]
    return mask.view(x.shape)


def add_noise_masked_list_out(
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
    limits,
    mask_seed,
    *,
    out,
):
    """The op pseuzo::add_noise_masked_list_out: add_noise_list_out where the masks say so, else
    out[t] <- xs[t]."""
    made = [torch.empty_like(y) for y in out]
    rest = noise, stochastic, rounding_seed, found_inf
    reference.add_noise_list_out(xs, seeds, coefs, streams, keeps, scales, *rest, out=made)
    for x, y, new, stream, limit in zip(xs, out, made, streams, limits, strict=True):
        y.copy_(torch.where(takes_noise(x, stream, limit, mask_seed), new, x))


def add_noise_masked_list_(
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
    limits,
    mask_seed,
):
    """The op pseuzo::add_noise_masked_list_: the same in place.

    Where scales[t] is 0, nothing is made or written.
    """
    rest = noise, stochastic, rounding_seed, found_inf
    for x, stream, keep, scale, limit in zip(xs, streams, keeps, scales, limits, strict=True):
        if scale:
            args = [x], seeds, coefs, [stream], [keep], [scale], *rest, [limit], mask_seed
            add_noise_masked_list_out(*args, out=[x])


def add_noise_masked_rows(x, index, seeds, coefs, stream, scale, noise, limit, mask_seed):
    """The op pseuzo::add_noise_masked_rows: add_noise_rows where the mask says so, else x[index].

    The mask of an element depends on its position in x.
    """
    made = reference.add_noise_rows(x, index, seeds, coefs, stream, scale, noise)
    if index.numel() == 0:
        return made
    rows, width = x[index], x.shape[1]
    at = index[..., None] * width + torch.arange(width, device=x.device)
    return torch.where(takes_noise(rows, stream, limit, mask_seed, at), made, rows)
