"""Every op in plain torch. This file defines what is correct; Triton, C++ and CUDA must agree with it.

The noise: z(seed, stream, i) is the i-th perturbation of tensor `stream` under `seed`, a pure function of the three, so
any element of any tensor can be made again anywhere. A chunk is 2048 consecutive elements, 16 planes of 128 columns,
and one Philox counter serves the 16 elements of a column:

    element i:  chunk = i >> 11,  plane = (i >> 7) & 15,  column = i & 127,  counter q = chunk * 128 + column
    words:      W = Philox4x32(counter = (q, stream, seed_lo, seed_hi)), the seed hashed by splitmix64

- "hadamard"    b[4w .. 4w+3] = four half-precision patterns of word W[w], z = FWHT16(b) / (4 sqrt(Var b)). Because the
                transform is linear, sum_k c_k z_k = FWHT16(sum_k c_k b_k): it is applied once, whatever K.
- "hadamard-fp16"  the same z; a sum over several seeds is made in half precision, see below.
- "rademacher"  b[4w .. 4w+3] = +-1 from the top bit of each byte of W[w], z = b.
- "normal"      Box-Muller: word w makes planes 2w and 2w + 1 from 16 bits of radius and 16 bits of angle.

Sums run over k in order, in fp32, with c_k rounded to 17 significant bits. The patterns have 7, so c_k * b_k is exact
and fused and unfused multiply-adds give the same bits: "hadamard" and "rademacher" are bit-exact on every backend.
(For 2^-120 < |c_k| < 2^126, that is: nearer to the ends of fp32 the product can underflow or overflow.)

"hadamard-fp16" with one seed is "hadamard". With more it sums in half precision, two planes an instruction on a GPU:

    2^e     the power of two with 2^(e-1) < max_k |c_k| <= 2^e, but at least 2^-126
    c'_k =  c_k / 2^e to the nearest multiple of 2^-10, ties to even; so |c'_k| <= 1, and fp16 holds it
    h <-    fp16(h + c'_k b_k), one rounding to nearest even, over 16 seeds in order, h = 0 before each 16
    acc <-  acc + h after each 16 seeds, in fp32;  d = FWHT16(acc) * (fp32 scale * 2^e)

c'_k b_k is a multiple of 2^-19 below 1.86, so h + c'_k b_k is one below 32: fp32 holds it, and what computes it in fp32
and then rounds has the bits of the GPU's half-precision fused multiply-add. Above 2^126 max_k |c_k| counts as infinite.
Rounding the sums costs 6e-4 of their size (rms; 2^-10 sqrt(16/12) at most,
unbiased), and a coefficient is off by up to 2^(e-11), so those below that vanish: together 1e-3 for coefs alike or
normal, K from 2 to 1000, and 1e-2 where one is a thousand times the 999 others.

Where a coefficient is NaN or infinite, or becomes so as it is rounded, an op is skipped: what it writes to stays as it
is, to the bit, without keep either. So it is where found_inf is not 0; and an op that is skipped because of its
coefficients sets found_inf to 1.

Sources: Philox and its constants, Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011); splitmix64,
Steele et al. (2014); perturbation by seed, Malladi et al., "Fine-tuning language models with just forward passes"
(2023).
"""

import math

import torch
from torch import Tensor

from pseuzo_kernels import checks, window

CHUNK, PLANE = 2048, 128  # elements
COUNTERS_AT_ONCE = (
    1 << 16
)  # bounds the int64 temporaries: about 16 MiB, whatever the size of the tensor

# The second only for planes 8..15 of "normal". Its half of the first spares a multiplication: round 1 ends alike.
KEYS_NOISE = ((0x243F6A88, 0x85A308D3), (0xA4093822, 0x85A308D3))
KEY_ROUNDING = (0x13198A2E, 0x03707344)
ROUNDING_VERSION = (
    2  # of round_stochastically: what was rounded by one version cannot be continued by another
)
FP16_BLOCK = 16  # seeds that "hadamard-fp16" sums in fp16
HADAMARD_SCALE = 1 / (4 * math.sqrt(0.7050395011901855))
ANGLE = (
    219 / 2**22
)  # half a step of the angle, nearly: with it, one fused multiply-add on bits makes the angle
MASK32 = 0xFFFFFFFF


