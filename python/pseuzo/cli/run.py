"""`pseuzo train` and `pseuzo eval`: from settings to model, task, data, trainer and results.

pseuzo.cli.folder says what a run writes into its folder.
"""

import gc
import math
import os
import sys
from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import PrinterCallback
from transformers.integrations import (
    get_available_reporting_integrations,
    get_reporting_integration_callbacks,
)

from pseuzo.cli.folder import (
    EMBEDDED,
    plain,
    resumed,
    set_aside,
    start_folder,
    to_make,
    undo,
)
from pseuzo.cli.options import MODE_OPTIONS, setting_name
from pseuzo.cli.plots import plot_runs
from pseuzo.cli.ranks import changes, check_shared, facts, join, leave, row_parts
from pseuzo.cli.results import results_of
from pseuzo.cli.rows import cut_prompts, max_length
from pseuzo.files import (
    check_saving,
    read_json,
    save_model,
    write_atomically,
    write_json,
    write_model,
)
from pseuzo.machine import peak_memory, reset_peak, usable_device
from pseuzo.models.kinds import kind_of
from pseuzo.models.loading import DTYPES, load_model
from pseuzo.models.modes import MODES, tune
from pseuzo.models.offloading import check_before_loading
from pseuzo.optim.curvature import RELATIVE_LR
from pseuzo.optim.schedule import Schedule
from pseuzo.optim.together import Together
from pseuzo.perturb.graphs import check_device
from pseuzo.sentences import one_line
from pseuzo.tasks import Task, TaskData, evaluate, load_task
from pseuzo.tasks.data import no_calibration
from pseuzo.train.arguments import PseuZOTrainingArguments
from pseuzo.train.journal_file import held
from pseuzo.train.methods import METHODS, ZEROTH_ORDER, default_rate, methods_with
from pseuzo.train.options import OPTIONS
from pseuzo.train.ranked import digest
from pseuzo.train.trainer import PseuZOTrainer
from pseuzo_kernels import _C


def model_path(name: str) -> str:
    """Return the folder of the embedded model for its name, else the name itself."""
    if name != EMBEDDED:
        return name
    from pseuzo.demo.run import ASSETS

    return str(ASSETS / "model")


