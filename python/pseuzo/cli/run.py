"""A training run from its settings: model, task, data, trainer, results. What `pseuzo train` and `pseuzo eval` do.

A run's folder: config.yaml (every setting, as resolved), results.json (figures and history), curves.png, model/
(what Transformers or peft loads), checkpoint-N/ (likewise, and to resume from); noise_on.json and lr.json where those
were searched for; start/, a mode's first weights, where there is a journal; and .pseuzo, which says that it is ours.
"""

import gc
import math
import os
import shutil
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import PrinterCallback
from transformers.integrations import (
    get_available_reporting_integrations,
    get_reporting_integration_callbacks,
)

from pseuzo.cli.plots import plot_runs
from pseuzo.files import (
    MARKER,
    check_saving,
    claim,
    differing,
    read_json,
    read_yaml,
    save_model,
    write_atomically,
    write_json,
    write_model,
)
from pseuzo.machine import hardware, peak_memory, reset_peak, usable_device
from pseuzo.models.loading import load_model
from pseuzo.models.modes import MODES, tune
from pseuzo.perturb.graphs import check_device
from pseuzo.tasks import Task, TaskData, evaluate, load_task
from pseuzo.train.arguments import PseuZOTrainingArguments
from pseuzo.train.checkpoints import last_checkpoint
from pseuzo.train.journal_file import JournalError, held, owner
from pseuzo.train.methods import ZEROTH_ORDER, default_rate
from pseuzo.train.noise_on import PLACEMENT_FILE
from pseuzo.train.trainer import PseuZOTrainer
from pseuzo_kernels import _C

EMBEDDED = "demo"  # the name of the embedded model, and of the task on its text
LR_FILE = "lr.json"
ROWS = ("data_seed", "train_size", "dev_size", "test_size")  # decide which rows are drawn
DECISIONS = (LR_FILE, PLACEMENT_FILE, "start")  # what a run writes before it begins
MAY_CHANGE = {"steps", "eval_every", "save_every", "log_every", "eval_batch_size", "test_size", "quiet", "report_to",
              "device", "output"}  # fmt: skip
EVALUATED, TRIALS = (
    200,
    10,
)  # of the search for lr: dev examples of a trial, and most rates on the way up or down


def model_path(name: str) -> str:
    """The folder of the embedded model for its name, else the name itself."""
    if name != EMBEDDED:
        return name
    from pseuzo.demo.run import ASSETS

    return str(ASSETS / "model")


class Run:
    """Task, data and model of one run's settings `c` (the options of `pseuzo train`, as a mapping)."""

    def __init__(self, c: dict[str, Any]):
        self.c = c
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
        """The model as it starts, in its tuning mode; the data too, the first time."""
        c = self.c
        gc.collect()  # a trainer and its callbacks hold each other, and the model of the trial before
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        model, self.tokenizer = load_model(
            model_path(c["model"]), dtype=c["dtype"], device=c["device"]
        )
        model = tune(
            model, c["mode"], lora_r=c["lora_r"], lora_alpha=c["lora_alpha"], prefix_tokens=c["prefix_tokens"],
            seed=c["seed"],
        )  # fmt: skip
        if not self.data:
            check_saving(partial(write_model, model, self.tokenizer), model, Path(c["output"]))
            self.longest = max_length(model, c["max_length"])
            self.data = {split: self.part(split) for split in self.examples}
            self.cut = {
                split: cut_prompts(data, split)["cut_prompts"] for split, data in self.data.items()
            }
        return model

    def part(self, split: str, most: int | None = None) -> TaskData:
        """The first examples of a split (all of them if most is None), as the model's tokens."""
        return TaskData(
            self.examples[split][:most],
            self.task,
            self.tokenizer,
            max_length=self.longest,
            train_on=self.c["train_on"],
        )

    def trainer(self, model: torch.nn.Module, output: Path, **changes: Any) -> PseuZOTrainer:
        c = self.c | changes
        every = c["eval_every"]
        args = PseuZOTrainingArguments(
            output_dir=str(output), method=c["method"], learning_rate=c["lr"], eps=c["eps"] or 1e-3, window=c["window"],
            momentum=c["momentum"], schedule=c["schedule"], directions=c["directions"], two_sided=c["two_sided"],
            noise=c["noise"], rounding=c["rounding"], groups=c["groups"], noise_on=list(c["noise_on"]),
            scale_lr=c["scale_lr"], scale_eps=c["scale_eps"], clip_examples=c["clip_examples"], head=c["head"],
            head_lr=c["head_lr"], objective=c["objective"], journal=c["journal"], capture=c["capture"],
            weight_decay=c["weight_decay"],
            max_steps=c["steps"], per_device_train_batch_size=c["batch_size"],
            per_device_eval_batch_size=c["eval_batch_size"], lr_scheduler_type=c["lr_scheduler"],
            seed=c["seed"], data_seed=c["seed"], use_cpu=torch.device(c["device"]).type == "cpu",
            logging_steps=c["log_every"], logging_first_step=True, eval_strategy="steps" if every else "no",
            eval_steps=every or None, eval_on_start=bool(every and not c["resume"]),
            save_strategy="steps" if c["save_every"] else "no",
            save_steps=c["save_every"] or 500, save_total_limit=2, load_best_model_at_end=c["keep"] == "best",
            metric_for_best_model=f"eval_{self.task.metric}" if every else None, greater_is_better=True,
            report_to=list(c["report_to"]), disable_tqdm=c["quiet"], dataloader_pin_memory=c["device"] != "cpu",
        )  # fmt: skip
        # the Trainer saves a collator's tokenizer with each checkpoint; as processing_class it would also write the
        # tokenizer's special tokens into the model's config
        collate = partial(self.data["train"].collate)
        collate.tokenizer = self.tokenizer
        trainer = PseuZOTrainer(model, args, collate, self.data["train"], self.data["dev"])
        if c["quiet"]:
            trainer.remove_callback(PrinterCallback)
        return trainer


