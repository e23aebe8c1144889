"""The command line: `pseuzo`, or `python -m pseuzo`.

Exit codes: 0 done; 2 what was asked for cannot be done, one sentence on stderr says why; 130 interrupted; 1 a bug.
"""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

METHODS = ("pseuzo", "mezo", "mezo-momentum", "fo-sgd", "fo-adam")  # as in pseuzo.trainer, whose import is slow
FOLDER = click.Path(file_okay=False, path_type=Path)
FILE = click.Path(dir_okay=False, path_type=Path)


class Failure(click.ClickException):
    """One sentence and exit code 2."""

    exit_code = 2


def plainly(command: Callable) -> Callable:
    """Refusals become one sentence and exit code 2, an interruption 130. PSEUZO_DEBUG=1 shows where they came from."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except (ValueError, TypeError, OSError, ImportError) as error:
            if os.environ.get("PSEUZO_DEBUG"):
                raise
            raise Failure(" ".join(str(error).split()) or type(error).__name__) from None
        except KeyboardInterrupt:
            click.echo("interrupted; a run of pseuzo train goes on from its last checkpoint with --resume", err=True)
            raise SystemExit(130) from None

    return run


def configured(command: click.Command) -> click.Command:
    """Adds --config FILE: a YAML mapping of the command's own options, which those on the command line override."""

    def read(context: click.Context, parameter: click.Parameter, file: Path | None) -> None:
        if file is None:
            return
        import yaml

        try:
            config = yaml.safe_load(file.read_text())
        except (OSError, yaml.YAMLError) as error:
            raise Failure(f"{file} cannot be read as YAML: {str(error).splitlines()[0]}") from None
        if not isinstance(config, dict):
            raise Failure(f"{file} must hold `option: value` lines")
        config = {str(k).replace("-", "_"): v for k, v in config.items()}
        known = {p.name for p in context.command.params} - {"config"}
        if unknown := sorted(set(config) - known):
            raise Failure(f"{file}: unknown option {unknown[0]!r}; pseuzo {context.info_name} --help lists them all")
        context.default_map = {k: v for k, v in config.items() if v is not None}
        for p in context.command.params:  # one value where several may stand
            if p.name in context.default_map and p.multiple and isinstance(context.default_map[p.name], str):
                context.default_map[p.name] = [context.default_map[p.name]]

    option = click.Option(
        ["--config"], type=click.Path(exists=True, dir_okay=False, path_type=Path), is_eager=True, expose_value=False,
        callback=read, help="YAML file of options (`batch_size: 16`); the command line overrides it.",
    )  # fmt: skip
    command.params.insert(0, option)
    return command


class LearningRate(click.ParamType):
    name = "float|auto"

    def convert(self, value: Any, param: Any, ctx: Any) -> float | str:
        if value == "auto":
            return value
        try:
            return float(value)
        except (TypeError, ValueError):
            self.fail(f"{value!r} is neither a number nor auto", param, ctx)


def options(*decorators: Callable) -> Callable:
    """Several options as one decorator, in the order they are written."""

    def add(command: Callable) -> Callable:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return add


def option(*names: str, **settings: Any) -> Callable:
    if settings.get("default") is not None and not settings.get("is_flag"):
        settings.setdefault("show_default", True)
    return click.option(*names, **settings)


WHAT = options(
    option("--model", required=True, help="A causal LM: a name on the hub, a folder, or demo, the embedded one."),
    option("--task", required=True,
           help="sst2 rte cb boolq wsc wic multirc copa record squad drop demo, or the path of a .yaml."),
    option("--data", type=click.Path(exists=True, path_type=Path), help="Local folder, .jsonl or .parquet in the "
           "task's columns. Default: the public data set on the hub."),
    option("--dtype", type=click.Choice(["fp32", "bf16", "fp16"]), default="fp32", help="Of the weights."),
    option("--device", help="cpu or cuda. Default: cuda where there is one."),
    option("--max-length", type=click.IntRange(min=8), default=2048, help="Tokens; prompts are cut on the left."),
    option("--test-size", type=click.IntRange(min=1), default=1000, help="Rows of the test split."),
    option("--eval-batch-size", type=click.IntRange(min=1), default=16),
    option("--seed", type=int, default=0, help="Of the batches and the perturbations; eval: of the shots."),
    option("--quiet", is_flag=True, help="No progress bars."),
)  # fmt: skip

