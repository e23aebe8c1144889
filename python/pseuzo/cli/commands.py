"""The commands: `pseuzo`, or `python -m pseuzo`.

Exit codes: 0 done; 2 what was asked for cannot be done, one sentence on stderr says why; 130
interrupted; 1 a bug. Whatever takes long to import is imported in the command that needs it.
"""

import copy
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from pseuzo.cli import compare_settings as asked
from pseuzo.cli import settings as checks
from pseuzo.cli.config import configured, with_recipe
from pseuzo.cli.errors import Failure, plainly
from pseuzo.cli.options import (
    COMPARE_OPTIONS,
    DATA_OPTIONS,
    FILE,
    FOLDER,
    RUN_OPTIONS,
    SEED,
    Device,
    option,
)
from pseuzo.launch import rank, refuse_launched


class Commands(click.Group):
    """A group that also reports errors plainly while it reads the options of a command."""

    def invoke(self, ctx: click.Context) -> Any:
        return plainly(self._invoke)(ctx)

    def _invoke(self, ctx: click.Context) -> Any:
        # Import numpy before torch, which mistakes a Ctrl-C during this import for a missing numpy.
        import numpy  # noqa: F401

        return super().invoke(ctx)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="pseuzo")
def main() -> None:
    """Fine-tune language models by forward passes alone, in the memory of inference."""


@configured
@with_recipe
@main.command()
@DATA_OPTIONS
@RUN_OPTIONS
@option(
    "--output", type=FOLDER, required=True, help="Folder for results; must be empty or not exist."
)
@click.option(
    "--resume",
    "--resume_from_checkpoint",
    "--resume-from-checkpoint",
    is_flag=False,
    flag_value="auto",
    metavar="[CHECKPOINT]",
    help="Resume the run in --output from its last (or this) checkpoint, with the same bits as if "
    "it had never stopped. Its journal, if it has one, spares the steps since then.",
)
@functools.partial(
    plainly,
    interrupted="interrupted; --resume continues the run from its last checkpoint, or starts it "
    "again if it has none",
)
def train(**settings: Any) -> None:
    """Fine-tune a model on a task.

    \b
    pseuzo train --model facebook/opt-1.3b --task sst2 --dtype bf16 --output run
    pseuzo train --model demo --task demo --method mezo --lr 4e-4 --steps 300 --output run
    pseuzo train --config examples/opt-1.3b-sst2.yaml --output run

    Writes config.yaml, results.json, curves.png, checkpoints and model/ into --output. If the run
    does not converge, try --lr auto, --noise-on attention-out or --clip-examples 2. If the final
    loss on the test rows is not finite, a line on stderr says that the run diverged.
    """
    checks.leave_out_unused(settings, train_defaults())
    checks.check_combination(settings)
    checks.check_launched(settings)
    checks.check_journal(settings)
    from pseuzo.cli import run as runs

    if settings["quiet"] or rank():
        hush()
    results = runs.train(settings)
    if results is None:
        return
    figures = ", ".join(f"{k} {v:.4g}" for k, v in results["test"].items())
    click.echo(
        f"test: {figures}; {results['steps']} steps, {results['forwards']} forward passes; the "
        f"model is in {settings['output']}/model"
    )
    if checks.could_take_auto(settings) and stood_still(results):
        click.echo("the training loss did not fall: try --lr auto, or a larger --lr")
    best = results.get("best_step")
    if settings["keep"] == "best" and best and best != results["steps"]:
        journal = settings["journal"]
        replay = f": pseuzo replay --until {best} makes it" if journal and journal.exists() else ""
        click.echo(f"model/ is step {best}, the best checkpoint on the dev rows{replay}")


def stood_still(results: Mapping[str, Any]) -> bool:
    """Whether the training loss fell by less than 2 %, from the first fifth of the rows to the
    last; False where there are fewer than five."""
    losses = [row["loss"] for row in results["history"] if row.get("loss") is not None]
    n = len(losses) // 5
    return n > 0 and sum(losses[-n:]) > 0.98 * sum(losses[:n])


def train_defaults() -> dict[str, Any]:
    """Return the settings of `pseuzo train` when only the required options are given."""
    required = ["--model", "", "--task", "", "--output", "run"]
    return train.make_context("train", required).params


