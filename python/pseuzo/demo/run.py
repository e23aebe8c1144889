"""The demo: a pretrained OPT of a million parameters learns to tell code from docstring prose, by
forward passes alone.

The four METHODS get the same start, the same batches and the same number of forward passes. Each
has its own learning rate, which was tuned on the validation lines. The README has measured results.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from pseuzo.files import claim, save_model, to_json, write_json
from pseuzo.machine import hardware, peak_memory, reset_peak
from pseuzo.models.objective import CausalLMObjective
from pseuzo.models.placement import place
from pseuzo.optim import MeZO, PseuZO
from pseuzo.tasks import TaskData, evaluate, load_task

ASSETS = resources.files("pseuzo.demo") / "assets"
EVALUATE_EVERY = 50  # steps
POSITIONS = 128  # the most tokens that the model takes


@dataclass
class Method:
    name: str
    title: str
    make: Callable[[nn.Module, int], torch.optim.Optimizer]  # (model, seed)
    grouped: bool = False


METHODS = (
    Method("mezo", "MeZO", lambda model, seed: MeZO(model, lr=4e-4, eps=1e-3, seed=seed)),
    Method(
        "pseuzo-rows",
        "PseuZO, rows paired as published",
        lambda model, seed: PseuZO(model, lr=1e-4, eps=1e-3, seed=seed),
    ),
    Method(
        "pseuzo-groups",
        "PseuZO, rows paired by label",
        lambda model, seed: PseuZO(model, lr=4e-5, eps=1e-3, seed=seed),
        grouped=True,
    ),
    Method(
        "mezo-attention-out",
        "MeZO, noise on v_proj and out_proj only",
        lambda model, seed: MeZO(
            list(place(model, ["attention-out"])), lr=3.5e-3, eps=5.2e-3, seed=seed, model=model
        ),
    ),
)


@dataclass
class Demo:
    """Holds the folder of the embedded model, its tokenizer, and the lines as its tokens."""

    model_folder: Path
    tokenizer: Any
    train: TaskData
    val: TaskData
    test: TaskData


def load() -> Demo:
    task = load_task("demo")
    lines = task.load(train=1000, dev=400, test=1000)
    folder = Path(str(ASSETS)) / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    parts = (
        TaskData(lines[part], task, tokenizer, max_length=POSITIONS)
        for part in ("train", "dev", "test")
    )
    return Demo(folder, tokenizer, *parts)


def batches(data: TaskData, size: int, seed: int) -> Iterator[dict[str, Tensor]]:
    """Yield whole batches without end, epoch after epoch."""
    sampler = data.sampler(size, seed)
    for epoch in itertools.count():
        sampler.set_epoch(epoch)
        order = list(sampler)
        for first in range(0, len(order) - size + 1, size):
            yield data.collate([data[i] for i in order[first : first + size]])


def train(
    method: Method,
    demo: Demo,
    steps: int,
    batch_size: int,
    seed: int,
    device: torch.device,
    log: Callable[[dict], None],
) -> tuple[nn.Module, dict[str, Any]]:
    """Fine-tune from the pretrained model. Return the model and its figures. log gets a row every
    EVALUATE_EVERY steps."""
    reset_peak(device)
    model = AutoModelForCausalLM.from_pretrained(demo.model_folder).to(device)
    objective = CausalLMObjective(model, demo.train.options)
    optimizer = method.make(model, seed)
    drawn = batches(demo.train, batch_size, seed)
    losses: list[Tensor] = []
    seconds = 0.0
    with tqdm(total=steps, desc=method.title, unit="step", mininterval=0.5) as bar:
        for step in range(1, steps + 1):
            started = time.perf_counter()
            batch = {k: v.to(device) for k, v in next(drawn).items()}
            forward, head = objective(batch)
            if isinstance(optimizer, PseuZO):
                loss = optimizer.step(
                    forward, head, groups=batch["groups"] if method.grouped else None
                )
            else:
                loss = optimizer.step(lambda f=forward, h=head: h(f()))
            losses.append(loss)
            if step % EVALUATE_EVERY == 0 or step == steps:
                mean = float(torch.stack(losses).mean())  # waits for the device
                seconds += time.perf_counter() - started
                losses.clear()
                val = evaluate(model, demo.val, batch_size=100)["accuracy"]
                log(
                    {
                        "method": method.name,
                        "step": step,
                        "seconds": round(seconds, 3),
                        "loss": round(mean, 5),
                        "val_accuracy": val,
                    }
                )
                bar.set_postfix(loss=f"{mean:.3f}", val=f"{val:.3f}")
            else:
                seconds += time.perf_counter() - started
            bar.update()
    return model, {
        "title": method.title,
        "test_accuracy_after": evaluate(model, demo.test, batch_size=100)["accuracy"],
        "val_accuracy_after": val,
        "steps": steps,
        "steps_per_s": steps / seconds,
        "peak_memory_mib": peak_memory(device),
        "skipped_steps": optimizer.skipped_steps,
        "lr": optimizer.param_groups[0]["lr"],
        "eps": optimizer.eps,
    }


def plot(rows: list[dict], path: Path) -> None:
    """Draw validation accuracy and training loss over forward passes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for method in METHODS:
        mine = [r for r in rows if r["method"] == method.name]
        if mine:
            passes = [2 * r["step"] for r in mine]
            left.plot(passes, [r["val_accuracy"] for r in mine], marker="o", label=method.title)
            right.plot(passes[1:], [r["loss"] for r in mine[1:]], marker="o")
    left.set(xlabel="forward passes", ylabel="validation accuracy")
    right.set(xlabel="forward passes", ylabel=f"training loss, mean of {EVALUATE_EVERY} steps")
    left.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def run(
    out: Path, methods: list[str], steps: int, batch_size: int, seed: int, device: torch.device
) -> dict[str, Any]:
    """Run the demo. Writes metrics.jsonl, curves.png, summary.json and model/ into out, and returns
    the summary. ValueError if out has files that no demo wrote."""
    with claim(out, "demo"):
        return _run(out, methods, steps, batch_size, seed, device)