def _task(c: dict[str, Any]) -> Task:
    task = load_task(c["task"])
    return task if c["chat"] is None else replace(task, chat=c["chat"])


def cut_prompts(data: TaskData, split: str) -> dict[str, float]:
    """data.fit of what is trained on or measured, and a line on stderr if prompts lost their beginning."""
    fit = data.fit(data.train_on if split == "train" else None)
    if fit["cut_prompts"]:
        many = f"{fit['cut_prompts']} of {len(data)} prompts of the {split} split were too long"
        print(
            f"{many} for {data.max_length} tokens and lost their beginning",
            file=sys.stderr,
            flush=True,
        )
    return fit


def max_length(model: torch.nn.Module, wanted: int | None = None) -> int:
    """Tokens of a sequence: wanted, or 2048 at most. ValueError if the model has not so many positions, less those of a
    learned prefix."""
    adapter = getattr(model, "active_peft_config", None)
    reserved = adapter.num_virtual_tokens if getattr(adapter, "is_prompt_learning", False) else 0
    positions = getattr(model.config, "max_position_embeddings", None) or getattr(
        model.config, "n_positions", None
    )
    most = positions - reserved if positions else None
    if wanted and most and wanted > most:
        raise ValueError(f"--max-length {wanted} is more than the model has positions for, {most}")
    return wanted or min(2048, most or 2048)


def check_integrations(names: Collection[str]) -> None:
    """ValueError unless each of Transformers' integrations, by the names of --report-to, can be reported to here."""
    if list(names) in (["all"], ["none"]):
        return
    callbacks = zip(
        names, get_reporting_integration_callbacks(list(names)), strict=True
    )  # ValueError: unknown names
    installed = get_available_reporting_integrations()
    for name, callback in callbacks:
        if name not in installed:
            try:
                callback()  # which raises what the Trainer would raise after the model was loaded
            except (ImportError, RuntimeError) as error:
                raise ValueError(f"--report-to {name}: {' '.join(str(error).split())}") from None


def resolve(c: dict[str, Any]) -> dict[str, Any]:
    """The settings with every default filled in. ValueError for those that cannot be."""
    c = dict(c)
    if _C:
        _C.cpu_isa()  # refuses a PSEUZO_CPU_ISA that this CPU has not
    zeroth = c["method"] in ZEROTH_ORDER
    placed = list(c["noise_on"]) != ["all"]
    if c["eps"] is None and (zeroth or placed):  # a first-order run probes with it, and no more
        c["eps"], c["scale_eps"] = MODES[c["mode"]].eps, zeroth and placed
    if c["lr"] is None:
        c["lr"], c["scale_lr"] = default_rate(c["method"], c["mode"]), placed
    elif c["lr"] != "auto" and not float(c["lr"]) > 0:
        raise ValueError(f"--lr must be positive, got {c['lr']}")
    c.setdefault("scale_lr", False)
    c.setdefault("scale_eps", False)
    check_integrations(c["report_to"])
    c["device"] = str(usable_device(c["device"]))
    if c["journal"]:
        c["journal"] = os.path.abspath(
            c["journal"]
        )  # in config.yaml it must not depend on the present folder
    if c["capture"]:
        check_device("--capture", torch.device(c["device"]))
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
            raise ValueError(
                "--keep best needs evaluations: --eval-every must not be 0; or use --keep last"
            )
        if not c["save_every"] or c["save_every"] % c["eval_every"]:
            raise ValueError(
                f"--keep best needs a checkpoint at evaluations: --save-every must be a multiple of --eval-every "
                f"({c['eval_every']}), got {c['save_every']}; or use --keep last"
            )
    return c


