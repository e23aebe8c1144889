"""Noise of low rank: z = U V^T / sqrt(rank) for a matrix [m, n], from seeds, in plain torch.

U [m, rank] and V [n, rank] are noise as `reference.noise` makes it, from two places of one stream:
U is its beginning, and V is what follows from element 2^35 on. So they are independent even under
one seed, and V may have a seed of its own, which stays the same for several steps. z has mean 0 and
variance 1. It is never made in memory:

    a_k = coefs[k] U_k, in fp32;  d_ij = sum_k sum_l a_k[i, l] V_k[j, l], over l within k, from 0
    x_ij <- keep * x_ij + d_ij * fp32(scale / sqrt(rank))

where each product and each sum is rounded to fp32, in this order, so all backends agree to the bit
where they agree on the noise. The last line is rounded once, as in `reference.add_noise_list_`.

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

from pseuzo_kernels import reference
from pseuzo_kernels.bits import CHUNK, PLANE, hash_seeds
from pseuzo_kernels.calls import Calls, Coefs, How, Out, Seeds, Streams
from pseuzo_kernels.checks import (
    check_count,
    check_finite,
    check_not_negative,
    check_stream,
    seeds_and_coefs,
)
from pseuzo_kernels.lists import Params

RIGHT = 1 << 35  # the element of its stream where V begins
ELEMENTS_AT_ONCE = 1 << 18  # of fp32 sums in memory


def outer_sum(left: Tensor, right: Tensor, noise, q, stream, hashes, coefs, factor) -> Tensor:
    """factor * left right for the elements of whole columns, [16, n] fp32, as noise_sum has it.

    left [m, R] and right [R, n] are fp32; elements beyond the matrix are 0.
    """
    at = (q // PLANE) * CHUNK + q % PLANE + PLANE * torch.arange(16, device=q.device)[:, None]
    n = right.shape[1]
    inside = at < left.shape[0] * n
    rows, columns = torch.where(inside, at // n, 0), at % n
    acc = torch.zeros(at.shape, dtype=torch.float32, device=q.device)
    for a, b in zip(left.t(), right, strict=True):
        acc = acc + a[rows] * b[columns]
    return acc * torch.tensor(factor, dtype=torch.float32, device=q.device)


def add_outer_out(
    xs, lefts, rights, coefs, streams, keeps, factors, stochastic, rounding_seed, found_inf, *, out
):
    """The op pseuzo::add_outer_out: out[t] <- keeps[t] xs[t] + factors[t] lefts[t] rights[t].

    xs, out: contiguous tensors of m * n elements, where out[t] may be xs[t]; lefts [m, R] and
    rights [R, n], contiguous fp32. Where factors[t] is 0, out[t] is a copy. Rounding and found_inf
    are as in reference.add_noise_list_out; coefs only say whether the op is skipped. streams: those
    of the bits that round stochastically.
    """
    if not any(y.numel() for y in out):
        return
    skipped = ~coefs.isfinite().all()
    if found_inf is not None:
        found_inf.masked_fill_(skipped, 1.0)
        skipped = (found_inf != 0).view(())
    rounding_hash = hash_seeds(torch.tensor(rounding_seed, device=coefs.device))
    for t, (x, y) in enumerate(zip(xs, out, strict=True)):
        left, right = lefts[t], rights[t]
        if not factors[t]:
            y.copy_(x)
        elif stochastic and y.dtype is not torch.float32:
            keep = torch.tensor(keeps[t], dtype=torch.float32, device=y.device)
            shared = "hadamard", True, rounding_hash, skipped, partial(outer_sum, left, right)
            terms = streams[t], None, None, keep, factors[t], *shared
            reference.add_noise_into(y.view(-1), x.view(-1), *terms)
        else:
            _add_rows(x, left, right, keeps[t], factors[t], skipped, y)


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


class LowRankApi(Calls):
    """The public functions over one implementation of the op, and of the noise."""

    def __init__(self, add_outer_out: Callable, shared: Any):
        """shared: the functions whose noise this takes, and which remember the same lists."""
        super().__init__(add_outer_out, add_outer_out)
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
        if len(shape) < 2:
            raise ValueError(
                f"{op}: low rank is for matrices, got shape {tuple(shape)}; pass vectors to "
                "perturb_"
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
    ) -> None:
        """x <- x + scale * noise_scale * U V^T / sqrt(rank) for each matrix x of params, in place.

        The noise is never made in memory: only U [m, rank] and V [n, rank] are, from seed and from
        right_seed, which is seed by default; LOZO keeps right_seed for some steps. A tensor of more
        than two dimensions counts as a matrix of its first one; vectors are refused. The same call
        with -scale undoes it, up to rounding. Other arguments as perturb_. Sources: see
        pseuzo_kernels.low_rank, which defines every bit.
        """
        op = "low_rank_perturb_"
        scale = check_finite(op, "scale", scale)
        how = How(noise, rounding, rounding_seed, found_inf)
        run = self._runner(op, rank, right_seed, noise)
        self._list(op, params, seed, scale, streams, noise_scale, how, run=run)

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
    ) -> Tensor | list[Tensor]:
        """out <- x + scale * noise_scale * U V^T / sqrt(rank): low_rank_perturb_, with out as in
        perturb."""
        op = "low_rank_perturb"
        scale = check_finite(op, "scale", scale)
        how = How(noise, rounding, rounding_seed, found_inf)
        run = self._runner(op, rank, right_seed, noise)
        terms = params, seed, scale, streams, noise_scale, how
        return self._list(op, *terms, out=out, in_place=False, run=run)

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
    ) -> None:
        """x <- (1 - lr * weight_decay) x - lr * noise_scale * sum_k coefs[k] U_k V_k^T /
        sqrt(rank), in one pass over x for any K.

        right_seeds: one for each of seeds, by default those. Other arguments as low_rank_perturb_
        and update_.
        """
        op = "low_rank_update_"
        lr = check_not_negative(op, "lr", lr)
        how = How(noise, rounding, rounding_seed, found_inf)
        run = self._runner(op, rank, right_seeds, noise, -lr)
        terms = params, seeds, coefs, streams, noise_scale, how
        self._list(op, *terms, lr=lr, weight_decay=weight_decay, run=run)

    def _runner(
        self, op: str, rank: int, right_seeds: Seeds | None, noise: str, factor: float = 1.0
    ) -> Callable:
        """The call of the op, with factors made of seeds. factor: multiplies all scales."""
        check_count(op, "rank", rank)

        def run(xs, seeds, coefs, streams, keeps, scales, _, *how, out=None) -> None:
            if bad := [tuple(x.shape) for x in xs if x.dim() < 2]:
                raise ValueError(
                    f"{op}: low rank is for matrices, got shape {bad[0]}; pass vectors to perturb_"
                )
            others = seeds
            if right_seeds is not None:
                others = seeds_and_coefs(op, right_seeds, coefs, coefs.device)[0]
            lefts, rights = [], []
            for x, stream in zip(xs, streams, strict=True):
                made = [
                    self.low_rank_factors(
                        *(x.shape, own, stream),
                        rank=rank,
                        right_seed=other,
                        noise=noise,
                        device=x.device,
                    )
                    for own, other in zip(seeds.split(1), others.split(1), strict=True)
                ]
                lefts.append(torch.cat([c * u for c, (u, _) in zip(coefs, made, strict=True)], 1))
                rights.append(torch.cat([v for _, v in made], 1).t().contiguous())
            factors = [factor * scale / math.sqrt(rank) for scale in scales]
            terms = lefts, rights, coefs, streams, keeps, factors, *how
            self._plain[1](xs, *terms, out=xs if out is None else out)

        return run


_api = LowRankApi(add_outer_out, reference._api)
low_rank_factors, low_rank_update_ = _api.low_rank_factors, _api.low_rank_update_
low_rank_perturb, low_rank_perturb_ = _api.low_rank_perturb, _api.low_rank_perturb_
