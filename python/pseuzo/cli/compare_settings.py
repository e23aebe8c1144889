"""What `pseuzo compare` is asked for, from its command line and --config."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import click

from pseuzo.cli.config import nested
from pseuzo.cli.options import unused
from pseuzo.cli.settings import check_combination
from pseuzo.train.methods import METHODS
from pseuzo.train.recipes import RECIPES

# Options that compare sets for every run.
COMPARED = {
    *("steps", "seed", "eval_every", "save_every", "keep", "quiet", "journal", "method"),
    *("direction_ranks", "ddp_timeout", "output", "resume"),
}
# Options that all methods of a comparison share, since they decide what is learned and measured.
OF_TASK = {
    *("task", "data", "train_size", "dev_size", "test_size", "data_seed"),
    *("model", "model_kind", "eval_batch_size", "device"),
}


# MeZO with noise on all weights, tuned: what every comparison has.
REFERENCE: dict[str, Any] = {"method": "mezo", "noise_on": ["all"], "lr": None, "eps": None}


@dataclass(frozen=True)
class OfTask:
    """What is compared on a task. settings: those of `pseuzo train` that all methods share, whole
    but for the method's own. methods: these, by title. reference: the title of tuned MeZO with
    noise on all weights. forwards: the budget of a final run."""

    settings: dict[str, Any]
    methods: dict[str, dict[str, Any]]
    reference: str
    forwards: int


@dataclass(frozen=True)
class Request:
    """What is compared, by the titles of the tasks. trial_forwards: the budget of a trial; None
    stands for trial_share of the task's."""

    tasks: dict[str, OfTask]
    seeds: int
    trials: int
    trial_forwards: int | None
    trial_share: float
    accept_code: bool = False


def read_request(
    settings: dict[str, Any],
    options: Mapping[str, click.Parameter],
    defaults: dict[str, Any],
    say: Callable[[str], None],
) -> Request:
    """Read the command line and --config of `pseuzo compare`.

    settings: the values of its options; those that are not its own are for all methods. options:
    those of `pseuzo train` that a method or a task may have, and defaults: the values of all of
    them. say gets a line where a method is added. ValueError for whatever cannot be run.
    """
    own = ("methods", "seeds", "forwards", "trials", "trial_forwards", "trial_share", "accept_code")
    mine = {name: settings[name] for name in own}
    common = {name: value for name, value in settings.items() if name not in own}
    names = mine.pop("methods") or ("pseuzo", "mezo", "fo-adam")
    source = click.get_current_context().get_parameter_source("methods")
    overridden = source == click.core.ParameterSource.COMMANDLINE
    methods = read_methods(None if overridden else nested("methods"), names, options)
    tasks = read_tasks(nested("tasks"), common, mine.pop("forwards"), options)
    return Request(
        {
            title: of_task(title, own, budget, methods, defaults, say)
            for title, (own, budget) in tasks.items()
        },
        **mine,
    )


def read_method(text: str, options: Mapping[str, click.Parameter]) -> tuple[str, dict[str, Any]]:
    """Parse NAME:KEY=VALUE,... into a title and settings, as pseuzo train would read them."""
    name, _, rest = text.partition(":")
    own: dict[str, Any] = {"method": name}
    for pair in filter(None, rest.split(",")):
        key, _, value = (part.strip() for part in pair.partition("="))
        key = key.replace("-", "_")
        if key in COMPARED:
            raise ValueError(
                f"--methods: {key} is not a method's own; compare sets it for every run"
            )
        if not value or key not in options:
            raise ValueError(f"--methods: {pair!r} is not KEY=VALUE with an option of pseuzo train")
        own[key] = value.split("+") if options[key].multiple else value
    return text, method_settings(f"--methods {text}", own, options)


def method_settings(
    where: str, given: Mapping[str, Any], options: Mapping[str, click.Parameter]
) -> dict[str, Any]:
    """Return the settings of a method, with values as pseuzo train reads them. where: what a
    refusal begins with."""
    name = given.get("method")
    if name in RECIPES:
        given = RECIPES[name] | {key: x for key, x in given.items() if key != "method"}
    elif name not in METHODS:
        known = ", ".join((*METHODS, *RECIPES))
        raise ValueError(f"{where}: {name!r} is not a method or a recipe; known: {known}")
    for key in given.keys() & OF_TASK:
        raise ValueError(f"{where}: {key} is not a method's own; it belongs to the task")
    own = {key: value for key, value in given.items() if key != "method"}
    return {"method": given["method"], **typed(where, own, options)}


