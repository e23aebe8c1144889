"""A task: where its rows come from, how a row becomes a prompt with its answers, how it is scored.

A task is a YAML file, the built-in ones (in builtin/) and a user's alike; docs/tasks.md describes the format. Prompts
are Jinja templates over the columns of a row.

The data of a task are drawn as MeZO does: training and dev examples from the training split, disjoint, and test
examples from the validation split, as public test splits have no labels; all by seed. Test rows come first: which ones
they are does not depend on how many others are asked for, so that what is evaluated was never trained on.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from pseuzo.files import parse_yaml
from pseuzo.tasks import templates
from pseuzo.tasks.sources import ALL, Hub, Local, Source, canonical, read_json, take

KINDS = ("classification", "choice", "generation")
METRICS = {"classification": ("accuracy",), "choice": ("accuracy",), "generation": ("f1", "em")}
NEEDS = {
    "classification": ("label", "labels"),
    "choice": ("options", "answer"),
    "generation": ("answers",),
}
BUILTIN = (
    "sst2",
    "rte",
    "cb",
    "boolq",
    "wsc",
    "wic",
    "multirc",
    "copa",
    "record",
    "squad",
    "drop",
    "demo",
)
PARTS = ("train", "dev", "test")


@dataclass(frozen=True)
class Example:
    """A question. options: the texts to choose between, answer the number of the right one; both are empty for free
    answers. golds: the texts that count as right, the first being the one that is trained on. place: where its row is,
    for people."""

    prompt: str
    options: tuple[str, ...] = ()
    answer: int | None = None
    golds: tuple[str, ...] = ()
    place: str = field(default="", compare=False)


@dataclass(frozen=True)
class Task:
    """What a task file says; see docs/tasks.md for each field. metric: the main one, larger is better."""

    name: str
    kind: str
    prompt: str
    description: str = ""
    dataset: Mapping[str, str] | None = None  # path, config, data_dir, revision: of the hub
    data: str | None = None  # local: absolute, or relative to the task's file
    splits: Mapping[str, str] | None = (
        None  # train, dev, test -> the name of the split they are drawn from
    )
    label: str = ""
    labels: Mapping[Any, str] = field(default_factory=dict)
    options: str | Sequence[str] = ()
    answer: str = ""
    answers: str = ""
    separator: str = " "
    metric: str = ""
    max_new_tokens: int = 50
    stop: str = "\n"
    chat: bool = False  # the prompt is a user's turn in the tokenizer's chat template
    folder: str = ""  # of the file: what `data` is relative to

    def __post_init__(self):
        """ValueError, with the task's name, for what a user may get wrong."""
        try:
            self._check()
        except ValueError as error:
            raise ValueError(f"task {self.name}: {error}") from None

    def _check(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        for other, names in NEEDS.items():
            for name in names:
                if other == self.kind and not getattr(self, name):
                    raise ValueError(
                        f"{name!r} is missing, which a task of the kind {self.kind} needs"
                    )
                if other != self.kind and getattr(self, name):
                    raise ValueError(
                        f"{name!r} belongs to tasks of the kind {other}, this one is {self.kind}"
                    )
        if not self.metric:
            object.__setattr__(self, "metric", METRICS[self.kind][0])
        if self.metric not in METRICS[self.kind]:
            raise ValueError(
                f"metric must be one of {', '.join(METRICS[self.kind])} for the kind {self.kind}, got {self.metric!r}"
            )
        for name in (
            "name",
            "prompt",
            "description",
            "separator",
            "stop",
            "label",
            "answer",
            "answers",
        ):
            if not isinstance(getattr(self, name), str):
                raise ValueError(
                    f"{name} must be text, got {getattr(self, name)!r}; put it in quotes"
                )
        if not isinstance(self.chat, bool):
            raise ValueError(f"chat must be true or false, got {self.chat!r}")
        if type(self.max_new_tokens) is not int or self.max_new_tokens < 1:
            raise ValueError(
                f"max_new_tokens must be a whole number from 1 up, got {self.max_new_tokens!r}"
            )
        templates.check(self.prompt, "prompt")
        for name in ("label", "answer", "answers"):
            if getattr(self, name):
                templates.check(getattr(self, name), name, expression=True)
        if isinstance(self.options, str):
            if self.options:
                templates.check(self.options, "options", expression=True)
        elif not isinstance(self.options, Sequence) or not all(
            isinstance(o, str) for o in self.options
        ):
            raise ValueError(
                f"options must be a column (an expression) or a list of templates, got {self.options!r}"
            )
        for option in () if isinstance(self.options, str) else self.options:
            templates.check(option, "options")
        if not isinstance(self.labels, Mapping):
            raise ValueError(
                f"labels must map each value of the label to its word, got {self.labels!r}"
            )
        for value, word in self.labels.items():  # a null would be the word "None"
            if isinstance(word, bool) or not isinstance(word, str | int | float) or word != word:
                raise ValueError(
                    f"labels must give each label a word, got {word!r} for {value!r}; put it in quotes"
                )
        words = [str(word).strip() for word in self.labels.values()]
        if self.labels and (len(words) < 2 or len(set(words)) < len(words) or not all(words)):
            raise ValueError(f"labels must give two or more labels different words, got {words}")
        for name, keys in (
            ("dataset", ("path", "config", "data_dir", "revision")),
            ("splits", PARTS),
        ):
            value = getattr(self, name)
            if value is None:
                continue
            if not isinstance(value, Mapping) or not all(
                isinstance(v, str) for v in value.values()
            ):
                raise ValueError(
                    f"{name} must map some of {', '.join(keys)} to names, got {value!r}"
                )
            if unknown := sorted(map(str, value.keys() - set(keys))):
                raise ValueError(
                    f"{name} has the unknown key {unknown[0]!r}; known: {', '.join(keys)}"
                )
        if self.data is not None and not isinstance(self.data, str):
            raise ValueError(
                f"data must be the path of a local file or folder, got {self.data!r}; put it in quotes"
            )
        if self.dataset is not None and "path" not in self.dataset:
            raise ValueError("dataset lacks 'path', its name on the hub")
        if self.dataset is not None and self.data is not None:
            raise ValueError(
                "it gives both 'dataset' (of the hub) and 'data' (local); keep one of them"
            )

    def example(self, row: Mapping[str, Any]) -> Example:
        """The question that a row makes. ValueError names the field and the column that do not fit."""
        prompt = templates.fill(self.prompt, row, "prompt")
        if self.kind == "classification":
            value = templates.fill(self.label, row, "label", expression=True)
            keys = list(self.labels)
            # JSON and YAML may disagree on 1 and "1"
            places = [i for i, k in enumerate(keys) if k == value] or [
                i for i, k in enumerate(keys) if str(k) == str(value)
            ]
            if not places:
                raise ValueError(
                    f"label {value!r} has no label word; known: {', '.join(map(repr, keys))}"
                )
            words = tuple(str(word).strip() for word in self.labels.values())
            return Example(prompt, words, places[0], (words[places[0]],))
        if self.kind == "choice":
            return self._choice(row, prompt)
        golds = _texts(templates.fill(self.answers, row, "answers", expression=True), "answers")
        return Example(prompt, (), None, golds)

    def _choice(self, row: Mapping[str, Any], prompt: str) -> Example:
        if isinstance(self.options, str):
            options = _texts(
                templates.fill(self.options, row, "options", expression=True), "options"
            )
        else:
            options = _texts(
                [templates.fill(option, row, "options") for option in self.options], "options"
            )
        if len(options) < 2:
            raise ValueError(f"options must be two or more different texts, got {list(options)}")
        answer = templates.fill(self.answer, row, "answer", expression=True)
        if isinstance(answer, int):
            if not 0 <= answer < len(options):
                raise ValueError(
                    f"answer must be the number of an option, 0 to {len(options) - 1}, got {answer}"
                )
            golds = (options[answer],)
        else:
            golds = tuple(gold for gold in _texts(answer, "answer") if gold in options)
            if not golds:
                raise ValueError(f"answer {answer!r} is none of the options {list(options)}")
        return Example(prompt, options, options.index(golds[0]), golds)

    def examples(
        self, rows: Sequence[Mapping[str, Any]], places: Sequence[str] | None = None
    ) -> list[Example]:
        """One for each row. places: where each row is, for people; by default its number in rows. ValueError names the
        place of a row that does not fit."""
        out = []
        for number, row in enumerate(rows):
            place = places[number] if places else f"row {number} (from 0)"
            try:
                example = replace(self.example(row), place=place)
                for text in (example.prompt, *example.options, *example.golds):
                    _check_characters(text)
                out.append(example)
            except ValueError as error:
                raise ValueError(f"task {self.name}, {place}: {error}") from None
        return out

    def load(
        self,
        data: str | Path | None = None,
        *,
        train: int = 1000,
        dev: int = 500,
        test: int = 1000,
        seed: int = 0,
    ) -> dict[str, list[Example]]:
        """{"train", "dev", "test"}: as many examples as asked for, drawn by seed, no row twice.

        data: a local folder, .jsonl or .parquet in the columns that the task's templates ask for; None takes what the
        task names, which may be a data set of the hub. The test examples depend on seed, test and the data alone: where
        they come from a split that train or dev use too (one file, say), they are drawn first, and are at most two
        fifths of it, even if train and dev are 0. If what is left is too few, train and dev share it in proportion to
        what was asked for. A warning says when there are fewer. ValueError if there are none, or if they do not fit the
        templates.
        """
        sizes = {"train": train, "dev": dev, "test": test}
        for name, size in sizes.items():
            if not isinstance(size, int) or size < 0:
                raise ValueError(
                    f"task {self.name}: {name} must be a number of examples from 0 up, got {size!r}"
                )
        if sum(sizes.values()) == 0:
            raise ValueError(
                f"task {self.name}: train, dev and test are all 0: there is nothing to load"
            )
        drawn: dict[str, tuple[list, list[str]]] = {
            part: ([], []) for part in PARTS
        }  # rows and their places
        try:
            source = self._source(data)
            by_split: dict[str, list[str]] = {}
            for part, split in self._splits_of(source).items():
                by_split.setdefault(split, []).append(part)
            for split, parts in by_split.items():
                wanted = {part: sizes[part] for part in parts if sizes[part]}
                if not wanted:
                    continue
                rows = source.rows(split)
                for part, index in self._draw(
                    split, len(rows), wanted, len(parts) > 1, seed
                ).items():
                    drawn[part] = take(rows, index), [source.place(split, i) for i in index]
        except ValueError as error:
            raise ValueError(f"task {self.name}: {error}") from error.__cause__
        return {part: self.examples(*rows) for part, rows in drawn.items()}

    def _source(self, data: str | Path | None) -> Source:
        if data is not None:
            return Local(Path(data).expanduser())
        if self.data is not None:
            return Local(Path(self.folder, self.data).expanduser())
        if self.dataset is None:
            raise ValueError(
                "it names no data; add 'data' (a local file or folder) or 'dataset' (of the hub) to its file, or give "
                "data with the call"
            )
        return Hub(**self.dataset)

    def _splits_of(self, source: Source) -> dict[str, str]:
        """train, dev, test -> the split each is drawn from."""
        wanted = dict(self.splits or {})
        there = source.splits
        if there == (ALL,):
            return dict.fromkeys(PARTS, ALL)
        if there is not None:
            wanted = {part: canonical(split) for part, split in wanted.items()}
            if not wanted and {"validation", "test"} <= set(there):
                wanted = {"dev": "validation", "test": "test"}
        train = wanted.get("train", "train")
        out = {
            "train": train,
            "dev": wanted.get("dev", train),
            "test": wanted.get("test", "validation"),
        }
        if there is None:
            return out
        instead = {
            "validation": ("test", train),
            "test": ("validation", train),
        }  # a local copy may hold fewer
        for part, split in out.items():
            found = next((s for s in (split, *instead.get(split, ())) if s in there), None)
            if found is None:
                raise ValueError(
                    f"{part} examples come from the split {split!r}, but there is only {', '.join(there)}"
                )
            out[part] = found
        return out

    def _draw(
        self, split: str, n: int, wanted: dict[str, int], shared: bool, seed: int
    ) -> dict[str, list[int]]:
        """For each part its random rows of n, disjoint, the test rows first. shared: is the split that of other parts
        too, wanted or not? See load for what is done when there are too few."""
        name = "the data" if split == ALL else f"the split {split!r}"
        if n == 0:
            raise ValueError(f"{name} is empty")
        if n < len(wanted):
            raise ValueError(f"{name} has {n} row(s), too few for {' and '.join(wanted)}")
        test = min(wanted.get("test", 0), max(1, 2 * n // 5) if shared else n)
        sizes, others = (
            {"test": test},
            {part: size for part, size in wanted.items() if part != "test"},
        )
        left, total = n - test, sum(others.values())
        if left < total:
            sizes |= {part: max(1, left * size // total) for part, size in others.items()}
            sizes[max(others, key=others.__getitem__)] += n - sum(sizes.values())
        else:
            sizes |= others
        if any(sizes[part] < size for part, size in wanted.items()):
            shares = ", ".join(
                f"{sizes[part]} of {size} for {part}" for part, size in wanted.items()
            )
            warnings.warn(f"task {self.name}: {name} has {n} rows, too few: {shares}", stacklevel=3)
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[
            : sum(sizes.values())
        ]
        parts = dict(
            zip(sizes, (part.tolist() for part in order.split(list(sizes.values()))), strict=True)
        )
        return {part: parts[part] for part in wanted}


def _check_characters(text: str) -> None:
    """ValueError for a code point that is no character and cannot be encoded: half of a surrogate pair, as of an emoji
    that was cut in two."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half, begin = text[error.start], text[max(0, error.start - 20) : error.start]
        raise ValueError(
            f"after {begin!r} comes {half!r}, half of a character of two, which no tokenizer takes; mend or remove the "
            "row"
        ) from None


def _texts(value: Any, name: str) -> tuple[str, ...]:
    """value as texts without outer white space, each once."""
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, Sequence) or not all(
        isinstance(v, str | int | float) for v in values
    ):
        raise ValueError(f"{name} must give text or a list of texts, got {value!r}")
    texts = tuple(dict.fromkeys(str(v).strip() for v in values))
    if not texts or not all(texts):
        raise ValueError(
            f"{name} must give at least one text, and none that is empty, got {value!r}"
        )
    return texts


def load_task(name_or_path: str | Path) -> Task:
    """A built-in task by name, or a user's by path: a .yaml, or a .jsonl of rows {prompt, options, answer} or
    {prompt, answers}. ValueError names what is unknown, missing or malformed."""
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml", ".jsonl"):
        if not path.is_file():
            raise ValueError(f"task {name_or_path}: there is no such file")
        return _from_rows(path) if path.suffix == ".jsonl" else _from_yaml(path)
    if str(name_or_path) not in BUILTIN:
        raise ValueError(
            f"unknown task {str(name_or_path)!r}; known: {', '.join(BUILTIN)}; one of your own is the path of a .yaml "
            "or .jsonl file"
        )
    return _from_yaml(
        Path(str(resources.files("pseuzo.tasks") / "builtin" / f"{name_or_path}.yaml"))
    )


def _from_yaml(path: Path) -> Task:
    import yaml

    class Loader(yaml.SafeLoader):
        """Yes, No, On and Off are the words they look like, as in YAML 1.2: label words, most of the time."""

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
    known = [f.name for f in fields(Task) if f.name != "folder"]
    if not isinstance(content, dict):
        raise ValueError(
            f"task {path} must be a YAML mapping with some of the keys {', '.join(known)}"
        )
    if unknown := [key for key in content if key not in known]:
        raise ValueError(
            f"task {path} has the unknown key {unknown[0]!r}; known: {', '.join(known)}"
        )
    if missing := [key for key in ("kind", "prompt") if key not in content]:
        raise ValueError(f"task {path} lacks the key {missing[0]!r}")
    return Task(**{"name": path.stem} | content, folder=str(path.resolve().parent))


def _from_rows(path: Path) -> Task:
    """A task whose rows are its questions. The same options everywhere make it a classification."""
    rows = [row for _, row in read_json(path)]
    if not rows:
        raise ValueError(f"task {path}: the file is empty")
    common = {
        "name": path.stem,
        "prompt": "{{ prompt }}",
        "data": path.name,
        "folder": str(path.resolve().parent),
    }
    lacking = [column for column in ("prompt",) if column not in rows[0]]
    if "options" in rows[0] and "answer" not in rows[0]:
        lacking.append("answer")
    if "options" not in rows[0] and "answers" not in rows[0]:
        lacking.append("options or answers")
    if lacking:
        raise ValueError(
            f"task {path}: its rows lack {', '.join(lacking)}; rows without a template are {{prompt, options, answer}} "
            f"or {{prompt, answers}}, and these have {', '.join(sorted(rows[0]))}"
        )
    if "options" not in rows[0]:
        return Task(kind="generation", answers="answers", **common)
    first = rows[0]["options"]
    words = isinstance(first, list) and len(first) > 1 and all(isinstance(o, str) for o in first)
    if words and all(row.get("options") == first for row in rows):
        numbered = all(isinstance(row.get("answer"), int) for row in rows)
        keys = range(len(first)) if numbered else [option.strip() for option in first]
        return Task(
            kind="classification",
            label="answer",
            labels=dict(zip(keys, first, strict=True)),
            **common,
        )
    return Task(kind="choice", options="options", answer="answer", **common)