@configured
@main.command(name="eval")
@DATA_OPTIONS
@option(
    "--shots", type=click.IntRange(min=0), default=0, help="Answered examples before each prompt."
)
@option(
    "--sfc",
    is_flag=True,
    help="Calibrate the scores of the options by those after the task's sfc template.",
)
@option("--output", type=FILE, help="Write the figures to this JSON file, too.")
@plainly
def evaluate(**settings: Any) -> None:
    """Evaluate a model on a task: zero-shot, or in context with --shots.

    \b
    pseuzo eval --model run/model --task sst2
    pseuzo eval --model facebook/opt-1.3b --task sst2 --shots 32

    A model in the folder of its run is evaluated on that run's test rows, unless sizes or
    --data-seed are given.
    """
    refuse_launched("pseuzo eval")
    from pseuzo.cli import run as runs
    from pseuzo.files import to_json, write_json

    if settings["quiet"]:
        hush()
    checks.take_rows_of_run(settings)
    figures = runs.evaluate_run(settings)
    if settings["output"]:
        settings["output"].parent.mkdir(parents=True, exist_ok=True)
        write_json(settings["output"], figures)
    click.echo(to_json(figures))


@main.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@option("--output", type=FILE, default="curves.png", help="The PNG to write.")
@plainly
def plot(runs: tuple[Path, ...], output: Path) -> None:
    """Overlay the curves of finished runs in one PNG."""
    from pseuzo.cli.plots import plot_runs, read_results

    names = [run.name if [r.name for r in runs].count(run.name) == 1 else str(run) for run in runs]
    plot_runs({name: read_results(run) for name, run in zip(names, runs, strict=True)}, output)
    click.echo(f"{len(runs)} run(s) in {output}")


@configured
@main.command()
@DATA_OPTIONS
@RUN_OPTIONS
@COMPARE_OPTIONS
@option(
    "--output", type=FOLDER, required=True, help="Folder; finished runs in it are not run again."
)
@functools.partial(
    plainly, interrupted="interrupted; the same command continues with the runs that are not done"
)
def compare(report: bool, output: Path, **settings: Any) -> None:
    """Compare methods fairly: equal forward passes, equal tuning, several seeds, and tuned MeZO
    always among them.

    \b
    pseuzo compare --model demo --task demo --output compared \\
        --methods pseuzo --methods mezo:noise_on=attention-out
    pseuzo compare --config examples/compare-demo.yaml --output compared
    pseuzo compare --report --output compared

    Appends a line per run to ledger.jsonl, and makes table.md, compare.json and plots from it. The
    same command continues a comparison that was killed. --config may have several `tasks`.
    """
    refuse_launched("pseuzo compare")
    from pseuzo.cli import compare as comparing
    from pseuzo.cli.printing import print_comparison

    if report:
        print_comparison(comparing.report(output), output)
        return
    options = {p.name: p for p in train.params if p.name not in {"config", *asked.COMPARED}}
    request = asked.read_request(settings, options, train_defaults(), click.echo)
    summary = comparing.compare(request, output, progress=click.echo)
    print_comparison(summary, output)


def _free(p: click.Parameter) -> click.Parameter:
    """The option as one that may be missing: `tasks` of --config may give it."""
    p = copy.copy(p)
    p.required = False
    return p


compare.params = [
    _free(p) if p.name in ("model", "task") else p
    for p in compare.params
    if p.name not in asked.COMPARED - {"output"}
]


