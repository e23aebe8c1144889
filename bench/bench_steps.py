"""Times training steps of OPT models at random initialisation, beside what people run today.

python bench/bench_steps.py [--model opt-125m ...] [--tokens 64 256] [--rows 16] [--dtype bfloat16]
    [--device cuda|cpu] [--ways ours published backward] [--no-check]

Our own parts are timed on the GPU alone, steps and forwards with their Python. "two forwards" is
the floor: inference, and nothing else. "captured" means that the passes are recorded as CUDA
graphs, including those of the floor. "one forward of twice the rows" is the least that the clean
and the perturbed pass could cost if they ran as one. pseuzo's step is also timed in parts, of which
"perturb" is all launches by which a perturbed pass makes its weights, without the forward. The
published ways are those of published.py. FO runs backward through the model.

peak_gb: the most memory that torch allocated on the GPU during a call. reserved_gb: the most that
torch held on the GPU since the way began. This includes the memory of graphs, which is allocated
only while they are recorded. device_gb: the memory that all processes used on the GPU after a call.
ops: the operations in a call that compute something, about as many as its launches (for "perturb":
the launches). syncs: the numbers for which Python waits. Two of ours on a CPU come from pinned
memory on a GPU, where nothing waits for them.
"""

import argparse
import gc
import sys
import traceback
from collections.abc import Callable

import torch
from harness import LARGER, MODELS, QUANTILES, Table, floor_of, parser
from opt_models import make_batch, make_model
from pseuzo.perturb.module import forget_passes
from torch.utils._python_dispatch import TorchDispatchMode
from ways import WAYS, Parts, ways

COLUMNS = (
    "model", "params", "dtype", "rows", "tokens", "impl", "part", *QUANTILES, "peak_gb", "ops",
    "syncs", "reserved_gb", "device_gb",
)  # fmt: skip


FITTING = [name for name in MODELS if name not in ("tiny", *LARGER)]


class Count(TorchDispatchMode):
    """Counts the operations that compute something, and those that wait for a number."""

    def __init__(self, device: torch.device):
        super().__init__()
        self.device, self.ops, self.syncs = device, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # torch offers an op's schema under this name alone.
        aliases = [r.alias_info for r in func._schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in aliases)
        self.ops += not is_view and "empty" not in func.__name__
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.syncs += args[0].device.type == self.device.type
        return func(*args, **(kwargs or {}))


def measure(table: Table, name: str, args: argparse.Namespace) -> bool:
    """Add the rows of a model. A way that does not fit into memory gets a row that says so. Return
    False if one failed for another reason."""
    dtype, all_ran = getattr(torch, args.dtype), True
    common = dict(model=name, dtype=args.dtype, rows=args.rows)
    too_large = dict(impl="inference", part="setup: does not fit")
    try:
        model = make_model(name, dtype, table.device)
        common["params"] = sum(p.numel() for p in model.parameters())
    except torch.cuda.OutOfMemoryError:
        table.add(**common, tokens=max(args.tokens), **too_large)
        return all_ran
    for i, tokens in enumerate(args.tokens):
        torch.manual_seed(tokens)
        try:
            batch = make_batch(model, args.rows, tokens)
            todo = ways(model, batch, args.no_check or i > 0, args.ways)
        except torch.cuda.OutOfMemoryError:
            table.add(**common, tokens=tokens, **too_large)
            continue
        floors: dict[str, dict] = {}
        for impl, way in todo.items():
            gc.collect()
            if table.device.type == "cuda":  # free the memory that other ways left
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            all_ran &= measure_way(table, impl, way, common | dict(tokens=tokens), floors)
            forget_passes(model)  # this frees their scratch
            model.zero_grad(set_to_none=True)
    return all_ran


def measure_way(
    table: Table, impl: str, way: Callable[[], Parts], common: dict, floors: dict[str, dict]
) -> bool:
    """Add a row for each part of a way. floors: impl -> its row of two forwards, which this adds
    to. Return False if the way failed, except for lack of memory."""
    part = "setup"
    try:
        for part, call, *launches in way():
            row = measure_part(table, impl, part, call)
            if launches:
                row["ops"] = launches[0]
            table.add(**common, impl=impl, part=part, **row)
            if part == "two forwards":
                floors[impl] = row
            elif part == "step" and floor_of(impl) in floors:
                print_beyond_floor(impl, row, floors)
    except torch.cuda.OutOfMemoryError:
        table.add(**common, impl=impl, part=f"{part}: does not fit")
    except Exception:
        traceback.print_exc()
        return False
    return True


def measure_part(table: Table, impl: str, part: str, call: Callable[[], object]) -> dict:
    """Measure counts, memory and times of a call, after a first one."""
    row, gpu, is_captured = {}, table.device.type == "cuda", "captured" in impl
    call()
    if gpu:
        torch.cuda.synchronize()
        # The timing below would reserve more memory.
        row["reserved_gb"] = torch.cuda.max_memory_reserved() / 1e9
        torch.cuda.reset_peak_memory_stats()
    if part in ("step", "two forwards") and not is_captured and "FO" not in impl:
        with Count(table.device) as count:
            call()
        row |= dict(ops=count.ops, syncs=count.syncs)
    elif gpu:
        call()
    if gpu:
        torch.cuda.synchronize()
        if not is_captured:  # a graph allocates only while it is recorded
            row["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        free, total = torch.cuda.mem_get_info()
        row["device_gb"] = (total - free) / 1e9
    return row | table.time(call, kernel=part in ("perturb", "window", "update"))


def print_beyond_floor(impl: str, row: dict, floors: dict[str, dict]) -> None:
    step, floor = row["ms_p50"], floors[floor_of(impl)]["ms_p50"]
    text = f"{step - floor:.3f} ms beyond two forwards, {step / floor:.2f} times them"
    kind = "reserved_gb" if "captured" in impl else "peak_gb"
    if kind in row and "inference" in floors:
        times = row[kind] / floors["inference"][kind]
        text += f", {times:.3f} times the memory of inference"
    print(f"    -> {text}")


def main() -> None:
    p = parser(__doc__)
    p.add_argument(
        "--model", nargs="*", choices=MODELS, help="default: tiny on a CPU, all others on a GPU"
    )
    p.add_argument("--dtype", default="bfloat16")
    p.add_argument("--rows", type=int, default=16)
    p.add_argument("--tokens", type=int, nargs="*", default=[64, 256])
    p.add_argument(
        "--ways", nargs="*", choices=WAYS, default=WAYS, help="beside inference; default: all"
    )
    args = p.parse_args()
    table, all_ran = Table("steps", args, COLUMNS), True
    on_cpu = table.device.type == "cpu"
    # The largest model comes last.
    for name in args.model or (["tiny"] if on_cpu else FITTING):
        all_ran &= measure(table, name, args)
        gc.collect()
        if not on_cpu:
            torch.cuda.empty_cache()
    sys.exit(not all_ran)


if __name__ == "__main__":
    main()
