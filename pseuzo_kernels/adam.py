"""Adam's update without its state: the moments are made again from seeds, in plain torch.

The gradient of a past step is seeded noise, g_j = noise_scale * sum_i c_ji z(s_ji) over the q
directions of step j, so the seeds and the coefficients of the last n steps give both moments:

    m <- beta1 * m + g_j,  v <- beta2 * v + g_j^2     over the steps, the oldest first, from 0
    x <- keep * x + (first * m) / (sqrt(second * v) + eps)

with first = -lr / sum_j beta1^j and second = 1 / sum_j beta2^j over the n steps that there are.
These are Adam's moments with its correction of the bias, where (1 - beta) / (1 - beta^n) is
1 / sum_j beta^j. In a longer run, steps that have left the window have no weight. Dividing by the
sum of the other weights keeps m and v means of g and g^2. Dividing by 1 - beta^t for all t steps
would make v too small, by a factor of 1 - beta2^n.

Every operation above is one operation in fp32, rounded to nearest, in the order that is written
(products before sums; no fused multiply-add; square root and quotient correctly rounded), and
`reference.noise_sum` makes g_j. So all backends agree to the bit where they agree on the noise. The
square of a sum is not a sum of squares, so "hadamard" is transformed once for each step of the
window. "hadamard-fp16" is "hadamard" here: there is no sum over steps in half precision.

Sources: Kingma and Ba, "Adam" (2015), Algorithm 1; moments from seeds over a finite window: Cai,
Chen and Zhu, "AdaMeZO" (2026), which does not correct the bias and has eps under the root.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pseuzo_kernels import parts
from pseuzo_kernels.bits import hash_seeds
from pseuzo_kernels.calls import Calls, Coefs, How, Seeds, Streams
from pseuzo_kernels.checks import check_count, check_finite, check_not_negative
from pseuzo_kernels.laws import resolve
from pseuzo_kernels.lists import Params
from pseuzo_kernels.reference import add_noise_into, flagged, noise_sum, prepared_coefs
from pseuzo_kernels.selection import Mask, Offset


def adam_factors(step: float, beta1: float, beta2: float, n: int) -> tuple[float, float]:
    """first and second for a window of n steps. step: -lr, or lr to maximize."""
    weights1, weights2 = ((1 - beta**n) / (1 - beta) for beta in (beta1, beta2))
    return step / weights1, 1 / weights2


def check_adam(op: str, beta1: float, beta2: float, eps: float, eps_name: str = "eps") -> None:
    """Raise ValueError if one of Adam's numbers is out of its range."""
    for name, beta in (("beta1", beta1), ("beta2", beta2)):
        if not 0 <= check_finite(op, name, beta) < 1:
            raise ValueError(f"{op}: {name} must be at least 0 and below 1, got {beta}")
    if check_not_negative(op, eps_name, eps) < 2.0**-149:
        raise ValueError(f"{op}: {eps_name} must be positive in float32, got {eps}")


def after(m: Tensor, v: Tensor, g: Tensor, beta1: Any, beta2: Any) -> tuple[Tensor, Tensor]:
    """The moments, fp32, after a step with gradient g."""
    return m * beta1 + g, v * beta2 + g * g


def move(m: Tensor, v: Tensor, first: Any, second: Any, eps: Any) -> Tensor:
    """(first * m) / (sqrt(second * v) + eps), fp32."""
    # A library's root in fp32 may be off by an ulp. This root is the nearest fp32: the root of an
    # fp32 number is further from the middle between two fp32 numbers than the error of fp64.
    return (m * first) / ((v * second).double().sqrt().float() + eps)


def adam_moves(
    noise: str,
    q: Tensor,
    stream: int,
    hashes: Tensor,
    coefs: Tensor,
    noise_scale: float,
    *,
    directions: int,
    numbers: Sequence[float],
) -> Tensor:
    """(first * m) / (sqrt(second * v) + eps) for whole columns, [16, n] fp32; see the module.

    q [n] and hashes [K] are int64, coefs [K] fp32, with `directions` of them per step, the oldest
    step first. numbers: beta1, beta2, first, second and eps, which are rounded to fp32.
    """
    beta1, beta2, first, second, eps = torch.tensor(
        numbers, dtype=torch.float32, device=q.device
    ).unbind()
    m = torch.zeros(16, q.numel(), dtype=torch.float32, device=q.device)
    v = torch.zeros_like(m)
    steps = zip(hashes.split(directions), coefs.split(directions), strict=True)
    for step_hashes, step_coefs in steps:
        g = noise_sum(noise, q, stream, step_hashes, step_coefs, noise_scale)
        m, v = after(m, v, g, beta1, beta2)
    return move(m, v, first, second, eps)


