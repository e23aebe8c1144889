"""The ops of `pseuzo_kernels.reference` as launches of the Triton kernels."""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from pseuzo_kernels import masks, reference
from pseuzo_kernels.checks import refuse_freed
from pseuzo_kernels.laws import resolve
from pseuzo_kernels.triton import kernels
from pseuzo_kernels.triton.kernels import (
    COUNTERS,
    COUNTERS_STEPS,
    ROWS_OPTIONS,
    WARPS,
)
from pseuzo_kernels.triton.sums import HASH_IN_KERNEL
from pseuzo_kernels.triton.tables import aligned_rows, blocks_of, cached, capturing, to_device

IMPLEMENTED = frozenset({"hadamard", "normal", "rademacher"})  # other laws run in plain torch


def implemented(noise: str, op: str) -> bool:
    """Whether the kernels implement this noise. ValueError if there is no such noise."""
    return resolve(noise, op)[0] in IMPLEMENTED


def is_compiled() -> bool:
    """Whether kernels are compiled: the interpreter has no PTX."""
    return isinstance(kernels.add_noise_kernel, triton.runtime.JITFunction)


def _scale_of(noise: str, scale):
    """The factor of the sums. The kernel's radius for "normal" is in units of sqrt(2 log 2)."""
    unit = math.sqrt(2 * math.log(2)) if noise == "normal" else 1.0
    return reference.scale_of(noise, scale) * unit


def factor(noise: str, scale: float) -> float:
    """The scale as the kernels for one step take it: NaN for 0, because a tiny one is 0 in fp32."""
    return _scale_of(noise, scale) if scale else math.nan


def on_device(device: torch.device):
    """Make device current, where Triton launches; the interpreter takes CPU tensors as they are."""
    here = device.type != "cuda" or device.index == torch.cuda.current_device()
    return nullcontext() if here else torch.cuda.device(device)


