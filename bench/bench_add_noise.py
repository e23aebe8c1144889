"""Times the noise op, Adam's update and the window on a weight of OPT-1.3B, beside copies and the
code of MeZO.

python bench/bench_add_noise.py [--threads 1] [--device cpu|cuda] [--dtype float32 ...] [--compile]
    [--check|--no-check]

The weight is that of fc1, 8192 x 2048. On a GPU it is 16 times as large, so that it fits no cache,
and our own ops are recorded as CUDA graphs, so that the GPU alone is timed. pct_of_copy: GB/s over
those of copy_ in the same run, for the bytes that a way has to move. pct_of_predicted: the ms that
predict.py expects for our update on this GPU, from the instructions and bytes that sass_cost.py
counted, over the measured ms. --compile adds MeZO's loop under torch.compile.

Results are checked before they are timed, unless --no-check is given: ours must have the bits of
the reference, and ways with another kind of noise must add noise of the same mean and variance.
--check does only that; with TRITON_INTERPRET=1 it checks the Triton kernels, on a CPU, in Triton's
interpreter.
"""

import json
import os
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import torch
from harness import HERE, QUANTILES, Table, parser
from torch import Tensor

from pseuzo_kernels import (
    NOISES,
    EmaWindow,
    adam,
    adam_update_,
    add_noise,
    noise,
    ops,
    perturb_,
    reference,
    update_,
)
from pseuzo_kernels.api import NoiseApi
from pseuzo_kernels.bench.limits import chip_named
from pseuzo_kernels.bench.ways import EPS, LR, coefs_of, torch_loop

N = 8192 * 2048
# Ways with a pass per seed are timed with at most this many seeds, since more would take minutes.
SEVERAL = {"cpu": 14, "cuda": 64}
UPDATE_NOISES = [kind for kind in NOISES if kind.startswith("hadamard")]
WINDOW_SHAPES = ((16, 1, 2048), (16, 8, 2048), (16, 1, 5120))  # rows, positions with a loss, width
COLUMNS = (
    "op", "impl", "dtype", "n", "K", *QUANTILES, "gb_per_s", "gnormals_per_s", "shape",
    "pct_of_copy", "pct_of_predicted",
)  # fmt: skip

OPS = SimpleNamespace(add_noise=add_noise, noise=noise, perturb_=perturb_, update_=update_)
ADAM = adam_update_
if os.environ.get("TRITON_INTERPRET") == "1":
    from pseuzo_kernels.triton import adam as triton_adam
    from pseuzo_kernels.triton import launch

    ADAM = adam.AdamApi(triton_adam.adam_list_triton_, ops.adam_parts_).adam_update_
    OPS = NoiseApi(launch.add_noise_list_triton_, launch.add_noise_list_out_triton)


@torch.compile(dynamic=False)
def add_randn(x: Tensor, coef: Tensor) -> None:
    x.add_(torch.randn_like(x) * coef)


def compiled_loop(x: Tensor, seeds: list[int], coefs: list[float], lr: float) -> None:
    """Run torch_loop with noise and sum fused by torch.compile. Reseeding, which cannot be
    compiled, stays outside."""
    alphas = torch.tensor([-lr * coef for coef in coefs], dtype=x.dtype, device=x.device).unbind()
    for seed, alpha in zip(seeds, alphas, strict=True):
        torch.manual_seed(seed)
        add_randn(x, alpha)


def pass_per_seed(x: Tensor, seeds: list[int], coefs: list[float], lr: float) -> None:
    for seed, coef in zip(seeds, coefs, strict=True):
        OPS.update_(x, seed, coef, lr=lr, rounding=rounding_of(x), rounding_seed=seed)


# way: (function, how often it reads or writes x for each seed)
LOOPS = {"pseuzo, a pass per seed": (pass_per_seed, 2), "MeZO-style torch loop": (torch_loop, 4)}
COMPILED = "MeZO-style, torch.compile"


def rounding_of(x: Tensor) -> str:
    return "nearest" if x.dtype is torch.float32 else "stochastic"