HOW = options(
    option("--method", type=click.Choice(METHODS), default="pseuzo", help="fo-*: with backpropagation, to compare."),
    option("--mode", type=click.Choice(["full", "lora", "prefix", "head"]), default="full", help="What is trained."),
    option("--steps", type=click.IntRange(min=1), default=10_000),
    option("--batch-size", type=click.IntRange(min=1), default=16),
    option("--lr", type=LearningRate(), help="Learning rate, or auto: a search by short trials on the dev loss. "
           "Default: the published rate of the mode (full 1e-7, lora 5e-5, prefix 1e-3); fo-*: a common one."),
    option("--eps", type=click.FloatRange(min=0, min_open=True),
           help="Size of the perturbation. Default: full 1e-3, lora 1e-2, prefix 1e-1."),
    option("--lr-scheduler", type=click.Choice(["constant", "linear", "cosine", "constant_with_warmup"]),
           default="constant"),
    option("--weight-decay", type=click.FloatRange(min=0), default=0.0, help="Not on biases and norms."),
    option("--window", type=click.IntRange(min=1), default=14, help="Entries of the window (pseuzo, mezo-momentum)."),
    option("--momentum", type=click.FloatRange(0, 1), help="pseuzo: lambda, 1; mezo-momentum: 0.9; fo-sgd: 0."),
    option("--schedule", type=click.Choice(["constant", "linear", "cyclic-hyperbola"]), default="constant",
           help="Of lambda; the last one is the published one."),
    option("--groups", type=click.Choice(["label", "row", "none"]), default="label",
           help="Rows of old batches are paired with those of the same label, of the same row (as published), or all."),
    option("--directions", type=click.IntRange(min=1), default=1, help="Perturbations a step of mezo."),
    option("--two-sided/--one-sided", "two_sided", default=None, help="Default: mezo two-sided, pseuzo one-sided."),
    option("--noise", type=click.Choice(["hadamard", "rademacher", "normal"]), default="hadamard"),
    option("--noise-on", multiple=True, default=["all"], metavar="PATTERN[=SCALE]",
           help="Names or globs of parameters, attention-out, last-half, all; or auto: chosen by a short probe. "
           "lr and eps not given are scaled to it."),
    option("--clip-examples", type=click.FloatRange(min=0, min_open=True), metavar="MULTIPLE",
           help="Clamp each example's projected gradient to this multiple of the batch's median."),
    option("--rounding", type=click.Choice(["stochastic", "nearest"]), default="stochastic", help="Of 16-bit weights."),
    option("--head", type=click.Choice(["frozen", "exact"]), default="frozen",
           help="An untied output head under pseuzo: frozen, or trained by its exact gradient."),
    option("--head-lr", type=click.FloatRange(min=0, min_open=True), help="Of --head exact. Default: 1000 lr."),
    option("--objective", type=click.Choice(["loss", "metric"]), default="loss",
           help="metric: 1 - the task's metric, which needs no derivative (mezo)."),
    option("--train-on", type=click.Choice(["auto", "options", "label-words"]), default="auto",
           help="Classification: options' length-normalised likelihood, or the label words alone."),
    option("--train-size", type=click.IntRange(min=1), default=1000, help="Rows of the train split."),
    option("--dev-size", type=click.IntRange(min=1), default=500, help="Rows of the dev split, taken from train's."),
    option("--data-seed", type=int, help="Which rows are drawn. Default: --seed."),
    option("--lora-r", type=click.IntRange(min=1), default=8),
    option("--lora-alpha", type=click.IntRange(min=1), default=16),
    option("--prefix-tokens", type=click.IntRange(min=1), default=5),
    option("--eval-every", type=click.IntRange(min=0), help="Steps; 0: never. Default: a tenth of the run."),
    option("--save-every", type=click.IntRange(min=0),
           help="Steps to a checkpoint; 0: none. Default: --eval-every."),
    option("--log-every", type=click.IntRange(min=1), help="Steps. Default: a hundredth of the run."),
    option("--keep", type=click.Choice(["best", "last"]), default="best", help="Weights by the dev metric, or last."),
    option("--journal", type=FILE, help="Record every update here, for pseuzo replay."),
    option("--report-to", multiple=True, metavar="NAME", help="tensorboard, wandb, ...; see Transformers."),
)  # fmt: skip


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="pseuzo")
def main() -> None:
    """Fine-tune language models by forward passes alone, in the memory of inference."""


