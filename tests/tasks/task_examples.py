"""Tasks and rows that several tests of tasks use."""

from pathlib import Path

import pseuzo
from pseuzo.tasks import Task

DEMO_MODEL = Path(pseuzo.__file__).parent / "demo" / "assets" / "model"
EXAMPLES = Path(__file__).parents[2] / "examples"

TASK = Task(
    name="mine",
    kind="classification",
    prompt="{{ sentence }} is",
    label="label",
    labels={0: "bad", 1: "good"},
)
# A task file of each kind needs these entries.
GOOD = {
    "kind": "classification",
    "prompt": "{{ sentence }}",
    "label": "label",
    "labels": {0: "bad", 1: "good"},
}
# Its label words are single tokens of the demo's tokenizer; those of LONG are not.
CODE = Task(
    name="kind",
    kind="classification",
    prompt="{{ text }}\n# kind:",
    label="label",
    labels={"code": "code", "prose": "prose"},
)
LONG = Task(
    name="long",
    kind="classification",
    prompt="{{ text }}\n# kind:",
    label="label",
    labels={"code": "a piece of code", "prose": "prose", "none": "neither of them"},
)
TEXTS = (
    "for i in range(10):",
    "Return a copy of it.",
    "x = 1",
    "The default is None, which means no limit at all.",
)


def numbered(n, start=0):
    return [{"sentence": f"number {i}", "label": i % 2, "idx": i} for i in range(start, start + n)]


def numbers(examples):
    return [int(e.prompt.split()[1]) for e in examples]


def examples_of(task, kinds=("code", "prose", "code", "prose")):
    return [
        task.example({"text": text, "label": kind}) for text, kind in zip(TEXTS, kinds, strict=True)
    ]


def decoded(tokenizer, ids, mask):
    return [tokenizer.decode(i[m != 0]) for i, m in zip(ids, mask, strict=True)]
