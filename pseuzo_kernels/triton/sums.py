"""The sums over seeds, and the block of a tensor to which a sum is added.

Why the code looks as it does (counted in the machine code for sm_90, see bench/sass_cost.py): a
thread has 4 counters, so that a plane is read and written 4 elements at a time; whole chunks and
tails are separate code, since one mask makes every access narrow; x is loaded after the sum, 8
planes at a time, as 16 would cost 40 more registers.

NOISE names the law, and how its sums are made: "hadamard", "rademacher", "normal"; "hadamard-fp16"
for at most 16 seeds, "hadamard-fp16 blocks" for more.
"""

import triton
import triton.language as tl

from pseuzo_kernels.triton import device as px

# Up to this many seeds are hashed where they are used: that is cheaper than a launch before.
HASH_IN_KERNEL = tl.constexpr(4)


@triton.jit
def inside(offs, lo, hi, J: tl.constexpr, PLANES: tl.constexpr):
    """Which elements i of plane J are written: lo <= i < hi.

    PLANES: there is a single chunk, of which all of the plane is written or none.
    """
    i = (tl.zeros_like(offs) if PLANES else offs) + J * 128
    return (i >= lo) & (i < hi)


@triton.jit
def load(ptr, offs, lo, hi, J: tl.constexpr, FULL: tl.constexpr, PLANES: tl.constexpr):
    if FULL:
        return tl.load(ptr + offs + J * 128)
    else:
        return tl.load(ptr + offs + J * 128, mask=inside(offs, lo, hi, J, PLANES), other=0)


@triton.jit
def zeros_laid_out_as(x, ASM: tl.constexpr):
    """uint32 zeros.

    The asm hides that they are constant, so everything computed from them has the layout of x. Each
    thread then makes the noise of the elements that it loads and stores, and nothing moves between
    threads.
    """
    if ASM:
        return tl.inline_asm_elementwise(
            "mov.b32 $0, 0;", "=r,r", [x.to(tl.float32)], dtype=tl.uint32, is_pure=True, pack=1
        )
    else:
        return tl.zeros(x.shape, tl.uint32)


@triton.jit
def unless_skipped(coefs_ptr, K, scale, found_inf_ptr, HAS_X: tl.constexpr, HASH: tl.constexpr):
    """Whether the op is skipped, and the K and the scale of the sums.

    If the op is skipped, or the scale is NaN, which means no noise, K and the scale are such that
    adding the sums changes nothing.
    """
    if HASH:
        power = 1.0
        for k in tl.static_range(HASH_IN_KERNEL):
            coef = tl.load(coefs_ptr + k, mask=k < K, other=0.0)
            power = tl.where(px.stays_finite(coef), power, float("nan"))
    else:
        power = tl.load(coefs_ptr + K)
    skipped = power != power
    if found_inf_ptr is not None:
        if HASH and skipped:  # else prepare_kernel has done that
            tl.store(found_inf_ptr, 1.0)
        skipped = skipped | (tl.load(found_inf_ptr) != 0)
    # -0 or 0, by its bits: Triton 3.6 takes a constant -0.0 for 0.0
    bits_of_zero: tl.constexpr = 0x80000000 if HAS_X else 0
    nothing = tl.full((), bits_of_zero, tl.uint32).to(tl.float32, bitcast=True)
    still = skipped | (scale != scale)
    return skipped, tl.where(still, 0, K), tl.where(still, nothing, scale * power)


