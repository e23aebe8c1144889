"""Predicts the memory and the time of a step of offloaded OPT models, without loading one.

python bench/offload_plan.py [--rows 16] [--tokens 256] [--gb-per-s 25] [--cores 32]
    [--host-gb-per-s 200]

Memory: `device_bytes` of the model on the meta device, and the activations that its forward makes
there, counted op by op. On that device attention is the plain one, which keeps its scores; fused
kernels take less. Time, in seconds a step: the largest of the upload of all weights at --gb-per-s,
the passes at half of the data sheet's rate of an H100, and the update on --cores cores, each as
fast as this one (measured here, bf16), or at --host-gb-per-s. Two layers more of the largest are
the start of the pipeline.
"""

import argparse
import time
import weakref

import torch
from harness import MODELS
from opt_models import make_model
from pseuzo import device_bytes
from pseuzo.perturb.regions import Regions, find_layers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pseuzo_kernels.bench.limits import CHIPS, MATRIX
from pseuzo_kernels.ops import add_noise_list_

META = torch.device("meta")
GPU = next(chip for chip in CHIPS if chip.name == "H100 SXM")
COLUMNS = (
    "model", "host GB", "buffers GB", "activations GB", "upload s", "passes s", "MeZO update s",
    "MeZO step s", "PseuZO update s", "PseuZO step s",
)  # fmt: skip


class Live(TorchDispatchMode):
    """The bytes of the tensors that ops have made and that are still referred to, and their
    peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, Tensor):
                self._known.add(x.untyped_storage())
        found = func(*args, **(kwargs or {}))
        for x in tree_leaves(found):
            if isinstance(x, Tensor) and (storage := x.untyped_storage()) not in self._known:
                self._known.add(storage)
                weakref.finalize(storage, self._free, storage.nbytes())
                self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        return found

    def _free(self, n_bytes: int) -> None:
        self.now -= n_bytes


def activations(model: nn.Module, rows: int, tokens: int, passes: int) -> int:
    """The bytes of a step's activations: those of one pass while it runs, and what the others hold,
    which wait between two layers. model: on the meta device, or on any other."""
    ids = torch.zeros(rows, tokens, dtype=torch.long, device=model.lm_head.weight.device)
    held: list[int] = []
    live = Live()
    hooks = [
        layer.register_forward_pre_hook(lambda *ignored: held.append(live.now))
        for layer in find_layers(model)[1]
    ]
    with torch.no_grad(), live:
        model.model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return live.peak + (passes - 1) * max(held)


def update_rate(terms: int, seconds: float = 1.0) -> float:
    """Weights that an update with so many seeds makes in a second of one core, bf16, rounded
    stochastically."""
    x = torch.randn(1 << 22, dtype=torch.bfloat16)
    at = torch.arange(terms), torch.full((terms,), 1e-6), [0], [1.0], [1.0], "hadamard"
    best = float("inf")
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.process_time()  # other processes may use the core meanwhile
        add_noise_list_([x], *at, True, 1, None)
        best = min(best, time.process_time() - start)
    return x.numel() / best


def plan(name: str, args: argparse.Namespace, rates: dict[str, float]) -> dict[str, object]:
    """The row of a model."""
    model = make_model(name, torch.bfloat16, META)
    n = sum(p.numel() for p in model.parameters())
    layers, width, *_ = MODELS[name]
    tokens = args.rows * args.tokens
    flops = 2 * (2 * n * tokens + 4 * layers * width * tokens * args.tokens)  # of two passes
    upload, passes = 2 * n / args.gb_per_s / 1e9, flops / (MATRIX * GPU.teraflops * 1e12)
    start = 1 + 2 * Regions(model).largest() / (2 * n)  # two stages of one region
    row: dict[str, object] = {
        "model": name,
        "host GB": 2 * n / 1e9,
        "buffers GB": device_bytes(model) / 1e9,
        "activations GB": activations(model, args.rows, args.tokens, 2) / 1e9,
        "upload s": upload,
        "passes s": passes,
    }
    for method, rate in rates.items():
        read_and_written = 4 * n / args.host_gb_per_s / 1e9
        row[f"{method} update s"] = update = max(n / (rate * args.cores), read_and_written)
        row[f"{method} step s"] = start * max(upload, passes, update)
    return row


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--models", nargs="+", default=["opt-13b", "opt-30b", "opt-66b", "opt-175b"])
    p.add_argument("--rows", type=int, default=16)
    p.add_argument("--tokens", type=int, default=256)
    p.add_argument("--gb-per-s", type=float, default=25.0, help="of the link to the GPU")
    p.add_argument("--host-gb-per-s", type=float, default=200.0, help="of the host's memory")
    p.add_argument("--cores", type=int, default=32, help="of the host")
    args = p.parse_args()
    torch.set_num_threads(1)
    rates = {"MeZO": update_rate(1), "PseuZO": update_rate(14)}
    for method, rate in rates.items():
        print(f"{method}: {rate / 1e9:.2f} billion weights a second and core, measured here")
    print(f"\n| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for name in args.models:
        cells = (x if isinstance(x, str) else f"{x:.3g}" for x in plan(name, args, rates).values())
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
