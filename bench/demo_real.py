"""Fine-tunes a real language model by forward passes alone, on a CPU in minutes.

python bench/demo_real.py [--model FOLDER] [--task FILE] [--output FOLDER] [TRAIN OPTIONS]

Without options, SmolLM2-135M learns whether a sentence of a film review is praise or blame; `make
real` makes both. It says first how long this will take. Then it evaluates the model on the test
rows, and runs `pseuzo train` with RECIPE, SETTINGS and the options given here, which evaluates
again. It prints the accuracy before and after, time and memory, the answers to the first ASKED test
rows before and after, and the accuracy on the dev rows during the run. The folder is that of any
run, with curves.png, results.json and model/.
"""

import argparse
import itertools
import math
import shlex
import sys
import time
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click
from pseuzo.cli.commands import main as pseuzo
from pseuzo.cli.commands import train
from pseuzo.cli.options import setting_name
from pseuzo.cli.plots import curve
from pseuzo.cli.rows import max_length
from pseuzo.cli.run import load, resolve
from pseuzo.files import read_json
from pseuzo.models.kinds import kind_of
from pseuzo.models.objective import CausalLMObjective
from pseuzo.perturb.offloaded import device_of
from pseuzo.tasks import Task, TaskData, evaluate, load_task
from pseuzo.tasks.task import Example
from pseuzo.train.methods import forwards_per_step
from pseuzo.train.options import OPTIONS
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "real" / "smollm2"
# How the model is trained, where no other option is given.
RECIPE = {"--recipe": "best"}
SETTINGS = {"--steps": "240", "--train-size": "8000", "--dev-size": "200", "--eval-every": "60"}
ASKED = 5
Answer = tuple[str, float]  # the likeliest option, and its probability among the options


def settings_of(arguments: list[str]) -> dict[str, Any]:
    """Return the settings of `pseuzo train` with these arguments."""
    return resolve(train.make_context("train", list(arguments)).params)


def data_of(c: dict[str, Any], task: Task, model: nn.Module, tokenizer: Any) -> dict[str, TaskData]:
    """Return the training and test rows of a run with settings c, which has the same."""
    parts = task.load(
        c["data"],
        train=c["train_size"],
        dev=c["dev_size"],
        test=c["test_size"],
        seed=c["data_seed"],
    )
    own = {"max_length": max_length(model, c["max_length"]), "kind": kind_of(model)}
    return {part: TaskData(parts[part], task, tokenizer, **own) for part in ("train", "test")}


def batch_of(data: TaskData, rows: Iterable[int], model: nn.Module) -> dict[str, Tensor]:
    batch = data.collate([data[i] for i in rows])
    return {k: v.to(device_of(model)) for k, v in batch.items()}


def answers_of(model: nn.Module, data: TaskData) -> list[Answer]:
    """Return the model's answers to the first ASKED rows."""
    model.eval()
    objective = CausalLMObjective(model, data.options, verify="once")
    some = data.examples[:ASKED]
    chances = objective.scores(batch_of(data, range(len(some)), model)).softmax(-1).cpu()
    return [
        (e.options[int(p.argmax())], float(p.max())) for e, p in zip(some, chances, strict=True)
    ]


def forward_seconds(model: nn.Module, data: TaskData, c: dict[str, Any]) -> float:
    """Return the seconds of a forward pass on a batch of the training rows."""
    rows = itertools.islice(data.sampler(c["batch_size"], c["seed"]), c["batch_size"])
    batch = batch_of(data, rows, model)
    objective = CausalLMObjective(model, data.options, verify="once")
    for _ in range(2):  # the first pass also verifies the model
        started = time.perf_counter()
        objective.scores(batch).sum().item()
    return time.perf_counter() - started


def passes(c: dict[str, Any], test_rows: int) -> dict[str, float]:
    """Return the forward passes of the steps, of the evaluations on dev rows between them, and of
    the two on test rows."""
    options = {name: c[setting_name(o)] for name, o in OPTIONS.items() if setting_name(o) in c}
    evaluations = 1 + c["steps"] // c["eval_every"] if c["eval_every"] else 0
    return {
        "steps": c["steps"] * float(forwards_per_step(c["method"], options)),
        "dev": evaluations * math.ceil(c["dev_size"] / c["eval_batch_size"]),
        "test": 2 * math.ceil(test_rows / c["eval_batch_size"]),
    }