def check(dtype: torch.dtype, Ks: list[int], device: torch.device, n: int = 20000) -> None:
    """Check that noise, perturb and update have the reference's bits. "normal" noise may differ by
    the errors of fast logarithms and sines."""
    host = torch.randn(n, generator=torch.Generator().manual_seed(0)).to(dtype)
    x = host.to(device)
    for kind in NOISES:
        got = OPS.noise((n,), 1, 0, noise=kind, dtype=dtype, device=device).cpu()
        want = reference.noise((n,), 1, 0, noise=kind, dtype=dtype)
        if kind == "normal":
            torch.testing.assert_close(got, want, rtol=torch.finfo(dtype).eps, atol=5e-5)
        else:
            assert torch.equal(got, want), f"{kind} noise differs from the reference"
    out = torch.empty_like(x)
    OPS.add_noise(x, 1, EPS, 0, out=out)
    want = reference.add_noise(host, 1, EPS, 0)
    assert torch.equal(out.cpu(), want), "perturb differs from the reference"
    OPS.perturb_(out.copy_(x), 1, EPS)
    assert torch.equal(out.cpu(), want), "perturb in place differs from the reference"
    for K in Ks:
        for kind in UPDATE_NOISES:
            args = dict(lr=0.1, noise=kind, rounding=rounding_of(x), rounding_seed=3)
            OPS.update_(got := x.clone(), list(range(K)), coefs_of(K), **args)
            reference.update_(want := host.clone(), list(range(K)), coefs_of(K), **args)
            same = torch.equal(got.cpu(), want)
            assert same, f"update, K = {K}, {kind}: differs from the reference"
    for K in (K for K in Ks if K <= 14):  # the reference is slow
        args = dict(lr=0.1, rounding=rounding_of(x), rounding_seed=3)
        ADAM(got := x.clone(), list(range(K)), coefs_of(K), **args)
        adam.adam_update_(want := host.clone(), list(range(K)), coefs_of(K), **args)
        assert torch.equal(got.cpu(), want), f"adam, K = {K}: differs from the reference"


def check_law(loop: Callable, K: int, dtype: torch.dtype, n: int, device: torch.device) -> None:
    """Check that the loop adds noise of mean 0 and the standard deviation of sum_k coefs[k] z_k, up
    to six sigma and roundings."""
    x = torch.zeros(n, dtype=dtype, device=device)
    loop(x, list(range(K)), coefs_of(K), 1.0)
    x, size = x.float(), torch.tensor(coefs_of(K)).norm().item()
    assert abs(x.mean().item()) < 6 * size / n**0.5, "the mean of the noise is not 0"
    far = abs(x.std().item() / size - 1)
    assert far < 0.02 + 6 / (2 * n) ** 0.5, "the variance differs from that of the other ways"


def check_compiled(dtype: torch.dtype, n: int, device: torch.device) -> None:
    """Check that the compiled loop, with torch's own generator inside, adds the same numbers as the
    loop."""
    got, want = (torch.ones(n, dtype=dtype, device=device) for _ in range(2))
    with torch._inductor.config.patch(fallback_random=True):
        torch.compiler.reset()
        compiled_loop(got, [1, 2], [0.5, 1.0], 0.1)
    torch.compiler.reset()
    torch_loop(want, [1, 2], [0.5, 1.0], 0.1)
    eps = torch.finfo(dtype).eps  # the product may be rounded; sums are below 2
    torch.testing.assert_close(got, want, rtol=2 * eps, atol=2 * eps)


def predicted_ms(device: str, dtype: torch.dtype, kind: str, n: int, K: int) -> float | None:
    """Return the ms that predict.py expects for an update of n elements, or None for a device or a
    kernel that is not in its tables."""
    chip = chip_named(device)
    name = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    stochastic = "" if dtype is torch.float32 else " stochastic"
    kernel = f"add_noise_many_kernel {kind} {name}{stochastic}"
    costs = json.loads((HERE / "results/sass.json").read_text()) if chip else []
    for c in costs:
        if c["arch"] == chip.arch and c["kernel"] == kernel:
            instructions = K * c["cycles_per_normal"] + c["around_per_normal"]
            return chip.ms(n * instructions, 2 * n * dtype.itemsize)[0]
    return None


