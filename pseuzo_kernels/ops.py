"""The noise op: x <- keep * x + scale * sum_k coefs[k] z(seeds[k], stream), one read and one write of x for any K.

Perturb, restore and update are all calls of it. The kernel makes 16 planes of noise a counter and adds up the K terms
in registers; for "hadamard" one transform of 16 points then turns the sums into noise, once per launch instead of once
per seed. `pseuzo_kernels.reference` defines every bit; `pseuzo_kernels.triton.device` holds the device functions.

Why the kernel looks as it does (counted in the machine code for sm_90, see bench/sass_cost.py): 4 counters a thread, so
that a plane is read and written 4 elements at a time; whole chunks and tails are separate code, since one mask makes
every access narrow; x is loaded after the sum, 8 planes at a time, as 16 would cost 40 more registers.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import accumulate
from threading import Lock, local
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from pseuzo_kernels import checks, reference

try:
    import triton
    import triton.language as tl
except ImportError:  # a build of torch without CUDA may come without triton: CPU tensors need none
    triton = None

COUNTERS, WARPS = 512, 4  # of 16 elements, a program
COUNTERS_STEPS = 256  # where a program holds x beside the sums
ROWS_OPTIONS = dict(
    debug=True, sanitize_overflow=False
)  # compiles asserts in, but none of integers that wrap
PLANS = (
    1 << 27
)  # bytes of launch tables that are kept; those of a list take 8 for every 8192 elements
PLAN = (
    1 << 16
)  # what each counts for beside them: its key, on the host, holds some numbers for every tensor

if triton is not None:
    from pseuzo_kernels.triton import device as px

    # up to this many seeds are hashed where they are used: cheaper than a launch that does it before
    HASH_IN_KERNEL = tl.constexpr(4)

    @triton.jit
    def _inside(offs, lo, hi, J: tl.constexpr, PLANES: tl.constexpr):
        """Which elements of plane J are written, lo <= i < hi; PLANES: of a single chunk, all of the plane or none."""
        at = (tl.zeros_like(offs) if PLANES else offs) + J * 128
        return (at >= lo) & (at < hi)

    @triton.jit
    def _load(ptr, offs, lo, hi, J: tl.constexpr, FULL: tl.constexpr, PLANES: tl.constexpr):
        if FULL:
            return tl.load(ptr + offs + J * 128)
        else:
            return tl.load(ptr + offs + J * 128, mask=_inside(offs, lo, hi, J, PLANES), other=0)

    @triton.jit
    def _zeros_laid_out_as(x, ASM: tl.constexpr):
        """uint32 zeros. The asm hides that they are constant, so all that is computed from them is laid out as x is:
        each thread then makes the noise of the elements that it loads and stores, and nothing moves between threads."""
        if ASM:
            return tl.inline_asm_elementwise(
                "mov.b32 $0, 0;", "=r,r", [x.to(tl.float32)], dtype=tl.uint32, is_pure=True, pack=1
            )
        else:
            return tl.zeros(x.shape, tl.uint32)

    @triton.jit
    def _fp32_sums(
        q, stream, seeds_ptr, coefs_ptr, first, last, zero,
        NOISE: tl.constexpr, HASH: tl.constexpr, ASM: tl.constexpr,
    ):  # fmt: skip
        """The 16 planes of sum_k coefs[k] b_k over first <= k < last."""
        acc = (zero.to(tl.float32, bitcast=True),) * 16
        k = first
        while k < last:  # not range: the interpreter of Triton 3.6 fails on it with numpy 2.4
            seed = tl.load(seeds_ptr + k)
            coef = tl.load(coefs_ptr + k)
            if HASH:
                seed = px.hash_seed(seed)
                coef = px.round17(coef)
            sums = ()
            if NOISE == "normal":
                w = px.philox(q, stream, seed, px.NOISE_KEY0, px.NOISE_KEY1, 10, ASM)
                w = w + px.philox(q, stream, seed, px.SECOND_KEY0, px.NOISE_KEY1, 10, ASM)
                for j in tl.static_range(8):
                    radius, cosine, sine = px.box_muller(w[j], coef, ASM)
                    sums = sums + (
                        tl.fma(radius, cosine, acc[2 * j]),
                        tl.fma(radius, sine, acc[2 * j + 1]),
                    )
            else:
                mask: tl.constexpr = 0x8F708F70 if NOISE == "hadamard" else 0x80008000
                ones: tl.constexpr = 0x30003000 if NOISE == "hadamard" else 0x3C003C00
                w = px.philox(q, stream, seed, px.NOISE_KEY0, px.NOISE_KEY1, 7, ASM)
                b = px.patterns(w[0], mask, ones, ASM) + px.patterns(w[1], mask, ones, ASM)
                b = b + px.patterns(w[2], mask, ones, ASM) + px.patterns(w[3], mask, ones, ASM)
                for j in tl.static_range(16):
                    sums = sums + (tl.fma(b[j], coef, acc[j]),)
            acc = sums
            k += 1
        return acc

    @triton.jit
    def _fp16_sums(q, stream, seeds_ptr, coefs_ptr, first, last, zero, ASM: tl.constexpr):
        """The same of "hadamard-fp16" over 16 seeds at most: while they add up in fp16, two planes share a word."""
        acc = (zero,) * 8
        k = first
        while k < last:
            coef = px.half_coef(tl.load(coefs_ptr + k), ASM)
            w = px.philox(q, stream, tl.load(seeds_ptr + k), px.NOISE_KEY0, px.NOISE_KEY1, 7, ASM)
            sums = ()
            for j in tl.static_range(4):
                low = px.mask_or(w[j], 0x8F708F70, 0x30003000, ASM)
                high = px.mask_or(px.swap_bytes(w[j], ASM), 0x8F708F70, 0x30003000, ASM)
                sums = sums + (px.fma_halves(low, coef, acc[2 * j], ASM),)
                sums = sums + (px.fma_halves(high, coef, acc[2 * j + 1], ASM),)
            acc = sums
            k += 1
        planes = ()
        for j in tl.static_range(8):
            planes = planes + px.halves(acc[j], ASM)
        return planes

    @triton.jit
    def _sums(
        q, stream, seeds_ptr, coefs_ptr, first, last, zero,
        NOISE: tl.constexpr, HASH: tl.constexpr, ASM: tl.constexpr,
    ):  # fmt: skip
        """The 16 planes of sum_k coefs[k] z(seeds[k], stream) over first <= k < last, but for the scale."""
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
    def _chunks(
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
        NOISE: tl.constexpr,
        COUNTERS: tl.constexpr,
        HAS_X: tl.constexpr,
        FULL: tl.constexpr,
        PLANES: tl.constexpr,
        HASH: tl.constexpr,
        STOCHASTIC: tl.constexpr,
        ASM: tl.constexpr,
    ):
        lane = tl.arange(0, COUNTERS)
        offs = lane // 128 * 2048 + lane % 128
        zero = _zeros_laid_out_as(_load(x_ptr, offs, lo, hi, 0, FULL, PLANES), ASM)
        q = q + lane.to(tl.uint32) + zero

        acc = _sums(q, stream, seeds_ptr, coefs_ptr, 0, K, zero, NOISE, HASH, ASM)

        words = (q, q, q, q)
        if STOCHASTIC:
            words = px.philox(q, stream, rounding_hash, px.ROUNDING_KEY0, px.ROUNDING_KEY1, 7, ASM)
        GROUP: tl.constexpr = 8 if FULL or PLANES else 1  # planes in flight
        for first in tl.static_range(0, 16, GROUP):
            xs = ()
            if HAS_X:
                for j in tl.static_range(first, first + GROUP):
                    xs = xs + (_load(x_ptr, offs, lo, hi, j, FULL, PLANES),)
            for j in tl.static_range(first, first + GROUP):
                y = acc[j] * scale
                if HAS_X:
                    y = px.widen(xs[j - first], ASM) * keep + y
                y = px.cast(y, words, j, out_ptr.dtype.element_ty, STOCHASTIC, ASM)
                if FULL:
                    tl.store(out_ptr + offs + j * 128, y)
                else:
                    tl.store(out_ptr + offs + j * 128, y, mask=_inside(offs, lo, hi, j, PLANES))

    @triton.jit
    def _unless_skipped(
        coefs_ptr, K, scale, found_inf_ptr, HAS_X: tl.constexpr, HASH: tl.constexpr
    ):
        """Is the op skipped?, and the K and the scale of the sums: such that adding them changes nothing if it is, or
        if the scale is NaN, which stands for no noise."""
        if HASH:
            power = 1.0
            for k in tl.static_range(HASH_IN_KERNEL):
                coef = tl.load(coefs_ptr + k, mask=k < K, other=0.0)
                power = tl.where(px.stays_finite(coef), power, float("nan"))
        else:
            power = tl.load(coefs_ptr + K)
        skipped = power != power
        if found_inf_ptr is not None:
            if HASH and skipped:  # else _prepare_kernel has done that
                tl.store(found_inf_ptr, 1.0)
            skipped = skipped | (tl.load(found_inf_ptr) != 0)
        bits_of_zero: tl.constexpr = (
            0x80000000 if HAS_X else 0
        )  # by its bits: Triton 3.6 takes a constant -0.0 for 0.0
        nothing = tl.full((), bits_of_zero, tl.uint32).to(tl.float32, bitcast=True)
        still = skipped | (scale != scale)
        return skipped, tl.where(still, 0, K), tl.where(still, nothing, scale * power)

    @triton.jit
    def _program(
        out_ptr, x_ptr, n, block, stream, seeds_ptr, coefs_ptr, K, keep, scale, rounding_hash, found_inf_ptr,
        NOISE: tl.constexpr, COUNTERS: tl.constexpr, HAS_X: tl.constexpr, HASH: tl.constexpr,
        STOCHASTIC: tl.constexpr, ASM: tl.constexpr,
    ):  # fmt: skip
        """Block `block` of a tensor of n elements."""
        start = block.to(tl.int64) * (16 * COUNTERS)
        left = tl.minimum(n - start, 16 * COUNTERS).to(tl.int32)
        q = (block * COUNTERS).to(tl.uint32)
        stream = stream.to(tl.uint32)
        skipped, K, scale = _unless_skipped(coefs_ptr, K, scale, found_inf_ptr, HAS_X, HASH)
        keep = tl.where(skipped, 1.0, keep)
        if HAS_X:
            in_place = out_ptr.to(tl.int64) == x_ptr.to(tl.int64)
            left = tl.where(skipped & in_place, 0, left)  # then nothing is read or written
        if left == 16 * COUNTERS:
            _chunks(
                out_ptr + start, x_ptr + start, 0, left, q, stream, seeds_ptr, coefs_ptr, K, keep, scale,
                rounding_hash, NOISE, COUNTERS, HAS_X, True, False, HASH, STOCHASTIC, ASM,
            )  # fmt: skip
        else:
            _chunks(
                out_ptr + start, x_ptr + start, 0, left, q, stream, seeds_ptr, coefs_ptr, K, keep, scale,
                rounding_hash, NOISE, COUNTERS, HAS_X, False, False, HASH, STOCHASTIC, ASM,
            )  # fmt: skip

    @triton.jit(
        do_not_specialize=["n", "stream", "K", "rounding_hash"]
    )  # Triton would make the value 1 a constant
    def _add_noise_kernel(
        out_ptr,  # [n] fp32 | bf16 | fp16
        x_ptr,  # [n], same dtype; out_ptr itself in place, or without x
        n: tl.int64,
        stream: tl.int64,
        seeds_ptr,  # [K] int64, hashed unless HASH
        coefs_ptr,  # [K] fp32, or from _prepare_kernel [K + 1]
        K: tl.int32,
        keep: tl.float32,
        scale: tl.float32,  # NaN: no noise
        rounding_hash: tl.int64,
        found_inf_ptr,  # [1] fp32 or None
        NOISE: tl.constexpr,
        COUNTERS: tl.constexpr,
        HAS_X: tl.constexpr,
        HASH: tl.constexpr,
        STOCHASTIC: tl.constexpr,
        ASM: tl.constexpr,
    ):
        _program(
            out_ptr, x_ptr, n, tl.program_id(0), stream, seeds_ptr, coefs_ptr, K, keep, scale, rounding_hash,
            found_inf_ptr, NOISE, COUNTERS, HAS_X, HASH, STOCHASTIC, ASM,
        )  # fmt: skip

    @triton.jit(do_not_specialize=["K", "rounding_hash"])
    def _add_noise_many_kernel(
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
            out_ptr, x_ptr, tl.load(ns_ptr + t), block, tl.load(streams_ptr + t), seeds_ptr, coefs_ptr, K,
            tl.load(keeps_ptr + t), tl.load(scales_ptr + t), rounding_hash, found_inf_ptr,
            NOISE, COUNTERS, HAS_X, HASH, STOCHASTIC, ASM,
        )  # fmt: skip

    @triton.jit(do_not_specialize=["S", "T"])
    def _add_noise_steps_kernel(
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
        """S updates of a block that stays in registers: memory is read and written once, so masks cost nothing."""
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
            xs = xs + (px.widen(_load(ptr, offs, 0, left, j, False, False), ASM),)
        zero = _zeros_laid_out_as(xs[0], ASM)
        q = (block * COUNTERS).to(tl.uint32) + lane.to(tl.uint32) + zero

        s = 0
        while s < S:
            keep = tl.load(keeps_ptr + s * T + t)
            scale = tl.load(scales_ptr + s * T + t)
            first = tl.load(firsts_ptr + s)
            last = tl.where(scale == scale, tl.load(firsts_ptr + s + 1), first)
            acc = _sums(q, stream, seeds_ptr, coefs_ptr, first, last, zero, NOISE, False, ASM)
            words = (q, q, q, q)
            if STOCHASTIC:
                rounding_hash = tl.load(rounding_hashes_ptr + s)
                words = px.philox(
                    q, stream, rounding_hash, px.ROUNDING_KEY0, px.ROUNDING_KEY1, 7, ASM
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
            tl.store(ptr + offs + j * 128, y, mask=_inside(offs, 0, left, j, False))

    @triton.jit(do_not_specialize=["stream", "K", "N", "width", "parts"])
    def _add_noise_rows_kernel(
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
        PLANES: tl.constexpr,  # width is a multiple of 128, so that all accesses are wide
        NOISE: tl.constexpr,
        HASH: tl.constexpr,
        ASM: tl.constexpr,
    ):
        pid = tl.program_id(0).to(tl.int64)
        row = pid // parts
        index = tl.load(index_ptr + row)
        # An index out of range ends in an error of the device, as it does in torch's embedding. See ROWS_OPTIONS.
        tl.device_assert(
            index.to(tl.uint64) < N.to(tl.uint64), "add_noise_rows: an index is out of range"
        )
        first = index * width  # element of x where the row begins
        chunk = first // 2048 + pid % parts
        start = chunk * 2048
        lo = tl.maximum(first - start, 0).to(tl.int32)
        hi = tl.minimum(first + width - start, 2048).to(tl.int32)
        to = row * width - first + start
        if PLANES:
            to = tl.multiple_of(to, 128)
        _, K, scale = _unless_skipped(coefs_ptr, K, scale, None, True, HASH)
        if lo < hi:
            _chunks(
                out_ptr + to, x_ptr + start, lo, hi, (chunk * 128).to(tl.uint32), stream.to(tl.uint32),
                seeds_ptr, coefs_ptr, K, 1.0, scale, 0, NOISE, 128, True, False, PLANES, HASH, False, ASM,
            )  # fmt: skip

    @triton.jit(do_not_specialize=["K"])
    def _prepare_kernel(
        seeds_ptr,
        coefs_ptr,
        hashes_ptr,
        rounded_ptr,  # [K + 1]: the last multiplies the sums; NaN: the op is skipped
        K: tl.int32,
        found_inf_ptr,  # [1] fp32 or None: becomes 1 then
        FP16: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """Hash the seeds and round the coefs, once for all programs of the launch that follows."""
        k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.store(
            hashes_ptr + k, px.hash_seed(tl.load(seeds_ptr + k, mask=k < K, other=0)), mask=k < K
        )
        coef = tl.load(coefs_ptr + k, mask=k < K, other=0.0)
        sizes = tl.zeros([BLOCK], tl.int32)
        first = 0
        while first < K:  # every program finds the largest of all: they cannot wait for each other
            at = first + tl.arange(0, BLOCK)
            bits = tl.load(coefs_ptr + at, mask=at < K, other=0.0).to(tl.int32, bitcast=True)
            sizes = tl.maximum(sizes, bits & 0x7FFFFFFF)  # as integers, since these put NaN on top
            first += BLOCK
        largest = tl.max(sizes, 0)
        if FP16:
            down, power = px.powers(largest)
            coef = (coef * down + 12288.0) - 12288.0  # 1.5 * 2^13: to a multiple of 2^-10
        else:
            power = tl.where(
                px.stays_finite(largest.to(tl.float32, bitcast=True)), 1.0, float("nan")
            )
            coef = px.round17(coef)
        tl.store(rounded_ptr + k, coef, mask=k < K)
        tl.store(rounded_ptr + K, power)
        if found_inf_ptr is not None:
            if power != power:
                tl.store(found_inf_ptr, 1.0)


def _scale_of(noise: str, scale):
    """What the sums are multiplied by; the kernel's radius of "normal" is in units of sqrt(2 log 2)."""
    return reference.scale_of(noise, scale) * (
        math.sqrt(2 * math.log(2)) if noise == "normal" else 1.0
    )