def hush() -> None:
    """Hide the progress bars and the warnings of Transformers."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@main.command()
@option(
    "--output",
    "--out",
    "out",
    type=FOLDER,
    default="pseuzo-demo",
    help="Folder for summary.json, metrics.jsonl, curves.png and model/.",
)
@option(
    "--steps",
    type=click.IntRange(min=1),
    default=300,
    help="Steps of each method; a step is two forward passes.",
)
@option("--batch-size", type=click.IntRange(min=2), default=16)
@option("--seed", type=SEED, default=0, help="Seed of the batches and the perturbations.")
@option(
    "--method",
    "methods",
    multiple=True,
    metavar="NAME",
    help="Only this method; may be given several times. Default: all four.",
)
@option("--device", type=Device(), help="cpu or cuda. Default: cuda where there is one.")
@plainly
def demo(
    out: Path, steps: int, batch_size: int, seed: int, methods: tuple[str, ...], device: str | None
) -> None:
    """Fine-tune an embedded OPT of a million parameters in about a minute.

    The task is to tell whether a line of the Python standard library is code or docstring prose.
    MeZO, PseuZO with rows paired as published and by label, and MeZO with noise on a tenth of the
    weights start from the same pretrained model and see the same batches. Prints what each reached.
    """
    refuse_launched("pseuzo demo")
    from pseuzo.cli.printing import print_demo
    from pseuzo.demo import run as demo_run
    from pseuzo.machine import usable_device

    known = [m.name for m in demo_run.METHODS]
    for name in methods:
        if name not in known:
            raise click.UsageError(f"unknown method {name!r}; known: {', '.join(known)}")
    try:
        where = usable_device(device)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    summary = demo_run.run(out, list(methods) or known, steps, batch_size, seed, where)
    print_demo(summary, out)


@main.command()
@option(
    "--base", required=True, help="The model the run started from: a folder, or a name on the hub."
)
@option(
    "--journal",
    required=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="What the run wrote (pseuzo.Journal).",
)
@option(
    "--output", required=True, type=FOLDER, help="Folder for the model; must be empty or not exist."
)
@option(
    "--until", type=click.IntRange(min=0), help="Stop before this step. Default: the whole journal."
)
@option(
    "--salvage",
    is_flag=True,
    help="Where the journal is damaged, stop there, and say what is lost.",
)
@option(
    "--device",
    type=Device(),
    default="cpu",
    help="Where to compute; the bits are the same anywhere (noise normal: on the same backend).",
)
@plainly
def replay(
    base: str, journal: Path, output: Path, until: int | None, salvage: bool, device: str
) -> None:
    """Rebuild fine-tuned weights from the base model and the journal of the run, bit for bit.

    Where the run wrote a folder start/, that folder is the base.
    """
    refuse_launched("pseuzo replay")
    import warnings

    from tqdm import tqdm

    from pseuzo.cli.run import model_path
    from pseuzo.files import save_model
    from pseuzo.models.loading import DTYPES, load_model
    from pseuzo.train.journal_file import read_journal
    from pseuzo.train.replay import replay as replay_journal

    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise Failure(f"{output} is not empty; choose another folder")
    header, records = read_journal(journal, until=until, salvage=salvage)
    with warnings.catch_warnings(record=True) as left_out:
        warnings.simplefilter("always")
        steps = sum(1 for _ in records)
    for warning in left_out:
        click.echo(str(warning.message), err=True)
    dtypes = {str(dtype).removeprefix("torch."): name for name, dtype in DTYPES.items()}
    model, tokenizer = load_model(
        model_path(base), dtype=dtypes[header["dtype"]], device=device, need_tokenizer=False
    )
    with tqdm(total=steps, desc="replay", unit="step") as bar, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they were printed above
        step = replay_journal(
            journal, model, until=until, salvage=salvage, progress=lambda record: bar.update()
        )
    save_model(model, tokenizer, output)
    click.echo(f"{steps} steps replayed, up to step {step}; the model is in {output}")


@main.command()
@plainly
def info() -> None:
    """Print versions, what each op runs on and why, the GPU, and a self-test of the kernels."""
    import platform

    import torch
    import transformers

    import pseuzo_kernels as pk
    from pseuzo.cli.selftest import checks

    click.echo(
        f"python {platform.python_version()}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}"
    )
    built = pk._C.build_info() if pk._C else {}
    cpp = (
        f"C++ ({pk._C.cpu_isa()}, of {', '.join(built['isas'])})"
        if pk._C
        else "plain torch (the extension is not built)"
    )
    click.echo(f"noise and window on CPU tensors: {cpp}")
    click.echo(f"noise on CUDA tensors: {pk.backends().cuda}")
    window = f"CUDA {built['cuda']}" if built.get("cuda") else "plain torch (built without nvcc)"
    click.echo(f"window on CUDA tensors: {window}")
    gpus = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        if torch.cuda.is_available()
        else []
    )
    click.echo(f"GPU: {', '.join(gpus) or 'none'}")
    failed = False
    for what, agrees, passed in checks(["cpu", *(["cuda"] if gpus else [])]):
        failed |= not passed
        click.echo(f"self-test, {what}: {agrees if passed else 'DIFFERS'}")
    if failed:
        raise Failure("the kernels disagree with the reference on this machine; please report it")