def prepared(
    seeds: Tensor,
    coefs: Tensor,
    noise: str,
    found_inf: Tensor | None = None,
    hash_in_kernel: bool = True,
) -> tuple[Tensor, Tensor, dict]:
    """Seeds and coefs as the kernels take them, and the options; NOISE says how they are summed."""
    seeds, coefs, K = seeds.contiguous(), coefs.contiguous(), seeds.numel()
    law, sums = resolve(noise)
    fp16 = sums == "fp16" and K > 1
    if fp16:
        law += "-fp16 blocks" if K > reference.FP16_BLOCK else "-fp16"
    options = dict(
        ASM=isinstance(kernels.prepare_kernel, triton.runtime.JITFunction),
        HASH=hash_in_kernel and not fp16 and K <= HASH_IN_KERNEL.value,
        NOISE=law,
        enable_fp_fusion=False,
    )
    if not options["HASH"]:
        hashes, rounded = torch.empty_like(seeds), coefs.new_empty(K + 1)
        args = seeds, coefs, hashes, rounded, K, found_inf
        kernels.prepare_kernel[(max(1, -(-K // 128)),)](
            *args, FP16=fp16, BLOCK=128, enable_fp_fusion=False
        )
        seeds, coefs = hashes, rounded
    return seeds, coefs, options


def addresses_of(op: str, name: str, xs: Sequence[Tensor]) -> tuple[int, ...]:
    addresses = tuple(map(Tensor.data_ptr, xs))
    if 0 in addresses and any(
        x.numel() for x, address in zip(xs, addresses, strict=True) if not address
    ):
        refuse_freed(op, name)
    return addresses


class Columns(NamedTuple):
    """A list of tensors as its launch tables have it, with one entry per tensor."""

    out_ptrs: tuple[int, ...]
    x_ptrs: tuple[int, ...]
    sizes: tuple[int, ...]
    streams: tuple[int, ...]
    scales: tuple[float, ...]
    dtypes: tuple[torch.dtype, ...]
    limits: tuple[float, ...] = ()  # of masks; empty without


class Together(NamedTuple):
    """Tensors of one dtype that share a launch, and its tables."""

    ts: list[int]
    programs: Tensor
    ints: Tensor  # addresses of out and x, sizes, streams
    scales: Tensor
    limits: Tensor | None = None


class Launches(NamedTuple):
    """How the tensors of a list are launched."""

    alone: list[int]
    together: list[Together]


def _launches(columns: Columns, noise: str, device: torch.device, tables: bool) -> Launches:
    """tables: whether tables may be made, with which aligned tensors share a launch."""
    ts = [t for t, n in enumerate(columns.sizes) if n]
    many: dict[torch.dtype, list[int]] = {}
    for t in ts:
        if tables and columns.out_ptrs[t] % 16 == columns.x_ptrs[t] % 16 == 0:
            many.setdefault(columns.dtypes[t], []).append(t)
    together = []
    for group in many.values():
        ints = aligned_rows(*([column[t] for t in group] for column in columns[:4]))
        factors = [factor(noise, columns.scales[t]) for t in group]
        limits = [columns.limits[t] for t in group] if columns.limits else None
        together.append(
            Together(
                group,
                blocks_of([columns.sizes[t] for t in group], 16 * COUNTERS, device),
                to_device(ints, torch.int64, device),
                to_device(factors, torch.float32, device),
                None if limits is None else to_device(limits, torch.float32, device),
            )
        )
    done = set().union(*many.values())
    return Launches([t for t in ts if t not in done], together)


def _launch(kernel: Any, programs: int, args: tuple, options: dict, launched: list | None) -> None:
    """launched: is called with the launch, in a form that can be repeated."""
    compiled = kernel[(programs,)](*args, **options)
    if launched is not None:
        constants = [options[p.name] for p in kernel.params[len(args) :]]
        launched.append(partial(compiled[(programs, 1, 1)], *args, *constants))


def planned(
    columns: Columns, keeps: Sequence[float], noise: str, device: torch.device
) -> tuple[Launches, list[Tensor]]:
    """How a list is launched, and the keeps of each group that shares a launch.

    keeps have tables of their own, because they change with the learning rate.
    """
    launches = partial(_launches, columns, noise, device)
    if len(columns.sizes) == 1:
        return launches(tables=False), []
    # a table belongs to the stream on which it was copied to the device
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    place, in_graph = (device, stream), capturing(device)
    plan = cached((place, noise, columns), partial(launches, tables=True), in_graph)
    kept = []
    for group in plan.together if plan is not None else ():
        values = [keeps[t] for t in group.ts]
        build = partial(to_device, values, torch.float32, device)
        kept.append(cached((place, *values), build, in_graph))
    if plan is None or any(keep is None for keep in kept):
        return launches(tables=False), []
    return plan, kept


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
    limits=(),
    mask_seed=None,
    *,
    out,
    launched=None,
):
    """reference.add_noise_list_out, and masks.add_noise_masked_list_out with limits.

    There is one launch per dtype, and one per tensor that is not aligned to 16 bytes.
    """
    op = "add_noise_list_out"
    if not implemented(noise, op):
        how = noise, stochastic, rounding_seed, found_inf
        plain, mask = reference.add_noise_list_out, ()
        if limits:
            plain, mask = masks.add_noise_masked_list_out, (limits, mask_seed)
        plain(xs, seeds, coefs, streams, keeps, scales, *how, *mask, out=out)
        return
    sizes = tuple(map(Tensor.numel, out))
    if not any(sizes):
        return
    device, inputs, K = out[0].device, xs or out, seeds.numel()
    rounding_hash = reference.hash_seed(rounding_seed) if stochastic else 0
    out_ptrs = addresses_of(op, "out", out)
    x_ptrs = addresses_of(op, "x", xs) if xs else out_ptrs
    dtypes = tuple(y.dtype for y in out)
    columns = Columns(out_ptrs, x_ptrs, sizes, tuple(streams), tuple(scales), dtypes, tuple(limits))
    with on_device(device):
        plan, kept = planned(columns, keeps, noise, device)
        seeds, coefs, options = prepared(seeds, coefs, noise, found_inf)
        options |= dict(HAS_X=bool(xs), COUNTERS=COUNTERS, num_warps=WARPS)
        for t in plan.alone:
            tensor = out[t], inputs[t], sizes[t], streams[t]
            numbers = keeps[t], factor(noise, scales[t]), rounding_hash
            mask = (limits[t] if limits else None), mask_seed
            args = *tensor, seeds, coefs, K, *numbers, found_inf, *mask
            options["STOCHASTIC"] = stochastic and dtypes[t] is not torch.float32
            programs = -(-sizes[t] // (16 * COUNTERS))
            _launch(kernels.add_noise_kernel, programs, args, options, launched)
        for group, keep in zip(plan.together, kept, strict=True):
            first = group.ts[0]
            tables = *group.ints.unbind(), keep, group.scales, group.programs
            mask = group.limits, mask_seed
            args = out[first], *tables, seeds, coefs, K, rounding_hash, found_inf, *mask
            options["STOCHASTIC"] = stochastic and dtypes[first] is not torch.float32
            _launch(kernels.add_noise_many_kernel, len(group.programs), args, options, launched)


def add_noise_list_triton_(
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
    limits=(),
    mask_seed=None,
):
    """reference.add_noise_list_, and masks.add_noise_masked_list_ with limits."""
    if not all(scales):
        ts = [t for t, scale in enumerate(scales) if scale]
        limits = [limits[t] for t in ts] if limits else ()
        columns = xs, streams, keeps, scales
        xs, streams, keeps, scales = ([column[t] for t in ts] for column in columns)
    how = noise, stochastic, rounding_seed, found_inf, limits, mask_seed
    add_noise_list_out_triton(xs, seeds, coefs, streams, keeps, scales, *how, out=xs)


def add_noise_steps_triton_(
    xs, seeds, coefs, counts, streams, keeps, scales, noise, stochastic, rounding_seeds
):
    """reference.add_noise_steps_: one launch per dtype.

    For sums in half precision, where the coefs of a step share a scale, there is one launch per
    step.
    """
    op = "add_noise_steps_"
    args = (xs, seeds, coefs, counts, streams, keeps, scales, noise, stochastic, rounding_seeds)
    if not implemented(noise, op):
        reference.add_noise_steps_(*args)
        return
    if not xs or not counts:
        return
    if resolve(noise)[1] == "fp16":
        reference.add_noise_steps_(*args, op=add_noise_list_triton_)
        return
    device, S = xs[0].device, len(counts)
    table_of = partial(to_device, device=device)
    with on_device(device):
        seeds, coefs, options = prepared(seeds, coefs, noise, hash_in_kernel=False)
        del options["HASH"]
        firsts = table_of([0, *accumulate(counts)], dtype=torch.int64)
        hashes = [reference.hash_seed(seed) for seed in rounding_seeds]
        rounding_hashes = table_of(hashes, dtype=torch.int64)
        keeps, scales = (
            torch.tensor(v, dtype=torch.float64, device="cpu").view(S, -1) for v in (keeps, scales)
        )
        not_finite = (~coefs[:-1].isfinite()).cumsum(0)
        before = torch.cat([firsts[:1], not_finite])[firsts]  # those before each step
        skipped = (before[1:] != before[:-1])[:, None]
        for dtype in {x.dtype for x in xs}:
            ts = [t for t, x in enumerate(xs) if x.dtype is dtype and x.numel()]
            if not ts:
                continue
            sizes = tuple(xs[t].numel() for t in ts)
            factors = torch.where(scales[:, ts] == 0, math.nan, _scale_of(noise, scales[:, ts]))
            factors = torch.where(skipped, math.nan, table_of(factors, dtype=torch.float32))
            addresses = addresses_of(op, "x", [xs[t] for t in ts])
            ints = aligned_rows(addresses, sizes, [streams[t] for t in ts])
            columns = table_of(ints, dtype=torch.int64)
            programs = blocks_of(sizes, 16 * COUNTERS_STEPS, device)
            tables = *columns.unbind(), programs, table_of(keeps[:, ts], dtype=torch.float32)
            terms = factors, firsts, rounding_hashes, seeds, coefs
            options |= dict(COUNTERS=COUNTERS_STEPS, num_warps=WARPS)
            options["STOCHASTIC"] = stochastic and dtype is not torch.float32
            args = xs[ts[0]], *tables, *terms, S, len(ts)
            kernels.add_noise_steps_kernel[(len(programs),)](*args, **options)


def add_noise_rows_triton(x, index, seeds, coefs, stream, scale, noise, limit=None, mask_seed=None):
    """reference.add_noise_rows, and masks.add_noise_masked_rows with a limit."""
    if not implemented(noise, "add_noise_rows"):
        args = x, index, seeds, coefs, stream, scale, noise
        if limit is None:
            return reference.add_noise_rows(*args)
        return masks.add_noise_masked_rows(*args, limit, mask_seed)
    rows, width = x.shape
    out = x.new_empty(*index.shape, width)
    if out.numel() == 0:
        return out
    if not scale:
        return x[index]
    K = seeds.numel()
    addresses_of("add_noise_rows", "x", [x])
    parts = width // 2048 if width % 2048 == 0 else (width - 2) // 2048 + 2
    with on_device(x.device):
        seeds, coefs, options = prepared(seeds, coefs, noise)
        options |= ROWS_OPTIONS if options["ASM"] else {}
        args = out, x, index.contiguous(), rows, width, parts, stream, seeds, coefs, K
        kernels.add_noise_rows_kernel[(index.numel() * parts,)](
            *args,
            *(_scale_of(noise, scale), limit, mask_seed),
            PLANES=width % 128 == 0,
            num_warps=1,
            **options,
        )
    return out


class RepeatedLaunches:
    """Launches again what add_noise_list_out_triton launched the first time on a stream."""

    def __init__(self, args: tuple, out: list[Tensor]):
        self._args, self._out, self._device = args, out, out[0].device
        self._by_stream: dict[int, list[Callable[..., None]]] = {}

    def __call__(self) -> None:
        stream = triton.runtime.driver.active.get_current_stream(self._device.index)
        if stream not in self._by_stream:
            launched: list[Callable[..., None]] = []
            add_noise_list_out_triton(*self._args, out=self._out, launched=launched)
            self._by_stream[stream] = launched
            return
        with on_device(self._device):
            for launch in self._by_stream[stream]:
                launch(stream=stream)
