"""Noise of low rank as Triton kernels; `pseuzo_kernels.low_rank` defines every bit.

One launch makes the thin factors of many matrices, and one more adds their products, so x is read
and written once for any number of seeds. What that moves for a matrix [m, n] and R = K * rank:

    x, twice       2 m n itemsize bytes, from and to memory
    factors        4 (m + n) R bytes, written once and read by every tile

With m = n = 2048 in 16 bits and rank 8, the factors of one seed are 0.8 % of what x moves, those of
14 seeds 11 %. They are made for a few matrices at a time, FACTOR_BYTES in all, which stay in the
cache of a GPU. A tile that made them for itself would move less still, but 16 of its rows are 16
rank elements of U, and the chunk of 2048 that their noise needs is made as a whole: at rank 8 that
is 16 times the work, for every tile of the row again.

A tile is 16 rows of 512 columns. A thread has four columns in each row, so a factor's four elements
of V, in one load, serve 64 products. Columns are those of a vector in one layout, and rows are
unrolled: nothing moves between threads. Every product and every sum is one operation in fp32.

Rounding stochastically and masks at random cost more than in the noise kernels, where one call of
Philox serves the 16 planes of a counter: those are in other tiles here, so each element makes a
call. In machine code for sm_90 that is 50 instructions an element, as much as 20 products.
"""

import triton
import triton.language as tl

from pseuzo_kernels.triton import device as px
from pseuzo_kernels.triton.sums import noise_sums


