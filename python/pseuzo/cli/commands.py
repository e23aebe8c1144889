"""The command line: `pseuzo`, or `python -m pseuzo`.

Exit codes: 0 done; 2 what was asked for cannot be done, one sentence on stderr says why; 130 interrupted; 1 a bug.
"""

import errno
import functools
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from pseuzo.train.methods import METHODS, MODES, ZEROTH_ORDER
from pseuzo.train.options import GROUPS, HEADS, OBJECTIVES, SCHEDULES

ONLY = (  # options that do something under some values of another one only
    ("method", ("mezo", "mezo-momentum"), ("directions", "objective")),
    ("method", ZEROTH_ORDER, ("two_sided", "eps", "noise", "rounding", "journal", "capture")),
    ("method", ("pseuzo", "mezo-momentum"), ("window",)),
    ("method", ("pseuzo",), ("schedule", "groups", "head", "head_lr")),
    ("method", ("pseuzo", "mezo-momentum", "fo-sgd"), ("momentum",)),
    ("mode", ("lora",), ("lora_r", "lora_alpha")),
    ("mode", ("prefix",), ("prefix_tokens",)),
    ("head", ("exact",), ("head_lr",)),
)
PROBES = (
    "eps",
    "noise",
)  # these do something under every method whose --noise-on is not all: they are its probe's
FOLDER = click.Path(file_okay=False, path_type=Path)
FILE = click.Path(dir_okay=False, path_type=Path)
FULL = (  # what errors of writing say, in the system's words, which safetensors has too, or torch's
    *(os.strerror(number) for number in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)),
    "PytorchStreamWriter failed writing", "iostream error",
)  # fmt: skip


class Failure(click.ClickException):
    """One sentence and exit code 2."""

    exit_code = 2

    def __init__(self, sentence: str):  # which may quote a file of any size
        super().__init__(
            sentence if len(sentence) <= 2000 else f"{sentence[:1500]} ... {sentence[-400:]}"
        )


def plainly(command: Callable, interrupted: str = "interrupted") -> Callable:
    """Refusals become one sentence and exit code 2, an interruption 130. PSEUZO_DEBUG=1 shows where they came from."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except (Exception, KeyboardInterrupt) as error:
            if _was_interruption(error):
                click.echo(interrupted, err=True)
                raise SystemExit(130) from None
            sentence = None if os.environ.get("PSEUZO_DEBUG") else _sentence(error)
            if sentence is None:
                raise
            raise Failure(sentence) from None

    return run


def _was_interruption(error: BaseException | None) -> bool:
    """Or came of one: Transformers makes an ImportError of a Ctrl-C during its imports."""
    return any(isinstance(e, KeyboardInterrupt) for e in _chain(error))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error, and those that it came of."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        yield error
        seen.add(id(error))
        error = error.__cause__ or error.__context__


def _sentence(error: BaseException) -> str | None:
    """What to tell of an error that is the user's to mend; None: a bug, or click's own."""
    import yaml
    from safetensors import SafetensorError

    text = " ".join(str(error).split()) or type(error).__name__
    has = {p.name for p in click.get_current_context().command.params}
    if full := next(
        (str(e) for e in _chain(error) if any(words in str(e) for words in FULL)), None
    ):
        then = "; then --resume goes on with the run" if "resume" in has else ""
        return f"the disk is full, or a limit on files was hit ({' '.join(full.split())}): make room{then}"
    memory = ("out of memory", "can't allocate memory", "not enough memory")
    if isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(m in text.lower() for m in memory)
    ):
        ways = {"batch_size": "a smaller --batch-size", "eval_batch_size": "a smaller --eval-batch-size",
                "max_length": "a smaller --max-length", "dtype": "a 16-bit --dtype"}  # fmt: skip
        ways = [way for name, way in ways.items() if name in has] or ["a smaller model"]
        return f"out of memory: try {_listed(ways, 'or')}"
    if isinstance(error, yaml.YAMLError):
        return f"not YAML: {text}"
    if isinstance(error, SafetensorError):
        return f"a safetensors file is damaged: {text}"
    if isinstance(error, LookupError) and _module(error) in (
        "pseuzo.cli.compare",
        "pseuzo.cli.plots",
    ):  # they read runs' files
        what = repr(error.args[0]) if isinstance(error, KeyError) else "an evaluation"
        return (
            f"{what} is missing in the results of a run (PSEUZO_DEBUG=1 shows where); run it anew"
        )
    if isinstance(error, RuntimeError) and _module(error).startswith("pseuzo"):
        return text
    return text if isinstance(error, (ValueError, TypeError, OSError, ImportError)) else None


def _module(error: BaseException) -> str:
    """The module that an error comes from; of an op's, the one that calls the op."""
    at, found = error.__traceback__, ""
    while at is not None:
        name = at.tb_frame.f_globals.get("__name__", "")
        found = found if name == "torch._ops" else name
        at = at.tb_next
    return found


