"""Every op in plain torch, which defines what is correct. Triton, C++ and CUDA must agree with it.

The noise: z(seed, stream, i) is the i-th perturbation of tensor `stream` under `seed`, a pure
function of the three, so any element of any tensor can be made again anywhere. A chunk is 2048
consecutive elements, 16 planes of 128 columns, and the 16 elements of a column share one Philox
counter:

    element i:  chunk = i >> 11,  plane = (i >> 7) & 15,  column = i & 127,
                counter q = chunk * 128 + column
    words:      W = Philox4x32(counter = (q, stream, seed_lo, seed_hi)), seed hashed by splitmix64

`pseuzo_kernels.laws` has the laws by which words become noise:

- "hadamard"    b[4w .. 4w+3] = four half-precision patterns of word W[w], and
                z = FWHT16(b) / (4 sqrt(Var b)). Because the transform is linear,
                sum_k c_k z_k = FWHT16(sum_k c_k b_k): it is applied once, whatever K.
- "rademacher"  b[4w .. 4w+3] = +-1 from the top bit of each byte of W[w], z = b.
- "normal"      Box-Muller: word w makes planes 2w and 2w + 1 from 16 bits of radius and 16 bits of
                angle.

Sums run over k in order, in fp32, with c_k rounded to 17 significant bits. The patterns have 7, so
c_k * b_k is exact and fused and unfused multiply-adds give the same bits: "hadamard" and
"rademacher" are bit-exact on every backend. (This holds for 2^-120 < |c_k| < 2^126: nearer to the
ends of fp32 the product can underflow or overflow.)

"hadamard-fp16" is the law "hadamard" with sums in half precision. With one seed it equals
"hadamard". With more, two planes share an instruction on a GPU:

    2^e     the power of two with 2^(e-1) < max_k |c_k| <= 2^e, but at least 2^-126
    c'_k =  c_k / 2^e to the nearest multiple of 2^-10, ties to even; so |c'_k| <= 1: fp16 holds it
    h <-    fp16(h + c'_k b_k), one rounding to nearest even, over 16 seeds in order, from h = 0
    acc <-  acc + h after each 16 seeds, in fp32;  d = FWHT16(acc) * (fp32 scale * 2^e)

c'_k b_k is a multiple of 2^-19 below 1.86, so h + c'_k b_k is one below 32: fp32 holds it, and
computing it in fp32 and then rounding gives the bits of the GPU's half-precision fused
multiply-add. If max_k |c_k| is above 2^126, it counts as infinite. Rounding the sums costs 6e-4 of
their size (rms; 2^-10 sqrt(16/12) at most, unbiased), and a coefficient is off by up to 2^(e-11),
so smaller ones vanish. Together the error is 1e-3 for coefs that are alike or normal, K from 2 to
1000, and 1e-2 where one is a thousand times the 999 others.

If a coefficient is NaN or infinite, or becomes so when it is rounded, the op is skipped: the
tensors that it would write stay as they are, to the bit, and keep is not applied either. The op is
also skipped if found_inf is not 0. An op that is skipped because of its coefficients sets found_inf
to 1.

Adam's update, whose second moment is not a sum of noise, is in `pseuzo_kernels.adam`.

Source of perturbation by seed: Malladi et al., "Fine-tuning language models with just forward
passes" (2023). `pseuzo_kernels.bits` has the sources of the hashes.
"""

import torch
from torch import Tensor

from pseuzo_kernels import window
from pseuzo_kernels.api import NoiseApi
from pseuzo_kernels.bits import (  # noqa: F401  (part of what this module offers)
    CHUNK,
    FP16_BLOCK,
    KEY_ROUNDING,
    KEYS_NOISE,
    PLANE,
    ROUNDING_VERSION,
    fp16_coefs,
    fwht16,
    hash_seed,
    hash_seeds,
    philox4x32,
    round17,
    round_stochastically,
    rounding_dither,
)
from pseuzo_kernels.laws import LAWS, resolve

# This bounds the int64 temporaries to about 16 MiB, however large a tensor is.
COUNTERS_AT_ONCE = 1 << 16


