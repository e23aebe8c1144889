"""How time grows: with the parameters and with K (one update), with the tokens (one training step).

python bench/bench_growth.py [--device cpu|cuda] [--max 28] [--model opt-1.3b]
"""

import argparse
from functools import partial

import torch
from bench_steps import EPS, LABEL_WORDS, LR, MODELS, WINDOW, make_batch, make_model
from harness import QUANTILES, Table
from pseuzo import CausalLMObjective, PseuZO

from pseuzo_kernels import reference, update_


def check(device: torch.device) -> None:
    x = torch.randn(9000, device=device)
    want = x.cpu()
    update_(x, [1, 2, 3], [0.5, -0.25, 2.0], lr=0.1)
    reference.update_(want, [1, 2, 3], [0.5, -0.25, 2.0], lr=0.1)
    assert torch.equal(x.cpu(), want), "the op differs from the reference"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--max", type=int, help="log2 of the most parameters: 24 on a CPU, 30 on a GPU")
    parser.add_argument("--model", choices=MODELS, help="tiny on a CPU, opt-1.3b on a GPU")
    parser.add_argument("--tokens", type=int, nargs="*", default=[16, 32, 64, 128, 256, 512])
    parser.add_argument("--threads", type=int, default=1, help="on a CPU")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    small = device.type == "cpu"
    most = args.max or (24 if small else 30)
    check(device)
    table = Table("growth", device, ("against", "x", "what", *QUANTILES))

    def update(n: int, K: int, against: str) -> None:
        x = torch.randn(n, device=device).to(torch.bfloat16)
        seeds, coefs = torch.arange(K, device=device), torch.ones(K, device=device)
        call = partial(update_, x, seeds, coefs, lr=LR, rounding="stochastic")
        fixed = f"K = {K}" if against == "parameters" else f"{n} parameters"
        table.add(
            against=against, x=n if against == "parameters" else K, what=f"update, bf16, {fixed}", **table.time(call)
        )

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
        table.add(**common, what=f"{name}, two forwards", **table.time(two_forwards))
        table.add(**common, what=f"{name}, step", **table.time(partial(opt.step, forward, head, groups)))


if __name__ == "__main__":
    main()