@triton.jit
def _fp32_sums(
    q,
    stream,
    seeds_ptr,
    coefs_ptr,
    first,
    last,
    zero,
    NOISE: tl.constexpr,
    HASH: tl.constexpr,
    ASM: tl.constexpr,
):
    """The 16 planes of sum_k coefs[k] b_k over first <= k < last."""
    acc = (zero.to(tl.float32, bitcast=True),) * 16
    # outside of the loop, whose body Triton 3.4 reads twice
    mask: tl.constexpr = px.HADAMARD_MASK if NOISE == "hadamard" else px.SIGNS_MASK
    ones: tl.constexpr = px.HADAMARD_ONES if NOISE == "hadamard" else px.SIGNS_ONES
    k = first
    while k < last:  # not range: the interpreter of Triton 3.6 fails on it with numpy 2.4
        seed = tl.load(seeds_ptr + k)
        coef = tl.load(coefs_ptr + k)
        if HASH:
            seed = px.hash_seed(seed)
            coef = px.round17(coef)
        sums = ()
        if NOISE == "normal":
            w = px.philox(q, stream, seed, px.NOISE_KEY0, px.NOISE_KEY1, px.NORMAL_ROUNDS, ASM)
            w = w + px.philox(q, stream, seed, px.SECOND_KEY0, px.NOISE_KEY1, px.NORMAL_ROUNDS, ASM)
            for j in tl.static_range(8):
                radius, cosine, sine = px.box_muller(w[j], coef, ASM)
                sums = sums + (
                    tl.fma(radius, cosine, acc[2 * j]),
                    tl.fma(radius, sine, acc[2 * j + 1]),
                )
        else:
            tl.static_assert(NOISE == "hadamard" or NOISE == "rademacher")
            w = px.philox(q, stream, seed, px.NOISE_KEY0, px.NOISE_KEY1, px.ROUNDS, ASM)
            b = px.patterns(w[0], mask, ones, ASM) + px.patterns(w[1], mask, ones, ASM)
            b = b + px.patterns(w[2], mask, ones, ASM) + px.patterns(w[3], mask, ones, ASM)
            for j in tl.static_range(16):
                sums = sums + (tl.fma(b[j], coef, acc[j]),)
        acc = sums
        k += 1
    return acc


@triton.jit
def _fp16_sums(q, stream, seeds_ptr, coefs_ptr, first, last, zero, ASM: tl.constexpr):
    """The same sums for "hadamard-fp16" over at most 16 seeds.

    Two planes share a word while they are summed in fp16.
    """
    acc = (zero,) * 8
    k = first
    while k < last:
        coef = px.half_coef(tl.load(coefs_ptr + k), ASM)
        w = px.philox(
            q, stream, tl.load(seeds_ptr + k), px.NOISE_KEY0, px.NOISE_KEY1, px.ROUNDS, ASM
        )
        sums = ()
        for j in tl.static_range(4):
            low = px.mask_or(w[j], px.HADAMARD_MASK, px.HADAMARD_ONES, ASM)
            high = px.mask_or(px.swap_bytes(w[j], ASM), px.HADAMARD_MASK, px.HADAMARD_ONES, ASM)
            sums = sums + (px.fma_halves(low, coef, acc[2 * j], ASM),)
            sums = sums + (px.fma_halves(high, coef, acc[2 * j + 1], ASM),)
        acc = sums
        k += 1
    planes = ()
    for j in tl.static_range(8):
        planes = planes + px.halves(acc[j], ASM)
    return planes


@triton.jit
def noise_sums(
    q,
    stream,
    seeds_ptr,
    coefs_ptr,
    first,
    last,
    zero,
    NOISE: tl.constexpr,
    HASH: tl.constexpr,
    ASM: tl.constexpr,
):
    """The 16 planes of sum_k coefs[k] z(seeds[k], stream) over first <= k < last, unscaled."""
    if NOISE == "hadamard-fp16":
        acc = _fp16_sums(q, stream, seeds_ptr, coefs_ptr, first, last, zero, ASM)
    elif NOISE == "hadamard-fp16 blocks":
        acc = (zero.to(tl.float32, bitcast=True),) * 16
        k = first
        while k < last:
            block = _fp16_sums(
                q, stream, seeds_ptr, coefs_ptr, k, tl.minimum(k + 16, last), zero, ASM
            )
            sums = ()
            for j in tl.static_range(16):
                sums = sums + (acc[j] + block[j],)
            acc = sums
            k += 16
    else:
        acc = _fp32_sums(q, stream, seeds_ptr, coefs_ptr, first, last, zero, NOISE, HASH, ASM)
    if NOISE != "rademacher" and NOISE != "normal":
        acc = px.butterfly(px.butterfly(px.butterfly(px.butterfly(acc, 1), 2), 4), 8)
    return acc