def scale_of(noise: str, noise_scale: float) -> float:
    """The constant that multiplies a column's sums. It is rounded to fp32 where it is used."""
    return LAWS[resolve(noise)[0]].scale * noise_scale


def sums_in_fp16(noise: str, K: int) -> bool:
    """Whether K terms are summed in half precision; a single term is not."""
    return K > 1 and resolve(noise)[1] == "fp16"


def prepared_coefs(noise: str, coefs: Tensor) -> tuple[Tensor, Tensor]:
    """coefs [K] as the sums take them, and the factor of the sums, [], both fp32.

    A factor of NaN means that the op is skipped.
    """
    if sums_in_fp16(noise, len(coefs)):
        return fp16_coefs(coefs)
    rounded = round17(coefs)
    return rounded, torch.where(rounded.isfinite().all(), 1.0, float("nan"))


def noise_sum(
    noise: str, q: Tensor, stream: int, hashes: Tensor, coefs: Tensor, noise_scale: float
) -> Tensor:
    """d = noise_scale * sum_k coefs[k] z_k for whole columns, [16, n] fp32.

    q [n] and hashes [K] are int64, coefs [K] fp32.
    """
    law = LAWS[resolve(noise)[0]]
    acc = torch.zeros(16, q.numel(), dtype=torch.float32, device=q.device)
    scale = torch.tensor(law.scale * noise_scale, dtype=torch.float32, device=q.device)
    coefs, power = prepared_coefs(noise, coefs)
    if sums_in_fp16(noise, len(hashes)):
        blocks = zip(hashes.split(FP16_BLOCK), coefs.split(FP16_BLOCK), strict=True)
        for block, block_coefs in blocks:
            h = torch.zeros_like(acc, dtype=torch.float16)
            for seed_hash, coef in zip(block, block_coefs, strict=True):
                h = (h.float() + coef * law.column_noise(q, stream, seed_hash)).half()
            acc = acc + h.float()
    else:
        for seed_hash, coef in zip(hashes, coefs, strict=True):
            acc = acc + coef * law.column_noise(q, stream, seed_hash)
    return (fwht16(acc) if law.transform else acc) * (scale * power)