def measure(
    table: Table, dtype: torch.dtype, n: int, Ks: list[int], compiled: bool, checked: bool
) -> None:
    """Measure all ways. checked: first compare the ways with each other."""
    device, loops = table.device, LOOPS | ({COMPILED: (compiled_loop, 2)} if compiled else {})
    x, y = torch.randn(n, device=device).to(dtype), torch.empty(n, dtype=dtype, device=device)
    size, copied = x.element_size(), None

    def row(op, impl, call, K, passes, kind=None):
        """Add a row. passes: how often x is read or written; kind: the noise of our update."""
        ms = table.time(call, kernel=impl.startswith("pseuzo"))
        rates = dict(gb_per_s=passes * size * n / ms["ms_p50"] / 1e6)
        rates["gnormals_per_s"] = K * n / ms["ms_p50"] / 1e6
        if copied:
            rates["pct_of_copy"] = 100 * rates["gb_per_s"] / copied
        if kind and (predicted := predicted_ms(table.common["device"], dtype, kind, n, K)):
            rates["pct_of_predicted"] = 100 * predicted / ms["ms_p50"]
        table.add(op=op, impl=impl, dtype=str(dtype)[6:], n=n, K=K, **ms, **rates)
        return ms["ms_p50"]

    copy = row("copy", "torch copy_", lambda: y.copy_(x), 0, 2)
    copied = 2 * size * n / copy / 1e6
    row("noise", "torch.randn", lambda: torch.randn(n, dtype=dtype, device=device), 1, 1)
    for kind in NOISES:
        call = partial(OPS.noise, (n,), 1, 0, noise=kind, dtype=dtype, device=device)
        row("noise", f"pseuzo {kind}", call, 1, 1)
    call = partial(OPS.add_noise, x, 1, EPS, 0, out=y)
    perturb = row("perturb", "pseuzo, out of place", call, 1, 2)
    print(f"    -> perturb: {perturb / copy:.2f} copies")
    row("perturb", "pseuzo, in place", lambda: OPS.perturb_(y, 1, EPS), 1, 2)
    if compiled and checked:
        check_compiled(dtype, n, device)
    for K in Ks:
        seeds, coefs, took = list(range(K)), coefs_of(K), {}
        on_device = torch.tensor(seeds, device=device), torch.tensor(coefs, device=device)
        for kind in UPDATE_NOISES:
            impl = "pseuzo" if kind == "hadamard" else f"pseuzo {kind}"
            args = dict(lr=LR, noise=kind, rounding=rounding_of(x), rounding_seed=3)
            call = partial(OPS.update_, x, *on_device, **args)
            took[impl] = row("update", impl, call, K, 2, kind)
        args = dict(lr=LR, rounding=rounding_of(x), rounding_seed=3)
        moments = row("adam", "pseuzo", partial(ADAM, x, *on_device, **args), K, 2)
        print(f"    -> adam K {K}: {moments / took['pseuzo']:.2f} updates")
        for impl, (loop, passes) in loops.items():
            slow = device.type == "cpu" and loop is compiled_loop and K > 1
            if slow or K > SEVERAL[device.type]:
                continue
            if checked:
                check_law(loop, K, dtype, n, device)
            took[impl] = row("update", impl, partial(loop, x, seeds, coefs, LR), K, passes * K)
        ours = took["pseuzo"]
        times = [f"{took[impl] / ours:.1f} times {impl}" for impl in loops if impl in took]
        print(f"    -> update K {K}: {ours / copy:.2f} copies; {', '.join(times)}")


def check_window(
    shape: tuple[int, int, int], dtype: torch.dtype, K: int, groups, device: torch.device
) -> None:
    """Check that seeds are the reference's, and coefs too, up to the errors of fp32 sums of such
    terms."""
    draw = torch.Generator().manual_seed(0)
    got = EmaWindow(K, eps=EPS)
    want, sizes = (reference.EmaWindow(K, eps=EPS) for _ in range(2))
    for seed in range(K + 2):
        o0, o1, e = (torch.randn(shape, generator=draw).to(dtype) for _ in range(3))
        seeds, coefs = got.step(seed, o0.to(device), o1.to(device), e.to(device), groups)
        on_cpu = groups if groups is None else groups.cpu()
        want_seeds, want_coefs = want.step(seed, o0, o1, e, on_cpu)
        size = sizes.step(seed, None, (o1.float() - o0.float()).abs(), e.abs(), on_cpu)[1]
        same = torch.equal(seeds.cpu(), want_seeds)
        assert same, "the window's seeds differ from the reference's"
        # A thread adds 4 columns of each row, then rows. An old entry is a mean of rows. The
        # product and the result are each rounded once more.
        far = (coefs.cpu() - want_coefs).abs() > (5 * shape[0] + 41) * 2**-24 * size
        assert not far.any(), "the window's coefs differ from the reference's"