def _listed(words: list[str] | tuple[str, ...], last: str = "and") -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} {last} {words[-1]}"


def configured(command: click.Command) -> click.Command:
    """Adds --config FILE: a YAML mapping of the command's own options, which those on the command line override."""

    def read(context: click.Context, parameter: click.Parameter, file: Path | None) -> None:
        if file is None:
            return
        import yaml

        from pseuzo.files import parse_yaml

        try:  # every scalar as it is written: the options' own types read it, as on the command line
            config = parse_yaml(file, yaml.BaseLoader)
        except (OSError, ValueError) as error:
            raise Failure(f"{file} cannot be read as YAML: {error}") from None
        if not isinstance(config, dict):
            raise Failure(f"{file} must hold `option: value` lines")
        known = {p.name: p for p in context.command.params if p.name != "config"}
        context.default_map = {}
        for key, value in config.items():
            p = known.get(str(key).replace("-", "_"))
            if p is None:
                raise Failure(
                    f"{file}: unknown option {key!r}; pseuzo {context.info_name} --help lists them all"
                )
            if value in ("", "~", "null", "Null", "NULL"):
                continue
            try:
                value = _from_yaml(p, value)
                if value is not None and not isinstance(
                    p.type, click.Path
                ):  # whether those exist: if not overridden
                    p.type_cast_value(context, value)
            except (click.BadParameter, ValueError) as error:
                raise Failure(f"{file}: {key}: {getattr(error, 'message', error)}") from None
            if value is not None:
                context.default_map[p.name] = value

    option = click.Option(
        ["--config"], type=click.Path(exists=True, dir_okay=False, path_type=Path), is_eager=True, expose_value=False,
        callback=read, help="YAML file of options (`batch_size: 16`); the command line overrides it.",
    )  # fmt: skip
    command.params.insert(0, option)
    return command


def _from_yaml(p: click.Parameter, value: Any) -> str | list[str] | None:
    """A value of a file as the text that the command line would have; None: as if it were not there."""
    values = value if isinstance(value, list) and p.multiple else [value]
    if not all(isinstance(v, str) for v in values):
        raise ValueError(
            "a list of plain values expected"
            if p.multiple
            else "one plain value expected, not a list"
        )
    if p.name == "resume":  # true: from the last checkpoint
        on = {"true": "auto", "yes": "auto", "on": "auto", "false": None, "no": None, "off": None}
        return on.get(value.lower(), value)
    if not p.is_flag and any(v.lower() in ("true", "false") for v in values):
        raise ValueError(f"{value} is for switches, and this option takes a value")
    return values if p.multiple else value


class Number(click.FloatRange):
    """A finite one in a range."""

    name = "float"

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number", param, ctx)
        return number


POSITIVE = Number(min=0, min_open=True)
SEED = click.IntRange(0, 2**32 - 1)  # what every generator takes


class LearningRate(click.ParamType):
    name = "float|auto"

    def convert(self, value: Any, param: Any, ctx: Any) -> float | str:
        if value == "auto":
            return value
        try:
            number = float(value)
        except (TypeError, ValueError):
            self.fail(f"{value!r} is neither a number nor auto", param, ctx)
        return POSITIVE.convert(number, param, ctx)


