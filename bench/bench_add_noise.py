"""The noise op on a weight of OPT-1.3B (fc1, 8192 x 2048), beside a copy and beside what MeZO's code does.

python bench/bench_add_noise.py [--threads 1] [--device cpu|cuda] [--dtype float32 ...]
"""

import argparse
from functools import partial

import torch
from harness import QUANTILES, Table

from pseuzo_kernels import NOISES, add_noise, noise, reference, update_

N = 8192 * 2048
LR = 1e-6


def mezo_update(x: torch.Tensor, seeds: list[int], coefs: list[float]) -> None:
    """As MeZO's and PseuZO's code do it: reseed, make the whole perturbation, add it, once per seed."""
    for seed, coef in zip(seeds, coefs, strict=True):
        torch.manual_seed(seed)
        x.add_(torch.normal(mean=0, std=1, size=x.shape, dtype=x.dtype, device=x.device), alpha=-LR * coef)


def passes_per_seed(x: torch.Tensor, seeds: list[int], coefs: list[float], rounding: str) -> None:
    for seed, coef in zip(seeds, coefs, strict=True):
        update_(x, seed, coef, lr=LR, rounding=rounding)


def check(x: torch.Tensor, seeds: list[int], coefs: list[float]) -> None:
    """The first elements of an update equal the reference's, before anything is timed."""
    got, want = x.clone(), x[:20000].cpu()
    update_(got, seeds, coefs, lr=LR)
    reference.update_(want, seeds, coefs, lr=LR)
    assert torch.equal(got[:20000].cpu(), want), "the op differs from the reference"


def measure(table: Table, dtype: torch.dtype, n: int, Ks: list[int], device: torch.device) -> None:
    x, y = torch.randn(n, device=device).to(dtype), torch.empty(n, dtype=dtype, device=device)
    size = x.element_size()

    def row(op, impl, call, K, passes):  # passes over x, of reading or writing
        ms = table.time(call)
        rates = dict(gb_per_s=passes * size * n / ms["ms_p50"] / 1e6, gnormals_per_s=K * n / ms["ms_p50"] / 1e6)
        table.add(op=op, impl=impl, dtype=str(dtype).removeprefix("torch."), n=n, K=K, **ms, **rates)
        return ms["ms_p50"]

    copy = row("copy", "torch copy_", lambda: y.copy_(x), 0, 2)
    row("noise", "torch.randn", lambda: torch.randn(n, dtype=dtype, device=device), 1, 1)
    for kind in NOISES:
        row("noise", f"pseuzo {kind}", partial(noise, (n,), 1, 0, noise=kind, dtype=dtype, device=device), 1, 1)
    perturb = row("perturb", "pseuzo, out of place", lambda: add_noise(x, 1, 1e-3, 0, out=y), 1, 2)
    print(f"    -> perturb: {perturb / copy:.2f} copies")
    rounding = "stochastic" if size == 2 else "nearest"
    for K in Ks:
        seeds, coefs = list(range(K)), [0.5 + 0.1 * k for k in range(K)]
        check(x, seeds, coefs)
        ours = row("update", "pseuzo", partial(update_, x, seeds, coefs, lr=LR, rounding=rounding), K, 2)
        if K <= 14:
            row("update", "pseuzo, a pass per seed", partial(passes_per_seed, x, seeds, coefs, rounding), K, 2 * K)
            mezo = row("update", "MeZO-style torch loop", partial(mezo_update, x, seeds, coefs), K, 4 * K)
            print(f"    -> update K {K}: {mezo / ours:.1f} times faster than the torch loop, {ours / copy:.2f} copies")


def replay(table: Table, dtype: torch.dtype, n: int, K: int, device: torch.device, steps: int = 16) -> None:
    """The same updates one by one and in one pass over the weights, as `pseuzo replay` makes them; ms of all."""
    one, many = (torch.randn(n, generator=torch.Generator().manual_seed(0)).to(device, dtype) for _ in range(2))
    seeds, coefs = torch.arange(steps * K, device=device), torch.linspace(-1, 1, steps * K, device=device) * LR
    rest = ([0.9999] * steps, [1.0] * steps, "hadamard", True, list(range(steps)))

    def one_by_one() -> None:
        for s, (some_seeds, some_coefs) in enumerate(zip(seeds.split(K), coefs.split(K), strict=True)):
            torch.ops.pseuzo.add_noise_list_(
                [one], some_seeds, some_coefs, [0], [0.9999], [1.0], "hadamard", True, s, None
            )

    def together() -> None:
        torch.ops.pseuzo.add_noise_steps_([many], seeds, coefs, [K] * steps, [0], *rest)

    one_by_one(), together()
    assert torch.equal(one, many), "steps in one pass differ from the same steps one by one"
    common = dict(op=f"{steps} updates", dtype=str(dtype).removeprefix("torch."), n=n, K=K)
    for impl, call in (("pseuzo, one by one", one_by_one), ("pseuzo, in one pass", together)):
        table.add(**common, impl=impl, **(ms := table.time(call)), gnormals_per_s=steps * K * n / ms["ms_p50"] / 1e6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="on a CPU")
    parser.add_argument("--dtype", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--n", type=int, default=N)
    parser.add_argument("--K", type=int, nargs="*", default=[1, 4, 14, 64])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    table = Table("add_noise", device, ("op", "impl", "dtype", "n", "K", *QUANTILES, "gb_per_s", "gnormals_per_s"))
    for name in args.dtype:
        measure(table, getattr(torch, name), args.n, args.K, device)
        for K in args.K:
            if K <= 14:
                replay(table, getattr(torch, name), args.n, K, device)


if __name__ == "__main__":
    main()
