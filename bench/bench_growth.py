"""Measures how the time of an update grows with parameters and K, and a step's with tokens.

python bench/bench_growth.py [--device cpu|cuda] [--max 28] [--model opt-1.3b]
"""

from functools import partial

import torch
from harness import MODELS, QUANTILES, Table, fits, parser
from opt_models import LABEL_WORDS, make_batch, make_model
from pseuzo import CausalLMObjective, PseuZO
from published import EPS, LR, WINDOW

from pseuzo_kernels import reference, update_


def check(device: torch.device) -> None:
    x = torch.randn(9000, device=device)
    want = x.cpu()
    update_(x, [1, 2, 3], [0.5, -0.25, 2.0], lr=0.1)
    reference.update_(want, [1, 2, 3], [0.5, -0.25, 2.0], lr=0.1)
    assert torch.equal(x.cpu(), want), "the op differs from the reference"


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--max", type=int, help="log2 of the most parameters: 24 on a CPU, 30 on a GPU")
    p.add_argument("--model", choices=MODELS, help="tiny on a CPU, opt-1.3b on a GPU")
    p.add_argument("--tokens", type=int, nargs="*", default=[16, 32, 64, 128, 256, 512])
    args = p.parse_args()
    table = Table("growth", args, ("against", "x", "what", *QUANTILES))
    device, small, points = table.device, table.device.type == "cpu", []
    most = args.max or (24 if small else 30)
    if not args.no_check:
        check(device)

    def row(call, **where) -> None:
        ms = table.time(call)
        table.add(**where, **ms)
        points.append(where | ms)

    def update(n: int, K: int, against: str) -> None:
        x = torch.randn(n, device=device).to(torch.bfloat16)
        seeds, coefs = torch.arange(K, device=device), torch.ones(K, device=device)
        call = partial(update_, x, seeds, coefs, lr=LR, rounding="stochastic", rounding_seed=3)
        x, fixed = (n, f"K = {K}") if against == "parameters" else (K, f"{n} parameters")
        row(call, against=against, x=x, what=f"update, bf16, {fixed}")

    for log2 in range(most - 8, most + 1, 2):
        for K in (1, WINDOW):
            update(1 << log2, K, "parameters")
    for K in (1, 2, 4, 8, 14, 32, 64, 256, 1000):
        update(1 << (most - 4), K, "K")

    name = args.model or ("tiny" if small else "opt-1.3b")
    model = make_model(name, torch.bfloat16, device)
    for tokens in args.tokens:
        batch = make_batch(model, 16, tokens)
        forward, head = CausalLMObjective(model, LABEL_WORDS)(batch)
        opt, groups = PseuZO(model, LR, EPS, WINDOW), batch["labels"].cpu()
        for _ in range(WINDOW):
            opt.step(forward, head, groups=groups)

        def two_forwards(forward=forward, head=head) -> None:
            with torch.no_grad():
                head(forward()), head(forward())

        common = dict(against="tokens", x=16 * tokens)
        row(two_forwards, **common, what=f"{name}, two forwards")
        row(partial(opt.step, forward, head, groups), **common, what=f"{name}, step")
    for (against, what), (a, b) in fits(points).items():
        print(f"  {what}: {a:.4g} ms + {b:.4g} ms a unit of {against}")


if __name__ == "__main__":
    main()