class Run:
    """Holds the task, the data and the model of one run. c: the options of `pseuzo train`.
    together: the ranks of the run."""

    def __init__(self, c: dict[str, Any], together: Together):
        self.c, self.together = c, together
        self.task: Task = _task(c)
        self.examples = self.task.load(
            c["data"],
            train=c["train_size"],
            dev=c["dev_size"],
            test=c["test_size"],
            seed=c["data_seed"],
        )
        self.data: dict[str, TaskData] = {}
        self.tokenizer: Any = None

    def model(self) -> torch.nn.Module:
        """Load the model and put it in its tuning mode; the first call also makes the data."""
        c = self.c
        # A trainer and its callbacks refer to each other, and keep the model of the last trial.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        stays, mode = c["offload"] != "none", MODES[c["mode"]]  # stays: on the host
        if stays:
            few = not (mode.starts_from_base or mode.on_host)
            name, dtype = model_path(c["model"]), DTYPES[c["dtype"]]
            check_before_loading(name, dtype, c["model_kind"], few)
        at_first = {"device": "cpu"} if stays or mode.on_host else {}
        model, self.tokenizer = load(c | at_first, self.task)
        mode_options = {name: c[name] for name in MODE_OPTIONS}
        model = tune(model, c["mode"], seed=c["seed"], **mode_options)
        model = model if stays else model.to(c["device"])
        if not self.data:
            if self.together.is_root:
                check_saving(partial(write_model, model, self.tokenizer), model, Path(c["output"]))
            self.kind = kind_of(model)
            self.longest = max_length(model, c["max_length"])
            self.data = {split: self.part(split) for split in self.examples}
            self.cut = {
                split: cut_prompts(data, split)["cut_prompts"] for split, data in self.data.items()
            }
        return model

    def part(self, split: str) -> TaskData:
        """Return the examples of a split as the model's tokens."""
        return TaskData(
            self.examples[split],
            self.task,
            self.tokenizer,
            max_length=self.longest,
            train_on=self.c["train_on"],
            kind=self.kind,
        )

    def trainer(self, model: torch.nn.Module, output: Path, **changes: Any) -> PseuZOTrainer:
        c = self.c | changes
        every = c["eval_every"]
        ours = {name: c[setting_name(o)] for name, o in OPTIONS.items() if setting_name(o) in c}
        ours |= {"eps": c["eps"] or OPTIONS["eps"].default, "noise_on": list(c["noise_on"])}
        if c["lr"] == "auto":
            ours |= {"find_lr": True, "learning_rate": RELATIVE_LR}
        args = PseuZOTrainingArguments(
            output_dir=str(output),
            **ours,
            weight_decay=c["weight_decay"],
            max_steps=c["steps"],
            per_device_train_batch_size=c["batch_size"] // row_parts(c),
            per_device_eval_batch_size=c["eval_batch_size"],
            seed=c["seed"],
            data_seed=c["seed"],
            use_cpu=torch.device(c["device"]).type == "cpu",
            logging_steps=c["log_every"],
            logging_first_step=True,
            eval_strategy="steps" if every else "no",
            eval_steps=every or None,
            eval_on_start=bool(every and not c["resume"]),
            save_strategy="steps" if c["save_every"] else "no",
            save_steps=c["save_every"] or 500,
            save_total_limit=2,
            load_best_model_at_end=c["keep"] == "best",
            metric_for_best_model=f"eval_{self.task.metric}" if every else None,
            greater_is_better=True,
            report_to=list(c["report_to"]),
            disable_tqdm=c["quiet"] or not self.together.is_root,
            ddp_timeout=c["ddp_timeout"],
            dataloader_pin_memory=c["device"] != "cpu",
        )
        # The Trainer saves the tokenizer of a collator with each checkpoint. As processing_class,
        # it would also have its special tokens written into the model's config.
        collate: Any = partial(self.data["train"].collate)
        collate.tokenizer = self.tokenizer
        trainer = PseuZOTrainer(model, args, collate, self.data["train"], self.data["dev"])
        if c["quiet"]:
            trainer.remove_callback(PrinterCallback)
        return trainer


def load(c: dict[str, Any], task: Task) -> tuple[torch.nn.Module, Any]:
    """The model that the settings name, of the kind that they say, and its tokenizer."""
    own = {name: c[name] for name in ("dtype", "device", "seed")}
    labels = [str(word) for word in task.labels.values()] or None
    return load_model(model_path(c["model"]), kind=c["model_kind"], labels=labels, **own)


def _task(c: dict[str, Any]) -> Task:
    task = load_task(c["task"])
    return task if c["chat"] is None else replace(task, chat=c["chat"])


def check_integrations(names: Collection[str]) -> None:
    """Raise ValueError unless each integration of Transformers that --report-to names works
    here."""
    if list(names) in (["all"], ["none"]):
        return
    # This raises ValueError for unknown names.
    callbacks = zip(names, get_reporting_integration_callbacks(list(names)), strict=True)
    installed = get_available_reporting_integrations()
    for name, callback in callbacks:
        if name not in installed:
            try:
                callback()  # raises now what the Trainer would raise after loading the model
            except (ImportError, RuntimeError) as error:
                raise ValueError(f"--report-to {name}: {one_line(error)}") from None