def _remove(*paths: Path) -> None:
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


@contextmanager
def start_folder(output: Path, resume: str | None) -> Iterator[tuple[str | None, str]]:
    """Make the folder of a run, and keep it to ourselves: new or empty, or that of a run to resume. Gives resume, or
    None where there is nothing to go on with yet; and the identifier of the run."""
    config = output / "config.yaml"
    if resume not in (None, "auto") and not (config.exists() and Path(resume).is_dir()):
        raise ValueError(f"--resume {resume}: that is no checkpoint of a run in {output}")
    with claim(output, "train") as run_id:
        begun = config.exists()
        if begun and not resume:
            raise ValueError(
                f"{output} is not empty; choose another folder, or --resume to go on with the run in it"
            )
        if not begun:
            if resume:
                print(f"{output} holds no run to resume: beginning a new one", flush=True)
            # of a try that did not get to its first step; the trials of a search for lr are gone on with
            _remove(*(output / name for name in DECISIONS if not (resume and name == LR_FILE)))
        yield resume if begun else None, run_id


def _to_make(output: Path, journal: str | None) -> list[Path]:
    """What a new run will make before its first step. Its journal is made here, empty: nobody else may take it for
    theirs meanwhile."""
    made = [output / name for name in ("config.yaml", *DECISIONS) if not (output / name).exists()]
    if journal:
        try:
            open(journal, "xb").close()
            made.append(Path(journal))
        except FileExistsError:
            pass
    return made


def _undo(output: Path, made: list[Path], journal: Path | None, run_id: str) -> None:
    """Leave nothing of a new run that failed before its first step, so that nothing is in the way of the next try."""
    _remove(*(path for path in made if path != journal))
    if journal in made:
        with suppress(JournalError), held(journal):  # another run may have taken it in the meantime
            if owner(journal) in ((None, 0), (run_id, 0)):
                journal.unlink()
    if list(output.iterdir()) == [output / MARKER]:
        _remove(output / MARKER)


def _same_run(c: dict[str, Any], output: Path) -> None:
    """ValueError if the settings are not those of the run in output."""
    config, now = read_yaml(output / "config.yaml"), plain(c)
    if (
        config.get("journal") and now["journal"]
    ):  # the file may have been moved: _own_journal looks at it
        now["journal"] = config["journal"]
    if found := differing(config, now, besides=MAY_CHANGE):
        key, before, now = found
        raise ValueError(
            f"the run in {output} has {key} {before}, not {now}: it goes on with its own settings "
            f"(pseuzo train --config {output / 'config.yaml'} --output {output} --resume), or begin a new one"
        )


def _own_journal(c: dict[str, Any], output: Path, run_id: str) -> None:
    """ValueError if c["journal"] is not the journal of the run in output, to be resumed from c["resume"]. Where that is
    None, the run begins anew: then the steps that it recorded are kept under another name."""
    path, before = c["journal"], read_yaml(output / "config.yaml").get("journal")
    run, steps = owner(path)
    if run is None and path == before and not c["resume"]:
        return
    if run != run_id:
        raise ValueError(
            f"the run in {output} records its steps in {before}, and {path} "
            f"{'is not there, or empty' if run is None else 'is the journal of another run'}: put its file back, or "
            f"name it with --journal; to go on without a journal, take the line `journal:` out of {output}/config.yaml"
        )
    if steps and not c["resume"]:
        aside = next(name for n in count(1) if not os.path.exists(name := f"{path}.{n}"))
        with held(path):
            os.rename(path, aside)
        print(
            f"the {steps} step(s) in {path} can be replayed from {aside}, which is kept", flush=True
        )


def _resumed(c: dict[str, Any], output: Path, run_id: str) -> dict[str, Any]:
    """The settings of the run that goes on in output: with the rate that it found, and the checkpoint to begin from."""
    if c["lr"] == "auto" and (output / LR_FILE).exists():
        c = c | _found_lr(read_json(output / LR_FILE, "chosen"))
    _same_run(c, output)
    if c["resume"] == "auto":
        c = c | {"resume": last_checkpoint(output)}
        if (
            c["resume"] is None
        ):  # killed before its first checkpoint: it begins anew, and makes the same steps
            print(f"{output} has no whole checkpoint: beginning anew", flush=True)
    if c["journal"]:
        _own_journal(c, output, run_id)
    return c


