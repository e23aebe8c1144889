"""Checks of a task's fields. Each error is a sentence that says what to change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pseuzo.tasks import templates
from pseuzo.tasks.drawing import PARTS

if TYPE_CHECKING:
    from pseuzo.tasks.task import Task

KINDS = ("classification", "choice", "generation")
# The metrics of a kind; the first is its default.
METRICS = {"classification": ("accuracy",), "choice": ("accuracy",), "generation": ("f1", "em")}
NEEDS = {
    "classification": ("label", "labels"),
    "choice": ("options", "answer"),
    "generation": ("answers",),
}
TEXTS = (
    "name", "prompt", "description", "separator", "stop", "label", "continuation", "sfc", "answer",
    "answers",
)  # fmt: skip
# The keys that the fields which are mappings may have.
KEYS = {"dataset": ("path", "config", "data_dir", "revision"), "splits": PARTS}


def check_task(task: Task) -> None:
    """Raise ValueError for the first field that is missing, unknown to the kind or malformed."""
    _check_kind(task)
    _check_types(task)
    _check_templates(task)
    _check_labels(task)
    _check_data(task)


def _check_kind(task: Task) -> None:
    kind = task.kind
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    for other, names in NEEDS.items():
        for name in names:
            given = getattr(task, name)
            if other == kind and not given:
                raise ValueError(f"{name!r} is missing, which a task of the kind {kind} needs")
            if other != kind and given:
                raise ValueError(
                    f"{name!r} belongs to tasks of the kind {other}, this one is {kind}"
                )
    if task.sfc and kind == "generation":
        raise ValueError("'sfc' calibrates the scores of options, and a generation has none")
    if task.continuation and kind != "choice":
        raise ValueError(f"'continuation' belongs to tasks of the kind choice, this one is {kind}")
    if task.metric and task.metric not in METRICS[kind]:
        known = ", ".join(METRICS[kind])
        raise ValueError(f"metric must be one of {known} for the kind {kind}, got {task.metric!r}")


def _check_types(task: Task) -> None:
    for name in TEXTS:
        value = getattr(task, name)
        if not isinstance(value, str):
            raise ValueError(f"{name} must be text, got {value!r}; put it in quotes")
    if not isinstance(task.chat, bool):
        raise ValueError(f"chat must be true or false, got {task.chat!r}")
    most = task.max_new_tokens
    if type(most) is not int or most < 1:  # bool is an int, too
        raise ValueError(f"max_new_tokens must be a whole number from 1 up, got {most!r}")


def _check_templates(task: Task) -> None:
    templates.check(task.prompt, "prompt")
    for name in ("continuation", "sfc"):
        templates.check(getattr(task, name), name)
    for name in ("label", "answer", "answers"):
        if source := getattr(task, name):
            templates.check(source, name, expression=True)
    options = task.options
    if isinstance(options, str):
        if options:
            templates.check(options, "options", expression=True)
        return
    if not isinstance(options, Sequence) or not all(isinstance(o, str) for o in options):
        raise ValueError(
            f"options must be a column (an expression) or a list of templates, got {options!r}"
        )
    for option in options:
        templates.check(option, "options")


def _check_labels(task: Task) -> None:
    if not isinstance(task.labels, Mapping):
        raise ValueError(
            f"labels must map each value of the label to its word, got {task.labels!r}"
        )
    for value, word in task.labels.items():
        # A null would become the word "None", and a NaN the word "nan".
        if isinstance(word, bool) or not isinstance(word, str | int | float) or word != word:
            raise ValueError(
                f"labels must give each label a word, got {word!r} for {value!r}; put it in quotes"
            )
    words = [str(word).strip() for word in task.labels.values()]
    if task.labels and (len(words) < 2 or len(set(words)) < len(words) or not all(words)):
        raise ValueError(f"labels must give two or more labels different words, got {words}")


def _check_data(task: Task) -> None:
    for name, keys in KEYS.items():
        value, known = getattr(task, name), ", ".join(keys)
        if value is None:
            continue
        if not isinstance(value, Mapping) or not all(isinstance(v, str) for v in value.values()):
            raise ValueError(f"{name} must map some of {known} to names, got {value!r}")
        if unknown := sorted(map(str, value.keys() - set(keys))):
            raise ValueError(f"{name} has the unknown key {unknown[0]!r}; known: {known}")
    if task.data is not None and not isinstance(task.data, str):
        raise ValueError(
            f"data must be the path of a local file or folder, got {task.data!r}; put it in quotes"
        )
    if task.dataset is not None and "path" not in task.dataset:
        raise ValueError("dataset lacks 'path', its name on the hub")
    if task.dataset is not None and task.data is not None:
        raise ValueError(
            "it gives both 'dataset' (of the hub) and 'data' (local); keep one of them"
        )
