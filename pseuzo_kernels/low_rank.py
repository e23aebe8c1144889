"""Noise of low rank: z = U V^T / sqrt(rank) for a matrix [m, n], from seeds, in plain torch.

U [m, rank] and V [n, rank] are noise as `reference.noise` makes it, from two places of one stream:
U is its beginning, and V is what follows from element 2^35 on. So they are independent even under
one seed, and V may have a seed of its own, which stays the same for several steps. z has mean 0 and
variance 1. It is never made in memory:

    a_k = coefs[k] U_k, in fp32;  d_ij = sum_k sum_l a_k[i, l] V_k[j, l], over l within k, from 0
    x_ij <- keep * x_ij + d_ij * fp32(scale / sqrt(rank))

where each product and each sum is rounded to fp32, in this order, so all backends agree to the bit
where they agree on the noise. The last line is rounded once, as in `reference.add_noise_list_`.

A part of a matrix that is a block of its rows and columns takes that block of z: its factors are
rows of U and of V. Its random masks and its stochastic rounding depend on the positions of its
elements in the whole matrix, as in `parts`.

In the notation of LOZO, x + eps U V^T is a scale of eps sqrt(rank) here, and its update along
U V^T / rank one of c / sqrt(rank). Sources: Chen et al., "Enhancing Zeroth-order Fine-tuning for
Language Models with Low-rank Structures" (LOZO, 2024); Yu et al., "Zeroth-Order Fine-Tuning of LLMs
in Random Subspaces" (SubZero, 2024), whose factors are orthogonal.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pseuzo_kernels import parts, reference
from pseuzo_kernels.bits import CHUNK, PLANE, hash_seeds
from pseuzo_kernels.calls import Calls, Coefs, How, Out, Seeds, Streams
from pseuzo_kernels.checks import (
    check_count,
    check_finite,
    check_not_negative,
    check_shape,
    check_stream,
    seeds_and_coefs,
)
from pseuzo_kernels.lists import Params
from pseuzo_kernels.selection import Mask, Offset, Part

RIGHT = 1 << 35  # the element of its stream where V begins
ELEMENTS_AT_ONCE = 1 << 18  # of fp32 sums in memory


def outer_sum(
    left: Tensor, right: Tensor, begin: int, noise, q, stream, hashes, coefs, factor
) -> Tensor:
    """factor * left right for the elements of whole columns, [16, n] fp32, as noise_sum has it.

    left [m, R] and right [R, n] are fp32; begin: the position of their first element in the whole
    matrix, counted in rows of n elements; elements outside of them are 0.
    """
    at = (q // PLANE) * CHUNK + q % PLANE + PLANE * torch.arange(16, device=q.device)[:, None]
    at, n = at - begin, right.shape[1]
    inside = (at >= 0) & (at < left.shape[0] * n)
    rows, columns = torch.where(inside, at // n, 0), at % n
    acc = torch.zeros(at.shape, dtype=torch.float32, device=q.device)
    for a, b in zip(left.t(), right, strict=True):
        acc = acc + a[rows] * b[columns]
    return acc * torch.tensor(factor, dtype=torch.float32, device=q.device)


def add_outer_out(
    xs,
    lefts,
    rights,
    coefs,
    streams,
    keeps,
    factors,
    stochastic,
    rounding_seed,
    found_inf,
    *,
    out,
):
    """The op pseuzo::add_outer_out: out[t] <- keeps[t] xs[t] + factors[t] lefts[t] rights[t].

    xs, out: contiguous tensors of m * n elements, where out[t] may be xs[t]; lefts [m, R] and
    rights [R, n], contiguous fp32. Where factors[t] is 0, out[t] is a copy. Rounding and found_inf
    are as in reference.add_noise_list_out; coefs only say whether the op is skipped. streams: those
    of the bits that round stochastically.
    """
    terms = lefts, rights, coefs, streams, keeps, factors
    how = stochastic, rounding_seed, found_inf
    add_outer_parts_out(xs, *terms, *how, [], [], None, [], out=out)


def add_outer_parts_out(
    xs,
    lefts,
    rights,
    coefs,
    streams,
    keeps,
    factors,
    stochastic,
    rounding_seed,
    found_inf,
    places,
    limits,
    mask_seed,
    takes,
    *,
    out,
):
    """The op pseuzo::add_outer_parts_out: add_outer_out for parts of matrices, and under masks.

    lefts and rights are of the parts; places, limits, mask_seed, takes: as in
    parts.add_noise_parts_out. streams: those of all random bits.
    """
    if not any(y.numel() for y in out):
        return
    skipped = reference.flagged(~coefs.isfinite().all(), found_inf)
    rounding_hash = hash_seeds(torch.tensor(rounding_seed, device=coefs.device))
    masked = parts.Masked(limits, mask_seed, takes)
    shared = "hadamard", True, rounding_hash, skipped
    for t, (y, part) in enumerate(zip(out, parts.parts_of(places, len(out)), strict=True)):
        left, right, x = lefts[t], rights[t], masked.saved(xs[t])
        if not factors[t]:
            y.copy_(xs[t])
        elif stochastic and y.dtype is not torch.float32:
            keep = torch.tensor(keeps[t], dtype=torch.float32, device=y.device)
            flat = y.view(-1)
            for begin, end, offset in parts.runs(flat.numel(), part):
                products = partial(outer_sum, left, right, offset - begin)
                terms = streams[t], None, None, keep, factors[t], *shared, products
                reference.add_noise_into(flat[begin:end], x[begin:end], *terms, offset)
        else:
            _add_rows(x, left, right, keeps[t], factors[t], skipped, y)
        masked.restore(t, y, x, part, streams[t])


def _add_rows(x, left, right, keep, factor, skipped, out) -> None:
    """The same, rounded to nearest, some rows at a time."""
    (m, _), n = left.shape, right.shape[1]
    x, out, together = x.view(m, n), out.view(m, n), max(1, ELEMENTS_AT_ONCE // n)
    keep, factor = (torch.tensor(v, dtype=torch.float32, device=x.device) for v in (keep, factor))
    for first in range(0, m, together):
        rows = slice(first, first + together)
        acc = torch.zeros_like(out[rows], dtype=torch.float32)
        for a, b in zip(left[rows].t(), right, strict=True):
            acc.add_(a[:, None] * b)
        y = (x[rows].float() * keep).add_(acc.mul_(factor)).to(x.dtype)
        out[rows] = torch.where(skipped, x[rows], y)


def add_low_rank_out(
    xs,
    seeds,
    right_seeds,
    coefs,
    rank,
    streams,
    keeps,
    factors,
    noise,
    stochastic,
    rounding_seed,
    found_inf,
    places,
    limits,
    mask_seed,
    takes,
    *,
    out,
    noise_of=None,
    add=add_outer_parts_out,
):
    """The op pseuzo::add_low_rank_out:
    out[t] <- keeps[t] xs[t] + factors[t] sum_k coefs[k] U_k V_k^T.

    xs, out: contiguous tensors, matrices of their first dimension. U_k [m, rank] is noise of
    seeds[k], V_k [n, rank] of right_seeds[k], both of streams[t]. Other arguments as
    add_outer_parts_out.
    noise_of, add: make the factors and their products, by default in plain torch.
    """
    make = noise_of or reference.noise
    lefts, rights = [], []
    for x, stream, part in zip(xs, streams, parts.parts_of(places, len(xs)), strict=True):
        m, n = sides(x.shape)
        row, column = corner(part, n)
        how: dict[str, Any] = dict(noise=noise, device=x.device)
        left, right = [], []
        for seed, other, coef in zip(seeds.split(1), right_seeds.split(1), coefs, strict=True):
            begin = row * rank or None
            left.append(coef * make((m, rank), seed, stream, offset=begin, **how))
            at = RIGHT + column * rank
            right.append(make((n, rank), other, stream, offset=at, **how))
        lefts.append(torch.cat(left, 1))
        rights.append(torch.cat(right, 1).t().contiguous())
    terms = lefts, rights, coefs, streams, keeps, factors
    how_to = stochastic, rounding_seed, found_inf, places, limits, mask_seed, takes
    add(xs, *terms, *how_to, out=out)


def sides(shape: Sequence[int]) -> tuple[int, int]:
    """The rows and the columns of a tensor as a matrix of its first dimension."""
    return shape[0], math.prod(shape[1:])


def corner(part: Part, n: int) -> tuple[int, int]:
    """The row and the column of the whole matrix where a part of n columns begins."""
    return divmod(part.offset, (part.stride if part.width else n) or 1)


def check_blocks(op: str, places: list[int], xs: Sequence[Tensor]) -> None:
    """ValueError unless each part of a matrix is a block of its rows and columns."""
    for t, (x, part) in enumerate(zip(xs, parts.parts_of(places, len(xs)), strict=True)):
        n = sides(x.shape)[1]
        _, column = corner(part, n)
        if (part.width and part.width != n) or column + n > (part.stride if part.width else n):
            raise ValueError(
                f"{op}: offset[{t}] must be that of whole rows of its matrix, or of the same "
                f"columns of each row, got {part} for a part of shape {tuple(x.shape)}; low rank "
                "is not defined for other parts"
            )


class LowRankApi(Calls):
    """The public functions over one implementation of the op, and of the noise."""

    def __init__(self, add_low_rank_out: Callable, shared: Any):
        """shared: the functions whose noise this takes, and which remember the same lists."""
        super().__init__(add_low_rank_out, add_low_rank_out)
        self._lists, self._watch, self._noise = shared._lists, shared._watch, shared.noise

    def low_rank_factors(
        self,
        shape: Sequence[int],
        seed: int | Tensor,
        stream: int,
        *,
        rank: int,
        right_seed: int | Tensor | None = None,
        noise: str = "hadamard",
        device: str | torch.device = "cpu",
    ) -> tuple[Tensor, Tensor]:
        """U [m, rank] and V [n, rank], fp32, of the noise U V^T / sqrt(rank) of a matrix.

        shape: (m, n), or of a tensor with more dimensions, of which all but the first count as n.
        right_seed: the seed of V, by default that of U. See pseuzo_kernels.low_rank.
        """
        op = "low_rank_factors"
        check_count(op, "rank", rank)
        check_shape(op, shape)
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        if len(shape) < 2:
            raise ValueError(
                f"{op}: low rank is for matrices, got shape {shape}; pass vectors to perturb_"
            )
        check_stream(op, stream)
        sides = (shape[0], seed, 0), (math.prod(shape[1:]), right_seed, RIGHT)
        u, v = (
            self._noise(
                (n, rank),
                seed if own is None else own,
                stream,
                noise=noise,
                device=device,
                offset=offset or None,
            )
            for n, own, offset in sides
        )
        return u, v

    def low_rank_perturb_(
        self,
        params: Params,
        seed: int | Tensor,
        scale: float,
        *,
        rank: int,
        right_seed: int | Tensor | None = None,
        streams: Streams = None,
        noise: str = "hadamard",
        rounding: str = "nearest",
        rounding_seed: int | None = None,
        noise_scale: float | Sequence[float] = 1.0,
        found_inf: Tensor | None = None,
        mask: Mask = None,
        offset: Offset = None,
    ) -> None:
        """x <- x + scale * noise_scale * U V^T / sqrt(rank) for each matrix x of params, in place.

        The noise is never made in memory: only U [m, rank] and V [n, rank] are, from seed and from
        right_seed, which is seed by default; LOZO keeps right_seed for some steps. A tensor of more
        than two dimensions counts as a matrix of its first one; vectors are refused. The same call
        with -scale undoes it, up to rounding. Other arguments as perturb_; a part that offset gives
        must be whole rows of its matrix, or the same columns of each row. Sources: see
        pseuzo_kernels.low_rank, which defines every bit.
        """
        op = "low_rank_perturb_"
        scale = check_finite(op, "scale", scale)
        how = How(noise, rounding, rounding_seed, found_inf)
        where: dict[str, Any] = dict(mask=mask, offset=offset)
        run = self._runner(op, rank, right_seed)
        self._list(op, params, seed, scale, streams, noise_scale, how, run=run, **where)

    def low_rank_perturb(
        self,
        params: Params,
        seed: int | Tensor,
        scale: float,
        *,
        rank: int,
        right_seed: int | Tensor | None = None,
        out: Out = None,
        streams: Streams = None,
        noise: str = "hadamard",
        rounding: str = "nearest",
        rounding_seed: int | None = None,
        noise_scale: float | Sequence[float] = 1.0,
        found_inf: Tensor | None = None,
        mask: Mask = None,
        offset: Offset = None,
    ) -> Tensor | list[Tensor]:
        """out <- x + scale * noise_scale * U V^T / sqrt(rank): low_rank_perturb_, with out as in
        perturb."""
        op = "low_rank_perturb"
        scale = check_finite(op, "scale", scale)
        how = How(noise, rounding, rounding_seed, found_inf)
        where: dict[str, Any] = dict(mask=mask, offset=offset, out=out, in_place=False)
        run = self._runner(op, rank, right_seed)
        terms = params, seed, scale, streams, noise_scale, how
        return self._list(op, *terms, run=run, **where)

    def low_rank_update_(
        self,
        params: Params,
        seeds: Seeds,
        coefs: Coefs,
        *,
        lr: float,
        rank: int,
        right_seeds: Seeds | None = None,
        weight_decay: float | Sequence[float] = 0.0,
        streams: Streams = None,
        noise: str = "hadamard",
        rounding: str = "nearest",
        rounding_seed: int | None = None,
        noise_scale: float | Sequence[float] = 1.0,
        found_inf: Tensor | None = None,
        mask: Mask = None,
        offset: Offset = None,
    ) -> None:
        """x <- (1 - lr * weight_decay) x - lr * noise_scale * sum_k coefs[k] U_k V_k^T /
        sqrt(rank), in one pass over x for any K.

        right_seeds: one for each of seeds, by default those. Other arguments as low_rank_perturb_
        and update_.
        """
        op = "low_rank_update_"
        lr = check_not_negative(op, "lr", lr)
        how = How(noise, rounding, rounding_seed, found_inf)
        where: dict[str, Any] = dict(mask=mask, offset=offset)
        run = self._runner(op, rank, right_seeds, -lr)
        terms = params, seeds, coefs, streams, noise_scale, how
        self._list(op, *terms, lr=lr, weight_decay=weight_decay, run=run, **where)

    def _runner(
        self, op: str, rank: int, right_seeds: Seeds | None, factor: float = 1.0
    ) -> Callable:
        """The call of the op. factor: multiplies all scales."""
        check_count(op, "rank", rank)

        def run(xs, seeds, coefs, streams, keeps, scales, *how, out=None) -> None:
            if bad := [tuple(x.shape) for x in xs if x.dim() < 2]:
                raise ValueError(
                    f"{op}: low rank is for matrices, got shape {bad[0]}; pass vectors to perturb_"
                )
            check_blocks(op, how[4], xs)
            others = seeds
            if right_seeds is not None:
                others = seeds_and_coefs(op, right_seeds, coefs, coefs.device)[0]
            factors = [factor * scale / math.sqrt(rank) for scale in scales]
            terms = seeds, others, coefs, rank, streams, keeps, factors, *how
            self._plain[1](xs, *terms, out=xs if out is None else out)

        return run


_api = LowRankApi(add_low_rank_out, reference._api)
low_rank_factors, low_rank_update_ = _api.low_rank_factors, _api.low_rank_update_
low_rank_perturb, low_rank_perturb_ = _api.low_rank_perturb, _api.low_rank_perturb_
