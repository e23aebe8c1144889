"""Adam's update of parts of tensors, and under masks, as a Triton kernel; `pseuzo_kernels.adam`
defines every bit. All runs of one dtype share a launch, as in `parts`."""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from pseuzo_kernels import adam, parts, reference
from pseuzo_kernels.laws import resolve
from pseuzo_kernels.triton import launch
from pseuzo_kernels.triton.adam import HALF, move_block
from pseuzo_kernels.triton.kernels import WARPS
from pseuzo_kernels.triton.parts import NARROW, tables_of_runs
from pseuzo_kernels.triton.sums import unless_skipped
from pseuzo_kernels.triton.tables import Kept


@triton.jit(do_not_specialize=["K", "directions", "rounding_hash"])
def adam_parts_kernel(
    dtype_ptr,  # any tensor of the list: says its dtype
    xs_ptr,  # [R] int64: the address where a run begins
    firsts_ptr,  # [R] int64: the position of its first element in the whole tensor
    ns_ptr,  # [R] int64: its elements
    takes_ptr,  # [R] int64: the addresses of given masks, or None
    tensors_ptr,  # [R] int64: its tensor
    table_ptr,  # [programs, 2] int32: run, block
    streams_ptr,  # [T] int64
    keeps_ptr,  # [T] fp32
    scales_ptr,  # [T] fp32
    limits_ptr,  # [T] fp32, or None
    seeds_ptr,
    coefs_ptr,
    K: tl.int32,
    directions: tl.int32,
    beta1: tl.float32,
    beta2: tl.float32,
    first_number: tl.float32,
    second: tl.float32,
    eps: tl.float32,
    rounding_hash: tl.int64,
    found_inf_ptr,
    mask_seed_ptr,
    NOISE: tl.constexpr,
    COUNTERS: tl.constexpr,
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
    x_ptr = (tl.load(xs_ptr + r) - before * size).to(pointer)
    if ALIGNED:
        x_ptr = tl.multiple_of(x_ptr, 16)
    x_ptr += start
    mask_ptr = None
    if takes_ptr is not None:
        mask_ptr = (tl.load(takes_ptr + r) - before).to(tl.pointer_type(tl.uint8)) + start
    limit = None
    if limits_ptr is not None:
        limit = tl.load(limits_ptr + t)
    stream = tl.load(streams_ptr + t).to(tl.uint32)
    keep, scale = tl.load(keeps_ptr + t), tl.load(scales_ptr + t)
    skipped, K, scale = unless_skipped(coefs_ptr, K, scale, found_inf_ptr, True, HASH)
    hi = tl.where(skipped, 0, hi)  # then nothing is read or written
    if (lo == 0) & (hi == 16 * COUNTERS):
        move_block(
            x_ptr,
            0,
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
            first_number,
            second,
            eps,
            rounding_hash,
            NOISE,
            COUNTERS,
            True,
            HASH,
            STOCHASTIC,
            ASM,
            limit,
            mask_seed_ptr,
            mask_ptr,
        )
    elif hi > 0:
        move_block(
            x_ptr,
            lo,
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
            first_number,
            second,
            eps,
            rounding_hash,
            NOISE,
            COUNTERS,
            False,
            HASH,
            STOCHASTIC,
            ASM,
            limit,
            mask_seed_ptr,
            mask_ptr,
        )


def adam_parts_triton_(
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
):
    """adam.adam_parts_: one launch per dtype, and one more for runs that are not aligned."""
    op, K = "adam_parts_", seeds.numel()
    wrong = not K or directions < 1 or K % directions
    if wrong or not launch.implemented(noise, op) or (limits and takes):
        terms = seeds, coefs, directions, streams, keeps, scales, numbers
        how = noise, stochastic, rounding_seed, found_inf, places, limits, mask_seed, takes
        adam.adam_parts_(xs, *terms, *how)
        return
    ts = [t for t, x in enumerate(xs) if scales[t] and x.numel()]
    if not ts:
        return
    columns = xs, streams, keeps, scales, parts.parts_of(places, len(xs))
    xs, streams, keeps, scales, whole = ([column[t] for t in ts] for column in columns)
    limits, takes = ([column[t] for t in ts] if column else [] for column in (limits, takes))
    noise, device = resolve(noise)[0], xs[0].device
    ptrs, sizes = launch.addresses_of(op, "x", xs), tuple(map(Tensor.numel, xs))
    takes_ptrs, dtypes = launch.addresses_of(op, "a mask", takes), tuple(x.dtype for x in xs)
    key = ptrs, ptrs, takes_ptrs, sizes, dtypes, tuple(whole), device, HALF
    with launch.on_device(device):
        kept = Kept(op, device)
        tables = kept.get((op, *key), partial(tables_of_runs, *key))
        seeds, coefs, options = launch.prepared(seeds, coefs, noise, found_inf)
        of_tensors = (
            kept.numbers(streams, torch.int64),
            kept.numbers(keeps, torch.float32),
            kept.numbers([launch.factor(noise, scale) for scale in scales], torch.float32),
            kept.numbers(limits, torch.float32) if limits else None,
        )
        rounding_hash = reference.hash_seed(rounding_seed) if stochastic else 0
        terms = seeds, coefs, K, directions, *numbers, rounding_hash, found_inf, mask_seed
        for group in tables:
            _, addresses, firsts, ns, takes_column, tensors = group.runs
            runs = addresses, firsts, ns, takes_column if takes else None, tensors
            adam_parts_kernel[(len(group.programs),)](
                *(xs[group.t], *runs, group.programs, *of_tensors, *terms),
                COUNTERS=group.counters,
                STOCHASTIC=stochastic and dtypes[group.t] is not torch.float32,
                ALIGNED=group.aligned,
                # two counters a thread, as in adam
                num_warps=2 if group.counters == NARROW else WARPS,
                **options,
            )
