"""Measures a step of each method: its time beyond its forward passes, its memory beyond inference.

python bench/bench_methods.py [--model opt-125m] [--method pseuzo mezo ...] [--mode full lora ...]
    [--rows 4] [--tokens 32] [--dtype float32] [--device cuda|cpu] [--set directions=4 ...]

Each method runs as in PseuZOTrainer, with its defaults, on an OPT model at random initialisation.
In the same run, forward passes without gradients are timed between the steps. "beyond" is the
median step less the method's forward passes per step, each at the median time of a forward pass. A
backward pass counts as two. If steps differ, so that the passes per step are a fraction, the mean
step is taken.

peak_mb: the most memory that torch allocated at one time, from the creation of the optimizer to the
end of some steps, less the memory of a forward pass. kept_mb: the part that is still held between
steps. On a CPU torch's profiler counts both, on a GPU torch's allocator.
"""

import argparse
import gc
import itertools
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from statistics import fmean, median
from typing import Any

import torch
from harness import MODELS, Table, parser
from opt_models import make_model
from pseuzo.models.modes import MODES, tune
from pseuzo.perturb.module import forget_passes
from pseuzo.train.arguments import PseuZOTrainingArguments
from pseuzo.train.methods import METHODS, forwards_per_step
from pseuzo.train.options import OPTIONS
from pseuzo.train.trainer import PseuZOTrainer
from torch import nn
from transformers import PrinterCallback, TrainerCallback
from transformers.utils.logging import disable_progress_bar

from pseuzo_kernels.bench.timing import measure_ms

COLUMNS = (
    "model", "params", "dtype", "mode", "rows", "tokens", "method", "options", "forwards",
    "forward_ms", "step_ms", "beyond_ms", "times_forwards", "peak_mb", "kept_mb",
)  # fmt: skip
WARM_UP = 2  # steps with work that later ones need not do
MEMORY_STEPS = 3  # by then a step allocates what every later one does, except for a full window


class Timed(TrainerCallback):
    """Times the steps of a run, and a forward pass between them."""

    def __init__(self, device: torch.device):
        self.device, self.forward = device, None
        self.step_ms: list[float] = []
        self.forward_ms: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        if self.forward is not None:
            self.forward_ms.append(measure_ms(self.forward, self.device))
        self._begin = self._now()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.step_ms.append((self._now() - self._begin) * 1e3)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def make_trainer(method: str, model: nn.Module, args: argparse.Namespace) -> PseuZOTrainer:
    settings = {name: parse(OPTIONS[name].type, value) for name, value in args.set.items()}
    arguments = PseuZOTrainingArguments(
        output_dir=args.folder,
        method=method,
        max_steps=args.steps,
        learning_rate=1e-9,  # the weights stay nearly as they are
        per_device_train_batch_size=args.rows,
        use_cpu=args.device == "cpu",
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        **{name: value for name, value in settings.items() if takes(method, name)},
    )
    trainer = PseuZOTrainer(model, arguments, train_dataset=random_rows(model, args))
    trainer.remove_callback(PrinterCallback)
    return trainer


def forward_of(trainer: PseuZOTrainer) -> Callable[[], None]:
    """Return a forward pass to the loss of one batch, without gradients."""
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    forward, head = trainer.losses.split(batch)

    @torch.no_grad()
    def call() -> None:
        head(forward())

    return call


def takes(method: str, option: str) -> bool:
    return method in OPTIONS[option].applies_to.get("method", (method,))


def parse(kind: type, text: str) -> Any:
    return text == "true" if kind is bool else kind(text)


def random_rows(model: nn.Module, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return rows whose last token alone carries a loss, as in classification by a label word."""
    generator = torch.Generator().manual_seed(0)
    shape = (4 * args.rows, args.tokens)
    ids = torch.randint(3, model.config.vocab_size, shape, generator=generator)
    labels = torch.full_like(ids, -100)
    labels[:, -1] = ids[:, -1]
    columns = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return [{k: v[i] for k, v in columns.items()} for i in range(len(ids))]


def allocated(call: Callable[[], None], device: torch.device) -> tuple[float, float]:
    """Return the memory that torch allocates in call(), in MB: the peak, and what is left
    afterwards."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        held, most = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
        return (most - before) / 1e6, (held - before) / 1e6
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        call()
        gc.collect()
    held = most = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most / 1e6, held / 1e6


def measure(table: Table, method: str, name: str, mode: str, args: argparse.Namespace) -> None:
    model = tune(make_model(name, getattr(torch, args.dtype), table.device), mode)
    trainer = make_trainer(method, model, args)
    forward_of(trainer)()
    inference, _ = allocated(forward_of(trainer), table.device)
    trainer.args.max_steps = MEMORY_STEPS
    peak, kept = allocated(lambda: (trainer.train(), None)[1], table.device)

    trainer = make_trainer(method, model, args)
    timed = Timed(table.device)
    timed.forward = forward_of(trainer)
    trainer.add_callback(timed)
    trainer.train()
    options = trainer.counted_options()
    forwards = forwards_per_step(method, options)
    # If steps differ, the average count of passes needs the average time beside it.
    average = median if float(forwards).is_integer() else fmean
    forward, step = median(timed.forward_ms), average(timed.step_ms[WARM_UP:])
    table.add(
        model=name,
        params=sum(p.numel() for p in model.parameters()),
        dtype=args.dtype,
        mode=mode,
        rows=args.rows,
        tokens=args.tokens,
        method=method,
        options=" ".join(f"{k}={options[k]}" for k in args.set if takes(method, k)),
        forwards=float(forwards),
        forward_ms=forward,
        step_ms=step,
        beyond_ms=step - forwards * forward,
        times_forwards=step / (forwards * forward),
        peak_mb=peak - inference,
        kept_mb=kept,
    )
    forget_passes(model)


def setting(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or name not in OPTIONS:
        raise argparse.ArgumentTypeError(f"{text}: give name=value, of {', '.join(OPTIONS)}")
    return name, value


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--model", choices=MODELS, help="default: tiny on a CPU, opt-1.3b on a GPU")
    p.add_argument("--method", nargs="*", choices=METHODS, default=list(METHODS))
    p.add_argument("--mode", nargs="*", choices=MODES, default=["full"])
    p.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    p.add_argument("--rows", type=int, default=4)
    p.add_argument("--tokens", type=int, default=32)
    p.add_argument("--steps", type=int, default=16, help="that are timed")
    p.add_argument("--set", nargs="*", type=setting, default=[], help="options, e.g. directions=4")
    args = p.parse_args()
    args.set = dict(args.set)
    disable_progress_bar()
    table, all_ran = Table("methods", args, COLUMNS), True
    name = args.model or ("tiny" if table.device.type == "cpu" else "opt-1.3b")
    for mode, method in itertools.product(args.mode, args.method):
        try:
            with tempfile.TemporaryDirectory() as args.folder:
                measure(table, method, name, mode, args)
        except Exception:  # the other methods are still measured
            traceback.print_exc()
            all_ran = False
    sys.exit(not all_ran)


if __name__ == "__main__":
    main()