def _factor(noise: str, scale: float) -> float:
    """The scale as the kernels of one step take it: not 0, which in fp32 may be a very small one."""
    return _scale_of(noise, scale) if scale else math.nan


def _on(device: torch.device):
    """Triton launches on the current device; the interpreter, on tensors of the CPU."""
    here = device.type != "cuda" or device.index == torch.cuda.current_device()
    return nullcontext() if here else torch.cuda.device(device)


def _prepared(
    seeds: Tensor,
    coefs: Tensor,
    noise: str,
    found_inf: Tensor | None = None,
    hash_in_kernel: bool = True,
) -> tuple[Tensor, Tensor, dict]:
    """seeds and coefs as the kernels take them, and the kernels' options; their NOISE says how they sum."""
    seeds, coefs, K = seeds.contiguous(), coefs.contiguous(), seeds.numel()
    fp16 = noise == "hadamard-fp16" and K > 1
    if fp16:
        noise += " blocks" * (K > reference.FP16_BLOCK)
        hash_in_kernel = False
    elif noise == "hadamard-fp16":
        noise = "hadamard"
    options = dict(
        ASM=isinstance(_prepare_kernel, triton.runtime.JITFunction),  # the interpreter has no PTX
        HASH=hash_in_kernel and K <= HASH_IN_KERNEL.value,
        NOISE=noise,
        enable_fp_fusion=False,
    )
    if not options["HASH"]:
        hashes, rounded = torch.empty_like(seeds), coefs.new_empty(K + 1)
        _prepare_kernel[(max(1, -(-K // 128)),)](
            seeds,
            coefs,
            hashes,
            rounded,
            K,
            found_inf,
            FP16=fp16,
            BLOCK=128,
            enable_fp_fusion=False,
        )
        seeds, coefs = hashes, rounded
    return seeds, coefs, options


def _rows(*columns: tuple) -> list[list]:
    """Rows of a table that all begin on a multiple of 16 bytes: Triton compiles apart for addresses that do not."""
    return [[*column, *[0] * (-len(column) % 4)] for column in columns]


def _to_device(values: list | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    t = torch.as_tensor(values, dtype=dtype, device="cpu")
    if device.type == "cuda":
        return t.pin_memory().to(device, non_blocking=True)
    return t.to(device)


class _Plans(OrderedDict):
    """Launch tables by what they are for, the ones used last at the end."""

    _bytes = 0

    @staticmethod
    def _size(plan: Any) -> int:
        return PLAN + sum(x.nbytes for x in tree_leaves(plan) if isinstance(x, Tensor))

    def keep(self, key: tuple, plan: Any) -> Any:
        """plan, or what another thread has kept under this key meanwhile."""
        if key in self:
            return self[key]
        self[key] = plan
        self._bytes += self._size(plan)
        while self._bytes > PLANS and len(self) > 1:
            self._bytes -= self._size(self.popitem(last=False)[1])
        return plan


_plans = _Plans()
_plans_lock = Lock()  # of both
_captured: dict[
    tuple, Any
] = {}  # kept for good: a graph that somebody else captures may always be replayed


class _Graph(local):
    """Of each thread: the tables of the graph that it captures, if it keeps them."""

    tables: dict[tuple, Any] | None = None


_graph = _Graph()


@contextmanager
def tables_of_a_graph() -> Iterator[dict[tuple, Any]]:
    """Inside, a CUDA graph is captured. It holds the addresses of the launch tables that the dict has in the end, so
    keep the dict as long as the graph."""
    before, _graph.tables = _graph.tables, {}
    try:
        yield _graph.tables
    finally:
        _graph.tables = before


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _plan(key: tuple, build: Callable[[], Any], capturing: bool) -> Any:
    """build(), or what it returned for the same key: a training step launches over the same tensors again and again.
    None if it is not there while a graph is captured: the graph would copy it at each replay, from memory long gone."""
    with _plans_lock:
        plan = _plans.get(key)  # a long key takes its time to be hashed
        if plan is not None:
            _plans.move_to_end(key)
            if capturing:
                (_captured if _graph.tables is None else _graph.tables)[key] = plan
    if plan is not None or capturing:
        return plan
    plan = build()  # other threads need not wait for that
    with _plans_lock:
        return _plans.keep(key, plan)


def _blocks(sizes: Sequence[int], elements: int, device: torch.device) -> Tensor:
    """[programs, 2] int32: the tensor and the block of that many elements that a program works on."""
    blocks = torch.tensor([-(-n // elements) for n in sizes], device="cpu")
    tensor_of = torch.repeat_interleave(torch.arange(len(sizes), device="cpu"), blocks)
    block_of = torch.arange(len(tensor_of), device="cpu") - (blocks.cumsum(0) - blocks)[tensor_of]
    return _to_device(torch.stack([tensor_of, block_of], dim=1), torch.int32, device)


def _addresses(op: str, name: str, xs: Sequence[Tensor]) -> tuple[int, ...]:
    addresses = tuple(map(Tensor.data_ptr, xs))
    if 0 in addresses and any(
        x.numel() for x, address in zip(xs, addresses, strict=True) if not address
    ):
        checks.refuse_freed(op, name)
    return addresses


class _Together(NamedTuple):
    """Tensors of one dtype that are done in one launch, and the tables of that."""

    ts: list[int]
    programs: Tensor
    ints: Tensor  # addresses of out and x, sizes, streams
    scales: Tensor


class _Launches(NamedTuple):
    """How the tensors of a list are done."""

    alone: list[int]
    together: list[_Together]


def _launches(columns: tuple, noise: str, device: torch.device, tables: bool) -> _Launches:
    """columns: addresses of outs and of xs, sizes, streams, scales, dtypes. tables: they may be made."""
    to, of, sizes, _, scales, dtypes = columns
    ts = [t for t, n in enumerate(sizes) if n]
    many: dict[torch.dtype, list[int]] = {}
    for t in ts:
        if tables and to[t] % 16 == of[t] % 16 == 0:
            many.setdefault(dtypes[t], []).append(t)
    together = []
    for group in many.values():
        ints = _rows(*([column[t] for t in group] for column in columns[:4]))
        together.append(_Together(
            group, _blocks([sizes[t] for t in group], 16 * COUNTERS, device), _to_device(ints, torch.int64, device),
            _to_device([_factor(noise, scales[t]) for t in group], torch.float32, device),
        ))  # fmt: skip
    done = set().union(*many.values())
    return _Launches([t for t in ts if t not in done], together)


def _launch(kernel: Any, programs: int, args: tuple, options: dict, launched: list | None) -> None:
    """launched: takes the launch, as it can be made again."""
    compiled = kernel[(programs,)](*args, **options)
    if launched is not None:
        constants = [options[p.name] for p in kernel.params[len(args) :]]
        launched.append(partial(compiled[(programs, 1, 1)], *args, *constants))


def add_noise_list_out_triton(
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
    launched=None,
):
    """reference.add_noise_list_out: one launch per dtype, and one per tensor that is not aligned to 16 bytes."""
    sizes = tuple(map(Tensor.numel, out))
    if not any(sizes):
        return
    device, inputs = out[0].device, xs or out
    rounding_hash = reference.hash_seed(rounding_seed) if stochastic else 0
    K = seeds.numel()
    addresses = _addresses("add_noise_list_out", "out", out)
    columns = (
        addresses, _addresses("add_noise_list_out", "x", xs) if xs else addresses, sizes, tuple(streams),
        tuple(scales), tuple(y.dtype for y in out),
    )  # fmt: skip
    launches = partial(_launches, columns, noise, device)
    with _on(device):
        plan, kept = (
            None,
            [],
        )  # keeps of the tensors that are done together: they change with the learning rate
        if len(out) > 1:
            # a table belongs to the stream on which it was copied to the device
            place = (
                device,
                torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0,
            )
            capturing = _capturing(device)
            plan = _plan((place, noise, columns), partial(launches, tables=True), capturing)
            for group in plan.together if plan is not None else ():
                values = [keeps[t] for t in group.ts]
                kept.append(
                    _plan(
                        (place, *values),
                        partial(_to_device, values, torch.float32, device),
                        capturing,
                    )
                )
        if plan is None or any(keep is None for keep in kept):
            plan, kept = launches(tables=False), []
        seeds, coefs, options = _prepared(seeds, coefs, noise, found_inf)
        options |= dict(HAS_X=bool(xs), COUNTERS=COUNTERS, num_warps=WARPS)
        for t in plan.alone:
            y = out[t]
            args = (
                y, inputs[t], sizes[t], streams[t], seeds, coefs, K, keeps[t], _factor(noise, scales[t]),
                rounding_hash, found_inf,
            )  # fmt: skip
            options["STOCHASTIC"] = stochastic and y.dtype is not torch.float32
            _launch(_add_noise_kernel, -(-sizes[t] // (16 * COUNTERS)), args, options, launched)
        for group, keep in zip(plan.together, kept, strict=True):
            y, ints, programs = out[group.ts[0]], group.ints, group.programs
            args = (
                y, ints[0], ints[1], ints[2], ints[3], keep, group.scales, programs, seeds, coefs, K, rounding_hash,
                found_inf,
            )  # fmt: skip
            options["STOCHASTIC"] = stochastic and y.dtype is not torch.float32
            _launch(_add_noise_many_kernel, len(programs), args, options, launched)


class RepeatedPerturb:
    """out <- xs + scales * coefs[0] z(seeds[0]) of the same tensors again and again; no scale is 0.

    torch.ops.pseuzo.add_noise_list_out at less cost to the host: on a GPU, what was launched the first time on a stream
    is launched again as it was. Where ops are looked at, or a CUDA graph is recorded, it is the op.
    """

    def __init__(
        self, xs: list[Tensor], seeds: Tensor, coefs: Tensor, streams: list[int], scales: list[float], noise: str,
        out: list[Tensor],
    ):  # fmt: skip
        self._args = xs, seeds, coefs, streams, [1.0] * len(xs), scales, noise, False, 0, None
        self._out, self._device = out, out[0].device
        gpu = self._device.type == "cuda" and triton is not None
        self._launched_again = gpu and isinstance(
            _add_noise_kernel, triton.runtime.JITFunction
        )  # no interpreter
        self._launches: dict[int, list[Callable[[], None]]] = {}  # by stream

    def __call__(self) -> None:
        device = self._device
        if (
            not self._launched_again or torch.compiler.is_compiling() or _capturing(device)
            or torch._C._len_torch_dispatch_stack()
        ):  # fmt: skip
            torch.ops.pseuzo.add_noise_list_out.default(*self._args, out=self._out)
            return
        stream = triton.runtime.driver.active.get_current_stream(device.index)
        if stream not in self._launches:
            launched: list[Callable[[], None]] = []
            add_noise_list_out_triton(*self._args, out=self._out, launched=launched)
            self._launches[stream] = launched
            return
        with _on(device):
            for launch in self._launches[stream]:
                launch(stream=stream)


def add_noise_list_triton_(
    xs, seeds, coefs, streams, keeps, scales, noise, stochastic, rounding_seed, found_inf=None
):
    """reference.add_noise_list_."""
    if not all(scales):
        ts = [t for t, scale in enumerate(scales) if scale]
        xs, streams, keeps, scales = (
            [values[t] for t in ts] for values in (xs, streams, keeps, scales)
        )
    add_noise_list_out_triton(
        xs,
        seeds,
        coefs,
        streams,
        keeps,
        scales,
        noise,
        stochastic,
        rounding_seed,
        found_inf,
        out=xs,
    )


def add_noise_steps_triton_(
    xs, seeds, coefs, counts, streams, keeps, scales, noise, stochastic, rounding_seeds
):
    """reference.add_noise_steps_: one launch per dtype; for "hadamard-fp16", whose coefs share a scale, one a step."""
    if not xs or not counts:
        return
    if noise == "hadamard-fp16":
        args = (xs, seeds, coefs, counts, streams, keeps, scales, noise, stochastic, rounding_seeds)
        reference.add_noise_steps_(*args, op=add_noise_list_triton_)
        return
    device, S = xs[0].device, len(counts)
    table_of = lambda values, dtype: _to_device(values, dtype, device)  # noqa: E731
    with _on(device):
        seeds, coefs, options = _prepared(seeds, coefs, noise, hash_in_kernel=False)
        del options["HASH"]
        firsts = table_of([0, *accumulate(counts)], torch.int64)
        rounding_hashes = table_of(
            [reference.hash_seed(seed) for seed in rounding_seeds], torch.int64
        )
        keeps, scales = (
            torch.tensor(v, dtype=torch.float64, device="cpu").view(S, -1) for v in (keeps, scales)
        )
        infinite = torch.cat([firsts[:1], (~coefs[:-1].isfinite()).cumsum(0)])[
            firsts
        ]  # coefs before each step
        skipped = (infinite[1:] != infinite[:-1])[:, None]
        for dtype in {x.dtype for x in xs}:
            ts = [t for t, x in enumerate(xs) if x.dtype is dtype and x.numel()]
            if not ts:
                continue
            sizes = tuple(xs[t].numel() for t in ts)
            factors = torch.where(scales[:, ts] == 0, math.nan, _scale_of(noise, scales[:, ts]))
            factors = torch.where(skipped, math.nan, table_of(factors, torch.float32))
            addresses = _addresses("add_noise_steps_", "x", [xs[t] for t in ts])
            columns = table_of(_rows(addresses, sizes, [streams[t] for t in ts]), torch.int64)
            programs = _blocks(sizes, 16 * COUNTERS_STEPS, device)
            _add_noise_steps_kernel[(len(programs),)](
                xs[ts[0]], columns[0], columns[1], columns[2], programs, table_of(keeps[:, ts], torch.float32),
                factors, firsts, rounding_hashes, seeds, coefs,
                S, len(ts), COUNTERS=COUNTERS_STEPS, STOCHASTIC=stochastic and dtype is not torch.float32,
                num_warps=WARPS, **options,
            )  # fmt: skip


def add_noise_rows_triton(x, index, seeds, coefs, stream, scale, noise):
    """reference.add_noise_rows."""
    width = x.shape[1]
    out = x.new_empty(*index.shape, width)
    if out.numel() == 0:
        return out
    if not scale:
        return x[index]
    K = seeds.numel()
    _addresses("add_noise_rows", "x", [x])
    parts = width // 2048 if width % 2048 == 0 else (width - 2) // 2048 + 2
    with _on(x.device):
        seeds, coefs, options = _prepared(seeds, coefs, noise)
        _add_noise_rows_kernel[(index.numel() * parts,)](
            out, x, index.contiguous(), x.shape[0], width, parts, stream, seeds, coefs, K, _scale_of(noise, scale),
            PLANES=width % 128 == 0, num_warps=1, **options, **(ROWS_OPTIONS if options["ASM"] else {}),
        )  # fmt: skip
    return out


lib = torch.library.Library("pseuzo", "FRAGMENT")
_SUM = "Tensor seeds, Tensor coefs, SymInt[] streams, {0} keeps, {0} scales, str noise, bool stochastic"
for _name, _numbers in (("", "float[]"), (".traced", "Tensor")):
    _sum = f"{_SUM.format(_numbers)}, SymInt rounding_seed, Tensor(b!)? found_inf"
    lib.define(f"add_noise_list_{_name}(Tensor(a!)[] xs, {_sum}) -> ()")
    lib.define(f"add_noise_list_out{_name}(Tensor[] xs, {_sum}, *, Tensor(a!)[] out) -> ()")
lib.define(
    "add_noise_steps_(Tensor(a!)[] xs, Tensor seeds, Tensor coefs, int[] counts, int[] streams, float[] keeps, "
    "float[] scales, str noise, bool stochastic, int[] rounding_seeds) -> ()"
)
lib.define(
    "add_noise_rows(Tensor x, Tensor index, Tensor seeds, Tensor coefs, int stream, float scale, str noise) -> Tensor"
)
for _name, _triton in (
    ("add_noise_list_", add_noise_list_triton_),
    ("add_noise_list_out", add_noise_list_out_triton),
    ("add_noise_steps_", add_noise_steps_triton_),
    ("add_noise_rows", add_noise_rows_triton),
):
    lib.impl(_name, getattr(reference, _name), "CompositeExplicitAutograd")
    if triton is not None:
        lib.impl(_name, _triton, "CUDA")
torch.library.register_fake("pseuzo::add_noise_steps_", lambda *args: None, lib=lib)
for _name in ("", ".traced"):
    torch.library.register_fake(f"pseuzo::add_noise_list_{_name}", lambda *args: None, lib=lib)
    torch.library.register_fake(
        f"pseuzo::add_noise_list_out{_name}", lambda *args, out: None, lib=lib
    )
torch.library.register_fake(
    "pseuzo::add_noise_rows", lambda x, index, *args: x.new_empty(*index.shape, x.shape[1]), lib=lib
)


def _traceable(op: Any) -> Callable[..., None]:
    """op, a list op. torch.compile would compile anew for each new number in a list of floats; keeps and scales that
    it does not know are put in tensors, on the CPU: the overload `traced` takes those."""

    def from_tensors(xs, seeds, coefs, streams, keeps, scales, *rest, **out) -> None:
        op.default(xs, seeds, coefs, streams, keeps.tolist(), scales.tolist(), *rest, **out)

    lib.impl(op.traced.name(), from_tensors, "CompositeExplicitAutograd")

    def call(xs, seeds, coefs, streams, keeps, scales, *rest, **out) -> None:
        if torch.compiler.is_compiling():
            from torch.fx.experimental import symbolic_shapes  # slow to import

            known = getattr(
                symbolic_shapes, "has_static_value", lambda number: True
            )  # torch 2.6 has none
            if not all(known(number) for number in (*keeps, *scales)):
                one = torch.ones((), dtype=torch.float64, device="cpu")
                keeps, scales = (
                    torch.stack([one * number for number in numbers]) for numbers in (keeps, scales)
                )
                op.traced(xs, seeds, coefs, streams, keeps, scales, *rest, **out)
                return
        op.default(xs, seeds, coefs, streams, keeps, scales, *rest, **out)

    return call


lib.impl("window_step", reference.window_step, "CompositeExplicitAutograd")

# For optimizers: the ops as their schemas above take them, one launch each. Nothing is checked here, autograd is not
# told (call torch.autograd.graph.increment_version), and nothing of ours runs in Python before a kernel of C++.
# `pseuzo_kernels.reference` has functions of the same names, which say what the arguments are.
_ops = torch.ops.pseuzo
add_noise_list_ = (
    _ops.add_noise_list_.default
)  # (xs, seeds, coefs, streams, keeps, scales, noise, stochastic,
#                                                  rounding_seed, found_inf): x <- keep x + scale sum_k c_k z(s_k)
add_noise_list_out = _ops.add_noise_list_out.default  # the same, *, out: into other tensors
add_noise_steps_ = (
    _ops.add_noise_steps_.default
)  # (xs, seeds, coefs, counts, streams, keeps, scales, noise,
#                                                    stochastic, rounding_seeds): updates in a row, one read and write
add_noise_rows = (
    _ops.add_noise_rows.default
)  # (x, index, seeds, coefs, stream, scale, noise): rows of x + noise

_api = checks.NoiseApi(_traceable(_ops.add_noise_list_), _traceable(_ops.add_noise_list_out))
noise, add_noise_, add_noise = _api.noise, _api.add_noise_, _api.add_noise
perturb_, restore_, update_ = _api.perturb_, _api.restore_, _api.update_
