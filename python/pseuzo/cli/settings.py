"""Reads settings from a command line, and checks them before anything is loaded."""

from collections.abc import Mapping
from typing import Any

import click

from pseuzo.cli.errors import Failure
from pseuzo.cli.options import flag, setting_name, unused
from pseuzo.launch import launched, rank
from pseuzo.models.modes import MODES
from pseuzo.train.methods import METHODS, methods_with, refused_in_ranks, with_defaults
from pseuzo.train.options import OPTIONS


def leave_out_unused(settings: dict[str, Any], defaults: Mapping[str, Any]) -> None:
    """Raise ValueError for an option that has no effect. An option of --config whose method (or
    mode) the command line overrides was meant for the other one: it is left out, and a line says
    so."""
    source = click.get_current_context().get_parameter_source
    file, line = click.core.ParameterSource.DEFAULT_MAP, click.core.ParameterSource.COMMANDLINE
    for name, (decides, sentence) in unused(settings, defaults).items():
        if not (source(name) == file and source(decides) == line):
            raise ValueError(sentence)
        settings[name] = defaults[name]
        if rank() == 0:
            click.echo(f"{sentence}: that of --config is left out", err=True)


def check_combination(settings: Mapping[str, Any]) -> None:
    """Raise ValueError for options of one run that exclude each other."""
    method = settings["method"]
    options = {name: settings[setting_name(o)] for name, o in OPTIONS.items() if not o.flag.hidden}
    why = METHODS[method].refusal(
        **with_defaults(method, options), batch_size=settings["batch_size"]
    )
    if why is not None:
        raise ValueError(f"--method {method}: {why}")
    if settings["lr"] == 0 and (settings["readout"] != "fit" or "auto" in settings["noise_on"]):
        raise ValueError(
            "--lr must be positive, got 0; with --readout fit, and without --noise-on auto, 0 "
            "trains the head alone"
        )
    if settings["mode"] == "head" and settings["readout"] == "fit":
        raise ValueError(
            "--readout fit trains the head, and leaves --mode head nothing: use --mode full with "
            "--lr 0"
        )
    if settings["objective"] == "metric":
        if settings["clip_examples"] is not None:
            raise ValueError(
                "--clip-examples needs the loss of each example, and --objective metric has none"
            )
    searches = _places_itself(settings)
    if searches and settings["lr"] not in (None, "auto"):
        raise ValueError(
            "--noise-on auto needs a rate that suits every placement: leave out --lr, or give "
            "--lr auto"
        )
    if searches or settings["lr"] == "auto":
        what = "--noise-on auto" if searches else "--lr auto"
        instead = "name a placement, and give --lr a number" if searches else "give --lr a number"
        if method not in methods_with("find_lr"):
            able = " or ".join(methods_with("find_lr"))
            needs = f"{what} needs --method {able}, not {method}: {instead}"
            raise ValueError(f"{needs} (--recipe best has --lr auto)")
        if settings["objective"] == "metric":
            raise ValueError(
                f"{what} measures the curvature by the loss of each example, and --objective "
                f"metric has none; {instead}"
            )
        if settings["weight_decay"]:
            raise ValueError(
                f"{what} is a rate in units of 1 / T, which does not suit --weight-decay; leave "
                f"that out, or {instead}"
            )
        if settings["head"] == "exact" and searches:
            raise ValueError(f"{what} cannot be used with --head exact; leave off one of the two")
        if settings["head"] == "exact" and settings["head_lr"] is None:
            raise ValueError(f"{what} finds no rate for an exact head; give --head-lr")
    if (
        settings["method"] == "fo-adam"
        and settings["dtype"] == "fp16"
        and MODES[settings["mode"]].model_dtype
    ):
        raise ValueError(
            "--method fo-adam cannot train fp16 weights, in which its eps of 1e-8 is 0: use "
            "--dtype bf16 or fp32"
        )


def _places_itself(settings: Mapping[str, Any]) -> bool:
    """Whether the placement of the noise is left open; the rate is then from the curvature."""
    return list(settings["noise_on"]) == ["auto"]


def could_take_auto(settings: Mapping[str, Any]) -> bool:
    """Whether --lr auto would be another rate, and one that the run could have."""
    given = settings["lr"] not in ("auto", 0) and not _places_itself(settings)
    excluded = settings["weight_decay"] or settings["objective"] == "metric"
    return given and not excluded and settings["method"] in methods_with("find_lr")


def check_launched(settings: Mapping[str, Any]) -> None:
    """Raise ValueError for what the launched processes cannot do together."""
    n, directions, method = launched(), settings["direction_ranks"], settings["method"]
    if n % directions:
        raise ValueError(
            f"--direction-ranks must divide the number of launched processes, {n}, got {directions}"
        )
    if n == 1:
        return
    options = {name: settings[setting_name(o)] for name, o in OPTIONS.items() if not o.flag.hidden}
    options["find_lr"] = settings["lr"] == "auto" or _places_itself(settings)
    if why := refused_in_ranks(method, options):
        raise ValueError(
            f"{why} is for one process, but {n} were launched: start it without torchrun or "
            "accelerate"
        )
    if settings["batch_size"] % (n // directions):
        raise ValueError(
            f"--batch-size {settings['batch_size']} is for all processes together, and {n} of them "
            f"cut it into {n // directions} parts of one size: choose a multiple of "
            f"{n // directions}"
        )
    if ":" in (settings["device"] or ""):
        raise ValueError(
            f"--device {settings['device']}: each launched process takes a GPU of its own; give "
            "cuda or cpu"
        )


def check_journal(settings: Mapping[str, Any]) -> None:
    """Raise ValueError, before a model is loaded, if the journal cannot be written."""
    journal, output = settings["journal"], settings["output"]
    if journal is None:
        return
    # The folder of --output will be made.
    if not journal.parent.is_dir() and journal.parent.resolve() != output.resolve():
        raise ValueError(f"--journal {journal}: there is no folder {journal.parent}")
    if journal.resolve() == output.resolve():
        raise ValueError(
            f"--journal and --output are the same, {output}; the journal is a file, in there or "
            "elsewhere"
        )
    own = (
        "config.yaml",
        "results.json",
        "curves.png",
        "found.json",
        "model",
        "start",
        ".pseuzo",
    )
    if journal.parent.resolve() == output.resolve() and journal.name in own:
        raise ValueError(
            f"--journal {journal}: the run writes {journal.name} itself; choose another name"
        )
    resumes = settings["resume"] and (output / "config.yaml").exists()
    if not resumes and journal.exists() and journal.stat().st_size:
        raise ValueError(
            f"--journal {journal} exists already; choose another file, or resume its run with "
            "--resume"
        )


def take_rows_of_run(settings: dict[str, Any]) -> None:
    """Make the options of the run in whose folder the model is the defaults, and print a line.

    With other options, a task in one file would give test rows that the run was trained on, or ask
    them in another way.
    """
    from pseuzo.cli.folder import rows_of_run

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
            flag(name if value else f"no_{name}")
            if isinstance(value, bool)
            else f"{flag(name)} {value}"
            for name, value in taken.items()
        )
        click.echo(f"rows as in {run / 'config.yaml'}: {options}", err=True)
