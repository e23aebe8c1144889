"""The demo: a pretrained OPT of a million parameters learns to tell code from docstring prose, by forward passes alone.

Four ways from the same start, the same batches and the same number of forward passes, each with its own learning rate,
as tuned on the validation lines. What each of them does is in METHODS; what was measured is in the README.
"""

import json
import math
import platform
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from pseuzo.data import Prompts, label_token_ids
from pseuzo.files import save_model, write_atomically
from pseuzo.objective import CausalLMObjective
from pseuzo.optimizer import MeZO, PseuZO

ASSETS = resources.files("pseuzo.demo") / "assets"
EVALUATE_EVERY = 50  # steps
MAX_LENGTH = 126  # tokens; the model has 128 positions


def attention_out(model: nn.Module) -> list[nn.Parameter]:
    """v_proj and out_proj weights of all layers but the first."""
    return [p for name, p in model.named_parameters()
            if name.endswith(("v_proj.weight", "out_proj.weight")) and ".layers.0." not in name]  # fmt: skip


@dataclass
class Method:
    name: str
    title: str
    make: Callable[[nn.Module, int], torch.optim.Optimizer]  # (model, seed)
    grouped: bool = False


METHODS = (
    Method("mezo", "MeZO", lambda model, seed: MeZO(model, lr=4e-4, eps=1e-3, seed=seed)),
    Method(
        "pseuzo-rows", "PseuZO, rows paired as published",
        lambda model, seed: PseuZO(model, lr=1e-4, eps=1e-3, seed=seed),
    ),
    Method(
        "pseuzo-groups", "PseuZO, rows paired by label",
        lambda model, seed: PseuZO(model, lr=4e-5, eps=1e-3, seed=seed), grouped=True,
    ),
    Method(
        "mezo-attention-out", "MeZO, noise on v_proj and out_proj only",
        lambda model, seed: MeZO(attention_out(model), lr=3.5e-3, eps=5.2e-3, seed=seed, model=model),
    ),
)  # fmt: skip


@dataclass
class Task:
    model_folder: Path
    train: Prompts
    val: Prompts
    test: Prompts
    options: list[int]


def load_task() -> Task:
    """The embedded data and the tokens of its label words."""
    folder = Path(str(ASSETS))
    task = json.loads((folder / "task.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    labels = list(task["label_words"])

    def split(name: str) -> Prompts:
        rows = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        return Prompts.encode(tokenizer, rows, task["template"], labels, MAX_LENGTH)

    options = label_token_ids(tokenizer, list(task["label_words"].values()))
    return Task(folder / "model", split("train"), split("val"), split("test"), options)


@torch.no_grad()
def accuracy(objective: CausalLMObjective, prompts: Prompts, device: torch.device) -> float:
    """Share of prompts whose own label word has the largest logit."""
    objective.model.eval()
    right = 0
    for index in prompts.by_length(100):
        batch = prompts.batch(index, device)
        forward, _ = objective(batch)
        right += int((objective.logits(forward())[:, -1].argmax(-1) == batch["labels"]).sum())
    return right / len(prompts)


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        try:
            Path("/proc/self/clear_refs").write_text("5")  # Linux: the resident set's high-water mark starts anew
        except OSError:
            pass


def _peak_mib(device: torch.device) -> float:
    """CUDA: memory allocated on the GPU. CPU: resident memory of the process, libraries and interpreter included."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 2**10
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def train(
    method: Method,
    task: Task,
    steps: int,
    batch_size: int,
    seed: int,
    device: torch.device,
    log: Callable[[dict], None],
) -> tuple[nn.Module, dict[str, Any]]:
    """Fine-tune from the pretrained model; the model and its figures. log gets a row every EVALUATE_EVERY steps."""
    _reset_peak(device)
    model = AutoModelForCausalLM.from_pretrained(task.model_folder).to(device)
    objective = CausalLMObjective(model, task.options)
    optimizer = method.make(model, seed)
    batches = task.train.stratified(batch_size, seed)
    losses: list[Tensor] = []
    seconds = 0.0
    with tqdm(total=steps, desc=method.title, unit="step", mininterval=0.5) as bar:
        for step in range(1, steps + 1):
            started = time.perf_counter()
            batch = task.train.batch(next(batches), device)
            forward, head = objective(batch)
            if isinstance(optimizer, PseuZO):
                loss = optimizer.step(forward, head, groups=batch["labels"] if method.grouped else None)
            else:
                loss = optimizer.step(lambda f=forward, h=head: h(f()))
            losses.append(loss)
            if step % EVALUATE_EVERY == 0 or step == steps:
                mean = float(torch.stack(losses).mean())  # waits for the device
                seconds += time.perf_counter() - started
                losses.clear()
                val = accuracy(objective, task.val, device)
                log({"method": method.name, "step": step, "seconds": round(seconds, 3), "loss": round(mean, 5),
                     "val_accuracy": val})  # fmt: skip
                bar.set_postfix(loss=f"{mean:.3f}", val=f"{val:.3f}")
            else:
                seconds += time.perf_counter() - started
            bar.update()
    return model, {
        "title": method.title,
        "test_accuracy_after": accuracy(objective, task.test, device),
        "val_accuracy_after": val,
        "steps": steps,
        "steps_per_s": steps / seconds,
        "peak_memory_mib": _peak_mib(device),
        "skipped_steps": optimizer.skipped_steps,
        "lr": optimizer.param_groups[0]["lr"],
        "eps": optimizer.eps,
    }


def hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    try:
        name = Path("/proc/cpuinfo").read_text().split("model name")[1].split("\n")[0].strip("\t: ")
    except (OSError, IndexError):
        pass
    return f"{name}, {torch.get_num_threads()} threads"


def plot(rows: list[dict], path: Path) -> None:
    """Validation accuracy and training loss over forward passes."""
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


def run(out: Path, methods: list[str], steps: int, batch_size: int, seed: int, device: torch.device) -> dict[str, Any]:
    """The demo. Writes metrics.jsonl, curves.png, summary.json and model/ into out; returns the summary."""
    out.mkdir(parents=True, exist_ok=True)
    task = load_task()
    pretrained = CausalLMObjective(AutoModelForCausalLM.from_pretrained(task.model_folder).to(device), task.options)
    start = {name: accuracy(pretrained, getattr(task, name), device) for name in ("val", "test")}
    del pretrained
    rows: list[dict] = []
    summary: dict[str, Any] = {
        "hardware": hardware(device), "torch": torch.__version__, "steps": steps, "batch_size": batch_size,
        "seed": seed, "forwards_per_step": 2, "methods": {},
    }  # fmt: skip
    best = (-math.inf, "")
    with open(out / "metrics.jsonl", "w") as metrics:

        def log(row: dict) -> None:
            rows.append(row)
            metrics.write(json.dumps(row) + "\n")
            metrics.flush()

        for method in METHODS:
            if method.name not in methods:
                continue
            log({"method": method.name, "step": 0, "seconds": 0.0, "loss": None, "val_accuracy": start["val"]})
            model, figures = train(method, task, steps, batch_size, seed, device, log)
            summary["methods"][method.name] = {"test_accuracy_before": start["test"], **figures}
            # chosen on the validation lines, the test lines are for the report
            if rows[-1]["val_accuracy"] > best[0]:
                best = (rows[-1]["val_accuracy"], method.name)
                save_model(model, task.model_folder, out / "model")
    summary["saved_model"] = best[1]
    plot(rows, out / "curves.png")
    write_atomically(out / "summary.json", json.dumps(summary, indent=1) + "\n")
    return summary