def adam_list_(
    xs,
    seeds,
    coefs,
    directions,
    streams,
    keeps,
    scales,
    numbers,
    noise,
    stochastic,
    rounding_seed,
    found_inf=None,
):
    """The op pseuzo::adam_list_: the update that the module describes, for each x of a list.

    x is written in place. seeds [K] int64 and coefs [K] fp32: `directions` of them per step, the
    oldest step first. numbers: see adam_moves. keeps, scales (noise_scale), streams: one per
    tensor; where scales[t] is 0, nothing is made or written. Rounding, found_inf and skipping are
    as in reference.add_noise_list_.
    """
    terms = seeds, coefs, directions, streams, keeps, scales, numbers
    how = noise, stochastic, rounding_seed, found_inf
    adam_parts_(xs, *terms, *how, [], [], None, [], op="adam_list_")


def adam_parts_(
    xs,
    seeds,
    coefs,
    directions,
    streams,
    keeps,
    scales,
    numbers,
    noise,
    stochastic,
    rounding_seed,
    found_inf,
    places,
    limits,
    mask_seed,
    takes,
    *,
    op="adam_parts_",
):
    """The op pseuzo::adam_parts_: the same for parts of tensors, and under masks.

    places, limits, mask_seed, takes: as in parts.add_noise_parts_out.
    """
    noise = resolve(noise, op)[0]
    if directions < 1 or not len(seeds) or len(seeds) % directions:
        raise ValueError(
            f"{op}: the seeds of one or several steps, {directions} a step, are needed, got "
            f"{len(seeds)}"
        )
    if not any(x.numel() for x, scale in zip(xs, scales, strict=True) if scale):
        return
    hashes = hash_seeds(seeds)
    rounding_hash = hash_seeds(torch.tensor(rounding_seed, device=seeds.device))
    skipped = flagged(~prepared_coefs(noise, coefs)[0].isfinite().all(), found_inf)
    moves = partial(adam_moves, directions=directions, numbers=numbers)
    rest = noise, stochastic, rounding_hash, skipped, moves
    masked = parts.Masked(limits, mask_seed, takes)
    for t, (x, part) in enumerate(zip(xs, parts.parts_of(places, len(xs)), strict=True)):
        if not scales[t]:
            continue
        keep = torch.tensor(keeps[t], dtype=torch.float32, device=x.device)
        flat, before = x.view(-1), masked.saved(x)
        for begin, end, offset in parts.runs(flat.numel(), part):
            terms = streams[t], hashes, coefs, keep, scales[t]
            add_noise_into(flat[begin:end], before[begin:end], *terms, *rest, offset)
        masked.restore(t, x, before, part, streams[t])


class AdamApi(Calls):
    """The public function over one implementation of the ops."""

    def __init__(self, adam_list_: Callable, adam_parts_: Callable, shared: Calls | None = None):
        """shared: other functions over the same tensors, which remember the same lists."""
        super().__init__(adam_list_, adam_list_)
        if shared is not None:
            self._lists, self._watch = shared._lists, shared._watch
        self._adam_list_, self._adam_parts_ = adam_list_, adam_parts_

    def adam_update_(
        self,
        params: Params,
        seeds: Seeds,
        coefs: Coefs,
        *,
        lr: float,
        beta1: float = 0.9,
        beta2: float = 0.999,
        eps: float = 1e-8,
        directions: int = 1,
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
        """x <- (1 - lr * weight_decay) x - lr * m / (sqrt(v) + eps), AdamW without its state.

        m and v are the means, with weights beta1^age and beta2^age, of g and g^2 over the last n
        steps, where g = noise_scale * sum_i coefs[i] z(seeds[i]) over the `directions` of a step.
        They are made in registers, so that no memory beyond x is read or written. seeds [n *
        directions] int64 and coefs fp32: step by step, the oldest first. lr, weight_decay and eps
        are not negative, and eps is not 0; the betas are at least 0 and below 1. The other
        arguments (mask and offset, too), and what happens if coefs are not finite, are as in
        update_ and add_noise_. Where |g| is below 1e-19 or above 1e19, its square is outside the
        range of fp32. Raises ValueError or TypeError before anything is written. Sources: see
        pseuzo_kernels.adam, which defines every bit.
        """
        op = "adam_update_"
        lr = check_not_negative(op, "lr", lr)
        check_adam(op, beta1, beta2, eps)
        check_count(op, "directions", directions)

        def run(xs, seeds, coefs, streams, keeps, scales, *rest) -> None:
            if len(seeds) % directions:
                raise ValueError(
                    f"{op}: {directions} seeds a step are needed, got {len(seeds)} seeds"
                )
            factors = adam_factors(-lr, beta1, beta2, len(seeds) // directions)
            numbers = [beta1, beta2, *factors, eps]
            terms = seeds, coefs, directions, streams, keeps, scales, numbers
            how, (places, limits, mask_seed, takes) = rest[:4], rest[4:]
            if places or limits or takes:
                self._adam_parts_(xs, *terms, *how, places, limits, mask_seed, takes)
            else:
                self._adam_list_(xs, *terms, *how)

        how = How(noise, rounding, rounding_seed, found_inf)
        terms = params, seeds, coefs, streams, noise_scale, how
        where: dict[str, Any] = dict(mask=mask, offset=offset)
        self._list(op, *terms, lr=lr, weight_decay=weight_decay, run=run, **where)


adam_update_ = AdamApi(adam_list_, adam_parts_).adam_update_