class Device(click.ParamType):
    name = "text"

    def convert(self, value: str, param: Any, ctx: Any) -> str:
        if value.split(":")[0] == "meta":
            self.fail("'meta' holds no numbers; cpu or cuda", param, ctx)
        return value


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
           help="sst2 rte cb boolq wsc wic multirc copa record squad drop demo, or the path of a .yaml or .jsonl."),
    option("--data", type=click.Path(exists=True, path_type=Path), help="Local folder, .jsonl or .parquet in the "
           "task's columns. Default: the public data set on the hub."),
    option("--dtype", type=click.Choice(["fp32", "bf16", "fp16"]), default="fp32", help="Of the weights."),
    option("--device", type=Device(), help="cpu or cuda. Default: cuda where there is one."),
    option("--max-length", type=click.IntRange(min=8), help="Tokens; prompts are cut on the left. "
           "Default: 2048, or what the model has positions for."),
    option("--train-size", type=click.IntRange(min=1), default=1000, help="Rows of the train split."),
    option("--dev-size", type=click.IntRange(min=1), default=500, help="Rows of the dev split, taken from train's."),
    option("--test-size", type=click.IntRange(min=1), default=1000, help="Rows of the test split."),
    option("--chat/--no-chat", "chat", default=None, help="Ask in the tokenizer's chat template, for instruction-tuned "
           "models. Default: what the task says."),
    option("--data-seed", type=SEED, help="Which rows are drawn. Default: --seed."),
    option("--eval-batch-size", type=click.IntRange(min=1), default=16),
    option("--seed", type=SEED, default=0, help="Of the batches and the perturbations; eval: of the shots."),
    option("--quiet", is_flag=True, help="No progress bars."),
)  # fmt: skip

HOW = options(
    option("--method", type=click.Choice(METHODS), default="pseuzo", help="fo-*: with backpropagation, to compare."),
    option("--mode", type=click.Choice(MODES), default="full", help="What is trained."),
    option("--steps", type=click.IntRange(min=1), default=10_000),
    option("--batch-size", type=click.IntRange(min=1), default=16),
    option("--lr", type=LearningRate(), help="Learning rate, or auto: a search by short trials on the dev loss. "
           "Default: the published rate of the mode (full 1e-7, lora 5e-5, prefix 1e-3); fo-*: a common one."),
    option("--eps", type=POSITIVE,
           help="Size of the perturbation; fo-*: of --noise-on's probe. Default: full 1e-3, lora 1e-2, prefix 1e-1."),
    option("--lr-scheduler", type=click.Choice(["constant", "linear", "cosine"]), default="constant"),
    option("--weight-decay", type=Number(min=0), default=0.0, help="Not on biases and norms."),
    option("--window", type=click.IntRange(min=1), default=14, help="Entries of the window (pseuzo, mezo-momentum)."),
    option("--momentum", type=Number(0, 1), help="pseuzo: lambda, 1; mezo-momentum: 0.9; fo-sgd: 0."),
    option("--schedule", type=click.Choice(SCHEDULES), default="constant",
           help="Of lambda; the last one is the published one."),
    option("--groups", type=click.Choice(GROUPS), default="label",
           help="Rows of old batches are paired with those of the same label, of the same row (as published), or all."),
    option("--directions", type=click.IntRange(min=1), default=1, help="Perturbations a step of mezo."),
    option("--two-sided/--one-sided", "two_sided", default=None, help="Default: mezo two-sided, pseuzo one-sided."),
    option("--noise", type=click.Choice(["hadamard", "hadamard-fp16", "rademacher", "normal"]), default="hadamard",
           help="hadamard-fp16: sums over the window in half precision, faster on a GPU."),
    option("--noise-on", multiple=True, default=["all"], metavar="PATTERN[=SCALE]",
           help="Names or globs of parameters, attention-out, last-half, all; or auto: chosen by a short probe. "
           "lr and eps not given are scaled to it. fo-*: what is trained, at SCALE^2 times the lr."),
    option("--clip-examples", type=POSITIVE, metavar="MULTIPLE",
           help="Limit each example's projected gradient (fo-*: its gradient's norm at the head's input) to this "
           "multiple of the batch's median."),
    option("--rounding", type=click.Choice(["stochastic", "nearest"]), default="stochastic", help="Of 16-bit weights."),
    option("--head", type=click.Choice(HEADS), default="frozen",
           help="An untied output head under pseuzo: frozen, or trained by its exact gradient."),
    option("--head-lr", type=POSITIVE, help="Of --head exact. Default: 1000 lr."),
    option("--objective", type=click.Choice(OBJECTIVES), default="loss",
           help="metric: 1 - the task's metric, which needs no derivative (mezo)."),
    option("--train-on", type=click.Choice(["auto", "options", "label-words"]), default="auto",
           help="Classification: options' length-normalised likelihood, or the label words alone."),
    option("--lora-r", type=click.IntRange(min=1), default=8),
    option("--lora-alpha", type=click.IntRange(min=1), default=16),
    option("--prefix-tokens", type=click.IntRange(min=1), default=5),
    option("--eval-every", type=click.IntRange(min=0), help="Steps; 0: never. Default: a tenth of the run."),
    option("--save-every", type=click.IntRange(min=0),
           help="Steps to a checkpoint; 0: none. Default: --eval-every."),
    option("--log-every", type=click.IntRange(min=1), help="Steps. Default: a hundredth of the run."),
    option("--keep", type=click.Choice(["best", "last"]), default="best", help="Weights by the dev metric, or last."),
    option("--journal", type=FILE, help="Record every update here, for pseuzo replay."),
    option("--capture", is_flag=True, help="Record the passes as CUDA graphs: faster where launches are the "
           "limit (small models, few tokens). Batches are padded to multiples of 64 tokens."),
    option("--report-to", "--report_to", multiple=True, metavar="NAME",
           help="tensorboard, wandb, ...; see Transformers."),
)  # fmt: skip


