"""Times steps of an OPT model that is offloaded to the host beside the same steps with its weights
on the GPU, and compares their bits.

python bench/bench_offload.py [--model opt-13b] [--rows 16] [--tokens 256] [--steps 4]
    [--dtype bfloat16] [--device cuda|cpu]

Both make the same steps of MeZO and PseuZO from the same weights; same_bits says whether all losses
and all weights are equal, and the exit code is 1 if they are not. peak_gb: the most memory that
torch allocated on the GPU. uploaded_gb: what a step copies to it. "copy of a layer" and "update of
a layer" are the two other stages of the pipeline by themselves, on one region's weights.
"""

import gc
import sys
import time

import torch
from harness import MODELS, Table, parser
from opt_models import LABEL_WORDS, make_batch, make_model
from pseuzo import CausalLMObjective, MeZO, PseuZO, offload
from pseuzo.machine import peak_memory, reset_peak
from pseuzo.perturb.offload import flush
from pseuzo.perturb.regions import DeviceMemory
from torch import Tensor, nn

from pseuzo_kernels.bench.timing import quantile
from pseuzo_kernels.ops import add_noise_list_

COLUMNS = (
    "model", "params", "dtype", "rows", "tokens", "method", "impl", "ms", "peak_gb", "uploaded_gb",
    "gb_per_s", "same_bits",
)  # fmt: skip
CHUNK = 1 << 24
METHODS = {"MeZO": MeZO, "PseuZO": PseuZO}


def on_host(model: nn.Module, name: str, dtype: torch.dtype) -> nn.Module:
    """A copy of a model in host memory, without a second copy on the way."""
    copy = make_model(name, dtype, torch.device("meta")).to_empty(device="cpu")
    copy.tie_weights()
    with torch.no_grad():
        for x, y in zip(copy.parameters(), model.parameters(), strict=True):
            x.copy_(y)
        for x, y in zip(copy.buffers(), model.buffers(), strict=True):
            x.copy_(y)
    return copy.eval()


def sums(model: nn.Module, device: torch.device) -> list[int]:
    """A number for each weight, which depends on all its bits and their order."""
    flush(model)
    found, factors = [], torch.arange(CHUNK, device=device) % 8191 + 1
    for p in model.parameters():
        total = 0
        for part in p.detach().flatten().split(CHUNK):
            bits = part.to(device).view(torch.uint8).view(len(part), -1).long()
            total = total * 31 + int((bits.sum(1) * factors[: len(part)]).sum()) + int(bits.sum())
        found.append(total % 2**61)
    return found


def steps(
    table: Table,
    model: nn.Module,
    batch: dict[str, Tensor],
    count: int,
    common: dict,
    memory: DeviceMemory | None = None,
) -> dict[str, dict]:
    """Make steps of each method. Return its row, with the losses."""
    objective, rows = CausalLMObjective(model, LABEL_WORDS), {}
    forward, head = objective(batch)
    for method, make in METHODS.items():
        optimizer, losses, times = make(model, lr=1e-7, eps=1e-3), [], []
        before = memory.uploaded if memory is not None else 0
        reset_peak(table.device)
        for _ in range(count):
            start = time.perf_counter()
            loss = (
                optimizer.step(forward, head)
                if method == "PseuZO"
                else optimizer.step(lambda: head(forward()))
            )
            losses.append(loss.item())  # waits for the device
            times.append(time.perf_counter() - start)
        row = dict(ms=1e3 * quantile(times, 0.5))
        if memory is not None:
            row["uploaded_gb"] = (memory.uploaded - before) / count / 1e9
        if table.device.type == "cuda":
            row["peak_gb"] = peak_memory(table.device) * 2**20 / 1e9
        rows[method] = common | row | {"method": method, "losses": losses}
    return rows


def stages(table: Table, model: nn.Module, common: dict) -> None:
    """Time the copy and the update of one layer by themselves."""
    layer = [p.detach() for p in model.model.decoder.layers[0].parameters()]
    parts = [torch.empty_like(x, device=table.device) for x in layer]
    n_bytes = sum(x.nbytes for x in layer)

    def copy() -> None:
        for part, x in zip(parts, layer, strict=True):
            part.copy_(x, non_blocking=True)

    def update() -> None:
        at = torch.zeros(1, dtype=torch.int64), torch.zeros(1), list(range(len(layer)))
        ones = [1.0] * len(layer)
        add_noise_list_(layer, *at, ones, ones, "hadamard", True, 1, None)

    timed = table.time(copy)["ms_p50"]
    table.add(**common, impl="copy of a layer", ms=timed, gb_per_s=n_bytes / timed / 1e6)
    update()
    start = time.perf_counter()
    update()
    ms = 1e3 * (time.perf_counter() - start)
    table.add(**common, impl="update of a layer", ms=ms, gb_per_s=2 * n_bytes / ms / 1e6)


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--model", choices=MODELS, help="default: tiny on a CPU, opt-13b on a GPU")
    p.add_argument("--dtype", default="bfloat16")
    p.add_argument("--rows", type=int, default=16)
    p.add_argument("--tokens", type=int, default=256)
    p.add_argument("--steps", type=int, default=4)
    args = p.parse_args()
    table, dtype = Table("offload", args, COLUMNS), getattr(torch, args.dtype)
    name = args.model or ("tiny" if table.device.type == "cpu" else "opt-13b")
    model = make_model(name, dtype, table.device)
    n = sum(p.numel() for p in model.parameters())
    common = dict(model=name, params=n, dtype=args.dtype, rows=args.rows, tokens=args.tokens)
    host = on_host(model, name, dtype)
    batch = make_batch(model, args.rows, args.tokens)
    resident = steps(table, model, batch, args.steps, common)
    bits = sums(model, table.device)
    for row in resident.values():
        table.add(**{k: x for k, x in row.items() if k != "losses"}, impl="resident")
    del model
    gc.collect()
    if table.device.type == "cuda":
        torch.cuda.empty_cache()
    memory = DeviceMemory(table.device)
    offload(host, table.device, memory=memory)
    offloaded = steps(table, host, batch, args.steps, common, memory)
    same = sums(host, table.device) == bits
    for method, row in offloaded.items():
        losses = row.pop("losses")
        same &= losses == resident[method]["losses"]
        table.add(**row, impl="offloaded", same_bits=str(same))
    stages(table, host, common)
    sys.exit(not same)


if __name__ == "__main__":
    main()