def _run(
    out: Path, methods: list[str], steps: int, batch_size: int, seed: int, device: torch.device
) -> dict[str, Any]:
    demo = load()
    pretrained = AutoModelForCausalLM.from_pretrained(demo.model_folder).to(device)
    start = {
        part: evaluate(pretrained, getattr(demo, part), batch_size=100)["accuracy"]
        for part in ("val", "test")
    }
    del pretrained
    rows: list[dict] = []
    summary: dict[str, Any] = {
        "hardware": hardware(device),
        "torch": torch.__version__,
        "steps": steps,
        "batch_size": batch_size,
        "seed": seed,
        "forwards_per_step": 2,
        "methods": {},
    }
    best = (-math.inf, "")
    with open(out / "metrics.jsonl", "w") as metrics:

        def log(row: dict) -> None:
            rows.append(row)
            metrics.write(to_json(row) + "\n")
            metrics.flush()

        for method in METHODS:
            if method.name not in methods:
                continue
            log(
                {
                    "method": method.name,
                    "step": 0,
                    "seconds": 0.0,
                    "loss": None,
                    "val_accuracy": start["val"],
                }
            )
            model, figures = train(method, demo, steps, batch_size, seed, device, log)
            summary["methods"][method.name] = {"test_accuracy_before": start["test"], **figures}
            # The model is chosen on the validation lines; the test lines are for the report.
            if rows[-1]["val_accuracy"] > best[0]:
                best = (rows[-1]["val_accuracy"], method.name)
                save_model(model, demo.tokenizer, out / "model")
    summary["saved_model"] = best[1]
    plot(rows, out / "curves.png")
    write_json(out / "summary.json", summary)
    return summary
