"""A task: where its rows come from, how a row becomes a prompt with its answers, how it is scored.

A task is a YAML file, the built-in ones (in builtin/) and a user's alike; docs/tasks.md describes
the format, loading.py reads it. Prompts are Jinja templates over the columns of a row.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pseuzo.tasks import templates
from pseuzo.tasks.checks import METRICS, check_task
from pseuzo.tasks.drawing import PARTS, draw_rows, split_of_parts
from pseuzo.tasks.sources import Hub, Local, Source, take


@dataclass(frozen=True)
class Example:
    """A question.

    options: the texts to choose between, and answer the number of the right one; a question with
    a free answer has neither. golds: the texts that count as right; the first is trained on.
    place: where its row is, for people. continuation: what is scored instead of the options, after
    the prompt and each of them. domain: the prompt without what the row asks, by which a score is
    calibrated, or "" if the task has no such template."""

    prompt: str
    options: tuple[str, ...] = ()
    answer: int | None = None
    golds: tuple[str, ...] = ()
    place: str = field(default="", compare=False)
    continuation: str = ""
    domain: str = ""


@dataclass(frozen=True)
class Task:
    """What a task file says; docs/tasks.md describes each field.

    ValueError, with the task's name, for what a user may get wrong."""

    name: str
    kind: str
    prompt: str
    description: str = ""
    dataset: Mapping[str, str] | None = None  # of the hub: path, config, data_dir, revision
    data: str | None = None  # local: absolute, or relative to `folder`
    splits: Mapping[str, str] | None = None  # train, dev, test -> the split they are drawn from
    label: str = ""
    labels: Mapping[Any, str] = field(default_factory=dict)
    options: str | Sequence[str] = ()
    continuation: str = ""
    sfc: str = ""
    answer: str = ""
    answers: str = ""
    separator: str = " "
    metric: str = ""  # the main one, larger is better; "" becomes the kind's default
    max_new_tokens: int = 50
    stop: str = "\n"
    chat: bool = False  # the prompt is a user's turn in the tokenizer's chat template
    folder: str = ""  # of the task's file

    def __post_init__(self):
        try:
            check_task(self)
        except ValueError as error:
            raise ValueError(f"task {self.name}: {error}") from None
        if not self.metric:
            object.__setattr__(self, "metric", METRICS[self.kind][0])

    def example(self, row: Mapping[str, Any]) -> Example:
        """Make the question of a row. ValueError names the field and the column that do not fit."""
        prompt = templates.fill(self.prompt, row, "prompt")
        if self.kind != "generation":
            ask = self._classification if self.kind == "classification" else self._choice
            return replace(ask(row, prompt), domain=templates.fill(self.sfc, row, "sfc"))
        golds = _texts(templates.fill(self.answers, row, "answers", expression=True), "answers")
        return Example(prompt, (), None, golds)

    def _classification(self, row: Mapping[str, Any], prompt: str) -> Example:
        value, keys = templates.fill(self.label, row, "label", expression=True), list(self.labels)
        places = [i for i, key in enumerate(keys) if key == value]
        if not places:  # JSON and YAML may disagree on 1 and "1"
            places = [i for i, key in enumerate(keys) if str(key) == str(value)]
        if not places:
            known = ", ".join(map(repr, keys))
            raise ValueError(f"label {value!r} has no label word; known: {known}")
        words = tuple(str(word).strip() for word in self.labels.values())
        return Example(prompt, words, places[0], (words[places[0]],))

    def _choice(self, row: Mapping[str, Any], prompt: str) -> Example:
        if isinstance(self.options, str):
            found = templates.fill(self.options, row, "options", expression=True)
        else:
            found = [templates.fill(option, row, "options") for option in self.options]
        options = _texts(found, "options")
        if len(options) < 2:
            raise ValueError(f"options must be two or more different texts, got {list(options)}")
        answer = templates.fill(self.answer, row, "answer", expression=True)
        if isinstance(answer, int):
            if not 0 <= answer < len(options):
                raise ValueError(
                    f"answer must be the number of an option, 0 to {len(options) - 1}, got {answer}"
                )
            golds: tuple[str, ...] = (options[answer],)
        else:
            golds = tuple(gold for gold in _texts(answer, "answer") if gold in options)
            if not golds:
                raise ValueError(f"answer {answer!r} is none of the options {list(options)}")
        rest = templates.fill(self.continuation, row, "continuation")
        if self.continuation and not rest:
            raise ValueError("continuation must give a text, which is scored, got an empty one")
        return Example(prompt, options, options.index(golds[0]), golds, continuation=rest)

    def examples(
        self, rows: Sequence[Mapping[str, Any]], places: Sequence[str] | None = None
    ) -> list[Example]:
        """Make one example of each row.

        places: where each row is, for messages; by default its number in rows. ValueError names the
        place of a row that does not fit."""
        examples = []
        for number, row in enumerate(rows):
            place = places[number] if places else f"row {number} (from 0)"
            try:
                example = replace(self.example(row), place=place)
                texts = (example.prompt, example.domain, example.continuation)
                for text in (*texts, *example.options, *example.golds):
                    _check_characters(text)
            except ValueError as error:
                raise ValueError(f"task {self.name}, {place}: {error}") from None
            examples.append(example)
        return examples

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

        data: a local folder, .jsonl or .parquet in the columns that the task's templates ask for;
        None takes what the task names, which may be a data set of the hub. The test examples
        depend on seed, test and the data alone: where they come from a split that train or dev
        use too (one file, say), they are drawn first, and are at most two fifths of it, even if
        train and dev are 0. If what is left is too few, train and dev share it in proportion to
        what was asked for. A warning says when there are fewer. ValueError if there are none, or
        if they do not fit the templates."""
        sizes = {"train": train, "dev": dev, "test": test}
        for part, size in sizes.items():
            if not isinstance(size, int) or size < 0:
                raise ValueError(
                    f"task {self.name}: {part} must be a number of examples from 0 up, got {size!r}"
                )
        if sum(sizes.values()) == 0:
            raise ValueError(
                f"task {self.name}: train, dev and test are all 0: there is nothing to load"
            )
        drawn: dict[str, tuple[list, list[str]]] = {part: ([], []) for part in PARTS}
        try:
            source = self._source(data)
            parts_of_split: dict[str, list[str]] = {}
            for part, split in split_of_parts(self.splits or {}, source.splits).items():
                parts_of_split.setdefault(split, []).append(part)
            for split, parts in parts_of_split.items():
                wanted = {part: sizes[part] for part in parts if sizes[part]}
                if not wanted:
                    continue
                rows = source.rows(split)
                numbers = draw_rows(
                    split, len(rows), wanted, shared=len(parts) > 1, seed=seed, task_name=self.name
                )
                for part, index in numbers.items():
                    drawn[part] = take(rows, index), [source.place(split, i) for i in index]
        except ValueError as error:
            raise ValueError(f"task {self.name}: {error}") from error.__cause__
        return {part: self.examples(rows, places) for part, (rows, places) in drawn.items()}

    def _source(self, data: str | Path | None) -> Source:
        if data is not None:
            return Local(Path(data).expanduser())
        if self.data is not None:
            return Local(Path(self.folder, self.data).expanduser())
        if self.dataset is None:
            raise ValueError(
                "it names no data; add 'data' (a local file or folder) or 'dataset' (of the hub) "
                "to its file, or give data with the call"
            )
        return Hub(**self.dataset)


def _check_characters(text: str) -> None:
    """Raise ValueError for half of a surrogate pair, such as an emoji that was cut in two, since it
    is not a character and cannot be encoded."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half, begin = text[error.start], text[max(0, error.start - 20) : error.start]
        raise ValueError(
            f"after {begin!r} comes {half!r}, half of a character of two, which no tokenizer "
            "takes; correct or remove the row"
        ) from None


def _texts(value: Any, name: str) -> tuple[str, ...]:
    """Return the value as texts without outer white space, without duplicates."""
    values = [value] if isinstance(value, str) else value
    are_texts = isinstance(values, Sequence)
    if not are_texts or not all(isinstance(v, str | int | float) for v in values):
        raise ValueError(f"{name} must give text or a list of texts, got {value!r}")
    texts = tuple(dict.fromkeys(str(v).strip() for v in values))
    if not texts or not all(texts):
        raise ValueError(
            f"{name} must give at least one text, and none that is empty, got {value!r}"
        )
    return texts