def _found_lr(found: dict[str, Any]) -> dict[str, Any]:
    """The settings that a search for lr chose; nothing is scaled any more."""
    return found["chosen"] | {"scale_lr": False, "scale_eps": False}


def train(c: dict[str, Any]) -> dict[str, Any]:
    """Run `pseuzo train` with settings c; its results, as written to results.json."""
    c = resolve(c)
    output = Path(c["output"])
    with start_folder(output, c["resume"]) as (resume, run_id):
        return _train(c | {"resume": resume}, output, run_id)


def _train(c: dict[str, Any], output: Path, run_id: str) -> dict[str, Any]:
    new, newest = not c["resume"], c["resume"] == "auto"
    if c["resume"]:
        c = _resumed(c, output, run_id)
    made = _to_make(output, c["journal"]) if new else []
    journal = Path(c["journal"]) if c["journal"] else None
    trainer = None
    try:
        with (
            held(journal) if journal else nullcontext()
        ):  # nobody else may take it while a model loads
            run = Run(c)
            if c["lr"] == "auto":
                found = search_lr(run, output)
                write_json(output / LR_FILE, found)
                c |= _found_lr(found)
            model = run.model()
            if (
                c["journal"] and c["mode"] != "full" and not (output / "start").exists()
            ):  # what its replay begins with
                save_model(model, run.tokenizer, output / "start")
            trainer = run.trainer(model, output)
            trainer.create_optimizer()  # what cannot be is refused here, before the folder is that of a run
            write_atomically(output / "config.yaml", yaml.safe_dump(plain(c), sort_keys=True))
        trainer.run_id = run_id
        trainer.found_whole = c["resume"] if newest else None
        reset_peak(c["device"])
        outcome = trainer.train(resume_from_checkpoint=c["resume"])
    except Exception:
        if new and not (trainer and trainer.state.global_step):
            _undo(output, made, journal, run_id)
        raise
    peak = peak_memory(c["device"])  # of the steps and the evaluations between them
    figures = evaluate(model, run.data["test"], batch_size=c["eval_batch_size"])
    if not math.isfinite(figures["loss"]):
        print(f"the run diverged: the loss on the test rows is {figures['loss']}; a smaller --lr, or --lr auto, "
              "or another --dtype", file=sys.stderr)  # fmt: skip
    results = _results(run, trainer, outcome.global_step, figures, peak)
    save_model(model, run.tokenizer, output / "model")
    write_json(output / "results.json", results)
    written = read_json(output / "results.json")  # what is not finite is null there
    plot_runs({output.name: written}, output / "curves.png")
    return results


def _results(
    run: Run, trainer: PseuZOTrainer, steps: int, test: dict[str, float], peak: float
) -> dict[str, Any]:
    c, history, optimizer = run.c, trainer.state.log_history, trainer.zero_order
    seconds = [row["train_seconds"] for row in history if "train_seconds" in row]
    return {
        "task": run.task.name, "metric": run.task.metric, "model": c["model"], "method": c["method"], "mode": c["mode"],
        "test": test, "steps": steps, "forwards": trainer.forwards(steps),
        "train_seconds": seconds[-1] if seconds else None, "lr": trainer.optimizer.defaults["lr"],
        "eps": optimizer.eps if optimizer else None, "cut_prompts": run.cut,
        "best_step": trainer.kept_step, "seed": c["seed"],
        "peak_memory_mib": peak, "hardware": hardware(c["device"]), "torch": torch.__version__,
        "skipped_steps": optimizer.skipped_steps if optimizer else 0, "history": history,
    }  # fmt: skip


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
    chosen: dict[str, Any] = {}
    zeroth = c["method"] in ZEROTH_ORDER
    if zeroth or list(c["noise_on"]) == ["auto"]:
        found = run.trainer(model, output, lr=1.0, scale_lr=False, journal=None).find_placement()
        chosen = {"noise_on": found["noise_on"], "eps": found["eps"]}
    if not zeroth:
        first, factor = default_rate(c["method"], c["mode"]), 4.0
    elif found["curvature"] > 0:
        first, factor = 0.125 / found["curvature"], 2.0
    else:
        raise ValueError(
            f"--lr auto: the loss does not curve upwards along the noise ({found['curvature']:.3g}), so there is "
            "no scale to begin from; give --lr, or another --eps"
        )
    dev = run.part("dev", EVALUATED)
    start = evaluate(model, dev, batch_size=c["eval_batch_size"])["loss"]
    del model
    file, request = output / LR_FILE, plain(c) | chosen
    before = read_json(file) if file.exists() else {}
    trials: dict[float, float] = {}
    if before.get("request") == request:  # of a search that was killed
        trials = {
            float(lr): math.inf if loss is None else loss for lr, loss in before["trials"].items()
        }
        print(f"{file}: {len(trials)} trials are done already", flush=True)

    def survives(lr: float) -> bool:
        lr = _rounded(lr)
        if lr not in trials:
            model = run.model()
            run.trainer(
                model, output, lr=lr, steps=steps, eval_every=0, save_every=0, keep="last", journal=None, quiet=True,
                report_to=(), scale_lr=False, scale_eps=False, resume=None, **chosen,
            ).train()  # fmt: skip
            loss = evaluate(model, dev, batch_size=c["eval_batch_size"])["loss"]
            trials[lr] = loss if math.isfinite(loss) else math.inf  # null in the file
            write_json(file, {"request": request, "trials": trials})
            print(
                f"lr {lr:.2g}: dev loss {loss:.4f} after {steps} steps, {start:.4f} before",
                flush=True,
            )
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
    chosen |= {"lr": best}
    if "noise_on" in chosen:
        write_json(output / PLACEMENT_FILE, found | chosen)
    return {"request": request, "steps": steps, "start": start, "trials": trials, "chosen": chosen}