def columns_of_chunks(first: int, last: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Counters q [n] of chunks first .. last - 1, and the elements [16, n] of their columns."""
    q = torch.arange(first * PLANE, last * PLANE, device=device)
    elements = (q // PLANE) * CHUNK + q % PLANE + PLANE * torch.arange(16, device=device)[:, None]
    return q, elements


def add_noise_into(
    out,
    x,
    stream,
    hashes,
    coefs,
    keep,
    scale,
    noise,
    stochastic,
    rounding_hash,
    skipped,
    sum_of=noise_sum,
    offset=0,
) -> None:
    """Write the result of an op for one tensor. out and x are flat; x may be None or out itself.

    skipped: [] bool; if it is True, out <- x, or 0 without x. sum_of: makes the sum that is added,
    as noise_sum does. offset: the position of the first element in the whole tensor.
    """
    last = offset + out.numel()
    chunks, together = -(-last // CHUNK), COUNTERS_AT_ONCE // PLANE
    for first in range(offset // CHUNK, chunks, together):
        q, elements = columns_of_chunks(first, min(first + together, chunks), out.device)
        if scale:
            y = sum_of(noise, q, stream, hashes, coefs, scale)
        else:  # adding -0 changes nothing
            nothing = 0.0 if x is None else -0.0
            y = torch.full(elements.shape, nothing, dtype=torch.float32, device=out.device)
        inside = (elements >= offset) & (elements < last)
        at = elements[inside] - offset
        y = y[inside]
        if x is not None:
            y = x[at].float() * keep + y
        if stochastic and out.dtype is not torch.float32:
            dither = rounding_dither(q, stream, rounding_hash)[inside]
            y = round_stochastically(y, dither, out.dtype)
        untouched = torch.zeros_like(y, dtype=out.dtype) if x is None else x[at]
        out[at] = torch.where(skipped, untouched, y.to(out.dtype))


def flagged(skipped: Tensor, found_inf: Tensor | None) -> Tensor:
    """[] bool: whether an op is skipped: for its own numbers, [] bool, which sets found_inf to 1,
    or because found_inf is not 0."""
    if found_inf is None:
        return skipped
    found_inf.masked_fill_(skipped, 1.0)
    return (found_inf != 0).view(())


def add_noise_list_out(
    xs,
    seeds,
    coefs,
    streams,
    keeps,
    scales,
    noise,
    stochastic,
    rounding_seed,
    found_inf=None,
    *,
    out,
):
    """The op pseuzo::add_noise_list_out:
    out[t] <- keeps[t] * xs[t] + scales[t] * sum_k coefs[k] z(seeds[k], streams[t]).

    xs, out: lists of contiguous tensors of equal sizes; without xs there is no first term.
    found_inf: fp32 [1] or None. If the op is skipped, it copies: out[t] <- xs[t], or 0. Where
    scales[t] is 0, no noise is made: out[t] <- keeps[t] * xs[t].
    """
    resolve(noise, "add_noise_list_out")
    if not any(y.numel() for y in out):
        return
    hashes = hash_seeds(seeds)
    rounding_hash = hash_seeds(torch.tensor(rounding_seed, device=seeds.device))
    skipped = flagged(prepared_coefs(noise, coefs)[1].isnan(), found_inf)
    shared = noise, stochastic, rounding_hash, skipped
    for t, y in enumerate(out):
        keep = torch.tensor(keeps[t], dtype=torch.float32, device=y.device)
        x = xs[t].view(-1) if xs else None
        add_noise_into(y.view(-1), x, streams[t], hashes, coefs, keep, scales[t], *shared)


def add_noise_list_(
    xs, seeds, coefs, streams, keeps, scales, noise, stochastic, rounding_seed, found_inf=None
):
    """The op pseuzo::add_noise_list_: add_noise_list_out in place.

    Where scales[t] is 0, nothing is made or written.
    """
    resolve(noise, "add_noise_list_")
    rest = noise, stochastic, rounding_seed, found_inf
    for x, stream, keep, scale in zip(xs, streams, keeps, scales, strict=True):
        if scale:
            add_noise_list_out([x], seeds, coefs, [stream], [keep], [scale], *rest, out=[x])


def add_noise_steps_(
    xs,
    seeds,
    coefs,
    counts,
    streams,
    keeps,
    scales,
    noise,
    stochastic,
    rounding_seeds,
    *,
    op=add_noise_list_,
):
    """The op pseuzo::add_noise_steps_: several updates in a row, for replaying a run.

    Each update is rounded as if it were alone. seeds, coefs: those of all steps, one step after the
    other, counts[s] of them in step s. keeps, scales: one per step and tensor, where that of tensor
    t in step s is at s * len(xs) + t; where a scale is 0, the step leaves the tensor alone.
    rounding_seeds: one per step. op: makes one step.
    """
    resolve(noise, "add_noise_steps_")
    T, first = len(xs), 0
    for s, count in enumerate(counts):
        terms, ts = slice(first, first + count), slice(s * T, (s + 1) * T)
        rest = noise, stochastic, rounding_seeds[s]
        op(xs, seeds[terms], coefs[terms], streams, keeps[ts], scales[ts], *rest)
        first += count


def add_noise_rows(x, index, seeds, coefs, stream, scale, noise):
    """The op pseuzo::add_noise_rows: rows of x + scale * sum_k coefs[k] z(seeds[k], stream).

    Only the rows `index` are made. x [N, D]; index int64, any shape, 0 <= index < N. Returns
    index.shape + [D], rounded to nearest; if the op is skipped, or the scale is 0, the rows of x.
    The noise of a row is that of its elements in x, so add_noise_rows(x, index) equals
    add_noise(x)[index] to the bit.
    """
    resolve(noise, "add_noise_rows")
    if index.numel() == 0:
        return x.new_empty(*index.shape, x.shape[1])
    if index.min() < 0:
        raise IndexError(
            f"add_noise_rows: index must be in 0 .. {x.shape[0] - 1}, got {int(index.min())}"
        )
    if not scale:
        return x[index]
    rows, inverse = torch.unique(index, return_inverse=True)
    width = x.shape[1]
    elements = rows[:, None] * width + torch.arange(width, device=x.device)
    chunks, chunk_of = torch.unique(elements // CHUNK, return_inverse=True)
    q = (chunks[:, None] * PLANE + torch.arange(PLANE, device=x.device)).view(-1)
    d = noise_sum(noise, q, stream, hash_seeds(seeds), coefs, scale)  # [16, chunks * 128]
    d = d[(elements // PLANE) % 16, chunk_of * PLANE + elements % PLANE]
    skipped = prepared_coefs(noise, coefs)[1].isnan()
    return torch.where(skipped, x[rows], (x[rows].float() + d).to(x.dtype))[inverse]


def window_step(
    values,
    seeds,
    groups,
    counts,
    skipped,
    o0,
    o1,
    grad,
    group,
    loss,
    seed,
    slot,
    used,
    momentum,
    eps,
):
    """The op pseuzo::window_step: write entry `slot`, project grad on the `used` last ones.

    pseuzo_kernels.window.EmaWindow says what that means. State, written in place: values [K, R, P,
    D] fp32, an entry's rows (means over a group), aligned to the last position; seeds [K] int64;
    groups [K, R] int64; counts [K, R] int32, how many rows of the batch a row stands for: 0 means
    none, and the row is not read; skipped [] int64. o0 (or None: o1 is the difference), o1, grad
    [B, P', D], B <= R, P' <= P; group [B] int64 or None: each row its own; loss fp32 scalar or
    None. The entry of age a is at slot (slot - a) mod K. Returns seeds [used], coefs [used] fp32,
    both the newest last, and found_inf [1] fp32.
    """
    slots_in_ring, _, positions_max, _ = values.shape
    rows, positions, _ = o1.shape
    row = torch.arange(rows, device=o1.device)
    change = o1.float() if o0 is None else o1.float() - o0.float()
    group = row if group is None else group
    same = group[:, None] == group[None, :]
    leader = same.int().argmax(1) == row  # the first row of its group

    values[slot] = 0
    sums = torch.einsum("ij,jpd->ipd", same.double(), change.double())
    pooled = sums / same.sum(1)[:, None, None]
    values[slot, :rows, positions_max - positions :] = pooled.float()
    groups[slot, :rows] = group
    counts[slot] = 0
    counts[slot, :rows] = torch.where(leader, same.sum(1), 0).int()
    seeds[slot] = seed

    ages = torch.arange(used - 1, -1, -1, device=o1.device)
    dots = []
    for age in range(used - 1, 0, -1):
        k = (slot - age) % slots_in_ring
        read = counts[k] > 0
        pairs = ((groups[k, :, None] == group[None, :]) & read[:, None]).double()  # [R, B]
        old = values[k, :, positions_max - positions :].double()
        old = torch.where(read[:, None, None], old, 0.0)
        dots.append((old * torch.einsum("rb,bpd->rpd", pairs, grad.double())).sum())
    own = (change.double() * grad.double()).sum()
    weights = torch.pow(torch.full_like(ages, momentum, dtype=torch.float64), ages) / eps
    coefs = (torch.stack([*dots, own]) * weights).float()

    loss_ok = torch.ones_like(row[0], dtype=torch.bool) if loss is None else loss.isfinite().all()
    ok = coefs.isfinite().all() & loss_ok
    counts[slot] = torch.where(coefs[-1].isfinite() & loss_ok, counts[slot], 0)
    skipped += (~ok).long()
    coefs = torch.where(ok, coefs, torch.zeros_like(coefs))
    return seeds[(slot - ages) % slots_in_ring], coefs, (~ok).float().view(1)


# The ops below are defined by those above.
from pseuzo_kernels import masks, parts  # noqa: E402

_api = NoiseApi(
    add_noise_list_,
    add_noise_list_out,
    (masks.add_noise_masked_list_, masks.add_noise_masked_list_out),
    (parts.add_noise_parts_, parts.add_noise_parts_out),
)
noise, add_noise_, add_noise = _api.noise, _api.add_noise_, _api.add_noise
perturb_, restore_, update_ = _api.perturb_, _api.restore_, _api.update_
perturb, update, sign_update_ = _api.perturb, _api.update, _api.sign_update_


class EmaWindow(window.EmaWindow):
    __doc__ = window.EmaWindow.__doc__
    _op = staticmethod(window_step)