def resolve(c: dict[str, Any]) -> dict[str, Any]:
    """Fill in every default. ValueError for settings that cannot be used."""
    c = dict(c)
    if _C:
        _C.cpu_isa()  # refuses a PSEUZO_CPU_ISA that this CPU does not have
    zeroth = c["method"] in ZEROTH_ORDER
    placed = list(c["noise_on"]) != ["all"]
    perturbs = c["method"] in methods_with("eps")
    if c["eps"] is None and (perturbs or placed):  # other runs need it for probing alone
        c["eps"], c["scale_eps"] = MODES[c["mode"]].eps, perturbs and placed
    if c["lr"] is None and list(c["noise_on"]) == ["auto"]:
        c["lr"] = "auto"
    if c["lr"] is None:
        # The size of a step that is free of the slope has no equal change of the loss to keep.
        scales = not zeroth or METHODS[c["method"]].rate == "lr"
        c["lr"], c["scale_lr"] = default_rate(c["method"], c["mode"]), placed and scales
    c.setdefault("scale_lr", False)
    c.setdefault("scale_eps", False)
    check_integrations(c["report_to"])
    c["device"] = str(usable_device(c["device"]))
    if c["journal"]:
        # The path in config.yaml must not depend on the current folder.
        c["journal"] = os.path.abspath(c["journal"])
    if c["offload"] != "none" and torch.device(c["device"]).type == "cpu":
        print("--offload: --device cpu uploads into other host memory", file=sys.stderr, flush=True)
    if c["capture"]:
        check_device("--capture", torch.device(c["device"]))
    if c["data_seed"] is None:
        c["data_seed"] = c["seed"]
    races = list(c["noise_on"]) == ["auto"] or (c["lr"] == "auto" and c["readout"] != "none")
    steps = int(c["steps"] * (1 - c["search_share"] * races))  # the others' passes it may take
    if c["eval_every"] is None:
        c["eval_every"] = max(1, steps // 10)
    if c["save_every"] is None:
        c["save_every"] = c["eval_every"] or max(1, steps // 10)
    if c["log_every"] is None:
        c["log_every"] = max(1, steps // 100)
    if c["keep"] == "best":
        if not c["eval_every"]:
            raise ValueError(
                "--keep best needs evaluations: --eval-every must not be 0; or use --keep last"
            )
        if not c["save_every"] or c["save_every"] % c["eval_every"]:
            raise ValueError(
                "--keep best needs a checkpoint at evaluations: --save-every must be a multiple of "
                f"--eval-every ({c['eval_every']}), got {c['save_every']}; or use --keep last"
            )
    return c


def train(c: dict[str, Any]) -> dict[str, Any] | None:
    """Run `pseuzo train` with settings c. Return the results, as written to results.json; None on
    another rank than 0, which alone writes and prints."""
    together = join(c["device"], c["ddp_timeout"], c["direction_ranks"])
    with together.one_speaks(), ExitStack() as lock:
        c = together.agreed(lambda: resolve(c))
        together.alike(lambda: facts(c))
        output = Path(c["output"])
        resume, run_id = together.of_root(
            lambda: lock.enter_context(start_folder(output, c["resume"]))
        )
        together.agreed(lambda: check_shared(output, together.rank))
        results = _train(c | {"resume": resume}, output, run_id, together)
    leave(together)
    return results


def _train(
    c: dict[str, Any], output: Path, run_id: str, together: Together
) -> dict[str, Any] | None:
    new, newest = not c["resume"], c["resume"] == "auto"
    if c["resume"]:
        c |= together.of_root(lambda: changes(c, resumed(c, output, run_id)))
    made: list[Path] = []
    if new:
        together.of_root(lambda: made.extend(to_make(output, c["journal"])))
    journal = Path(c["journal"]) if c["journal"] else None
    trainer = None
    try:
        with ExitStack() as lock:
            if journal:
                # The lock keeps other runs from taking the journal while the model loads.
                together.of_root(lambda: lock.enter_context(held(journal)))
            run = together.agreed(lambda: Run(c, together))
            together.alike(lambda: {f"{name} rows": digest(x) for name, x in run.examples.items()})
            model, trainer = together.agreed(lambda: _prepared(run, output))
            c = run.c
            starts_again = journal and newest and not c["resume"]
        if starts_again and trainer.zero_order and trainer.zero_order.history is None:
            together.of_root(lambda: set_aside(c["journal"]))
        trainer.run_id, trainer.follows = run_id, newest
        trainer.found_whole = c["resume"] if newest else None
        reset_peak(c["device"])
        outcome = trainer.train(resume_from_checkpoint=c["resume"])
    except Exception:
        if new and together.is_root and not (trainer and trainer.state.global_step):
            undo(output, made, journal, run_id)
        raise
    peak = peak_memory(c["device"])  # covers the steps and the evaluations between them
    figures = evaluate(model, run.data["test"], batch_size=c["eval_batch_size"], together=together)

    def finish() -> dict[str, Any]:
        if not math.isfinite(figures["loss"]):
            print(
                f"the run diverged: the loss on the test rows is {figures['loss']}; a smaller "
                "--lr, or another --dtype",
                file=sys.stderr,
            )
        results = results_of(run, trainer, outcome.global_step, figures, peak)
        save_model(model, run.tokenizer, output / "model")
        write_json(output / "results.json", results)
        written = read_json(output / "results.json")  # there, numbers that are not finite are null
        plot_runs({output.name: written}, output / "curves.png")
        return results

    results = together.of_root(finish)
    return results if together.is_root else None


def _prepared(run: Run, output: Path) -> tuple[torch.nn.Module, PseuZOTrainer]:
    """Return the model and the trainer of a run. Whatever may be refused before the first step is
    refused here, before config.yaml marks the folder as a run's."""
    c = run.c
    model = run.model()
    # A head that a classifier lacked is drawn by the seed of the run.
    adds_weights = not MODES[c["mode"]].starts_from_base or run.kind != "causal"
    if c["journal"] and adds_weights and not (output / "start").exists() and run.together.is_root:
        # A replay of the journal starts from this model.
        save_model(model, run.tokenizer, output / "start")
    trainer = run.trainer(model, output)
    trainer.create_optimizer()
    if plan := getattr(trainer.zero_order, "schedule", Schedule()).plan():
        print(plan, flush=True)
    if run.together.is_root:
        write_atomically(output / "config.yaml", yaml.safe_dump(plain(c), sort_keys=True))
    return model, trainer


def evaluate_run(c: dict[str, Any]) -> dict[str, Any]:
    """Run `pseuzo eval`: zero-shot, or with `shots` training rows before every prompt."""
    task = _task(c)
    if c["sfc"] and (why_not := no_calibration(task)):
        raise ValueError(why_not)
    examples = task.load(
        c["data"],
        train=c["train_size"],
        dev=c["dev_size"],
        test=c["test_size"],
        seed=c["seed"] if c["data_seed"] is None else c["data_seed"],
    )
    model, tokenizer = load(c, task)
    shots = examples["train"][: c["shots"]]
    data = TaskData(
        examples["test"],
        task,
        tokenizer,
        max_length=max_length(model, c["max_length"]),
        shots=shots,
        kind=kind_of(model),
    )
    fit = cut_prompts(data, "test")
    if fit["shots_least"] < c["shots"]:
        used = f"{fit['shots_mean']:.1f} on average, {fit['shots_least']} at least"
        room = f"{len(examples['train'])} training rows, {data.max_length} tokens"
        print(
            f"--shots {c['shots']}: a prompt has {used}, as there are {room}",
            file=sys.stderr,
            flush=True,
        )
    figures = evaluate(
        model, data, batch_size=c["eval_batch_size"], progress=not c["quiet"], sfc=c["sfc"]
    )
    if not math.isfinite(figures["loss"]):
        print(
            f"the loss on the test rows is {figures['loss']}, as the model's logits are not finite "
            "(its run may have diverged); the figures have null in its place",
            file=sys.stderr,
            flush=True,
        )
    return {
        "task": task.name,
        "metric": task.metric,
        "model": c["model"],
        "shots": c["shots"],
        "sfc": c["sfc"],
        **fit,
        "seed": c["seed"],
        "test": figures,
    }