def hash_seed(seed: int) -> int:
    """splitmix64 of one seed, as the int64 with the bits of the result."""
    z = (seed + 0x9E3779B97F4A7C15) % (1 << 64)
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % (1 << 64)
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % (1 << 64)
    return checks.signed64("hash_seed", z ^ (z >> 31))


def hash_seeds(seeds: Tensor) -> Tensor:
    """splitmix64 of each seed. [K] int64 -> [K] int64 (the bits of the unsigned result)."""

    def shift_right(v: Tensor, by: int) -> Tensor:
        return (v >> by) & ((1 << (64 - by)) - 1)  # int64 shifts copy the sign

    z = seeds + (0x9E3779B97F4A7C15 - (1 << 64))
    z = (z ^ shift_right(z, 30)) * (0xBF58476D1CE4E5B9 - (1 << 64))
    z = (z ^ shift_right(z, 27)) * (0x94D049BB133111EB - (1 << 64))
    return z ^ shift_right(z, 31)


def philox4x32(
    counter: tuple[Tensor | int, ...], key: tuple[int, int], rounds: int
) -> tuple[Tensor, ...]:
    """Four words, int64 in 0 .. 2^32 - 1, of the shape that the four counter words broadcast to."""
    c0, c1, c2, c3 = (c if isinstance(c, Tensor) else torch.tensor(c) for c in counter)
    k0, k1 = key
    for _ in range(rounds):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # int64 wraps as uint64 does
        c0, c1 = ((p1 >> 32) & MASK32) ^ c1 ^ k0, p1 & MASK32
        c2, c3 = ((p0 >> 32) & MASK32) ^ c3 ^ k1, p0 & MASK32
        k0, k1 = (k0 + 0x9E3779B9) & MASK32, (k1 + 0xBB67AE85) & MASK32
    return c0, c1, c2, c3


def round17(coefs: Tensor) -> Tensor:
    """fp32 rounded to 17 significant bits, halves away from zero; infinities and NaN unchanged."""
    rounded = ((coefs.view(torch.int32) + 0x40) & -0x80).view(torch.float32)
    return torch.where(coefs.isfinite(), rounded, coefs)


def fp16_coefs(coefs: Tensor) -> tuple[Tensor, Tensor]:
    """c' [K] and 2^e [] of "hadamard-fp16", both fp32; NaN if the largest |c| is above 2^126 or not finite."""
    largest = (
        (coefs.view(torch.int32) & 0x7FFFFFFF).max().long()
    )  # as integers, since these put NaN on top
    exponent = (largest + 0x7FFFFF >> 23).clamp(1, 253)
    power = torch.where(largest > 0x7E800000, 0x7FC00000, exponent << 23).int().view(torch.float32)
    return torch.round(coefs / power * 1024) / 1024, power


def scale_of(noise: str, noise_scale: float) -> float:
    """The constant that multiplies a column's sums: rounded to fp32 once, where it is used."""
    return (HADAMARD_SCALE if noise.startswith("hadamard") else 1.0) * noise_scale


def _half_patterns(words: tuple[Tensor, ...], mask: int, ones: int) -> Tensor:
    """[16, n] fp32: four half-precision numbers from each of four words [n]."""
    planes = []
    for word in words:
        swapped = ((word & 0x00FF00FF) << 8) | ((word >> 8) & 0x00FF00FF)
        for source in (word, swapped):
            bits = (source & mask) | ones
            planes += [bits & 0xFFFF, bits >> 16]
    halves = torch.stack(planes)
    halves = torch.where(halves >= 0x8000, halves - 0x10000, halves)  # the range of int16
    return halves.to(torch.int16).view(torch.float16).float()


def column_noise(noise: str, q: Tensor, stream: int, seed_hash: Tensor) -> Tensor:
    """b, [16, n] fp32: plane by column, before the transform and the scale. q [n] int64, seed_hash [] int64."""
    counter = (q, stream, seed_hash & MASK32, (seed_hash >> 32) & MASK32)
    if noise.startswith("hadamard"):
        return _half_patterns(philox4x32(counter, KEYS_NOISE[0], 7), 0x8F708F70, 0x30003000)
    if noise == "rademacher":
        return _half_patterns(philox4x32(counter, KEYS_NOISE[0], 7), 0x80008000, 0x3C003C00)
    words = torch.stack(
        philox4x32(counter, KEYS_NOISE[0], 10) + philox4x32(counter, KEYS_NOISE[1], 10)
    )  # [8, n]
    radius = torch.sqrt(-2 * torch.log(((words >> 16).float() + 0.5) / 65536))
    angle = ((words & 0xFFFF).float() - 32768) * (math.pi / 32768) + ANGLE
    return torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], dim=1).flatten(0, 1)


