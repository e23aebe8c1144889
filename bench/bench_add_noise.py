"""The noise op on a weight of OPT-1.3B (fc1, 8192 x 2048), beside a copy and beside what MeZO's code does.

python bench/bench_add_noise.py [--threads 1] [--device cpu|cuda] [--dtype float32 ...]
"""

import argparse

import torch
from harness import Table

from pseuzo_kernels import add_noise, noise, reference, update_

N = 8192 * 2048
LR = 1e-6


def mezo_update(x: torch.Tensor, seeds: list[int], coefs: list[float]) -> None:
    """As MeZO's and PseuZO's code do it: reseed, make the whole perturbation, add it, once per seed."""
    for seed, coef in zip(seeds, coefs, strict=True):
        torch.manual_seed(seed)
        x.add_(torch.normal(mean=0, std=1, size=x.shape, dtype=x.dtype, device=x.device), alpha=-LR * coef)


def check(x: torch.Tensor, seeds: list[int], coefs: list[float]) -> None:
    """The first elements of an update equal the reference's, before anything is timed."""
    got, want = x.clone(), x[:20000].cpu()
    update_(got, seeds, coefs, lr=LR)
    reference.update_(want, seeds, coefs, lr=LR)
    assert torch.equal(got[:20000].cpu(), want), "the op differs from the reference"


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
    table = Table("add_noise", device)
    for dtype in (getattr(torch, name) for name in args.dtype):
        x, y = torch.randn(args.n, device=device).to(dtype), torch.empty(args.n, dtype=dtype, device=device)
        size, n = x.element_size(), args.n
        common = dict(dtype=dtype, n=n)
        copy = table.measure("copy", "torch copy_", lambda: y.copy_(x), K=0, n_bytes=2 * size * n, normals=0, **common)
        table.measure("noise", "torch.randn", lambda: torch.randn(n, dtype=dtype, device=device), K=1,
                      n_bytes=size * n, normals=n, **common)  # fmt: skip
        for kind in ("hadamard", "rademacher", "normal"):
            table.measure("noise", f"pseuzo {kind}", lambda k=kind: noise((n,), 1, 0, noise=k, dtype=dtype, device=device),
                          K=1, n_bytes=size * n, normals=n, **common)  # fmt: skip
        perturb = table.measure("perturb", "pseuzo, out of place", lambda: add_noise(x, 1, 1e-3, 0, out=y), K=1,
                                n_bytes=2 * size * n, normals=n, **common)  # fmt: skip
        for K in args.K:
            seeds, coefs = list(range(K)), [0.5 + 0.1 * k for k in range(K)]
            check(x, seeds, coefs)
            here = common | dict(K=K, normals=K * n)
            rounding = dict(rounding="stochastic") if size == 2 else {}
            ours = table.measure("update", "pseuzo", lambda: update_(x, seeds, coefs, lr=LR, **rounding),
                                 n_bytes=2 * size * n, **here)  # fmt: skip
            if K > 14:
                continue
            table.measure("update", "pseuzo, a pass per seed", lambda: [update_(x, s, c, lr=LR) for s, c in
                          zip(seeds, coefs, strict=True)], n_bytes=2 * size * n * K, **here)  # fmt: skip
            mezo = table.measure("update", "MeZO-style torch loop", lambda: mezo_update(x, seeds, coefs),
                                 n_bytes=4 * size * n * K, **here)  # fmt: skip
            print(f"    -> update K {K}: {mezo / ours:.1f} times faster than the torch loop, {ours / copy:.2f} copies")
        print(f"    -> perturb: {perturb / copy:.2f} copies")


if __name__ == "__main__":
    main()
