"""The noise kernels: x <- keep * x + scale * sum_k coefs[k] z(seeds[k], stream).

Each element is read and written once for any K. Perturb, restore and update are all calls of them.
A kernel makes 16 planes of noise a counter and adds up the K terms in registers; for "hadamard" one
transform of 16 points then turns the sums into noise, once per launch instead of once per seed.
`pseuzo_kernels.reference` defines every bit.
"""

import triton
import triton.language as tl

from pseuzo_kernels.triton import device as px
from pseuzo_kernels.triton.sums import (
    add_block,
    add_chunks,
    inside,
    load,
    noise_sums,
    unless_skipped,
    zeros_laid_out_as,
)

COUNTERS, WARPS = 512, 4  # of 16 elements, a program
COUNTERS_STEPS = 256  # where a program holds x beside the sums
# Asserts are compiled in, but none about integers that wrap.
ROWS_OPTIONS = dict(debug=True, sanitize_overflow=False)


@triton.jit
def _program(
    out_ptr,
    x_ptr,
    n,
    block,
    stream,
    seeds_ptr,
    coefs_ptr,
    K,
    keep,
    scale,
    rounding_hash,
    found_inf_ptr,
    limit,
    mask_seed_ptr,
    NOISE: tl.constexpr,
    COUNTERS: tl.constexpr,
    HAS_X: tl.constexpr,
    HASH: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ASM: tl.constexpr,
):
    """Block `block` of a tensor of n elements."""
    start = block.to(tl.int64) * (16 * COUNTERS)
    left = tl.minimum(n - start, 16 * COUNTERS).to(tl.int32)
    q = (block * COUNTERS).to(tl.uint32)
    stream = stream.to(tl.uint32)
    skipped, K, scale = unless_skipped(coefs_ptr, K, scale, found_inf_ptr, HAS_X, HASH)
    keep = tl.where(skipped, 1.0, keep)
    if HAS_X:
        in_place = out_ptr.to(tl.int64) == x_ptr.to(tl.int64)
        left = tl.where(skipped & in_place, 0, left)  # then nothing is read or written
    add_block(
        out_ptr + start,
        x_ptr + start,
        0,
        left,
        q,
        stream,
        seeds_ptr,
        coefs_ptr,
        K,
        keep,
        scale,
        rounding_hash,
        limit,
        mask_seed_ptr,
        NOISE,
        COUNTERS,
        HAS_X,
        HASH,
        STOCHASTIC,
        ASM,
    )


# Without do_not_specialize, Triton would compile another kernel where a number is 1.
@triton.jit(do_not_specialize=["n", "stream", "K", "rounding_hash"])
def add_noise_kernel(
    out_ptr,  # [n] fp32 | bf16 | fp16
    x_ptr,  # [n], same dtype; out_ptr itself in place, or without x
    n: tl.int64,
    stream: tl.int64,
    seeds_ptr,  # [K] int64, hashed unless HASH
    coefs_ptr,  # [K] fp32, or from prepare_kernel [K + 1]
    K: tl.int32,
    keep: tl.float32,
    scale: tl.float32,  # NaN: no noise
    rounding_hash: tl.int64,
    found_inf_ptr,  # [1] fp32 or None
    limit,  # fp32 of the mask, or None without one
    mask_seed_ptr,  # [1] int64 of a random mask, or None
    NOISE: tl.constexpr,
    COUNTERS: tl.constexpr,
    HAS_X: tl.constexpr,
    HASH: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ASM: tl.constexpr,
):
    _program(
        out_ptr,
        x_ptr,
        n,
        tl.program_id(0),
        stream,
        seeds_ptr,
        coefs_ptr,
        K,
        keep,
        scale,
        rounding_hash,
        found_inf_ptr,
        limit,
        mask_seed_ptr,
        NOISE,
        COUNTERS,
        HAS_X,
        HASH,
        STOCHASTIC,
        ASM,
    )


