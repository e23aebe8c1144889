"""Fixtures for the tests of the command line."""

import gc
import json
from pathlib import Path

import pytest
from cli_families import VOCABULARY, WORDS, tokenizer
from pseuzo.cli import compare
from pseuzo.cli import run as runs
from tiny_models import causal_lm


@pytest.fixture
def settings(monkeypatch):
    """Replace the training of a run. The fixture holds the settings that the training would have
    had."""
    seen = {}

    def train(given):
        seen.clear()
        seen.update(given)
        return {
            "test": {"accuracy": 0.5},
            "steps": 10,
            "forwards": 20,
            "history": [],
            "best_step": given["steps"] - 2,
        }

    monkeypatch.setattr(runs, "train", train)
    return seen


@pytest.fixture
def compared(monkeypatch):
    """Replace a comparison. The fixture holds the settings of each method, on the last task."""
    seen = {}

    def run(request, output, **kwargs):
        for of in request.tasks.values():
            seen.update({title: of.settings | own for title, own in of.methods.items()})
        raise ValueError("far enough")

    monkeypatch.setattr(compare, "compare", run)
    return seen


TASK = """
name: own
kind: classification
data: rows.jsonl
prompt: "{{ text }}"
label: label
labels: {0: FIRST, 1: SECOND}
"""


@pytest.fixture(scope="module")
def quick():
    """Draw no curves, which other tests do, and keep imported modules out of garbage collection.
    This saves a second per run."""
    gc.freeze()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "plot_runs", lambda *args: None)
        yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return folder(kind, tied), which saves a tiny random model with its tokenizer."""
    root = tmp_path_factory.mktemp("models")

    def saved(kind: str, tied: bool = True) -> Path:
        target = root / f"{kind}-{'tied' if tied else 'untied'}"
        if not target.exists():
            causal_lm(kind, tied).save_pretrained(target)
            tokenizer().save_pretrained(target)
        return target

    return saved


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """Return task(words), which writes a task with these label words. Rows have different lengths,
    so that batches are padded."""
    root = tmp_path_factory.mktemp("task")
    texts = [
        " ".join(VOCABULARY[(7 * i + 3 * j * j) % 60] for j in range(5 + i % 9)) for i in range(60)
    ]
    rows = [{"text": text, "label": i % 2} for i, text in enumerate(texts)]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def file(words: tuple[str, str] = WORDS) -> Path:
        path = root / f"{'-'.join(words).replace(' ', '_')}.yaml"
        path.write_text(TASK.replace("FIRST", words[0]).replace("SECOND", words[1]))
        return path

    return file
