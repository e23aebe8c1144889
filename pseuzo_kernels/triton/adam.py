"""Adam's update as a Triton kernel; `pseuzo_kernels.adam` defines every bit.

The noise of each step of the window is made and transformed in registers, which also hold both
moments, so a thread has 2 counters here instead of 4.
"""

import torch
import triton
import triton.language as tl

from pseuzo_kernels import adam, reference
from pseuzo_kernels.laws import resolve
from pseuzo_kernels.triton import device as px
from pseuzo_kernels.triton import launch
from pseuzo_kernels.triton.kernels import COUNTERS, WARPS
from pseuzo_kernels.triton.sums import (
    inside,
    load,
    noise_sums,
    unless_skipped,
    zeros_laid_out_as,
)

HALF = COUNTERS // 2  # the counters of a program; launch tables list blocks of twice as many


@triton.jit
def _moves(
    q,
    stream,
    seeds_ptr,
    coefs_ptr,
    K,
    directions,
    scale,
    beta1,
    beta2,
    first,
    second,
    eps,
    zero,
    NOISE: tl.constexpr,
    HASH: tl.constexpr,
    ASM: tl.constexpr,
):
    """The 16 planes of adam.adam_moves."""
    m = (zero.to(tl.float32, bitcast=True),) * 16
    v = m
    k = 0
    while k < K:
        g = noise_sums(q, stream, seeds_ptr, coefs_ptr, k, k + directions, zero, NOISE, HASH, ASM)
        means, squares = (), ()
        for j in tl.static_range(16):
            d = g[j] * scale
            means = means + (m[j] * beta1 + d,)
            squares = squares + (v[j] * beta2 + d * d,)
        m, v = means, squares
        k += directions
    moves = ()
    for j in tl.static_range(16):
        moves = moves + (tl.div_rn(m[j] * first, tl.sqrt_rn(v[j] * second) + eps),)
    return moves


@triton.jit
def move_block(
    x_ptr,  # the first element of the block
    lo,  # elements from there that are written: lo <= i < hi
    hi,
    q,
    stream,
    seeds_ptr,
    coefs_ptr,
    K,
    directions,
    keep,
    scale,
    beta1,
    beta2,
    first,
    second,
    eps,
    rounding_hash,
    NOISE: tl.constexpr,
    COUNTERS: tl.constexpr,
    FULL: tl.constexpr,
    HASH: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ASM: tl.constexpr,
    limit=None,  # of a mask
    mask_seed_ptr=None,  # [1] int64, or None: the mask is of small elements
    takes_ptr=None,  # to the bytes of a given mask, where x_ptr is
):
    lane = tl.arange(0, COUNTERS)
    offs = lane // 128 * 2048 + lane % 128
    zero = zeros_laid_out_as(load(x_ptr, offs, lo, hi, 0, FULL, False), ASM)
    q = q + lane.to(tl.uint32) + zero
    moves = _moves(
        q,
        stream,
        seeds_ptr,
        coefs_ptr,
        K,
        directions,
        scale,
        beta1,
        beta2,
        first,
        second,
        eps,
        zero,
        NOISE,
        HASH,
        ASM,
    )
    words = (q, q, q, q)
    if STOCHASTIC:
        words = px.philox(
            q, stream, rounding_hash, px.ROUNDING_KEY0, px.ROUNDING_KEY1, px.ROUNDING_ROUNDS, ASM
        )
    RANDOM: tl.constexpr = mask_seed_ptr is not None
    mask_words = words
    if RANDOM:
        mask_hash = px.hash_seed(tl.load(mask_seed_ptr))
        mask_words = px.philox(
            q, stream, mask_hash, px.MASK_KEY0, px.MASK_KEY1, px.ROUNDING_ROUNDS, ASM
        )
    for j in tl.static_range(16):
        x = load(x_ptr, offs, lo, hi, j, FULL, False)
        y = px.widen(x, ASM) * keep + moves[j]
        y = px.cast(y, words, j, x_ptr.dtype.element_ty, STOCHASTIC, ASM)
        if limit is not None:
            y = tl.where(px.takes_noise(x, mask_words, j, limit, RANDOM, ASM), y, x)
        if takes_ptr is not None:
            y = tl.where(load(takes_ptr, offs, lo, hi, j, FULL, False) != 0, y, x)
        if FULL:
            tl.store(x_ptr + offs + j * 128, y)
        else:
            tl.store(x_ptr + offs + j * 128, y, mask=inside(offs, lo, hi, j, False))


@triton.jit
def _program(
    x_ptr,
    n,
    block,
    stream,
    seeds_ptr,
    coefs_ptr,
    K,
    directions,
    keep,
    scale,
    beta1,
    beta2,
    first,
    second,
    eps,
    rounding_hash,
    found_inf_ptr,
    NOISE: tl.constexpr,
    COUNTERS: tl.constexpr,
    HASH: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ASM: tl.constexpr,
):
    """Block `block` of a tensor of n elements. A skipped op reads and writes nothing."""
    start = block.to(tl.int64) * (16 * COUNTERS)
    left = tl.minimum(n - start, 16 * COUNTERS).to(tl.int32)
    q = (block * COUNTERS).to(tl.uint32)
    stream = stream.to(tl.uint32)
    skipped, K, scale = unless_skipped(coefs_ptr, K, scale, found_inf_ptr, True, HASH)
    left = tl.where(skipped, 0, left)
    if left == 16 * COUNTERS:
        move_block(
            x_ptr + start,
            0,
            left,
            q,
            stream,
            seeds_ptr,
            coefs_ptr,
            K,
            directions,
            keep,
            scale,
            beta1,
            beta2,
            first,
            second,
            eps,
            rounding_hash,
            NOISE,
            COUNTERS,
            True,
            HASH,
            STOCHASTIC,
            ASM,
        )
    elif left > 0:
        move_block(
            x_ptr + start,
            0,
            left,
            q,
            stream,
            seeds_ptr,
            coefs_ptr,
            K,
            directions,
            keep,
            scale,
            beta1,
            beta2,
            first,
            second,
            eps,
            rounding_hash,
            NOISE,
            COUNTERS,
            False,
            HASH,
            STOCHASTIC,
            ASM,
        )