@triton.jit(do_not_specialize=["K", "rounding_hash"])
def add_noise_many_kernel(
    dtype_ptr,  # any tensor of the list: says its dtype
    outs_ptr,  # [T] int64: addresses, multiples of 16
    xs_ptr,  # [T] int64
    ns_ptr,  # [T] int64
    streams_ptr,  # [T] int64
    keeps_ptr,  # [T] fp32
    scales_ptr,  # [T] fp32, as scale above
    table_ptr,  # [programs, 2] int32: tensor, block
    seeds_ptr,
    coefs_ptr,
    K: tl.int32,
    rounding_hash: tl.int64,
    found_inf_ptr,
    limits_ptr,  # [T] fp32, or None
    mask_seed_ptr,
    NOISE: tl.constexpr,
    COUNTERS: tl.constexpr,
    HAS_X: tl.constexpr,
    HASH: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ASM: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    t = tl.load(table_ptr + 2 * pid)
    block = tl.load(table_ptr + 2 * pid + 1)
    pointer: tl.constexpr = tl.pointer_type(dtype_ptr.dtype.element_ty)
    out_ptr = tl.multiple_of(tl.load(outs_ptr + t).to(pointer), 16)
    x_ptr = tl.multiple_of(tl.load(xs_ptr + t).to(pointer), 16)
    _program(
        out_ptr,
        x_ptr,
        tl.load(ns_ptr + t),
        block,
        tl.load(streams_ptr + t),
        seeds_ptr,
        coefs_ptr,
        K,
        tl.load(keeps_ptr + t),
        tl.load(scales_ptr + t),
        rounding_hash,
        found_inf_ptr,
        None if limits_ptr is None else tl.load(limits_ptr + t),
        mask_seed_ptr,
        NOISE,
        COUNTERS,
        HAS_X,
        HASH,
        STOCHASTIC,
        ASM,
    )


@triton.jit(do_not_specialize=["S", "T"])
def add_noise_steps_kernel(
    dtype_ptr,  # any tensor of the list: says its dtype
    xs_ptr,  # [T] int64: addresses
    ns_ptr,  # [T] int64
    streams_ptr,  # [T] int64
    table_ptr,  # [programs, 2] int32: tensor, block
    keeps_ptr,  # [S, T] fp32
    scales_ptr,  # [S, T] fp32; NaN: the step leaves the tensor alone
    firsts_ptr,  # [S + 1] int64: where the terms of a step begin
    rounding_hashes_ptr,  # [S] int64
    seeds_ptr,  # hashed
    coefs_ptr,  # rounded to 17 bits
    S: tl.int32,
    T: tl.int64,
    NOISE: tl.constexpr,
    COUNTERS: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ASM: tl.constexpr,
):
    """S updates of a block that stays in registers.

    Memory is read and written once, so masks cost nothing.
    """
    pid = tl.program_id(0).to(tl.int64)
    t = tl.load(table_ptr + 2 * pid)
    block = tl.load(table_ptr + 2 * pid + 1)
    dtype: tl.constexpr = dtype_ptr.dtype.element_ty
    start = block.to(tl.int64) * (16 * COUNTERS)
    ptr = tl.load(xs_ptr + t).to(tl.pointer_type(dtype)) + start
    left = tl.minimum(tl.load(ns_ptr + t) - start, 16 * COUNTERS).to(tl.int32)
    stream = tl.load(streams_ptr + t).to(tl.uint32)
    lane = tl.arange(0, COUNTERS)
    offs = lane // 128 * 2048 + lane % 128
    xs = ()
    for j in tl.static_range(16):
        xs = xs + (px.widen(load(ptr, offs, 0, left, j, False, False), ASM),)
    zero = zeros_laid_out_as(xs[0], ASM)
    q = (block * COUNTERS).to(tl.uint32) + lane.to(tl.uint32) + zero

    s = 0
    while s < S:
        keep = tl.load(keeps_ptr + s * T + t)
        scale = tl.load(scales_ptr + s * T + t)
        first = tl.load(firsts_ptr + s)
        last = tl.where(scale == scale, tl.load(firsts_ptr + s + 1), first)
        acc = noise_sums(q, stream, seeds_ptr, coefs_ptr, first, last, zero, NOISE, False, ASM)
        words = (q, q, q, q)
        if STOCHASTIC:
            rounding_hash = tl.load(rounding_hashes_ptr + s)
            words = px.philox(
                q,
                stream,
                rounding_hash,
                px.ROUNDING_KEY0,
                px.ROUNDING_KEY1,
                px.ROUNDING_ROUNDS,
                ASM,
            )
        after = ()
        for j in tl.static_range(16):
            y = xs[j] * keep + acc[j] * scale
            y = px.widen(px.cast(y, words, j, dtype, STOCHASTIC, ASM), ASM)
            after = after + (tl.where(scale == scale, y, xs[j]),)
        xs = after
        s += 1
    for j in tl.static_range(16):
        y = px.cast(xs[j], None, j, dtype, False, ASM)  # exact
        tl.store(ptr + offs + j * 128, y, mask=inside(offs, 0, left, j, False))


@triton.jit(do_not_specialize=["stream", "K", "N", "width", "parts"])
def add_noise_rows_kernel(
    out_ptr,  # [M, width]
    x_ptr,  # [N, width]
    index_ptr,  # [M] int64
    N: tl.int64,
    width: tl.int64,
    parts: tl.int32,  # programs a row: the most chunks that a row can touch
    stream: tl.int64,
    seeds_ptr,
    coefs_ptr,
    K: tl.int32,
    scale: tl.float32,
    limit,
    mask_seed_ptr,
    PLANES: tl.constexpr,  # width is a multiple of 128, so that all accesses are wide
    NOISE: tl.constexpr,
    HASH: tl.constexpr,
    ASM: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    row = pid // parts
    index = tl.load(index_ptr + row)
    # As in torch's embedding, an index out of range is an error of the device; ROWS_OPTIONS
    # compiles this assert in.
    tl.device_assert(
        index.to(tl.uint64) < N.to(tl.uint64), "add_noise_rows: an index is out of range"
    )
    first = index * width  # element of x where the row begins
    chunk = first // 2048 + pid % parts
    start = chunk * 2048
    lo = tl.maximum(first - start, 0).to(tl.int32)
    hi = tl.minimum(first + width - start, 2048).to(tl.int32)
    out_start = row * width - first + start
    if PLANES:
        out_start = tl.multiple_of(out_start, 128)
    _, K, scale = unless_skipped(coefs_ptr, K, scale, None, True, HASH)
    if lo < hi:
        add_chunks(
            out_ptr + out_start,
            x_ptr + start,
            lo,
            hi,
            (chunk * 128).to(tl.uint32),
            stream.to(tl.uint32),
            seeds_ptr,
            coefs_ptr,
            K,
            1.0,
            scale,
            0,
            limit,
            mask_seed_ptr,
            NOISE,
            128,
            True,
            False,
            PLANES,
            HASH,
            False,
            ASM,
        )


@triton.jit(do_not_specialize=["K"])
def prepare_kernel(
    seeds_ptr,
    coefs_ptr,
    hashes_ptr,
    rounded_ptr,  # [K + 1]: the last multiplies the sums; NaN: the op is skipped
    K: tl.int32,
    found_inf_ptr,  # [1] fp32 or None: becomes 1 then
    FP16: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Hash the seeds and round the coefs, once for all programs of the next launch."""
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(hashes_ptr + k, px.hash_seed(tl.load(seeds_ptr + k, mask=k < K, other=0)), mask=k < K)
    coef = tl.load(coefs_ptr + k, mask=k < K, other=0.0)
    sizes = tl.zeros([BLOCK], tl.int32)
    first = 0
    while first < K:  # programs cannot wait for each other, so each finds the largest of all
        at = first + tl.arange(0, BLOCK)
        bits = tl.load(coefs_ptr + at, mask=at < K, other=0.0).to(tl.int32, bitcast=True)
        sizes = tl.maximum(sizes, bits & 0x7FFFFFFF)  # NaN is the largest of these integers
        first += BLOCK
    largest = tl.max(sizes, 0)
    if FP16:
        down, power = px.powers(largest)
        coef = (coef * down + 12288.0) - 12288.0  # 1.5 * 2^13: to a multiple of 2^-10
    else:
        power = tl.where(px.stays_finite(largest.to(tl.float32, bitcast=True)), 1.0, float("nan"))
        coef = px.round17(coef)
    tl.store(rounded_ptr + k, coef, mask=k < K)
    tl.store(rounded_ptr + K, power)
    if found_inf_ptr is not None:
        if power != power:
            tl.store(found_inf_ptr, 1.0)
