"""The bits of the noise contract in plain torch: hashes, Philox, the transform, and the roundings.

`pseuzo_kernels.reference` explains what they are for. This module needs torch alone.

Sources: Philox and its constants, Salmon et al., "Parallel random numbers: as easy as 1, 2, 3"
(2011); splitmix64, Steele et al. (2014).
"""

import torch
from torch import Tensor

CHUNK, PLANE = 2048, 128  # elements
# The second key only serves planes 8..15 of "normal". It shares half of the first, which saves a
# multiplication: round 1 ends alike.
KEYS_NOISE = ((0x243F6A88, 0x85A308D3), (0xA4093822, 0x85A308D3))
KEY_ROUNDING = (0x13198A2E, 0x03707344)
KEY_MASK = (0x082EFA98, 0xEC4E6C89)  # of random masks
# The version of round_stochastically. A run that one version began cannot continue with another.
ROUNDING_VERSION = 2
FP16_BLOCK = 16  # seeds that are summed in fp16 before the sums are added up in fp32
MASK32 = 0xFFFFFFFF


def hash_seed(seed: int) -> int:
    """splitmix64 of one seed, as the int64 with the bits of the result."""
    z = (seed + 0x9E3779B97F4A7C15) % (1 << 64)
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % (1 << 64)
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % (1 << 64)
    z ^= z >> 31
    return z - (1 << 64) if z >= 1 << 63 else z


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


def counter_of(q: Tensor, stream: int, seed_hash: Tensor) -> tuple[Tensor | int, ...]:
    """Philox's counter for columns q [n] of tensor `stream` under a hashed seed, [] int64."""
    return q, stream, seed_hash & MASK32, (seed_hash >> 32) & MASK32


def fwht16(a: Tensor) -> Tensor:
    """Walsh-Hadamard transform over the first axis, [16, n].

    The order of the additions is part of the contract.
    """
    for h in (1, 2, 4, 8):
        a = a.reshape(16 // (2 * h), 2, h, -1)
        a = torch.stack([a[:, 0] + a[:, 1], a[:, 0] - a[:, 1]], dim=1).reshape(16, -1)
    return a


def round17(coefs: Tensor) -> Tensor:
    """fp32 rounded to 17 significant bits, halves away from zero; infinities and NaN unchanged."""
    rounded = ((coefs.view(torch.int32) + 0x40) & -0x80).view(torch.float32)
    return torch.where(coefs.isfinite(), rounded, coefs)


def fp16_coefs(coefs: Tensor) -> tuple[Tensor, Tensor]:
    """c' [K] and 2^e [] of sums in half precision, both fp32.

    NaN if the largest |c| is above 2^126 or not finite.
    """
    # The sizes are compared as integers, because NaN is the largest of those.
    largest = (coefs.view(torch.int32) & 0x7FFFFFFF).max().long()
    exponent = (largest + 0x7FFFFF >> 23).clamp(1, 253)
    power = torch.where(largest > 0x7E800000, 0x7FC00000, exponent << 23).int().view(torch.float32)
    return torch.round(coefs / power * 1024) / 1024, power


def round_stochastically(x: Tensor, dither: Tensor, dtype: torch.dtype) -> Tensor:
    """floor(|x| / ulp + dither / 2^16) ulps of dtype, with the sign of x.

    x is fp32, dither int64 in 0 .. 2^16 - 1. The result is unbiased for every fp32 number, except
    for parts below 2^-16 of the smallest half. Values that dtype can hold stay as they are,
    including infinities and NaN.
    """
    bits = x.view(torch.int32).to(torch.int64) & MASK32
    if dtype is torch.bfloat16:
        out = (bits + torch.where(x.isfinite(), dither, 0)) >> 16
        out = torch.where(x.isnan(), 0x7FC0, out)
    else:
        u = bits & 0x7FFFFFFF
        small = torch.where(u < 0x38800000, x.abs(), 0) * 2.0**40
        subnormal = (small.to(torch.int64) + dither) >> 16
        out = torch.where(u >= 0x38800000, (u - 0x38000000 + (dither >> 3)) >> 13, subnormal)
        out = torch.where(u >= 0x47800000, 0x7C00, out)
        out = torch.where(u > 0x7F800000, 0x7E00, out) | ((bits >> 16) & 0x8000)
    out = torch.where(out >= 0x8000, out - 0x10000, out)
    return out.to(torch.int16).view(dtype)


def rounding_dither(
    q: Tensor, stream: int, seed_hash: Tensor, key: tuple[int, int] = KEY_ROUNDING
) -> Tensor:
    """16 bits for each plane and column, [16, n] int64. q [n] int64, seed_hash [] int64.

    key: the Philox key, one for each purpose of the bits.

    Plane j takes byte j % 4 (the low one first) of word j // 4 as its high byte, and the same byte
    of word (j // 4) ^ 1 as its low one: exactly uniform, with no more Philox calls than 8 bits
    would take. Planes j and j ^ 4 share their bytes crosswise: their roundings correlate by up to
    0.012, and by up to 2^-16 / p where rounding up, or down, has a chance p below 2^-9.
    """
    words = torch.stack(philox4x32(counter_of(q, stream, seed_hash), key, 7))
    shifts = 8 * torch.arange(4, device=q.device)[:, None]
    bytes_ = (words[:, None] >> shifts) & 0xFF  # [4 words, 4 bytes, n]
    return (bytes_ << 8 | bytes_[[1, 0, 3, 2]]).flatten(0, 1)
