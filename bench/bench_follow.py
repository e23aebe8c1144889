"""Times the steps that a resumed run makes again from its journal, beside the steps of training.

    python bench/bench_follow.py

Prints steps per second, by model and method: of training, and of following, where an update is all
that a step takes. On a CPU, seconds are those of one core, which other processes do not change. OPT
is at random initialisation.
"""

import copy
import sys
import tempfile
import time
from pathlib import Path

import torch
from harness import parser
from opt_models import LABEL_WORDS, make_batch, make_model
from pseuzo import CausalLMObjective, Journal, MeZO, PseuZO
from pseuzo.cli.run import model_path
from pseuzo.models.loading import DTYPES, load_model

METHODS = {"mezo": MeZO, "pseuzo": PseuZO}


def steps_per_second(opt, batch, steps: int) -> float:
    forward, head = CausalLMObjective(opt.model, LABEL_WORDS)(batch)
    clock = time.process_time if opt.device.type == "cpu" else time.perf_counter
    began = clock()
    for _ in range(steps):
        if isinstance(opt, PseuZO):
            opt.step(forward, head, groups=batch["labels"])
        else:
            opt.step(lambda: head(forward()))
    return steps / (clock() - began)


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--models", default="demo,opt-125m")
    p.add_argument("--steps", type=int, default=40, help="of training; a quarter of opt-125m's")
    p.add_argument("--rows", type=int, default=16)
    p.add_argument("--tokens", type=int, default=64)
    p.add_argument("--dtype", default="fp32", choices=DTYPES)
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    device, dtype = torch.device(args.device), DTYPES[args.dtype]
    print(f"{'model':12}{'method':10}{'training':>14}{'following':>14}   steps per second")
    for name in args.models.split(","):
        if name == "demo":
            base = load_model(model_path("demo"), dtype=args.dtype, device=str(device))[0]
        else:
            base = make_model(name, dtype, device)
        steps = args.steps if name == "demo" else max(4, args.steps // 4)
        batch = make_batch(base, args.rows, args.tokens)
        for method, make in METHODS.items():
            model, path = copy.deepcopy(base), Path(tempfile.mkdtemp()) / "run.pzj"
            with Journal(path, opt := make(model)):
                trains = steps_per_second(opt, batch, steps)
            again = copy.deepcopy(base)
            with Journal(path, opt := make(again), follow=True):
                opt.followed.history = 0  # the last steps of PseuZO would run their passes
                follows = steps_per_second(opt, batch, steps)
            if not all(map(torch.equal, model.parameters(), again.parameters())):
                sys.exit(f"{name}, {method}: the weights differ from those of the run")
            print(f"{name:12}{method:10}{trains:14.2f}{follows:14.2f}", flush=True)


if __name__ == "__main__":
    main()