def fwht16(a: Tensor) -> Tensor:
    """Walsh-Hadamard transform over the first axis, [16, n]; the order of the additions is part of the contract."""
    for h in (1, 2, 4, 8):
        a = a.reshape(16 // (2 * h), 2, h, -1)
        a = torch.stack([a[:, 0] + a[:, 1], a[:, 0] - a[:, 1]], dim=1).reshape(16, -1)
    return a


def prepared_coefs(noise: str, coefs: Tensor) -> tuple[Tensor, Tensor]:
    """coefs [K] as the sums take them, and what multiplies the sums, [], both fp32. NaN: the op is skipped."""
    if noise == "hadamard-fp16" and len(coefs) > 1:
        return fp16_coefs(coefs)
    rounded = round17(coefs)
    return rounded, torch.where(rounded.isfinite().all(), 1.0, float("nan"))


def noise_sum(
    noise: str, q: Tensor, stream: int, hashes: Tensor, coefs: Tensor, noise_scale: float
) -> Tensor:
    """d = noise_scale * sum_k coefs[k] z_k for whole columns, [16, n] fp32. q [n], hashes [K] int64, coefs [K] fp32."""
    acc = torch.zeros(16, q.numel(), dtype=torch.float32, device=q.device)
    scale = torch.tensor(scale_of(noise, noise_scale), dtype=torch.float32, device=q.device)
    coefs, power = prepared_coefs(noise, coefs)
    if noise == "hadamard-fp16" and len(hashes) > 1:
        for block, block_coefs in zip(
            hashes.split(FP16_BLOCK), coefs.split(FP16_BLOCK), strict=True
        ):
            h = torch.zeros_like(acc, dtype=torch.float16)
            for seed_hash, coef in zip(block, block_coefs, strict=True):
                h = (h.float() + coef * column_noise(noise, q, stream, seed_hash)).half()
            acc = acc + h.float()
    else:
        for seed_hash, coef in zip(hashes, coefs, strict=True):
            acc = acc + coef * column_noise(noise, q, stream, seed_hash)
    return (fwht16(acc) if noise.startswith("hadamard") else acc) * (scale * power)


def round_stochastically(x: Tensor, dither: Tensor, dtype: torch.dtype) -> Tensor:
    """floor(|x| / ulp + dither / 2^16) ulps of dtype, with the sign of x. x fp32, dither int64 in 0 .. 2^16 - 1.

    Unbiased for every fp32 number, but for what is below 2^-16 of the smallest half. Values that dtype holds stay as
    they are, infinities and NaN too.
    """
    bits = x.view(torch.int32).to(torch.int64) & MASK32
    if dtype is torch.bfloat16:
        out = (bits + torch.where(x.isfinite(), dither, 0)) >> 16
        out = torch.where(x.isnan(), 0x7FC0, out)
    else:
        u = bits & 0x7FFFFFFF
        subnormal = (
            (torch.where(u < 0x38800000, x.abs(), 0) * 2.0**40).to(torch.int64) + dither
        ) >> 16
        out = torch.where(u >= 0x38800000, (u - 0x38000000 + (dither >> 3)) >> 13, subnormal)
        out = torch.where(u >= 0x47800000, 0x7C00, out)
        out = torch.where(u > 0x7F800000, 0x7E00, out) | ((bits >> 16) & 0x8000)
    out = torch.where(out >= 0x8000, out - 0x10000, out)
    return out.to(torch.int16).view(dtype)


def rounding_dither(q: Tensor, stream: int, seed_hash: Tensor) -> Tensor:
    """16 bits for each plane and column, [16, n] int64. Arguments as column_noise.

    Plane j takes byte j % 4 (the low one first) of word j // 4 as its high byte, and the same byte of word
    (j // 4) ^ 1 as its low one: exactly uniform, at no more Philox calls than 8 bits would take. Planes j and j ^ 4
    share their bytes crosswise: their roundings correlate by up to 0.012, and by up to 2^-16 / p where rounding up, or
    down, has a chance p below 2^-9.
    """
    counter = (q, stream, seed_hash & MASK32, (seed_hash >> 32) & MASK32)
    words = torch.stack(philox4x32(counter, KEY_ROUNDING, 7))
    shifts = 8 * torch.arange(4, device=q.device)[:, None]
    bytes_ = (words[:, None] >> shifts) & 0xFF  # [4 words, 4 bytes, n]
    return (bytes_ << 8 | bytes_[[1, 0, 3, 2]]).flatten(0, 1)


def _columns(first: int, last: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Counters q [n] of chunks first .. last - 1, and the element index of each (plane, column), [16, n]."""
    q = torch.arange(first * PLANE, last * PLANE, device=device)
    elements = (q // PLANE) * CHUNK + q % PLANE + PLANE * torch.arange(16, device=device)[:, None]
    return q, elements


def _add_noise_into(
    out, x, stream, hashes, coefs, keep, scale, noise, stochastic, rounding_hash, skipped
) -> None:
    """out and x are flat, x may be None or out itself. skipped: [] bool, out <- x, or 0 without it."""
    n = out.numel()
    chunks_at_once = COUNTERS_AT_ONCE // PLANE
    for first in range(0, -(-n // CHUNK), chunks_at_once):
        q, elements = _columns(first, min(first + chunks_at_once, -(-n // CHUNK)), out.device)
        if scale:
            y = noise_sum(noise, q, stream, hashes, coefs, scale)
        else:  # adding -0 changes nothing
            y = torch.full(
                elements.shape, 0.0 if x is None else -0.0, dtype=torch.float32, device=out.device
            )
        inside = elements < n
        at = elements[inside]
        y = y[inside]
        if x is not None:
            y = x[at].float() * keep + y
        if stochastic and out.dtype is not torch.float32:
            y = round_stochastically(
                y, rounding_dither(q, stream, rounding_hash)[inside], out.dtype
            )
        untouched = torch.zeros_like(y, dtype=out.dtype) if x is None else x[at]
        out[at] = torch.where(skipped, untouched, y.to(out.dtype))


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

    xs, out: lists of contiguous tensors of equal sizes; xs may be empty, then there is no first term. found_inf: fp32
    [1] or None. Skipped, the op copies: out[t] <- xs[t], or 0.
    Where scales[t] is 0, no noise is made: out[t] <- keeps[t] * xs[t].
    """
    if not any(y.numel() for y in out):
        return
    hashes = hash_seeds(seeds)
    rounding_hash = hash_seeds(torch.tensor(rounding_seed, device=seeds.device))
    skipped = prepared_coefs(noise, coefs)[1].isnan()
    if found_inf is not None:
        found_inf.masked_fill_(skipped, 1.0)
        skipped = (found_inf != 0).view(())
    for t, y in enumerate(out):
        keep = torch.tensor(keeps[t], dtype=torch.float32, device=y.device)
        x = xs[t].view(-1) if xs else None
        _add_noise_into(
            y.view(-1),
            x,
            streams[t],
            hashes,
            coefs,
            keep,
            scales[t],
            noise,
            stochastic,
            rounding_hash,
            skipped,
        )


def add_noise_list_(
    xs, seeds, coefs, streams, keeps, scales, noise, stochastic, rounding_seed, found_inf=None
):
    """The op pseuzo::add_noise_list_: add_noise_list_out in place; where scales[t] is 0 nothing is made or written."""
    for x, stream, keep, scale in zip(xs, streams, keeps, scales, strict=True):
        if scale:
            add_noise_list_out(
                [x],
                seeds,
                coefs,
                [stream],
                [keep],
                [scale],
                noise,
                stochastic,
                rounding_seed,
                found_inf,
                out=[x],
            )


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
    """The op pseuzo::add_noise_steps_: updates in a row, each rounded as if it were alone, for replaying a run.

    seeds, coefs: those of all steps, one step after the other, counts[s] of them in step s. keeps, scales: one per step
    and tensor, that of tensor t in step s at s * len(xs) + t; where scales is 0, that step leaves the tensor alone.
    rounding_seeds: one per step. op: what makes a step.
    """
    T, first = len(xs), 0
    for s, count in enumerate(counts):
        terms, ts = slice(first, first + count), slice(s * T, (s + 1) * T)
        op(
            xs,
            seeds[terms],
            coefs[terms],
            streams,
            keeps[ts],
            scales[ts],
            noise,
            stochastic,
            rounding_seeds[s],
        )
        first += count


def add_noise_rows(x, index, seeds, coefs, stream, scale, noise):
    """The op pseuzo::add_noise_rows: rows `index` of x + scale * sum_k coefs[k] z(seeds[k], stream), nothing else made.

    x [N, D]; index int64, any shape, 0 <= index < N; returns index.shape + [D], rounded to nearest; skipped, or with a
    scale of 0, the rows of x. The noise of a row is that of its elements in x, so add_noise_rows(x, index) equals
    add_noise(x)[index] to the bit.
    """
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
    """The op pseuzo::window_step: write entry `slot`, project grad on the `used` last ones. See window.EmaWindow.

    State, written in place: values [K, R, P, D] fp32, an entry's rows (means over a group), aligned to the last
    position; seeds [K] int64; groups [K, R] int64; counts [K, R] int32, how many rows of the batch a row stands for: 0
    means none, and the row is not read; skipped [] int64.
    o0 (or None: o1 is the difference), o1, grad [B, P', D], B <= R, P' <= P; group [B] int64 or None: each row its own;
    loss fp32 scalar or None. The entry of age a is at slot (slot - a) mod K.
    Returns seeds [used], coefs [used] fp32, both the newest last, and found_inf [1] fp32.
    """
    capacity, _, positions_max, _ = values.shape
    rows, positions, _ = o1.shape
    change = o1.float() if o0 is None else o1.float() - o0.float()
    group = torch.arange(rows, device=o1.device) if group is None else group
    same = group[:, None] == group[None, :]
    leader = same.int().argmax(1) == torch.arange(
        rows, device=o1.device
    )  # the first row of its group

    values[slot] = 0
    pooled = (
        torch.einsum("ij,jpd->ipd", same.double(), change.double()) / same.sum(1)[:, None, None]
    )
    values[slot, :rows, positions_max - positions :] = pooled.float()
    groups[slot, :rows] = group
    counts[slot] = 0
    counts[slot, :rows] = torch.where(leader, same.sum(1), 0).int()
    seeds[slot] = seed

    ages = torch.arange(used - 1, -1, -1, device=o1.device)
    slots = [(slot - age) % capacity for age in range(used - 1, -1, -1)]
    dots = []
    for k in slots[:-1]:
        pairs = (
            (groups[k, :, None] == group[None, :]) & (counts[k, :, None] > 0)
        ).double()  # [R, B]
        old = values[k, :, positions_max - positions :].double()
        old = torch.where(counts[k, :, None, None] > 0, old, 0.0)
        dots.append((old * torch.einsum("rb,bpd->rpd", pairs, grad.double())).sum())
    own = (change.double() * grad.double()).sum()
    weights = torch.pow(torch.full_like(ages, momentum, dtype=torch.float64), ages) / eps
    coefs = (torch.stack([*dots, own]) * weights).float()

    loss_ok = (
        torch.ones((), dtype=torch.bool, device=o1.device)
        if loss is None
        else loss.isfinite().all()
    )
    ok = coefs.isfinite().all() & loss_ok
    counts[slot] = torch.where(coefs[-1].isfinite() & loss_ok, counts[slot], 0)
    skipped += (~ok).long()
    coefs = torch.where(ok, coefs, torch.zeros_like(coefs))
    return seeds[(slot - ages) % capacity], coefs, (~ok).float().view(1)


_api = checks.NoiseApi(add_noise_list_, add_noise_list_out)
noise, add_noise_, add_noise = _api.noise, _api.add_noise_, _api.add_noise
perturb_, restore_, update_ = _api.perturb_, _api.restore_, _api.update_


class EmaWindow(window.EmaWindow):
    __doc__ = window.EmaWindow.__doc__
    _op = staticmethod(window_step)