@triton.jit
def add_chunks(
    out_ptr,  # both pointers to the first element of the first chunk
    x_ptr,
    lo,  # elements from there that are written: lo <= i < hi
    hi,
    q,  # counter of the first element
    stream,
    seeds_ptr,
    coefs_ptr,
    K,
    keep,
    scale,
    rounding_hash,
    limit,  # of a mask, or None
    mask_seed_ptr,  # [1] int64, or None: the mask is of small elements
    NOISE: tl.constexpr,
    COUNTERS: tl.constexpr,
    HAS_X: tl.constexpr,
    FULL: tl.constexpr,
    PLANES: tl.constexpr,
    HASH: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ASM: tl.constexpr,
    takes_ptr=None,  # to the bytes of a given mask, where x_ptr is
    step=None,  # only the sign of the sum is added, times this; then there is an x
):
    lane = tl.arange(0, COUNTERS)
    offs = lane // 128 * 2048 + lane % 128
    zero = zeros_laid_out_as(load(x_ptr, offs, lo, hi, 0, FULL, PLANES), ASM)
    q = q + lane.to(tl.uint32) + zero

    acc = noise_sums(q, stream, seeds_ptr, coefs_ptr, 0, K, zero, NOISE, HASH, ASM)

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
    GROUP: tl.constexpr = 8 if FULL or PLANES else 1  # planes in flight
    for first in tl.static_range(0, 16, GROUP):
        xs = ()
        if HAS_X:
            for j in tl.static_range(first, first + GROUP):
                xs = xs + (load(x_ptr, offs, lo, hi, j, FULL, PLANES),)
        for j in tl.static_range(first, first + GROUP):
            y = acc[j] * scale
            if step is not None:
                # -0 by its bits, as above
                nothing = tl.full((), 0x80000000, tl.uint32).to(tl.float32, bitcast=True)
                y = tl.where(y > 0, step, tl.where(y < 0, -step, nothing))
            if HAS_X:
                y = px.widen(xs[j - first], ASM) * keep + y
            y = px.cast(y, words, j, out_ptr.dtype.element_ty, STOCHASTIC, ASM)
            if limit is not None:
                takes = px.takes_noise(xs[j - first], mask_words, j, limit, RANDOM, ASM)
                y = tl.where(takes, y, xs[j - first])
            if takes_ptr is not None:
                takes = load(takes_ptr, offs, lo, hi, j, FULL, PLANES)
                y = tl.where(takes != 0, y, xs[j - first])
            if FULL:
                tl.store(out_ptr + offs + j * 128, y)
            else:
                tl.store(out_ptr + offs + j * 128, y, mask=inside(offs, lo, hi, j, PLANES))


@triton.jit
def add_block(
    out_ptr,
    x_ptr,
    lo,
    hi,
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
    NOISE: tl.constexpr,
    COUNTERS: tl.constexpr,
    HAS_X: tl.constexpr,
    HASH: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ASM: tl.constexpr,
    takes_ptr=None,
    step=None,
):
    """add_chunks on one block, with code of its own where all of its elements are written."""
    if (lo == 0) & (hi == 16 * COUNTERS):
        add_chunks(
            out_ptr,
            x_ptr,
            0,
            hi,
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
            True,
            False,
            HASH,
            STOCHASTIC,
            ASM,
            takes_ptr,
            step,
        )
    else:
        add_chunks(
            out_ptr,
            x_ptr,
            lo,
            hi,
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
            False,
            False,
            HASH,
            STOCHASTIC,
            ASM,
            takes_ptr,
            step,
        )