def _rounded(lr: float) -> float:
    return float(f"{lr:.2g}")


def rows_of_run(model: str, task: str, data: Any) -> tuple[Path, dict[str, int]] | None:
    """The run in whose folder the model is, with the settings that decided which rows it was trained on, and whether
    they were asked as in a chat; None if there is none, or if it was of another task or other data."""
    folder = Path(model).expanduser()
    if model == EMBEDDED or not folder.is_dir():
        return None
    run = folder.resolve().parent
    if not (run / MARKER).is_file() or not (run / "config.yaml").is_file():
        return None
    config = read_yaml(run / "config.yaml")
    names = {"task": str(task), "data": None if data is None else str(data)}
    for key, name in names.items():  # by name: either path may be relative, to another directory
        other = config.get(key)
        if not isinstance(other, str | None) or Path(other or "").name != Path(name or "").name:
            return None
    kinds = dict.fromkeys(ROWS, int) | {"chat": bool}
    return run, {key: config[key] for key, kind in kinds.items() if type(config.get(key)) is kind}


def evaluate_run(c: dict[str, Any]) -> dict[str, Any]:
    """Run `pseuzo eval`: zero-shot, or with `shots` examples of the training rows before every prompt."""
    task = _task(c)
    examples = task.load(
        c["data"], train=c["train_size"], dev=c["dev_size"], test=c["test_size"],
        seed=c["seed"] if c["data_seed"] is None else c["data_seed"],
    )  # fmt: skip
    model, tokenizer = load_model(model_path(c["model"]), dtype=c["dtype"], device=c["device"])
    shots = examples["train"][: c["shots"]]
    data = TaskData(
        examples["test"],
        task,
        tokenizer,
        max_length=max_length(model, c["max_length"]),
        shots=shots,
    )
    fit = cut_prompts(data, "test")
    if fit["shots_least"] < c["shots"]:
        used = f"{fit['shots_mean']:.1f} on average, {fit['shots_least']} at least"
        room = f"{len(examples['train'])} training rows, {data.max_length} tokens"
        print(
            f"of {c['shots']} shots, before a prompt were {used}: there are {room}",
            file=sys.stderr,
            flush=True,
        )
    figures = evaluate(model, data, batch_size=c["eval_batch_size"], progress=not c["quiet"])
    if not math.isfinite(figures["loss"]):
        print(f"the loss on the test rows is {figures['loss']}: the model's logits are not finite, as after a run that "
              "diverged; null stands for it in the figures", file=sys.stderr, flush=True)  # fmt: skip
    return {
        "task": task.name, "metric": task.metric, "model": c["model"], "shots": c["shots"], **fit, "seed": c["seed"],
        "test": figures,
    }  # fmt: skip


def plain(c: dict[str, Any]) -> dict[str, Any]:
    """The settings as YAML takes them, and as --config takes them again."""
    c = {k: v for k, v in c.items() if k not in ("resume", "scale_lr", "scale_eps")} | {
        key: None
        for key in ("lr", "eps")
        if c.get(f"scale_{key}")  # what they are is in noise_on.json
    }
    return {
        k: str(v) if isinstance(v, os.PathLike) else list(v) if isinstance(v, tuple) else v
        for k, v in c.items()
    }