@triton.jit(do_not_specialize=["K", "rank"])
def outer_factors_kernel(
    out_ptr,  # fp32: left factors [R, pitch] times coefs, and right factors [R, pitch]
    begins_ptr,  # [F] int64: where a factor begins in out
    pitches_ptr,  # [F] int64
    firsts_ptr,  # [F] int64: the position of its first element under its stream
    counts_ptr,  # [F] int64: its elements of one seed
    streams_ptr,  # [F] int64
    sides_ptr,  # [F] int64: 0 left, 1 right
    table_ptr,  # [programs / K, 2] int32: factor, chunk
    seeds_ptr,  # [2, K] int64: left, right
    coefs_ptr,  # [2, K] fp32: those of the right factors are 1
    ones_ptr,  # [2, K] fp32
    K: tl.int32,
    rank: tl.int32,
    scale: tl.float32,
    NOISE: tl.constexpr,
    ASM: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    k = (pid % K).to(tl.int32)
    f = tl.load(table_ptr + 2 * (pid // K))
    first = tl.load(firsts_ptr + f)
    chunk = first // 2048 + tl.load(table_ptr + 2 * (pid // K) + 1)
    seed = tl.load(sides_ptr + f).to(tl.int32) * K + k
    lane = tl.arange(0, 128)
    q = (chunk * 128).to(tl.uint32) + lane.to(tl.uint32)
    stream = tl.load(streams_ptr + f).to(tl.uint32)
    zero = tl.zeros([128], tl.uint32)
    z = noise_sums(q, stream, seeds_ptr, ones_ptr, seed, seed + 1, zero, NOISE, True, ASM)
    coef = tl.load(coefs_ptr + seed)
    count = tl.load(counts_ptr + f).to(tl.int32)
    pitch = tl.load(pitches_ptr + f)
    ptr = out_ptr + tl.load(begins_ptr + f) + k.to(tl.int64) * rank * pitch
    at = (chunk * 2048 - first).to(tl.int32) + lane
    for j in tl.static_range(16):
        i = at + j * 128
        row, column = i // rank, i % rank
        value = coef * (z[j] * scale)
        tl.store(ptr + column.to(tl.int64) * pitch + row, value, mask=(i >= 0) & (i < count))


@triton.jit
def _dither(first, lane, stream, key_hash, MASK: tl.constexpr, ASM: tl.constexpr):
    """The 16 bits of bits.rounding_dither for the elements at first + lane, each by itself.

    MASK: those of random masks.
    """
    KEY0: tl.constexpr = px.MASK_KEY0 if MASK else px.ROUNDING_KEY0
    KEY1: tl.constexpr = px.MASK_KEY1 if MASK else px.ROUNDING_KEY1
    i = (first % 2048).to(tl.uint32) + lane.to(tl.uint32)  # unsigned: divided by shifts alone
    q = (first // 2048 * 128).to(tl.uint32) + i // 2048 * 128 + i % 128
    w = px.philox(q, stream, key_hash, KEY0, KEY1, px.ROUNDING_ROUNDS, ASM)
    plane = i // 128 % 16
    odd, upper = plane // 4 % 2 == 1, plane >= 8
    even_word, odd_word = tl.where(upper, w[2], w[0]), tl.where(upper, w[3], w[1])
    high, low = tl.where(odd, odd_word, even_word), tl.where(odd, even_word, odd_word)
    shift = plane % 4 * 8
    return (((high >> shift) & 0xFF) << 8) | ((low >> shift) & 0xFF)


@triton.jit
def _store_row(
    out_ptr,
    x,
    d,
    keep,
    place,  # the position of the first element in the whole matrix
    lane,
    columns,
    stream,
    rounding_hash,
    limit,  # of a mask, or None
    mask_hash,  # of its seed, or None
    takes_ptr,  # to the bytes of a given mask, or None
    skipped,
    STOCHASTIC: tl.constexpr,
    ASM: tl.constexpr,
):
    """Store keep * x + d, rounded, where the masks say so."""
    inside = lane < columns
    y, dither = px.widen(x, ASM) * keep + d, 0
    if STOCHASTIC:
        dither = _dither(place, lane, stream, rounding_hash, False, ASM)
    y = px.cast_by(y, dither, out_ptr.dtype.element_ty, STOCHASTIC, ASM)
    if limit is not None:
        if mask_hash is not None:
            chance = _dither(place, lane, stream, mask_hash, True, ASM)
            takes = chance.to(tl.float32) < limit * 65536.0
        else:
            takes = tl.abs(px.widen(x, ASM)) <= limit
        y = tl.where(takes, y, x)
    if takes_ptr is not None:
        takes = tl.load(takes_ptr + lane, mask=inside, other=0)
        y = tl.where(takes != 0, y, x)
    tl.store(out_ptr + lane, tl.where(skipped, x, y), mask=inside)


@triton.jit(do_not_specialize=["K", "R", "rounding_hash"])
def add_outer_kernel(
    dtype_ptr,  # any tensor of the launch: says its dtype
    outs_ptr,  # [T] int64: addresses
    xs_ptr,  # [T] int64
    ms_ptr,  # [T] int64: rows
    ns_ptr,  # [T] int64: columns
    firsts_ptr,  # [T] int64: the position of the first element in the whole matrix
    strides_ptr,  # [T] int64: between the beginnings of two rows, in the whole matrix
    lefts_ptr,  # [T] int64: where the factors begin in factors_ptr
    rights_ptr,  # [T] int64
    streams_ptr,  # [T] int64
    takes_ptr,  # [T] int64: the addresses of given masks, or None
    table_ptr,  # [programs, 2] int32: tensor, tile
    keeps_ptr,  # [T] fp32
    scales_ptr,  # [T] fp32
    limits_ptr,  # [T] fp32, or None
    factors_ptr,
    coefs_ptr,  # [K] fp32: say whether the op is skipped
    K: tl.int32,
    R: tl.int32,
    rounding_hash: tl.int64,
    found_inf_ptr,  # [1] fp32 or None
    mask_seed_ptr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ALIGNED: tl.constexpr,  # all rows begin on multiples of 16 elements
    ASM: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    t = tl.load(table_ptr + 2 * pid)
    tile = tl.load(table_ptr + 2 * pid + 1)
    largest = tl.load(coefs_ptr).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    k = 1
    while k < K:
        bits = tl.load(coefs_ptr + k).to(tl.int32, bitcast=True)
        largest = tl.maximum(largest, bits & 0x7FFFFFFF)
        k += 1
    skipped = largest >= 0x7F800000
    if found_inf_ptr is not None:
        if skipped:
            tl.store(found_inf_ptr, 1.0)
        skipped = skipped | (tl.load(found_inf_ptr) != 0)
    pointer: tl.constexpr = tl.pointer_type(dtype_ptr.dtype.element_ty)
    out_ptr, x_ptr = tl.load(outs_ptr + t).to(pointer), tl.load(xs_ptr + t).to(pointer)
    in_place, n = out_ptr.to(tl.int64) == x_ptr.to(tl.int64), tl.load(ns_ptr + t)
    if ALIGNED:
        out_ptr, x_ptr = tl.multiple_of(out_ptr, 16), tl.multiple_of(x_ptr, 16)
        n = tl.multiple_of(n, 16)
    m = tl.load(ms_ptr + t)
    across = (n + COLUMNS - 1) // COLUMNS
    first_row, first_column = tile // across * ROWS, tile % across * COLUMNS
    rows = tl.minimum(m - first_row, ROWS).to(tl.int32)
    rows = tl.where(skipped & in_place, 0, rows)  # then nothing is read or written
    R = tl.where(skipped, 0, R)
    lane = tl.arange(0, COLUMNS)
    columns = (n - first_column).to(tl.int32)
    left_pitch, right_pitch = (m + ROWS - 1) // ROWS * ROWS, across * COLUMNS
    left_ptr = factors_ptr + tl.load(lefts_ptr + t) + first_row
    right_ptr = factors_ptr + tl.multiple_of(tl.load(rights_ptr + t), 16) + first_column

    acc = (tl.zeros([COLUMNS], tl.float32),) * ROWS
    left = 0
    while left < R:
        b = tl.load(right_ptr + lane)
        sums = ()
        for i in tl.static_range(ROWS):
            sums = sums + (acc[i] + tl.load(left_ptr + i) * b,)
        acc = sums
        left_ptr += left_pitch
        right_ptr += right_pitch
        left += 1

    at = first_row * n + first_column
    out_ptr, x_ptr = out_ptr + at, x_ptr + at
    stride = tl.load(strides_ptr + t)
    first = tl.load(firsts_ptr + t) + first_row * stride + first_column
    stream = tl.load(streams_ptr + t).to(tl.uint32)
    keep, scale = tl.load(keeps_ptr + t), tl.load(scales_ptr + t)
    limit, mask_hash, mask_ptr = None, None, None
    if limits_ptr is not None:
        limit = tl.load(limits_ptr + t)
    if mask_seed_ptr is not None:
        mask_hash = px.hash_seed(tl.load(mask_seed_ptr))
    if takes_ptr is not None:
        mask_ptr = tl.load(takes_ptr + t).to(tl.pointer_type(tl.uint8)) + at
    GROUP: tl.constexpr = 8  # rows in flight
    for begin in tl.static_range(0, ROWS, GROUP):
        xs = ()
        for i in tl.static_range(begin, begin + GROUP):
            inside = lane < tl.where(i < rows, columns, 0)
            xs = xs + (tl.load(x_ptr + i * n + lane, mask=inside, other=0),)
        for i in tl.static_range(begin, begin + GROUP):
            y_ptr, d, place = out_ptr + i * n, acc[i] * scale, first + i * stride
            if i < rows:  # a branch, so that the random bits of one row at a time take registers
                _store_row(
                    y_ptr,
                    xs[i - begin],
                    d,
                    keep,
                    place,
                    lane,
                    columns,
                    stream,
                    rounding_hash,
                    limit,
                    mask_hash,
                    None if mask_ptr is None else mask_ptr + i * n,
                    skipped,
                    STOCHASTIC,
                    ASM,
                )