@configured
@main.command()
@WHAT
@HOW
@option("--output", type=FOLDER, required=True, help="Folder for results; must be empty or not there.")
@click.option("--resume", "--resume_from_checkpoint", "--resume-from-checkpoint", is_flag=False, flag_value="auto",
              metavar="[CHECKPOINT]", help="Go on with the run in --output from its last (or this) checkpoint, to the "
              "same bits as if it had never stopped.")  # fmt: skip
@plainly
def train(**settings: Any) -> None:
    """Fine-tune a model on a task.

    \b
    pseuzo train --model facebook/opt-1.3b --task sst2 --dtype bf16 --output run
    pseuzo train --model demo --task demo --method mezo --lr 4e-4 --steps 300 --output run
    pseuzo train --config examples/opt-1.3b-sst2.yaml --output run

    Writes config.yaml, results.json, curves.png, checkpoints and model/ into --output. Does the run not converge? Try
    --lr auto, --noise-on attention-out, --clip-examples 2.
    """
    from pseuzo import runs

    if settings["quiet"]:
        _hush()
    results = runs.train(settings)
    figures = ", ".join(f"{k} {v:.4g}" for k, v in results["test"].items())
    click.echo(f"test: {figures}; {results['steps']} steps, {results['forwards']} forward passes; the model is in "
               f"{settings['output']}/model")  # fmt: skip


@configured
@main.command(name="eval")
@WHAT
@option("--shots", type=click.IntRange(min=0), default=0, help="Answered examples before each prompt.")
@option("--output", type=FILE, help="Write the figures to this JSON file, too.")
@plainly
def evaluate(**settings: Any) -> None:
    """Evaluate a model on a task: zero-shot, or in context with --shots.

    \b
    pseuzo eval --model run/model --task sst2
    pseuzo eval --model facebook/opt-1.3b --task sst2 --shots 32
    """
    import json

    from pseuzo import runs
    from pseuzo.files import write_atomically

    if settings["quiet"]:
        _hush()
    figures = runs.evaluate_run(settings)
    if settings["output"]:
        settings["output"].parent.mkdir(parents=True, exist_ok=True)
        write_atomically(settings["output"], json.dumps(figures, indent=1) + "\n")
    click.echo(json.dumps(figures))


@main.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@option("--output", type=FILE, default="curves.png", help="The PNG to write.")
@plainly
def plot(runs: tuple[Path, ...], output: Path) -> None:
    """Overlay the curves of finished runs in one PNG."""
    from pseuzo.plots import plot_runs, read_results

    names = [run.name if [r.name for r in runs].count(run.name) == 1 else str(run) for run in runs]
    plot_runs({name: read_results(run) for name, run in zip(names, runs, strict=True)}, output)
    click.echo(f"{len(runs)} run(s) in {output}")


@configured
@main.command()
@WHAT
@HOW
@option(
    "--methods",
    multiple=True,
    metavar="NAME[:KEY=VALUE,...]",
    help="A method with settings of its own, as in mezo:lr=4e-4 or pseuzo:lr=1e-4,groups=row; repeat. "
    "Default: pseuzo mezo fo-adam, each with --lr auto.",
)
@option("--seeds", type=click.IntRange(min=1), default=3, help="Runs of each method.")
@option("--forwards", type=click.IntRange(min=4), default=1200, help="Forward passes of each run; a backward is two.")
@option("--output", type=FOLDER, required=True, help="Folder; finished runs in it are not run again.")
@plainly
def compare(methods: tuple[str, ...], seeds: int, forwards: int, output: Path, **settings: Any) -> None:
    """Run methods side by side for equal forward passes, and print what each reached, in equal time too.

    \b
    pseuzo compare --model demo --task demo --methods mezo:lr=4e-4 --methods pseuzo:lr=4e-5 --output compared

    Writes table.md, compare.json, compare.png and the runs themselves. Each run is a process of its own, so that its
    memory and time are its own.
    """
    from pseuzo.compare import compare as run_compare
    from pseuzo.runs import plain

    chosen = dict(_method(text) for text in methods or ("pseuzo", "mezo", "fo-adam"))
    if len(chosen) < len(methods):
        raise ValueError("--methods: the same method with the same settings is named twice")
    common = {k: v for k, v in plain(settings).items() if v is not None}
    common.setdefault("lr", "auto")
    output.mkdir(parents=True, exist_ok=True)
    summary = run_compare(common, chosen, output, seeds=seeds, forwards=forwards, progress=click.echo)
    _print_comparison(summary, output)


