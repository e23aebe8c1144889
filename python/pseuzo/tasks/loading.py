"""load_task: a task from a YAML file, built in or a user's, or from rows that are questions."""

from dataclasses import fields
from importlib import resources
from pathlib import Path
from typing import Any

from pseuzo.files import parse_yaml
from pseuzo.tasks.sources import read_json
from pseuzo.tasks.task import Task

_FOLDER = resources.files("pseuzo.tasks") / "builtin"
BUILTIN = tuple(sorted(file.name.removesuffix(".yaml") for file in _FOLDER.iterdir()))


def load_task(name_or_path: str | Path) -> Task:
    """A built-in task by name, or a user's by path.

    The path is that of a .yaml file, or of a .jsonl file with the rows {prompt, options, answer}
    or {prompt, answers}. ValueError names what is unknown, missing or malformed."""
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml", ".jsonl"):
        if not path.is_file():
            raise ValueError(f"task {name_or_path}: there is no such file")
        return _from_rows(path) if path.suffix == ".jsonl" else _from_yaml(path)
    if str(name_or_path) not in BUILTIN:
        raise ValueError(
            f"unknown task {str(name_or_path)!r}; known: {', '.join(BUILTIN)}; "
            "one of your own is the path of a .yaml or .jsonl file"
        )
    return _from_yaml(Path(str(_FOLDER / f"{name_or_path}.yaml")))


def _from_yaml(path: Path) -> Task:
    import yaml

    class Loader(yaml.SafeLoader):
        """Reads Yes, No, On and Off as these words, as YAML 1.2 does: most of the time they are
        label words."""

    Loader.yaml_implicit_resolvers = {
        first: [
            (tag, regexp)
            for tag, regexp in resolvers
            if tag != "tag:yaml.org,2002:bool" or first in "tTfF"
        ]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    try:
        content = parse_yaml(path, Loader)
    except ValueError as error:
        raise ValueError(f"task {path} is not YAML: {error}") from None
    keys = [f.name for f in fields(Task) if f.name != "folder"]
    known = ", ".join(keys)
    if not isinstance(content, dict):
        raise ValueError(f"task {path} must be a YAML mapping with some of the keys {known}")
    if unknown := [key for key in content if key not in keys]:
        raise ValueError(f"task {path} has the unknown key {unknown[0]!r}; known: {known}")
    if missing := [key for key in ("kind", "prompt") if key not in content]:
        raise ValueError(f"task {path} lacks the key {missing[0]!r}")
    given: dict[str, Any] = {"name": path.stem} | content
    return Task(**given, folder=str(path.resolve().parent))


def _from_rows(path: Path) -> Task:
    """A task whose rows are its questions; a classification if all rows have the same options."""
    rows = [row for _, row in read_json(path)]
    if not rows:
        raise ValueError(f"task {path}: the file is empty")
    first = rows[0]
    lacking = [] if "prompt" in first else ["prompt"]
    if "options" in first and "answer" not in first:
        lacking.append("answer")
    if "options" not in first and "answers" not in first:
        lacking.append("options or answers")
    if lacking:
        raise ValueError(
            f"task {path}: its rows lack {', '.join(lacking)}; rows without a template are "
            "{prompt, options, answer} or {prompt, answers}, and these have "
            f"{', '.join(sorted(first))}"
        )
    common: dict[str, Any] = {
        "name": path.stem,
        "prompt": "{{ prompt }}",
        "data": path.name,
        "folder": str(path.resolve().parent),
    }
    if "options" not in first:
        return Task(kind="generation", answers="answers", **common)
    options = first["options"]
    are_words = isinstance(options, list) and len(options) > 1
    are_words = are_words and all(isinstance(option, str) for option in options)
    if are_words and all(row.get("options") == options for row in rows):
        numbered = all(isinstance(row.get("answer"), int) for row in rows)
        values = range(len(options)) if numbered else [option.strip() for option in options]
        labels = dict(zip(values, options, strict=True))
        return Task(kind="classification", label="answer", labels=labels, **common)
    return Task(kind="choice", options="options", answer="answer", **common)