def sparkline(values: list[float]) -> str:
    """Return a bar of one character for each value, from the least to the largest."""
    bars, least, span = "▁▂▃▄▅▆▇█", min(values), max(values) - min(values)
    return "".join(bars[round((v - least) / (span or 1) * (len(bars) - 1))] for v in values)


def figures_table(before: dict[str, float], results: dict[str, Any], total: float) -> Table:
    """total: the seconds of everything."""
    table = Table(title=f"{results['model']} on {results['task']}, {results['hardware']}")
    for column in ("", "before", "after"):
        table.add_column(column, justify="right" if column else "left")
    for name in (results["metric"], "loss"):
        cells = (f"{figures[name]:.3f}" for figures in (before, results["test"]))
        table.add_row(f"{name} on {before['examples']} test rows", *cells)
    seconds = results["train_seconds"]
    steps = f"{results['steps']} steps, {results['forwards']:g} forward passes"
    table.add_row(steps, "", clock(seconds))
    table.add_row("evaluations, loading and saving", "", clock(total - seconds))
    table.add_row("peak memory", "", f"{results['peak_memory_mib']:.0f} MiB")
    return table


def answers_table(examples: Sequence[Example], *seen: list[Answer]) -> Table:
    """seen: the answers before and after."""
    table = Table(title=f"The first {len(seen[0])} test rows")
    for column in ("prompt", "right", "before", "after"):
        table.add_column(column)
    for example, *answers in zip(examples, *seen, strict=False):
        right = example.options[example.answer]
        cells = (f"{'✓' if word == right else '✗'} {word} {p:.2f}" for word, p in answers)
        table.add_row(example.prompt, right, *cells)
    return table


def curve_line(results: dict[str, Any]) -> str:
    metric = results["metric"]
    values = curve(results, "step", f"eval_{metric}")[1]
    line = f"{values[0]:.3f} {sparkline(values)} {values[-1]:.3f}" if values else "none"
    return f"{metric} on the dev rows during the run: {line}"


def clock(seconds: float) -> str:
    return f"{int(seconds) // 60} min {int(seconds) % 60} s"


def new_folder() -> Path:
    """Return runs/demo-real, or the first of runs/demo-real-2, ... that is not there yet."""
    base = ROOT / "runs" / "demo-real"
    others = (base.with_name(f"{base.name}-{i}") for i in itertools.count(2))
    return next(path for path in itertools.chain([base], others) if not path.exists())


def run(arguments: list[str], console: Console) -> None:
    started = time.perf_counter()
    c = settings_of(arguments)
    output, task = c["output"], load_task(c["task"])
    model, tokenizer = load(c, task)
    data = data_of(c, task, model, tokenizer)
    test, count = data["test"], passes(c, len(data["test"]))
    seconds = forward_seconds(model, data["train"], c)
    say = partial(console.print, highlight=False, soft_wrap=True)
    say(
        f"{c['model']} learns {task.name}. {c['steps']} steps are {count['steps']:g} forward "
        f"passes of {c['batch_size']} rows, evaluations on dev rows {count['dev']}, before and "
        f"after on {len(test)} test rows {count['test']}. A forward pass takes {seconds:.2f} s "
        f"now, so all this takes about {clock(sum(count.values()) * seconds)}."
    )
    before = evaluate(model, test, batch_size=c["eval_batch_size"], progress=not c["quiet"])
    seen = [answers_of(model, test)]
    del model
    say(f"$ pseuzo train {shlex.join(arguments)}")
    pseuzo(["train", *arguments], standalone_mode=False)
    results = read_json(output / "results.json")
    model, _ = load(c | {"model": str(output / "model")}, task)
    seen.append(answers_of(model, test))
    say(figures_table(before, results, time.perf_counter() - started))
    say(answers_table(test.examples, *seen))
    say(f"{curve_line(results)}\nCurves: {output}/curves.png. Model: {output}/model.")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=str(MODEL))
    parser.add_argument("--task", default=str(ROOT / "examples" / "films.yaml"))
    parser.add_argument("--output", type=Path)
    args, more = parser.parse_known_args()
    own = {"--model": args.model, "--task": args.task, "--output": args.output or new_folder()}
    given = {argument.split("=")[0] for argument in more}
    own |= {name: value for name, value in (RECIPE | SETTINGS).items() if name not in given}
    if args.model == str(MODEL) and not MODEL.is_dir():
        parser.error(f"there is no {MODEL}: run make real, or bench/make_real.py")
    try:
        run([*map(str, itertools.chain(*own.items())), *more], Console())
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except ValueError as error:
        print(f"demo_real: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
