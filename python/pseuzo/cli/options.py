"""The options of the commands.

Those of training are made from the fields of `pseuzo.train.options.ZeroOrderOptions`, which define
their defaults, choices and help. This module adds the options that only the command line has:
model, task, data, tuning mode, the number of steps, and when to evaluate, save and log.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from pseuzo.cli.errors import listed
from pseuzo.models.kinds import KINDS
from pseuzo.models.modes import MODES, ModeOption, by_mode, mode_options
from pseuzo.train.methods import METHODS, OF_METHOD
from pseuzo.train.options import OPTIONS, Option

FOLDER = click.Path(file_okay=False, path_type=Path)
FILE = click.Path(dir_okay=False, path_type=Path)
SEED = click.IntRange(0, 2**32 - 1)  # every generator accepts these
# Options of a tuning mode, which do nothing under another one.
MODE_OPTIONS = {name: modes for name, (o, modes) in mode_options().items() if o.on_command_line}


class Number(click.FloatRange):
    """A finite number in a range."""

    name = "float"

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number", param, ctx)
        return number


NOT_NEGATIVE = Number(min=0)


class LearningRate(click.ParamType):
    name = "float|auto"

    def convert(self, value: Any, param: Any, ctx: Any) -> float | str:
        if value == "auto":
            return value
        try:
            number = float(value)
        except (TypeError, ValueError):
            self.fail(f"{value!r} is neither a number nor auto", param, ctx)
        return NOT_NEGATIVE.convert(number, param, ctx)


class Device(click.ParamType):
    name = "text"

    def convert(self, value: str, param: Any, ctx: Any) -> str:
        if value.split(":")[0] == "meta":
            self.fail("'meta' holds no numbers; cpu or cuda", param, ctx)
        return value


def options(*decorators: Callable) -> Callable:
    """Combine several options into one decorator, in the order in which they are written."""

    def add(command: Callable) -> Callable:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return add


def option(*names: str, **settings: Any) -> Callable:
    if settings.get("default") is not None and not settings.get("is_flag"):
        settings.setdefault("show_default", True)
    return click.option(*names, **settings)


def setting_name(o: Option) -> str:
    """Return the name of a training option among the settings of a command."""
    return o.flag_name.split("/")[0].removeprefix("--").replace("-", "_")


def training_option(name: str, *more_help: str, **changes: Any) -> Callable:
    """Make the option of a field of ZeroOrderOptions. more_help is appended to its help; changes
    replaces what differs on the command line, such as a default that depends on the mode."""
    o = OPTIONS[name]
    settings: dict[str, Any] = {"help": " ".join((o.help, *more_help)), "metavar": o.flag.metavar}
    if o.type is bool and "/" not in o.flag_name:
        settings["is_flag"] = True
    else:
        settings |= {"default": o.default, "type": _type_of(o)}
    if o.type == list[str]:
        settings["multiple"] = True
    return option(o.flag_name, setting_name(o), **settings | changes)


def _type_of(o: Option) -> Any:
    if o.choices:
        return click.Choice(o.choices)
    if o.type is int:
        return _whole_numbers(o.flag.least, o.flag.most)
    if o.type is float:
        least = 0 if o.flag.positive else o.flag.least
        return Number(least, o.flag.most, min_open=o.flag.positive)
    return bool if o.type is bool else str


def _whole_numbers(least: float | None, most: float | None = None) -> click.IntRange:
    return click.IntRange(
        None if least is None else int(least), None if most is None else int(most)
    )


def by_modes(field: str) -> str:
    """List a default of each tuning mode, as in `full 1e-7, lora 5e-5`."""
    values = by_mode(field).items()
    return ", ".join(f"{name} {value:g}".replace("e-0", "e-") for name, value in values)


def mode_option(o: ModeOption, modes: tuple[str, ...]) -> Callable:
    """Make the option of a tuning mode."""
    kind = _whole_numbers(o.least) if isinstance(o.default, int) else Number(min=o.least)
    help = f"{o.help} For --mode {listed(modes, 'or')}."
    return option(flag(o.name), type=kind, default=o.default, help=help)


def flag(name: str) -> str:
    """Return the flag of a setting."""
    return "--" + name.replace("_", "-")


DATA_OPTIONS = options(
    option(
        "--model",
        required=True,
        help="A language model: a name on the hub, a folder, or demo, the embedded one.",
    ),
    option(
        "--model-kind",
        type=click.Choice(["auto", *KINDS]),
        default="auto",
        help="causal: the next token answers; masked: the mask token (BERT); classifier: a "
        "classification head, a new one if the checkpoint has none. Default: what its config says.",
    ),
    option(
        "--task",
        required=True,
        help="sst2 rte cb boolq wsc wic multirc copa record winogrande squad drop demo, or the "
        "path of a .yaml or .jsonl.",
    ),
    option(
        "--data",
        type=click.Path(exists=True, path_type=Path),
        help="Local folder, .jsonl or .parquet in the task's columns. Default: the public data "
        "set on the hub.",
    ),
    option(
        "--dtype",
        type=click.Choice(["fp32", "bf16", "fp16"]),
        default="fp32",
        help="Precision of the weights.",
    ),
    option("--device", type=Device(), help="cpu or cuda. Default: cuda where there is one."),
    option(
        "--max-length",
        type=click.IntRange(min=8),
        help="Most tokens of a sequence; prompts are cut on the left. Default: 2048, or what the "
        "model has positions for.",
    ),
    option(
        "--train-size", type=click.IntRange(min=1), default=1000, help="Rows of the train split."
    ),
    option(
        "--dev-size",
        type=click.IntRange(min=1),
        default=500,
        help="Rows of the dev split, which are taken from the rows of train.",
    ),
    option("--test-size", type=click.IntRange(min=1), default=1000, help="Rows of the test split."),
    option(
        "--chat/--no-chat",
        "chat",
        default=None,
        help="Ask in the tokenizer's chat template, for instruction-tuned models. Default: what "
        "the task says.",
    ),
    option("--data-seed", type=SEED, help="Seed that draws the rows. Default: --seed."),
    option("--eval-batch-size", type=click.IntRange(min=1), default=16),
    option(
        "--seed",
        type=SEED,
        default=0,
        help="Seed of the batches and the perturbations; eval: of the shots.",
    ),
    option("--quiet", is_flag=True, help="Show no progress bars."),
)

RUN_OPTIONS = options(
    training_option("method"),
    option(
        "--mode",
        type=click.Choice(list(MODES)),
        default="full",
        help="What is trained: "
        + "; ".join(f"{name}, {mode.help}" for name, mode in MODES.items())
        + ".",
    ),
    option("--steps", type=click.IntRange(min=1), default=10_000),
    option("--batch-size", type=click.IntRange(min=1), default=16),
    training_option(
        "learning_rate",
        "auto: 0.1 / T, where T is the curvature of the loss along the noise, measured in every "
        "step. Default: the published rate of the mode ("
        + by_modes("lr")
        + "); fo-*: a common one.",
        type=LearningRate(),
        default=None,
    ),
    training_option(
        "eps",
        f"Default: {by_modes('eps')}.",
        default=None,
    ),
    training_option("lr_scheduler_type", type=click.Choice(["constant", "linear", "cosine"])),
    option(
        "--weight-decay",
        type=NOT_NEGATIVE,
        default=0.0,
        help="Decoupled weight decay, not on biases and norms.",
    ),
    *(
        training_option(name)
        for name in (
            *("window", "momentum", "schedule", "cycles", "pseuzo_epochs", "weighting"),
            *("groups", "directions", "two_sided", "weights", "split_batch", "moments"),
            *("coordinates", "scores", "sparsity", "mask", "renew_mask", "blocks", "noise"),
        )
    ),
    training_option("noise_on", "lr and eps not given are scaled to it."),
    *(
        training_option(name)
        for name in (
            *("search_share", "clip_examples", "rounding", "head", "head_lr", "objective"),
            *("readout", "readout_decay"),
            *("anchor_every", "anchor_batches", "anchor_lr"),
        )
    ),
    option(
        "--train-on",
        type=click.Choice(["auto", "options", "label-words"]),
        default="auto",
        help="Classification: the length-normalised likelihood of the options, or the label words "
        "alone.",
    ),
    *(mode_option(o, modes) for o, modes in mode_options().values() if o.on_command_line),
    option(
        "--eval-every",
        type=click.IntRange(min=0),
        help="Steps between evaluations; 0: never. Default: a tenth of the run.",
    ),
    option(
        "--save-every",
        type=click.IntRange(min=0),
        help="Steps between checkpoints; 0: none. Default: --eval-every.",
    ),
    option(
        "--log-every",
        type=click.IntRange(min=1),
        help="Steps between lines of the log. Default: a hundredth of the run.",
    ),
    option(
        "--keep",
        type=click.Choice(["best", "last"]),
        default="best",
        help="Keep the weights that are best by the dev metric, or the last.",
    ),
    training_option("journal", type=FILE),
    training_option("direction_ranks"),
    option(
        "--ddp-timeout",
        type=click.IntRange(min=1),
        default=1800,
        help="Under torchrun: seconds after which a rank stops to wait for another.",
    ),
    training_option("offload"),
    training_option("capture"),
    option(
        "--report-to",
        "--report_to",
        multiple=True,
        metavar="NAME",
        help="tensorboard, wandb, ...; see Transformers.",
    ),
)

COMPARE_OPTIONS = options(
    option(
        "--methods",
        multiple=True,
        metavar="NAME[:KEY=VALUE,...]",
        help="A method with settings of its own, as in mezo or pseuzo:groups=row; repeat. lr and "
        "eps that are not among them are tuned. Default: pseuzo mezo fo-adam.",
    ),
    option(
        "--seeds",
        type=click.IntRange(min=3),
        default=3,
        help="Final runs of each method on a task.",
    ),
    option(
        "--forwards",
        type=click.IntRange(min=4),
        default=1200,
        help="Forward passes of each final run; a backward is two.",
    ),
    option(
        "--trials",
        type=click.IntRange(min=1),
        default=8,
        help="Trials of the search over lr and eps, for each method.",
    ),
    option("--trial-forwards", type=click.IntRange(min=4), help="Forward passes of each trial."),
    option(
        "--trial-share",
        type=Number(min=0, max=1, min_open=True),
        default=0.5,
        help="Without --trial-forwards: the share of --forwards that each trial has.",
    ),
    option("--report", is_flag=True, help="Make the tables and plots of --output, and no runs."),
    option(
        "--accept-code",
        is_flag=True,
        help="Go on with runs that another version of the code made; the report says so.",
    ),
)

APPLIES_TO: dict[str, Mapping[str, tuple[str, ...]]] = {
    setting_name(o): o.applies_to for o in OPTIONS.values() if o.applies_to
} | {name: {"mode": modes} for name, modes in MODE_OPTIONS.items()}
PROBES = tuple(setting_name(o) for o in OPTIONS.values() if o.flag.probes)


def unused(settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Find options that are given but have no effect. For each: the option that decides, and a
    sentence."""
    found: dict[str, tuple[str, str]] = {}
    for name, conditions in APPLIES_TO.items():
        if name not in settings or settings[name] in (None, defaults[name]):
            continue
        if name in OF_METHOD and settings[name] == getattr(METHODS[settings["method"]], name):
            continue
        if name in PROBES and list(settings["noise_on"]) != ["all"]:
            continue
        for decides, values in conditions.items():
            if settings[decides] not in values:
                prefix = "" if decides == "method" else f"{flag(decides)} "
                here = f"not for {prefix}{settings[decides]}"
                sentence = f"{flag(name)} is for {prefix}{listed(values)}, {here}"
                found.setdefault(name, (decides, sentence))
    return found