def typed(
    where: str, given: Mapping[str, Any], options: Mapping[str, click.Parameter]
) -> dict[str, Any]:
    """Return settings whose values are text as pseuzo train reads them on its command line."""
    context, found = click.get_current_context(), {}
    for key, value in given.items():
        name = str(key).replace("-", "_")
        if name in COMPARED:
            raise ValueError(
                f"{where}: {name} is not a setting here; compare sets it for every run"
            )
        if name not in options:
            raise ValueError(f"{where}: {key!r} is not an option of pseuzo train")
        p = options[name]
        if p.multiple and isinstance(value, str):
            value = [value]
        try:
            found[name] = p.type_cast_value(context, value)
        except (click.BadParameter, TypeError) as error:
            raise ValueError(f"{where}: {name}: {getattr(error, 'message', error)}") from None
    return found


def read_methods(
    given: Any, names: tuple[str, ...], options: Mapping[str, click.Parameter]
) -> dict[str, dict[str, Any]]:
    """Return the settings of each method by title. given: the mapping of --config from titles to
    NAME:KEY=VALUE,... or to settings, if it has one; names: those of --methods."""
    if given is None:
        chosen = dict(read_method(text, options) for text in names)
        if len(chosen) < len(names):
            raise ValueError("--methods: the same method with the same settings is named twice")
        return chosen
    chosen = {}
    for title, own in given.items():
        if isinstance(own, str):
            chosen[title] = read_method(own, options)[1]
        elif isinstance(own, dict):
            chosen[title] = method_settings(f"methods: {title}", own, options)
        else:
            raise ValueError(f"methods: {title}: NAME:KEY=VALUE,... or a mapping of settings")
    return chosen


def read_tasks(
    given: Any, settings: Mapping[str, Any], forwards: int, options: Mapping[str, click.Parameter]
) -> dict[str, tuple[dict[str, Any], int]]:
    """Return the settings of each task and its budget, by title. given: the mapping `tasks` of
    --config, if it has one; otherwise --model and --task are the only one."""
    if given is None:
        given = {str(settings["task"]): {}}
    found = {}
    for title, own in given.items():
        if not isinstance(own, dict):
            raise ValueError(f"tasks: {title}: a mapping of settings is expected")
        own = dict(own)
        budget = _number(f"tasks: {title}: forwards", own.pop("forwards", forwards), 4)
        whole = {**settings, **typed(f"tasks: {title}", own, options)}
        for name in ("model", "task"):
            if whole[name] is None:
                raise ValueError(f"{title}: give --{name}, or `{name}:` among the task's settings")
        found[title] = whole, budget
    return found


def _number(what: str, value: Any, least: int) -> int:
    try:
        return click.IntRange(least).convert(value, None, None)
    except click.BadParameter as error:
        raise ValueError(f"{what}: {error.message}") from None


def of_task(
    title: str,
    settings: dict[str, Any],
    forwards: int,
    methods: Mapping[str, dict[str, Any]],
    defaults: dict[str, Any],
    say: Callable[[str], None],
) -> OfTask:
    """Put tuned MeZO with noise on all weights among the methods, if it is not there, and give each
    the options for all methods that apply to it. ValueError: see share."""
    own = {title: dict(method) for title, method in methods.items()}
    share(settings, own, defaults)
    reference = next((name for name in own if _is_reference(settings, methods[name])), "")
    if not reference:
        reference = "mezo" if "mezo" not in own else "mezo (tuned, noise on all)"
        say(f"{title}: {reference} is added, as the reference of every comparison")
        added = dict(REFERENCE)
        _fit(reference, added, settings, defaults)
        own = {reference: added} | own
    return OfTask(settings, own, reference, forwards)


def _is_reference(settings: Mapping[str, Any], method: Mapping[str, Any]) -> bool:
    """Whether a method is REFERENCE, with nothing that the others do not have."""
    whole = {name: {**settings, **method}[name] for name in REFERENCE}
    whole["noise_on"] = list(whole["noise_on"])
    return method.keys() <= REFERENCE.keys() and whole == REFERENCE


def share(
    settings: dict[str, Any], chosen: Mapping[str, dict[str, Any]], defaults: dict[str, Any]
) -> None:
    """Give each method the options for all methods that apply to it. ValueError for an option that
    applies to none, and for methods that cannot be run."""
    left_out = [_fit(title, own, settings, defaults) for title, own in chosen.items()]
    for name, (_, sentence) in left_out[0].items():
        if all(name in idle for idle in left_out):
            raise ValueError(sentence)


def _fit(
    title: str, own: dict[str, Any], settings: dict[str, Any], defaults: dict[str, Any]
) -> dict[str, tuple[str, str]]:
    """Set the options for all methods that do not apply to one to their defaults; return these."""
    import torch

    from pseuzo.perturb.graphs import check_device

    idle = unused(defaults | settings | own, defaults)
    for name, (_, sentence) in idle.items():
        if name in own:
            raise ValueError(f"--methods {title}: {sentence}")
    own |= {name: defaults[name] for name in idle}
    try:
        given = defaults | settings | own
        check_combination(given)
        if given["capture"]:
            usual = "cuda" if torch.cuda.is_available() else "cpu"
            check_device("--capture", torch.device(given["device"] or usual))
    except ValueError as error:
        raise ValueError(f"{title}: {error}") from None
    return idle