def measure_window(table: Table, dtype: torch.dtype, checked: bool, K: int = 14) -> None:
    """Measure a step of a full window, push and project, with rows paired by number or pooled by
    label."""
    for shape in WINDOW_SHAPES:
        n, rows = shape[0] * shape[1] * shape[2], shape[0]
        o0, o1, e = (torch.randn(shape, device=table.device).to(dtype) for _ in range(3))
        labels = torch.arange(rows, device=table.device) % 2
        for impl, groups in (("rows", None), ("labels", labels)):
            if checked:
                check_window(shape, dtype, K, groups, table.device)
            window = EmaWindow(K, eps=EPS)
            for seed in range(K):
                window.step(seed, o0, o1, e, groups)
            # This is the number of floats in an entry. K - 1 entries are read, and one is written.
            kept = n if groups is None else n * 2 // rows
            moved = 3 * n * o0.element_size() + 4 * K * kept
            options = dict(dtype=torch.uint8, device=table.device)
            a, b = (torch.empty(moved // 2, **options) for _ in range(2))
            copy = table.time(partial(b.copy_, a), kernel=True)
            ms = table.time(partial(window.step, K, o0, o1, e, groups), kernel=True)
            common = dict(op="window", dtype=str(dtype)[6:], n=n, K=K)
            common["shape"] = "x".join(map(str, shape))
            copied, stepped = (moved / took["ms_p50"] / 1e6 for took in (copy, ms))
            name = f"torch copy_ of the bytes of {impl}"
            table.add(**common, impl=name, **copy, gb_per_s=copied)
            rates = dict(gb_per_s=stepped, pct_of_copy=100 * copy["ms_p50"] / ms["ms_p50"])
            table.add(**common, impl=f"pseuzo, {impl}", **ms, **rates)


def replay(table: Table, dtype: torch.dtype, n: int, K: int, steps: int = 16) -> None:
    """Measure updates made one by one, and all in one pass over the weights, as by `pseuzo
    replay`."""
    device = table.device
    one = torch.randn(n, device=device, generator=torch.Generator(device).manual_seed(0)).to(dtype)
    many = one.clone()
    seeds = torch.arange(steps * K, device=device)
    coefs = torch.linspace(-1, 1, steps * K, device=device) * LR
    rest = ([0.9999] * steps, [1.0] * steps, "hadamard", True, list(range(steps)))

    def one_by_one() -> None:
        pairs = zip(seeds.split(K), coefs.split(K), strict=True)
        for step, (some_seeds, some_coefs) in enumerate(pairs):
            arguments = ([0], [0.9999], [1.0], "hadamard", True, step, None)
            ops.add_noise_list_([one], some_seeds, some_coefs, *arguments)

    def together() -> None:
        ops.add_noise_steps_([many], seeds, coefs, [K] * steps, [0], *rest)

    one_by_one(), together()
    assert torch.equal(one, many), "steps in one pass differ from the same steps one by one"
    common = dict(op=f"{steps} updates", dtype=str(dtype)[6:], n=n, K=K)
    for impl, call in (("pseuzo, one by one", one_by_one), ("pseuzo, in one pass", together)):
        ms = table.time(call)
        rate = steps * K * n / ms["ms_p50"] / 1e6
        table.add(**common, impl=impl, **ms, gnormals_per_s=rate)


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--dtype", nargs="*", default=["float32", "bfloat16"])
    p.add_argument(
        "--n", type=int, help="elements; default: those of fc1, on a GPU 16 times as many"
    )
    p.add_argument("--K", type=int, nargs="*", help="default: 1 4 14 64; on a GPU also 1000")
    p.add_argument(
        "--compile", action="store_true", help="time MeZO's loop under torch.compile, too"
    )
    p.add_argument("--check", action="store_true", help="check that all agree, and time nothing")
    args = p.parse_args()
    device = torch.device(args.device)
    if isinstance(OPS, NoiseApi) and not args.check:
        p.error(
            "Triton's interpreter is for --check: what it would measure says nothing; "
            "unset TRITON_INTERPRET"
        )
    Ks = args.K or [1, 4, 14, 64, *[1000] * (device.type == "cuda")]
    n = args.n or N * (16 if device.type == "cuda" else 1)
    dtypes = [getattr(torch, name) for name in args.dtype]
    for dtype in dtypes if args.check or not args.no_check else ():
        check(dtype, Ks, device, min(n, 20000))
    if args.check:
        checked = "the Triton kernels" if isinstance(OPS, NoiseApi) else "the ops"
        print(f"{checked} agree with the reference")
        return
    table = Table("add_noise", args, COLUMNS)
    for dtype in dtypes:
        measure(table, dtype, n, Ks, args.compile, not args.no_check)
        measure_window(table, dtype, not args.no_check)
        for K in Ks:
            if K <= 14:
                replay(table, dtype, n, K)


if __name__ == "__main__":
    main()
