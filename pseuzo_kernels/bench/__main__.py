"""python -m pseuzo_kernels.bench [--size N] [--dtypes float32 bfloat16] [--json FILE] [--svg FILE]

ms are medians, with the times that 20 % and 80 % of the calls did not exceed. The calls go through
tensors that are together four times as large as the last cache. "% of copy" is the bandwidth of the
bytes that an op has to move, over that of copy_. "% of limit" is the least time for the arithmetic
over the measured time. On a GPU, the least is the time in which it can issue the instructions that
were counted in the machine code. How many instructions a CPU issues depends on its ports, so there
the least is the fastest time of the same op on data in the cache: what is missing to 100 is lost to
memory, or to other programs.
"""

import argparse
import json
import math
import os
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import pseuzo_kernels
from pseuzo_kernels.bench import limits
from pseuzo_kernels.bench.table import Row, row_of, svg, table
from pseuzo_kernels.bench.timing import (
    device_name,
    in_turn,
    last_cache,
    measure_ms,
    memory,
    quantile,
)
from pseuzo_kernels.bench.ways import OURS, Way, bound, ways

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}
SIZE = {"cpu": 1 << 22, "cuda": 1 << 26}  # 2048 x 2048 is a weight of OPT-1.3B's attention
CACHED = 1 << 18  # bytes for each thread: two such tensors fit the second cache of a core
SMALLEST = 1 << 10  # elements
FIRST_CALLS = 0.25  # their share of the time
REPEATS = {"cpu": 1, "cuda": 10}
MOST_TENSORS = 2 << 30  # bytes


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        "python -m pseuzo_kernels.bench",
        description="Time the kernels beside copies, torch.randn and MeZO's loop, within a minute.",
    )
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--threads", type=int, help="on a CPU; default: torch's")
    p.add_argument(
        "--size", type=int, help="elements of a tensor; default: 2^22, on a GPU 2^26, or what fits"
    )
    p.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=DTYPES)
    p.add_argument("--seconds", type=float, default=30.0, help="for all measurements together")
    p.add_argument("--json", metavar="FILE", type=Path, help="write a line of JSON for each row")
    p.add_argument("--svg", metavar="FILE", type=Path, help="write a plot")
    args = p.parse_args(given)
    try:
        args.device = torch.device(args.device)
        torch.empty(1, device=args.device)
    except (RuntimeError, AssertionError) as error:
        p.error(f"--device {args.device} cannot be used: {str(error).splitlines()[0]}")
    if args.device.type not in SIZE:
        p.error(f"--device must be cpu or cuda, got {args.device}")
    if not 0 < args.seconds <= 3600:
        p.error(f"--seconds must be above 0 and at most 3600, got {args.seconds}")
    if args.threads is not None and args.threads < 1:
        p.error(f"--threads must be at least 1, got {args.threads}")
    if args.size is not None and args.size < SMALLEST:
        p.error(f"--size must be at least {SMALLEST} elements, got {args.size}")
    most = min(memory(args.device) // 16, (1 << 31) - 1)  # two tensors, and one of the loop's
    if args.size is not None and args.size > most:
        p.error(f"--size {args.size} does not fit here: at most {most} elements")
    for option in (args.json, args.svg):
        if option and not option.parent.is_dir():
            p.error(f"{option}: the folder {option.parent} does not exist; make it first")
    return args


def pairs_of(n: int, dtype: torch.dtype, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Pairs of tensors that are together four times as large as the last cache, or one pair if its
    size needs more memory than that."""
    bytes_of_pair = 2 * n * dtype.itemsize
    count = math.ceil(4 * last_cache(device) / bytes_of_pair)
    count = max(1, min(count, MOST_TENSORS // bytes_of_pair, memory(device) // 4 // bytes_of_pair))
    x = torch.randn(n, device=device).to(dtype)
    return [(x.clone(), x.clone()) for _ in range(count)]


def fitting(n: int, seconds: float, found: list[Way], dtype: torch.dtype) -> int:
    """The largest n / 2^i at which one call of each way takes FIRST_CALLS of the seconds."""
    few = min(n, CACHED // dtype.itemsize)
    x = torch.randn(few).to(dtype)
    once = sum(measure_ms(bound(way, [(x, x.clone())]), x.device) for way in found) / 1e3
    while n > few and once * n / few > FIRST_CALLS * seconds:
        n //= 2
    return n


def limit_ms(
    way: Way, n: int, dtype: torch.dtype, device: torch.device, seconds: float
) -> float | None:
    """The least ms of our op on n elements by its arithmetic, or None if it is not known."""
    if way.impl != OURS:
        return None
    if device.type == "cuda":
        return limits.issue_ms(limits.chip_of(device), way.counted, dtype, n, way.K)
    few = min(n, CACHED // dtype.itemsize * torch.get_num_threads())
    calls = {}
    for name, size in (("call", 16), ("cached", few)):  # the former is what any call costs
        x = torch.randn(size).to(dtype)
        calls[name] = bound(way, [(x, x.clone())])
    times = in_turn(calls, seconds, partial(measure_ms, device=device))
    least = min(times["cached"]) - min(times["call"])
    return least * n / (few - 16) if least > 0 else None


def measured(dtype: torch.dtype, args: argparse.Namespace, seconds: float) -> list[Row]:
    """The rows of a dtype."""
    device, found = args.device, ways(dtype, args.device)
    n = args.size or min(SIZE[device.type], memory(device) // 32)
    if not args.size and device.type == "cpu":
        n = fitting(n, seconds, found, dtype)
    pairs = pairs_of(n, dtype, device)
    measure = partial(measure_ms, device=device, repeats=REPEATS[device.type])
    if device.type == "cuda":  # kernels are compiled at their first call
        for way in found:
            way.run(*pairs[0])
    calls = {way.name: bound(way, pairs) for way in found}
    times = in_turn(calls, 0.9 * seconds, measure)
    del calls, pairs
    ours = sum(way.impl == OURS for way in found)
    copy_ms = quantile(times[found[0].name], 0.5)
    rows = []
    for way in found:
        least = limit_ms(way, n, dtype, device, 0.1 * seconds / ours)
        size = dict(n=n, itemsize=dtype.itemsize, K=way.K, passes=way.passes)
        row = row_of(times[way.name], **size, copy_ms=copy_ms, limit_ms=least)
        rows.append(dict(op=way.op, impl=way.impl, dtype=str(dtype)[6:], n=n, K=way.K) | row)
    return rows


def about(device: torch.device) -> Row:
    """What the numbers depend on besides the ways."""
    try:
        import triton

        version = triton.__version__
    except ImportError:
        version = None
    return dict(
        device=device_name(device),
        threads=torch.get_num_threads() if device.type == "cpu" else None,
        load=os.getloadavg()[0] if device.type == "cpu" else None,
        python=platform.python_version(),
        torch=torch.__version__,
        triton=version,
        pseuzo_kernels=pseuzo_kernels.__version__,
        date=datetime.now(UTC).strftime("%Y-%m-%d"),
    )


def main(given: Sequence[str] | None = None) -> None:
    args = arguments(given)
    if args.threads and args.device.type == "cpu":
        torch.set_num_threads(args.threads)
    here = about(args.device)
    title = f"{here['device']}, torch {here['torch']}, triton {here['triton']}"
    if args.device.type == "cpu":
        title += f", {here['threads']} thread(s) of {os.cpu_count()}, load {here['load']:.1f}"
    print(f"{title}, pseuzo_kernels {here['pseuzo_kernels']}, {here['date']}", flush=True)
    if here["load"] and here["load"] > (os.cpu_count() or 1):
        print("other programs keep the CPU busy: times are too long, most of all with many threads")
    backend = getattr(pseuzo_kernels.backends(), args.device.type)
    if not backend.fast:
        print(f"our ops are slow here: {backend}")
    dtypes = list(dict.fromkeys(args.dtypes))
    rows: list[Row] = []
    for name in dtypes:
        part = measured(DTYPES[name], args, args.seconds / len(dtypes))
        print(table(part), flush=True)
        rows += [here | row for row in part]
    print(f"\n{__doc__.partition(chr(10) * 2)[2].strip()}")
    if args.json:
        args.json.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if args.svg:
        args.svg.write_text(svg(rows, title))


if __name__ == "__main__":
    main()