class Commands(click.Group):
    """Plain too about what happens while the options of a command are read."""

    def invoke(self, ctx: click.Context) -> Any:
        return plainly(self._invoke)(ctx)

    def _invoke(self, ctx: click.Context) -> Any:
        import numpy  # noqa: F401  # before torch, which takes a Ctrl-C during this import for a missing numpy

        return super().invoke(ctx)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="pseuzo")
def main() -> None:
    """Fine-tune language models by forward passes alone, in the memory of inference."""


@configured
@main.command()
@WHAT
@HOW
@option(
    "--output", type=FOLDER, required=True, help="Folder for results; must be empty or not there."
)
@click.option("--resume", "--resume_from_checkpoint", "--resume-from-checkpoint", is_flag=False, flag_value="auto",
              metavar="[CHECKPOINT]", help="Go on with the run in --output from its last (or this) checkpoint, to the "
              "same bits as if it had never stopped.")  # fmt: skip
@functools.partial(
    plainly,
    interrupted="interrupted; the run goes on from its last checkpoint with --resume, or begins anew if it has none",
)
def train(**settings: Any) -> None:
    """Fine-tune a model on a task.

    \b
    pseuzo train --model facebook/opt-1.3b --task sst2 --dtype bf16 --output run
    pseuzo train --model demo --task demo --method mezo --lr 4e-4 --steps 300 --output run
    pseuzo train --config examples/opt-1.3b-sst2.yaml --output run

    Writes config.yaml, results.json, curves.png, checkpoints and model/ into --output. Does the run not converge? Try
    --lr auto, --noise-on attention-out, --clip-examples 2. Where the loss on the test rows is not finite in the end, a
    line on stderr says that the run diverged.
    """
    _leave_out_unused(settings)
    _check_combination(settings)
    _check_journal(settings)
    from pseuzo.cli import run as runs

    if settings["quiet"]:
        _hush()
    results = runs.train(settings)
    figures = ", ".join(f"{k} {v:.4g}" for k, v in results["test"].items())
    click.echo(f"test: {figures}; {results['steps']} steps, {results['forwards']} forward passes; the model is in "
               f"{settings['output']}/model")  # fmt: skip
    best = results.get("best_step")
    if settings["keep"] == "best" and best and best != results["steps"]:
        journal = settings["journal"]
        replay = f": pseuzo replay --until {best} makes it" if journal and journal.exists() else ""
        click.echo(f"model/ is step {best}, the best checkpoint on the dev rows{replay}")


