"""A training run from its settings: model, task, data, trainer, results. What `pseuzo train` and `pseuzo eval` do.

A run's folder: config.yaml (every setting, as resolved), results.json (figures and history), curves.png, model/
(what Transformers or peft loads), checkpoint-N/ (to resume from); noise_on.json and lr.json where those were
searched for; and start/, a mode's first weights, where there is a journal.
"""

import json
import math
import os
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import PrinterCallback

from pseuzo.files import save_model, write_atomically
from pseuzo.machine import hardware, peak_memory
from pseuzo.plots import plot_runs
from pseuzo.tasks import Task, TaskData, evaluate, load_task
from pseuzo.trainer import (
    PLACEMENT_FILE,
    PseuZOTrainer,
    PseuZOTrainingArguments,
    forwards_per_step,
    last_checkpoint,
)
from pseuzo.tuning import load_model, tune

# Where no rate is given. Zeroth order: those published for OPT-1.3B. First order: common ones for such models.
DEFAULT_LR = {
    "zo": {"full": 1e-7, "head": 1e-4, "lora": 5e-5, "prefix": 1e-3},
    "fo-sgd": {"full": 1e-3, "head": 1e-2, "lora": 1e-2, "prefix": 1e-1},
    "fo-adam": {"full": 1e-5, "head": 1e-4, "lora": 1e-4, "prefix": 1e-3},
}
DEFAULT_EPS = {"full": 1e-3, "head": 1e-3, "lora": 1e-2, "prefix": 1e-1}
EMBEDDED = "demo"  # the name of the embedded model, and of the task on its text
EVALUATED, TRIALS = 200, 10  # of the search for lr: dev examples of a trial, and most rates on the way up or down


def default_lr(method: str, mode: str) -> float:
    return DEFAULT_LR[method if method.startswith("fo-") else "zo"][mode]


def model_path(name: str) -> str:
    """The folder of the embedded model for its name, else the name itself."""
    if name != EMBEDDED:
        return name
    from pseuzo.demo.run import ASSETS

    return str(ASSETS / "model")


def read_config(path: Path) -> dict[str, Any]:
    """Settings from a YAML file: option names, with - or _. ValueError if it is not a mapping."""
    try:
        config = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold `option: value` lines, got {type(config).__name__}")
    return {str(k).replace("-", "_"): v for k, v in config.items()}


class Run:
    """Task, data and model of one run's settings `c` (the options of `pseuzo train`, as a mapping)."""

    def __init__(self, c: dict[str, Any]):
        self.c = c
        self.task: Task = load_task(c["task"])
        self.examples = self.task.load(
            c["data"], train=c["train_size"], dev=c["dev_size"], test=c["test_size"], seed=c["data_seed"]
        )
        self.data: dict[str, TaskData] = {}
        self.tokenizer: Any = None

    def model(self) -> torch.nn.Module:
        """The model as it starts, in its tuning mode; the data too, the first time."""
        c = self.c
        model, self.tokenizer = load_model(model_path(c["model"]), dtype=c["dtype"], device=c["device"])
        if not self.data:
            self.longest = max_length(model, c["max_length"], c["prefix_tokens"] if c["mode"] == "prefix" else 0)
            self.data = {split: self.part(split) for split in self.examples}
        return tune(
            model, c["mode"], lora_r=c["lora_r"], lora_alpha=c["lora_alpha"], prefix_tokens=c["prefix_tokens"],
            seed=c["seed"],
        )  # fmt: skip

    def part(self, split: str, most: int | None = None) -> TaskData:
        """The first examples of a split (all of them if most is None), as the model's tokens."""
        return TaskData(
            self.examples[split][:most], self.task, self.tokenizer, max_length=self.longest, train_on=self.c["train_on"]
        )

    def trainer(self, model: torch.nn.Module, output: Path, **changes: Any) -> PseuZOTrainer:
        c = self.c | changes
        every = c["eval_every"]
        args = PseuZOTrainingArguments(
            output_dir=str(output), method=c["method"], learning_rate=c["lr"], eps=c["eps"], window=c["window"],
            momentum=c["momentum"], schedule=c["schedule"], directions=c["directions"], two_sided=c["two_sided"],
            noise=c["noise"], rounding=c["rounding"], groups=c["groups"], noise_on=list(c["noise_on"]),
            scale_lr=c["scale_lr"], scale_eps=c["scale_eps"], clip_examples=c["clip_examples"], head=c["head"],
            head_lr=c["head_lr"], objective=c["objective"], journal=c["journal"], weight_decay=c["weight_decay"],
            max_steps=c["steps"], per_device_train_batch_size=c["batch_size"],
            per_device_eval_batch_size=c["eval_batch_size"], lr_scheduler_type=c["lr_scheduler"],
            seed=c["seed"], data_seed=c["seed"], use_cpu=torch.device(c["device"]).type == "cpu",
            logging_steps=c["log_every"], logging_first_step=True, eval_strategy="steps" if every else "no",
            eval_steps=every or None, eval_on_start=bool(every), save_strategy="steps" if c["save_every"] else "no",
            save_steps=c["save_every"] or 500, save_total_limit=2, load_best_model_at_end=c["keep"] == "best",
            metric_for_best_model=f"eval_{self.task.metric}" if every else None, greater_is_better=True,
            report_to=list(c["report_to"]), disable_tqdm=c["quiet"], dataloader_pin_memory=c["device"] != "cpu",
        )  # fmt: skip
        trainer = PseuZOTrainer(model, args, train_dataset=self.data["train"], eval_dataset=self.data["dev"])
        if c["quiet"]:
            trainer.remove_callback(PrinterCallback)
        return trainer