# what compare sets for every run
_SET = {"steps", "seed", "eval_every", "save_every", "keep", "quiet", "journal", "method"}
compare.params = [p for p in compare.params if p.name not in _SET]


def _method(text: str) -> tuple[str, dict[str, Any]]:
    """NAME:KEY=VALUE,... as a title and settings."""
    import yaml

    name, _, rest = text.partition(":")
    if name not in METHODS:
        raise ValueError(f"--methods: {name!r} is not a method; known: {', '.join(METHODS)}")
    own: dict[str, Any] = {"method": name}
    for pair in filter(None, rest.split(",")):
        key, equals, value = pair.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or key not in {p.name for p in train.params}:
            raise ValueError(f"--methods: {pair!r} is not KEY=VALUE with an option of pseuzo train")
        own[key] = value.split("+") if key == "noise_on" else yaml.safe_load(value)
    return text, own


def _hush() -> None:
    """No progress bars but the command's own, no warnings but errors."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def _print_comparison(summary: dict, output: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    metric, rows = summary["metric"], summary["methods"]
    least = min(row["equal_seconds"] for row in rows.values())
    table = Table(title=f"{summary['forwards']} forward passes, {summary['seeds']} seed(s), {summary['hardware']}")
    for column in ("method", "lr", f"test {metric}", f"dev {metric}", f"dev after {least:.0f} s", "seconds", "memory"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for title, row in rows.items():
        table.add_row(
            title, f"{row['lr']:.2g}", f"{row['test_mean']:.3f} ± {row['test_std']:.3f}", f"{row['dev_mean']:.3f}",
            f"{row['dev_at_equal_time']:.3f}", f"{row['seconds']:.0f}", f"{row['peak_memory_mib']:.0f} MiB",
        )  # fmt: skip
    console = Console()
    console.print(table)
    console.print(f"Table: {output}/table.md. Curves: {output}/compare.png.", highlight=False, soft_wrap=True)


@main.command()
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default="pseuzo-demo", show_default=True,
              help="Folder for summary.json, metrics.jsonl, curves.png and model/.")  # fmt: skip
@click.option("--steps", type=click.IntRange(min=1), default=300, show_default=True,
              help="Steps of each method; a step is two forward passes.")  # fmt: skip
@click.option("--batch-size", type=click.IntRange(min=2), default=16, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the batches and of the perturbations.")
@click.option("--method", "methods", multiple=True, metavar="NAME",
              help="Only this method; may be given several times. Default: all four.")  # fmt: skip
@click.option("--device", default=None, help="cpu or cuda. Default: cuda where there is one.")
def demo(out: Path, steps: int, batch_size: int, seed: int, methods: tuple[str, ...], device: str | None) -> None:
    """Fine-tune an embedded OPT of a million parameters in about a minute.

    The question put to it: is this line of the Python standard library code or docstring prose? MeZO, PseuZO with rows
    paired as published and by label, and MeZO with noise on a tenth of the weights start from the same pretrained model
    and see the same batches. Prints what each reached.
    """
    import torch  # here, so that --help is quick

    from pseuzo.demo import run as demo_run

    known = [m.name for m in demo_run.METHODS]
    for name in methods:
        if name not in known:
            raise click.UsageError(f"unknown method {name!r}; known: {', '.join(known)}")
    try:
        where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=where)
    except (RuntimeError, AssertionError) as error:
        raise click.UsageError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from None
    if out.exists() and not out.is_dir():
        raise click.UsageError(f"{out} is a file, not a folder")
    summary = demo_run.run(out, list(methods) or known, steps, batch_size, seed, where)
    _print_demo(summary, out)


@main.command()
@click.option("--base", required=True, help="The model the run began with: a folder, or a name on the hub.")
@click.option("--journal", required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="What the run wrote (pseuzo.Journal).")  # fmt: skip
@click.option("--output", required=True, type=click.Path(file_okay=False, path_type=Path),
              help="Folder for the model; must be empty or not there.")  # fmt: skip
@click.option("--until", type=click.IntRange(min=0), help="Stop before this step. Default: the whole journal.")
@click.option("--device", default="cpu", show_default=True, help="Where to compute; the bits are the same anywhere.")
@plainly
def replay(base: str, journal: Path, output: Path, until: int | None, device: str) -> None:
    """Rebuild fine-tuned weights from the base model and the journal of the run, bit for bit.

    For a run of mode lora, prefix or head the base is the folder start/ that the run wrote.
    """
    from tqdm import tqdm

    from pseuzo.files import save_model
    from pseuzo.journal import read_journal
    from pseuzo.journal import replay as replay_journal
    from pseuzo.runs import model_path
    from pseuzo.tuning import DTYPES, load_model

    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise Failure(f"{output} is not empty; choose another folder")
    header, records = read_journal(journal)
    total = sum(1 for _ in records)
    dtypes = {str(dtype).removeprefix("torch."): name for name, dtype in DTYPES.items()}
    model, tokenizer = load_model(
        model_path(base), dtype=dtypes[header["params"][0]["dtype"]], device=device, need_tokenizer=False
    )
    steps = total if until is None else min(total, max(until - header["first_step"], 0))
    with tqdm(total=steps, desc="replay", unit="step") as bar:
        step = replay_journal(journal, model, until=until, progress=lambda record: bar.update())
    save_model(model, tokenizer, output)
    click.echo(f"{steps} steps replayed, up to step {step}; the model is in {output}")


@main.command()
def info() -> None:
    """Print versions, what each op runs on and why, the GPU, and a short self-test of the kernels."""
    import platform

    import torch
    import transformers

    import pseuzo_kernels as pk
    from pseuzo_kernels import reference

    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    click.echo(
        f"python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    )
    built = pk._C.build_info() if pk._C else {}
    cpp = (
        f"C++ ({pk._C.cpu_isa()}, of {', '.join(built['isas'])})"
        if pk._C
        else "plain torch (the extension is not built)"
    )
    click.echo(f"noise and window on CPU tensors: {cpp}")
    click.echo(f"noise on CUDA tensors: {f'triton {triton_version}' if triton_version else 'plain torch (no triton)'}")
    window = f"CUDA {built['cuda']}" if built.get("cuda") else "plain torch (built without nvcc)"
    click.echo(f"window on CUDA tensors: {window}")
    gpus = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    click.echo(f"GPU: {', '.join(gpus) or 'none'}")
    failed = False
    for device in ["cpu", *(["cuda"] if gpus else [])]:
        for noise in ("hadamard", "rademacher"):
            x = torch.linspace(-1, 1, 50_000).to(torch.bfloat16)
            got = x.to(device)
            for api, y in ((pk, got), (reference, x)):
                api.update_(y, [1, 2, 3], [0.1, -0.2, 0.3], lr=0.1, noise=noise, rounding="stochastic")
            same = torch.equal(got.cpu(), x)
            failed |= not same
            click.echo(f"self-test, {noise} on {device}: {'same bits as the reference' if same else 'DIFFERS'}")
    if failed:
        raise Failure("the kernels disagree with the reference on this machine; please report it")


def _print_demo(summary: dict, out: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"{summary['steps']} steps of 2 forward passes, batch {summary['batch_size']}, {summary['hardware']}"
    )
    for column in ("method", "test before", "test after", "steps/s", "peak memory"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for figures in summary["methods"].values():
        table.add_row(
            figures["title"], f"{figures['test_accuracy_before']:.3f}", f"{figures['test_accuracy_after']:.3f}",
            f"{figures['steps_per_s']:.1f}", f"{figures['peak_memory_mib']:.0f} MiB",
        )  # fmt: skip
    console = Console()
    console.print(table)
    console.print(
        f"Best on the validation lines: {summary['saved_model']}, saved in {out}/model. "
        f"Curves: {out}/curves.png. Figures: {out}/summary.json, {out}/metrics.jsonl",
        highlight=False, soft_wrap=True,
    )  # fmt: skip


if __name__ == "__main__":
    main()