def _defaults() -> dict[str, Any]:
    return train.make_context("train", ["--model", "", "--task", "", "--output", "run"]).params


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _unused(settings: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Options that are given, and do nothing: name -> the option that decides, and a sentence."""
    found: dict[str, tuple[str, str]] = {}
    defaults = _defaults()
    for decides, values, names in ONLY:
        prefix = "" if decides == "method" else f"{_flag(decides)} "
        for name in names:
            if name in PROBES and list(settings["noise_on"]) != ["all"]:
                continue
            if settings[decides] not in values and settings[name] not in (None, defaults[name]):
                sentence = f"{_flag(name)} is for {prefix}{_listed(values)}, not for {prefix}{settings[decides]}"
                found.setdefault(name, (decides, sentence))
    return found


def _leave_out_unused(settings: dict[str, Any]) -> None:
    """ValueError for an option that does nothing. One of a --config whose method (or mode) the command line overrides
    was not meant for this one: it is left out, and a line says so."""
    source = click.get_current_context().get_parameter_source
    file, line = click.core.ParameterSource.DEFAULT_MAP, click.core.ParameterSource.COMMANDLINE
    defaults = _defaults()
    for name, (decides, sentence) in _unused(settings).items():
        if not (source(name) == file and source(decides) == line):
            raise ValueError(sentence)
        settings[name] = defaults[name]
        click.echo(f"{sentence}: that of --config is left out", err=True)


def _check_combination(settings: Mapping[str, Any]) -> None:
    """ValueError for options of one run that do not go together."""
    if settings["objective"] == "metric":
        if settings["clip_examples"] is not None:
            raise ValueError(
                "--clip-examples needs the loss of each example, and --objective metric has none"
            )
        if settings["lr"] == "auto":
            raise ValueError("--lr auto searches by the curvature of the loss, and --objective metric has none; "
                             "give --lr")  # fmt: skip
    if (
        settings["method"] == "fo-adam"
        and settings["dtype"] == "fp16"
        and settings["mode"] in ("full", "head")
    ):
        raise ValueError("--method fo-adam cannot train fp16 weights, in which its eps of 1e-8 is 0: use --dtype bf16 "
                         "or fp32")  # fmt: skip


def _check_journal(settings: Mapping[str, Any]) -> None:
    """ValueError before a model is loaded, if the journal cannot be written."""
    journal, output = settings["journal"], settings["output"]
    if journal is None:
        return
    if (
        not journal.parent.is_dir() and journal.parent.resolve() != output.resolve()
    ):  # that one will be made
        raise ValueError(f"--journal {journal}: there is no folder {journal.parent}")
    if journal.resolve() == output.resolve():
        raise ValueError(
            f"--journal and --output are the same, {output}; the journal is a file, in there or elsewhere"
        )
    own = (
        "config.yaml",
        "results.json",
        "curves.png",
        "lr.json",
        "noise_on.json",
        "model",
        "start",
        ".pseuzo",
    )
    if journal.parent.resolve() == output.resolve() and journal.name in own:
        raise ValueError(
            f"--journal {journal}: the run writes {journal.name} itself; choose another name"
        )
    goes_on = settings["resume"] and (output / "config.yaml").exists()
    if not goes_on and journal.exists() and journal.stat().st_size:
        raise ValueError(
            f"--journal {journal} exists already; choose another file, or --resume to go on with its run"
        )


@configured
@main.command(name="eval")
@WHAT
@option(
    "--shots", type=click.IntRange(min=0), default=0, help="Answered examples before each prompt."
)
@option("--output", type=FILE, help="Write the figures to this JSON file, too.")
@plainly
def evaluate(**settings: Any) -> None:
    """Evaluate a model on a task: zero-shot, or in context with --shots.

    \b
    pseuzo eval --model run/model --task sst2
    pseuzo eval --model facebook/opt-1.3b --task sst2 --shots 32

    A model in the folder of its run is evaluated on that run's test rows, unless sizes or --data-seed are given.
    """
    from pseuzo.cli import run as runs
    from pseuzo.files import to_json, write_json

    if settings["quiet"]:
        _hush()
    _take_rows_of_run(settings)
    figures = runs.evaluate_run(settings)
    if settings["output"]:
        settings["output"].parent.mkdir(parents=True, exist_ok=True)
        write_json(settings["output"], figures)
    click.echo(to_json(figures))


def _take_rows_of_run(settings: dict[str, Any]) -> None:
    """Of a task in one file, other options would draw test rows that the run was trained on, or ask in another way: its
    own are the defaults, and a line says so."""
    from pseuzo.cli.run import rows_of_run

    found = rows_of_run(settings["model"], settings["task"], settings["data"])
    if found is None:
        return
    run, own = found
    context, default = click.get_current_context(), click.core.ParameterSource.DEFAULT
    types = {p.name: p.type for p in context.command.params}
    before, taken = settings | {"data_seed": settings["seed"]}, {}
    for name, value in own.items():
        try:
            value = types[name].convert(value, None, context)
        except click.BadParameter as error:
            raise Failure(f"{run / 'config.yaml'}: {name}: {error.message}") from None
        if context.get_parameter_source(name) == default and value != before[name]:
            taken[name] = value
    if taken:
        settings |= taken
        options = " ".join(
            _flag(name if value else f"no_{name}")
            if isinstance(value, bool)
            else f"{_flag(name)} {value}"
            for name, value in taken.items()
        )
        click.echo(f"rows as in {run / 'config.yaml'}: {options}", err=True)


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
@option(
    "--forwards",
    type=click.IntRange(min=4),
    default=1200,
    help="Forward passes of each run; a backward is two.",
)
@option(
    "--output", type=FOLDER, required=True, help="Folder; finished runs in it are not run again."
)
@functools.partial(
    plainly, interrupted="interrupted; the same command goes on with the runs that are not done"
)
def compare(
    methods: tuple[str, ...], seeds: int, forwards: int, output: Path, **settings: Any
) -> None:
    """Run methods side by side for equal forward passes, and print what each reached, in equal time too.

    \b
    pseuzo compare --model demo --task demo --methods mezo:lr=4e-4 --methods pseuzo:lr=4e-5 --output compared

    Writes table.md, compare.json, compare.png and the runs themselves. Each run is a process of its own, so that its
    memory and time are its own.
    """
    chosen = dict(_method(text) for text in methods or ("pseuzo", "mezo", "fo-adam"))
    if len(chosen) < len(methods):
        raise ValueError("--methods: the same method with the same settings is named twice")
    if settings["lr"] is None:
        settings["lr"] = "auto"
    _share(settings, chosen)
    from pseuzo.cli.compare import compare as run_compare
    from pseuzo.cli.run import plain

    common = {k: v for k, v in plain(settings).items() if v is not None}
    chosen = {title: plain(own) for title, own in chosen.items()}
    summary = run_compare(
        common, chosen, output, seeds=seeds, forwards=forwards, progress=click.echo
    )
    _print_comparison(summary, output)


# what compare sets for every run
_SET = {"steps", "seed", "eval_every", "save_every", "keep", "quiet", "journal", "method"}
compare.params = [p for p in compare.params if p.name not in _SET]


def _method(text: str) -> tuple[str, dict[str, Any]]:
    """NAME:KEY=VALUE,... as a title and settings, read as pseuzo train would read them."""
    name, _, rest = text.partition(":")
    if name not in METHODS:
        raise ValueError(f"--methods: {name!r} is not a method; known: {', '.join(METHODS)}")
    own: dict[str, Any] = {"method": name}
    known = {p.name: p for p in train.params if p.name not in _SET | {"output", "resume", "config"}}
    for pair in filter(None, rest.split(",")):
        key, _, value = (part.strip() for part in pair.partition("="))
        key = key.replace("-", "_")
        if key in _SET | {"output", "resume"}:
            raise ValueError(
                f"--methods: {key} is not a method's own; compare sets it for every run"
            )
        if not value or key not in known:
            raise ValueError(f"--methods: {pair!r} is not KEY=VALUE with an option of pseuzo train")
        p = known[key]
        try:
            own[key] = p.type_cast_value(
                click.get_current_context(), value.split("+") if p.multiple else value
            )
        except click.BadParameter as error:
            raise ValueError(f"--methods {text}: {key}: {error.message}") from None
    return text, own


def _share(settings: Mapping[str, Any], chosen: Mapping[str, dict[str, Any]]) -> None:
    """Options given for all methods go to those that they are for. ValueError for one that is for none of them, and for
    methods that cannot be run."""
    import torch

    from pseuzo.perturb.graphs import check_device

    usual = "cuda" if torch.cuda.is_available() else "cpu"
    defaults, left_out = _defaults(), []
    for title, own in chosen.items():
        unused = _unused(defaults | settings | own)
        for name, (_, sentence) in unused.items():
            if name in own:
                raise ValueError(f"--methods {title}: {sentence}")
        left_out.append(unused)
        own |= {name: defaults[name] for name in unused}
        try:
            given = defaults | settings | own
            _check_combination(given)
            if given["capture"]:
                check_device("--capture", torch.device(given["device"] or usual))
        except ValueError as error:
            raise ValueError(f"{title}: {error}") from None
    for name, (_, sentence) in left_out[0].items():
        if all(name in unused for unused in left_out):
            raise ValueError(sentence)


def _hush() -> None:
    """No progress bars but the command's own, no warnings but errors."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def _print_comparison(summary: dict, output: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    from pseuzo.cli.compare import cells, columns

    table = Table(
        title=f"{summary['forwards']} forward passes, {summary['seeds']} seed(s), {summary['hardware']}"
    )
    for column in columns(summary):
        table.add_column(column, justify="left" if column == "method" else "right", overflow="fold")
    for title, row in summary["methods"].items():
        table.add_row(*cells(title, row))
    console = Console()
    console.print(table)
    console.print(
        f"Table: {output}/table.md. Curves: {output}/compare.png.", highlight=False, soft_wrap=True
    )


@main.command()
@option("--output", "--out", "out", type=FOLDER, default="pseuzo-demo",
        help="Folder for summary.json, metrics.jsonl, curves.png and model/.")  # fmt: skip
@option(
    "--steps",
    type=click.IntRange(min=1),
    default=300,
    help="Steps of each method; a step is two forward passes.",
)
@option("--batch-size", type=click.IntRange(min=2), default=16)
@option("--seed", type=SEED, default=0, help="Of the batches and of the perturbations.")
@option("--method", "methods", multiple=True, metavar="NAME",
        help="Only this method; may be given several times. Default: all four.")  # fmt: skip
@option("--device", type=Device(), help="cpu or cuda. Default: cuda where there is one.")
@plainly
def demo(
    out: Path, steps: int, batch_size: int, seed: int, methods: tuple[str, ...], device: str | None
) -> None:
    """Fine-tune an embedded OPT of a million parameters in about a minute.

    The question put to it: is this line of the Python standard library code or docstring prose? MeZO, PseuZO with rows
    paired as published and by label, and MeZO with noise on a tenth of the weights start from the same pretrained model
    and see the same batches. Prints what each reached.
    """
    from pseuzo.demo import run as demo_run  # here, so that --help is quick
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
    _print_demo(summary, out)


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


@main.command()
@option(
    "--base", required=True, help="The model the run began with: a folder, or a name on the hub."
)
@option("--journal", required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path),
        help="What the run wrote (pseuzo.Journal).")  # fmt: skip