def max_length(model: torch.nn.Module, wanted: int, reserved: int = 0) -> int:
    """Tokens of a sequence: wanted, or what the model has positions for, less those reserved."""
    positions = getattr(model.config, "max_position_embeddings", None) or getattr(model.config, "n_positions", None)
    return min(wanted, positions - reserved) if positions else wanted


def resolve(c: dict[str, Any]) -> dict[str, Any]:
    """The settings with every default filled in. ValueError for those that cannot be."""
    c = dict(c)
    if c["eps"] is None:
        c["eps"] = DEFAULT_EPS[c["mode"]]
        c["scale_eps"] = tuple(c["noise_on"]) != ("all",) and not c["method"].startswith("fo-")
    if c["lr"] is None:
        c["lr"] = default_lr(c["method"], c["mode"])
        c["scale_lr"] = tuple(c["noise_on"]) != ("all",) and not c["method"].startswith("fo-")
    elif c["lr"] != "auto" and not float(c["lr"]) > 0:
        raise ValueError(f"--lr must be positive, got {c['lr']}")
    c.setdefault("scale_lr", False)
    c.setdefault("scale_eps", False)
    c["device"] = c["device"] or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(1, device=c["device"])
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {c['device']!r} cannot be used: {str(error).splitlines()[0]}") from None
    if c["data_seed"] is None:
        c["data_seed"] = c["seed"]
    if c["eval_every"] is None:
        c["eval_every"] = max(1, c["steps"] // 10)
    if c["save_every"] is None:
        c["save_every"] = c["eval_every"] or max(1, c["steps"] // 10)
    if c["log_every"] is None:
        c["log_every"] = max(1, c["steps"] // 100)
    if c["keep"] == "best":
        if not c["eval_every"]:
            raise ValueError("--keep best needs evaluations: --eval-every must not be 0; or use --keep last")
        if not c["save_every"] or c["save_every"] % c["eval_every"]:
            raise ValueError(
                f"--keep best needs a checkpoint at evaluations: --save-every must be a multiple of --eval-every "
                f"({c['eval_every']}), got {c['save_every']}; or use --keep last"
            )
    return c


def start_folder(output: Path, resume: bool) -> None:
    """An empty folder, or that of a run to resume."""
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file, not a folder")
    if output.exists() and any(output.iterdir()) and not resume:
        raise ValueError(f"{output} is not empty; choose another folder, or --resume to go on with the run in it")
    output.mkdir(parents=True, exist_ok=True)


def train(c: dict[str, Any]) -> dict[str, Any]:
    """Run `pseuzo train` with settings c; its results, as written to results.json."""
    c = resolve(c)
    output = Path(c["output"])
    resume = c["resume"]
    start_folder(output, bool(resume))
    searched = output / "lr.json"
    if c["lr"] == "auto" and searched.exists():  # resumed
        c |= json.loads(searched.read_text())["chosen"]
    run = Run(c)
    if c["lr"] == "auto":
        found = search_lr(run, output)
        write_atomically(searched, json.dumps(found, indent=1) + "\n")
        c |= found["chosen"]
    run.c = c
    write_atomically(output / "config.yaml", yaml.safe_dump(plain(c), sort_keys=True))
    model = run.model()
    if c["journal"] and c["mode"] != "full" and not (output / "start").exists():  # what its replay begins with
        save_model(model, run.tokenizer, output / "start")
    trainer = run.trainer(model, output)
    if resume is True or resume == "auto":
        resume = last_checkpoint(output)  # a run killed before its first checkpoint begins anew
    outcome = trainer.train(resume_from_checkpoint=resume or None)
    figures = evaluate(model, run.data["test"], batch_size=c["eval_batch_size"])
    history = trainer.state.log_history
    last = [row for row in history if "train_seconds" in row]
    passes = forwards_per_step(c["method"], c["directions"], c["two_sided"])
    results = {
        "task": run.task.name, "metric": run.task.metric, "model": c["model"], "method": c["method"], "mode": c["mode"],
        "test": figures, "steps": outcome.global_step, "forwards": outcome.global_step * passes,
        "train_seconds": last[-1]["train_seconds"] if last else None, "lr": trainer.args.learning_rate,
        "eps": trainer.args.eps, "best_step": trainer.state.best_global_step, "seed": c["seed"],
        "peak_memory_mib": peak_memory(c["device"]), "hardware": hardware(c["device"]), "torch": torch.__version__,
        "skipped_steps": trainer.zero_order.skipped_steps if trainer.zero_order else 0, "history": history,
    }  # fmt: skip
    if trainer.zero_order is not None:
        results["lr"], results["eps"] = trainer.zero_order.param_groups[0]["lr"], trainer.zero_order.eps
    save_model(model, run.tokenizer, output / "model")
    write_atomically(output / "results.json", json.dumps(results, indent=1) + "\n")
    plot_runs({output.name: results}, output / "curves.png")
    return results


def search_lr(run: Run, output: Path) -> dict[str, Any]:
    """A rate for the run by short trials from the same start, a tenth of its steps long (20 to 200), judged by the loss
    on at most 200 dev examples.

    Rates go up by a factor of 2 (first order: 4) until a trial ends above where it began. What a short run survives, a
    long one may not: of the rates at most a quarter of the largest that survived, the one with the least loss is taken.
    Zeroth-order rates begin from the curvature T along the noise, which a few forward passes measure: for a quadratic
    loss the best rate of a step is |g|^2 / (|g|^2 T + 2 g'Hg), nearly 1 / T; the first trial takes an eighth of that.
    """
    c = run.c
    steps = min(max(20, c["steps"] // 10), 200)
    model = run.model()
    chosen: dict[str, Any] = {"scale_lr": False, "scale_eps": False}
    if c["method"].startswith("fo-"):
        first, factor = default_lr(c["method"], c["mode"]), 4.0
    else:
        found = run.trainer(model, output, lr=1.0, scale_lr=False, journal=None).find_placement()
        chosen |= {"noise_on": found["noise_on"], "eps": found["eps"]}
        write_atomically(output / PLACEMENT_FILE, json.dumps(found, indent=1) + "\n")
        if not found["curvature"] > 0:
            raise ValueError(
                f"--lr auto: the loss does not curve upwards along the noise ({found['curvature']:.3g}), so there is "
                "no scale to begin from; give --lr, or another --eps"
            )
        first, factor = 0.125 / found["curvature"], 2.0
    dev = run.part("dev", EVALUATED)
    start = evaluate(model, dev, batch_size=c["eval_batch_size"])["loss"]
    del model
    trials: dict[float, float] = {}

    def survives(lr: float) -> bool:
        lr = _rounded(lr)
        if lr not in trials:
            model = run.model()
            run.trainer(
                model, output, lr=lr, steps=steps, eval_every=0, save_every=0, keep="last", journal=None, quiet=True,
                report_to=(), **chosen,
            ).train()  # fmt: skip
            loss = evaluate(model, dev, batch_size=c["eval_batch_size"])["loss"]
            trials[lr] = loss if math.isfinite(loss) else math.inf
            print(f"lr {lr:.2g}: dev loss {loss:.4f} after {steps} steps, {start:.4f} before", flush=True)
        return trials[lr] < 1.05 * start

    lr = first
    while not survives(lr) and len(trials) < TRIALS:
        lr /= factor
    while survives(lr) and survives(lr * factor) and len(trials) < TRIALS:
        lr *= factor
    if not survives(lr):
        raise ValueError(
            f"--lr auto: every rate from {min(trials):.2g} to {max(trials):.2g} made the loss worse; look at the data "
            "and the dtype, or give --lr"
        )
    largest = max(rate for rate in trials if survives(rate))
    for rate in (largest / 4, largest / 8):
        survives(rate)
    best = min((rate for rate in trials if rate <= 1.05 * largest / 4), key=trials.__getitem__)
    return {"steps": steps, "start": start, "trials": trials, "chosen": chosen | {"lr": best}}


def _rounded(lr: float) -> float:
    return float(f"{lr:.2g}")


def evaluate_run(c: dict[str, Any]) -> dict[str, Any]:
    """Run `pseuzo eval`: zero-shot, or with `shots` examples of the training rows before every prompt."""
    task = load_task(c["task"])
    examples = task.load(c["data"], train=max(c["shots"], 1), dev=0, test=c["test_size"], seed=c["seed"])
    model, tokenizer = load_model(model_path(c["model"]), dtype=c["dtype"], device=c["device"])
    shots = tuple(examples["train"][: c["shots"]])
    data = TaskData(examples["test"], task, tokenizer, max_length=max_length(model, c["max_length"]), shots=shots)
    return {
        "task": task.name, "metric": task.metric, "model": c["model"], "shots": len(shots), "seed": c["seed"],
        "test": evaluate(model, data, batch_size=c["eval_batch_size"], progress=not c["quiet"]),
    }  # fmt: skip


def plain(c: dict[str, Any]) -> dict[str, Any]:
    """The settings as YAML takes them, and as --config takes them again."""
    c = {k: v for k, v in c.items() if k not in ("resume", "scale_lr", "scale_eps")} | {
        key: None
        for key in ("lr", "eps")
        if c.get(f"scale_{key}")  # what they are is in noise_on.json
    }
    return {k: str(v) if isinstance(v, os.PathLike) else list(v) if isinstance(v, tuple) else v for k, v in c.items()}
