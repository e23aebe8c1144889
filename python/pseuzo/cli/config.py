"""--config FILE: a YAML mapping of a command's own options."""

from pathlib import Path
from typing import Any

import click

from pseuzo.cli.errors import Failure
from pseuzo.train.recipes import RECIPES

# Keys of a command's file that may hold a mapping, which nested() returns.
NESTED = {"compare": ("tasks", "methods")}
# Keys of a command's file that hold a mapping of options under shorter names.
GROUPED = {
    "compare": {
        "tuning": {"trials": "trials", "forwards": "trial_forwards", "share": "trial_share"}
    }
}


def nested(name: str) -> Any:
    """Return the mapping that --config has under this key of NESTED; None if it has none."""
    return click.get_current_context().meta.get(f"pseuzo.config.{name}")


def _flat(config: dict[str, Any], groups: dict[str, dict[str, str]]) -> dict[str, Any]:
    """Return the options with those of the groups beside the others. ValueError for a name that a
    group does not have."""
    flat = {}
    for key, value in config.items():
        if key not in groups:
            flat[key] = value
            continue
        names = groups[key]
        if not isinstance(value, dict) or value.keys() - names.keys():
            raise ValueError(f"{key}: a mapping is expected, of {', '.join(names)}")
        flat |= {names[name]: one for name, one in value.items()}
    return flat


def configured(command: click.Command) -> click.Command:
    """Add --config FILE: a YAML mapping of the command's own options. Options on the command line
    override it."""

    def read(context: click.Context, parameter: click.Parameter, file: Path | None) -> None:
        if file is None:
            return
        import yaml

        from pseuzo.files import parse_yaml

        # Scalars stay text, which the options' own types parse as they do on the command line.
        try:
            config = parse_yaml(file, yaml.BaseLoader)
        except (OSError, ValueError) as error:
            raise Failure(f"{file} cannot be read as YAML: {error}") from None
        if not isinstance(config, dict):
            raise Failure(f"{file} must hold `option: value` lines")
        command_name = str(context.info_name)
        try:
            config = _flat(config, GROUPED.get(command_name, {}))
        except ValueError as error:
            raise Failure(f"{file}: {error}") from None
        known = {p.name: p for p in context.command.params if p.name != "config"}
        context.default_map = context.default_map or {}
        for key, value in config.items():
            if isinstance(value, dict) and key in NESTED.get(command_name, ()):
                context.meta[f"pseuzo.config.{key}"] = value
                continue
            p = known.get(str(key).replace("-", "_"))
            if p is None:
                raise Failure(
                    f"{file}: unknown option {key!r}; pseuzo {context.info_name} --help lists them "
                    "all"
                )
            if value in ("", "~", "null", "Null", "NULL"):
                continue
            try:
                value = _from_yaml(p, value)
                # click checks that a path exists, unless the command line overrides it.
                if value is not None and not isinstance(p.type, click.Path):
                    p.type_cast_value(context, value)
            except (click.BadParameter, ValueError) as error:
                raise Failure(f"{file}: {key}: {getattr(error, 'message', error)}") from None
            if value is not None:
                context.default_map[p.name] = value

    option = click.Option(
        ["--config"],
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        is_eager=True,
        expose_value=False,
        callback=read,
        help="YAML file of options (`batch_size: 16`); the command line overrides it.",
    )
    command.params.insert(0, option)
    return command


def with_recipe(command: click.Command) -> click.Command:
    """Add --recipe NAME, which gives options that are not given, by --config or here, the values of
    a recipe."""

    def read(context: click.Context, parameter: click.Parameter, name: str | None) -> None:
        if name is not None:
            given = context.default_map or {}
            context.default_map = {**RECIPES[name], **given}

    option = click.Option(
        ["--recipe"],
        type=click.Choice(list(RECIPES)),
        is_eager=True,
        expose_value=False,
        callback=read,
        help="Settings that go together, for options that are not given; best: what did best in "
        "our comparisons ("
        + ", ".join(f"{key} {_shown(value)}" for key, value in RECIPES["best"].items())
        + ").",
    )
    command.params.insert(0, option)
    return command


def _shown(value: Any) -> str:
    return " ".join(value) if isinstance(value, list) else str(value)


def _from_yaml(p: click.Parameter, value: Any) -> str | list[str] | None:
    """Return a value of the file as the text that a command line would have; None if it leaves the
    option unset."""
    values = value if isinstance(value, list) and p.multiple else [value]
    if not all(isinstance(v, str) for v in values):
        raise ValueError(
            "a list of plain values expected"
            if p.multiple
            else "one plain value expected, not a list"
        )
    if p.name == "resume":  # true means from the last checkpoint
        on = {"true": "auto", "yes": "auto", "on": "auto", "false": None, "no": None, "off": None}
        return on.get(value.lower(), value)
    if not getattr(p, "is_flag", False) and any(v.lower() in ("true", "false") for v in values):
        raise ValueError(f"{value} is for switches, and this option takes a value")
    return values if p.multiple else value
