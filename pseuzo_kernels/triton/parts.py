"""Noise on parts of tensors, under any mask, or its sign, as a Triton kernel.

`pseuzo_kernels.parts` defines every bit. A part is one run of elements that follow each other in
the whole tensor, or several. All runs of one dtype share a launch.
"""

from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pseuzo_kernels import parts, reference
from pseuzo_kernels.bits import CHUNK
from pseuzo_kernels.triton import launch
from pseuzo_kernels.triton.kernels import COUNTERS, WARPS
from pseuzo_kernels.triton.sums import add_block, unless_skipped
from pseuzo_kernels.triton.tables import Kept, blocks_of, columns_of

NARROW = 128  # counters of a program, of one warp, where all runs are short


@triton.jit(do_not_specialize=["K", "rounding_hash"])
def add_noise_parts_kernel(
    dtype_ptr,  # any tensor of the list: says its dtype
    outs_ptr,  # [R] int64: the address where a run begins
    xs_ptr,  # [R] int64
    firsts_ptr,  # [R] int64: the position of its first element in the whole tensor
    ns_ptr,  # [R] int64: its elements
    takes_ptr,  # [R] int64: the addresses of given masks, or None
    tensors_ptr,  # [R] int64: its tensor
    table_ptr,  # [programs, 2] int32: run, block
    streams_ptr,  # [T] int64
    keeps_ptr,  # [T] fp32
    scales_ptr,  # [T] fp32; NaN: no noise
    steps_ptr,  # [T] fp32 of signs, or None
    limits_ptr,  # [T] fp32, or None
    seeds_ptr,
    coefs_ptr,
    K: tl.int32,
    rounding_hash: tl.int64,
    found_inf_ptr,
    mask_seed_ptr,
    NOISE: tl.constexpr,
    COUNTERS: tl.constexpr,
    HAS_X: tl.constexpr,
    HASH: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ALIGNED: tl.constexpr,  # the chunks of all runs begin on multiples of 16 bytes
    ASM: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    r = tl.load(table_ptr + 2 * pid)
    t = tl.load(tensors_ptr + r)
    first = tl.load(firsts_ptr + r)
    before = first % 2048  # elements of the first chunk that are not of the run
    start = tl.load(table_ptr + 2 * pid + 1).to(tl.int64) * (16 * COUNTERS)  # from that chunk on
    lo = tl.maximum(before - start, 0).to(tl.int32)
    hi = tl.minimum(before + tl.load(ns_ptr + r) - start, 16 * COUNTERS).to(tl.int32)
    q = ((first - before + start) // 16).to(tl.uint32)
    pointer: tl.constexpr = tl.pointer_type(dtype_ptr.dtype.element_ty)
    size: tl.constexpr = dtype_ptr.dtype.element_ty.primitive_bitwidth // 8
    # Integers are shifted, since this may be before the memory, of which nothing there is read.
    out_at, x_at = (tl.load(outs_ptr + r) - before * size), (tl.load(xs_ptr + r) - before * size)
    out_ptr, x_ptr = out_at.to(pointer), x_at.to(pointer)
    if ALIGNED:  # said of the pointers, as Triton forgets it with a conversion
        out_ptr, x_ptr = tl.multiple_of(out_ptr, 16), tl.multiple_of(x_ptr, 16)
    out_ptr, x_ptr = out_ptr + start, x_ptr + start
    mask_ptr = None
    if takes_ptr is not None:
        mask_ptr = (tl.load(takes_ptr + r) - before).to(tl.pointer_type(tl.uint8)) + start
    stream = tl.load(streams_ptr + t).to(tl.uint32)
    scale = tl.load(scales_ptr + t)
    step = None
    if steps_ptr is not None:
        step = tl.load(steps_ptr + t)
    limit = None
    if limits_ptr is not None:
        limit = tl.load(limits_ptr + t)
    skipped, K, scale = unless_skipped(coefs_ptr, K, scale, found_inf_ptr, HAS_X, HASH)
    keep = tl.where(skipped, 1.0, tl.load(keeps_ptr + t))
    if HAS_X:
        hi = tl.where(skipped & (out_at == x_at), 0, hi)  # then nothing is read or written
    add_block(
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
        HASH,
        STOCHASTIC,
        ASM,
        mask_ptr,
        step,
    )


class Runs(NamedTuple):
    """The runs of one dtype that share a launch."""

    t: int  # one of the tensors
    aligned: bool
    counters: int
    runs: list[Tensor]  # outs, xs, firsts, ns, takes, tensors
    programs: Tensor


def tables_of_runs(
    out_ptrs: tuple[int, ...],
    x_ptrs: tuple[int, ...],
    takes_ptrs: tuple[int, ...],
    sizes: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    places: tuple[parts.Part, ...],
    device: torch.device,
    most: int = COUNTERS,
) -> list[Runs]:
    """The launches for the runs of a list. most: the counters of a program, unless all runs are
    short."""
    groups: dict[tuple, list[tuple[int, ...]]] = {}
    for t, (n, part, dtype) in enumerate(zip(sizes, places, dtypes, strict=True)):
        for begin, end, first in parts.runs(n, part):
            out, x = (ptrs[t] + begin * dtype.itemsize for ptrs in (out_ptrs, x_ptrs))
            before = first % CHUNK * dtype.itemsize
            aligned = (out - before) % 16 == (x - before) % 16 == 0
            takes = takes_ptrs[t] + begin if takes_ptrs else 0
            run = out, x, first, end - begin, takes, t
            groups.setdefault((dtype, aligned), []).append(run)
    tables = []
    for (_, aligned), rows in groups.items():
        touched = [row[2] % CHUNK + row[3] for row in rows]  # elements from the first chunk on
        counters = NARROW if max(touched) < 16 * most else most
        columns = columns_of(rows, device)
        programs = blocks_of(touched, 16 * counters, device)
        tables.append(Runs(rows[0][-1], aligned, counters, columns, programs))
    return tables


def add_noise_parts_out_triton(
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
    places,
    limits,
    mask_seed,
    takes,
    sign,
    *,
    out,
):
    """parts.add_noise_parts_out: one launch per dtype, and one more for runs that are not aligned:
    their chunks begin at addresses that are not multiples of 16 bytes."""
    op = "add_noise_parts_out"
    terms = seeds, coefs, streams, keeps, scales
    how = noise, stochastic, rounding_seed, found_inf, places, limits, mask_seed, takes, sign
    if not launch.implemented(noise, op) or (limits and takes):
        parts.add_noise_parts_out(xs, *terms, *how, out=out)
        return
    sizes = tuple(map(Tensor.numel, out))
    if not any(sizes):
        return
    device, K = out[0].device, seeds.numel()
    rounding_hash = reference.hash_seed(rounding_seed) if stochastic else 0
    out_ptrs = launch.addresses_of(op, "out", out)
    x_ptrs = launch.addresses_of(op, "x", xs) if xs else out_ptrs
    takes_ptrs = launch.addresses_of(op, "a mask", takes)
    dtypes, all_parts = tuple(y.dtype for y in out), tuple(parts.parts_of(places, len(out)))
    key = "parts", out_ptrs, x_ptrs, takes_ptrs, sizes, dtypes, all_parts
    factors = [launch.factor(noise, (1.0 if sign else scale) if scale else 0.0) for scale in scales]
    with launch.on_device(device):
        kept = Kept(op, device)
        tables = kept.get(key, partial(tables_of_runs, *key[1:], device))
        seeds, coefs, options = launch.prepared(seeds, coefs, noise, found_inf)
        options["HAS_X"] = bool(xs)
        of_tensors = (
            kept.numbers(streams, torch.int64),
            kept.numbers(keeps, torch.float32),
            kept.numbers(factors, torch.float32),
            kept.numbers(scales, torch.float32) if sign else None,
            kept.numbers(limits, torch.float32) if limits else None,
        )
        terms = seeds, coefs, K, rounding_hash, found_inf, mask_seed
        for group in tables:
            *runs, takes_column, tensors = group.runs
            runs = *runs, takes_column if takes else None, tensors
            add_noise_parts_kernel[(len(group.programs),)](
                *(out[group.t], *runs, group.programs, *of_tensors, *terms),
                COUNTERS=group.counters,
                STOCHASTIC=stochastic and dtypes[group.t] is not torch.float32,
                ALIGNED=group.aligned,
                num_warps=1 if group.counters == NARROW else WARPS,
                **options,
            )


add_noise_parts_triton_ = partial(parts.add_noise_parts_, run=add_noise_parts_out_triton)