@triton.jit(do_not_specialize=["n", "stream", "K", "directions", "rounding_hash"])
def adam_kernel(
    x_ptr,  # [n] fp32 | bf16 | fp16
    n: tl.int64,
    stream: tl.int64,
    keep: tl.float32,
    scale: tl.float32,
    seeds_ptr,  # [K] int64, hashed unless HASH
    coefs_ptr,  # [K] fp32, or from prepare_kernel [K + 1]
    K: tl.int32,
    directions: tl.int32,
    beta1: tl.float32,
    beta2: tl.float32,
    first: tl.float32,
    second: tl.float32,
    eps: tl.float32,
    rounding_hash: tl.int64,
    found_inf_ptr,  # [1] fp32 or None
    NOISE: tl.constexpr,
    COUNTERS: tl.constexpr,
    HASH: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ASM: tl.constexpr,
):
    _program(
        x_ptr,
        n,
        tl.program_id(0),
        stream,
        seeds_ptr,
        coefs_ptr,
        K,
        directions,
        keep,
        scale,
        beta1,
        beta2,
        first,
        second,
        eps,
        rounding_hash,
        found_inf_ptr,
        NOISE,
        COUNTERS,
        HASH,
        STOCHASTIC,
        ASM,
    )


@triton.jit(do_not_specialize=["K", "directions", "rounding_hash"])
def adam_many_kernel(
    dtype_ptr,  # any tensor of the list, for its dtype
    xs_ptr,  # [T] int64: addresses, multiples of 16
    ns_ptr,  # [T] int64
    streams_ptr,  # [T] int64
    keeps_ptr,  # [T] fp32
    scales_ptr,  # [T] fp32
    table_ptr,  # [programs / 2, 2] int32: tensor, and block of twice as many counters
    seeds_ptr,
    coefs_ptr,
    K: tl.int32,
    directions: tl.int32,
    beta1: tl.float32,
    beta2: tl.float32,
    first: tl.float32,
    second: tl.float32,
    eps: tl.float32,
    rounding_hash: tl.int64,
    found_inf_ptr,
    NOISE: tl.constexpr,
    COUNTERS: tl.constexpr,
    HASH: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ASM: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    t = tl.load(table_ptr + pid // 2 * 2)
    block = 2 * tl.load(table_ptr + pid // 2 * 2 + 1) + (pid % 2).to(tl.int32)
    pointer: tl.constexpr = tl.pointer_type(dtype_ptr.dtype.element_ty)
    _program(
        tl.multiple_of(tl.load(xs_ptr + t).to(pointer), 16),
        tl.load(ns_ptr + t),
        block,
        tl.load(streams_ptr + t),
        seeds_ptr,
        coefs_ptr,
        K,
        directions,
        tl.load(keeps_ptr + t),
        tl.load(scales_ptr + t),
        beta1,
        beta2,
        first,
        second,
        eps,
        rounding_hash,
        found_inf_ptr,
        NOISE,
        COUNTERS,
        HASH,
        STOCHASTIC,
        ASM,
    )


def adam_list_triton_(
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
    """adam.adam_list_: one launch per dtype, and one per tensor that is not aligned to 16 bytes."""
    op, K = "adam_list_", seeds.numel()
    if not launch.implemented(noise, op) or not K or directions < 1 or K % directions:
        how = numbers, noise, stochastic, rounding_seed, found_inf
        adam.adam_list_(xs, seeds, coefs, directions, streams, keeps, scales, *how)
        return
    ts = [t for t, x in enumerate(xs) if scales[t] and x.numel()]
    if not ts:
        return
    xs, streams, keeps, scales = ([c[t] for t in ts] for c in (xs, streams, keeps, scales))
    noise, device = resolve(noise)[0], xs[0].device
    ptrs, sizes = launch.addresses_of(op, "x", xs), tuple(x.numel() for x in xs)
    dtypes = tuple(x.dtype for x in xs)
    columns = launch.Columns(ptrs, ptrs, sizes, tuple(streams), tuple(scales), dtypes)
    with launch.on_device(device):
        plan, kept = launch.planned(columns, keeps, noise, device)
        seeds, coefs, options = launch.prepared(seeds, coefs, noise, found_inf)
        options |= dict(COUNTERS=HALF, num_warps=WARPS)
        rounding_hash = reference.hash_seed(rounding_seed) if stochastic else 0
        terms = seeds, coefs, K, directions, *numbers, rounding_hash, found_inf
        for t in plan.alone:
            scale = launch.factor(noise, scales[t])
            options["STOCHASTIC"] = stochastic and dtypes[t] is not torch.float32
            args = xs[t], sizes[t], streams[t], keeps[t], scale, *terms
            adam_kernel[(-(-sizes[t] // (16 * HALF)),)](*args, **options)
        for group, keep in zip(plan.together, kept, strict=True):
            x = xs[group.ts[0]]
            options["STOCHASTIC"] = stochastic and x.dtype is not torch.float32
            _, addresses, ns, places = group.ints.unbind()
            args = x, addresses, ns, places, keep, group.scales, group.programs, *terms
            adam_many_kernel[(2 * len(group.programs),)](*args, **options)