@option(
    "--output", required=True, type=FOLDER, help="Folder for the model; must be empty or not there."
)
@option(
    "--until", type=click.IntRange(min=0), help="Stop before this step. Default: the whole journal."
)
@option(
    "--salvage",
    is_flag=True,
    help="Where the journal is damaged, stop there, and say what is lost.",
)
@option("--device", type=Device(), default="cpu",
        help="Where to compute; the same bits anywhere (noise normal: on the same backend).")  # fmt: skip
@plainly
def replay(
    base: str, journal: Path, output: Path, until: int | None, salvage: bool, device: str
) -> None:
    """Rebuild fine-tuned weights from the base model and the journal of the run, bit for bit.

    For a run of mode lora, prefix or head the base is the folder start/ that the run wrote.
    """
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
        warnings.simplefilter("ignore")  # they were shown
        step = replay_journal(
            journal, model, until=until, salvage=salvage, progress=lambda record: bar.update()
        )
    save_model(model, tokenizer, output)
    click.echo(f"{steps} steps replayed, up to step {step}; the model is in {output}")


@main.command()
@plainly
def info() -> None:
    """Print versions, what each op runs on and why, the GPU, and a short self-test of the kernels."""
    import platform

    import torch
    import transformers

    import pseuzo_kernels as pk
    from pseuzo.cli.selftest import checks

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
    click.echo(
        f"noise on CUDA tensors: {f'triton {triton_version}' if triton_version else 'plain torch (no triton)'}"
    )
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
