"""The demo runs from its command line in a short form, and its data and helpers are right."""

import json
from pathlib import Path

import make_demo
import pytest
import torch
from click.testing import CliRunner
from pseuzo.cli.commands import main
from pseuzo.demo import run as demo
from pseuzo.tasks import load_task
from pseuzo.tasks.words import label_token_ids
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = pytest.mark.slow


def test_demo_writes_what_it_promises(tmp_path):
    out = tmp_path / "out"
    for _ in range(2):  # the second run replaces the first one's files
        result = CliRunner().invoke(
            main,
            [
                "demo",
                "--steps",
                "3",
                "--out",
                str(out),
                "--method",
                "mezo-attention-out",
                "--method",
                "pseuzo-groups",
            ],
        )
        assert result.exit_code == 0, result.output
    summary = json.loads((out / "summary.json").read_text())
    assert list(summary["methods"]) == ["pseuzo-groups", "mezo-attention-out"]
    for figures in summary["methods"].values():
        assert (
            0.55 < figures["test_accuracy_before"] < 0.66
            and 0.4 < figures["test_accuracy_after"] <= 1
        )
        assert (
            figures["steps_per_s"] > 0
            and figures["peak_memory_mib"] > 10
            and figures["skipped_steps"] == 0
        )
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [(r["method"], r["step"]) for r in rows] == [
        ("pseuzo-groups", 0),
        ("pseuzo-groups", 3),
        ("mezo-attention-out", 0),
        ("mezo-attention-out", 3),
    ]
    assert (out / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert {p.suffix for p in (out / "model").iterdir()} <= {".json", ".safetensors"}
    model = AutoModelForCausalLM.from_pretrained(out / "model")
    start = AutoModelForCausalLM.from_pretrained(demo.load().model_folder)
    assert any(
        not torch.equal(p, q) for p, q in zip(model.parameters(), start.parameters(), strict=True)
    )
    assert AutoTokenizer.from_pretrained(out / "model").padding_side == "left"
    assert "0.634" in result.output and "steps/s" in result.output


def test_demo_learns():
    """A third of the demo's steps, with the noise on few weights, ends well above the start on any
    machine."""
    loaded = demo.load()
    method = next(m for m in demo.METHODS if m.name == "mezo-attention-out")
    _, figures = demo.train(method, loaded, 120, 16, 0, torch.device("cpu"), lambda row: None)
    assert figures["test_accuracy_after"] > 0.75


def test_data_is_balanced_and_split_by_file():
    folder = demo.load().model_folder.parent
    rows = {
        s: [json.loads(line) for line in (folder / f"{s}.jsonl").read_text().splitlines()]
        for s in ("train", "val", "test")
    }
    assert {s: len(r) for s, r in rows.items()} == {"train": 1000, "val": 400, "test": 1000}
    for split in rows.values():
        assert sum(r["label"] == "code" for r in split) * 2 == len(split)
    files = {s: {r["file"] for r in split} for s, split in rows.items()}
    texts = {s: {r["text"] for r in split} for s, split in rows.items()}
    for a, b in (("train", "val"), ("train", "test"), ("val", "test")):
        assert not files[a] & files[b] and not texts[a] & texts[b]


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--method", "adam"], "unknown method 'adam'; known: mezo"),
        (["--device", "abacus"], "device 'abacus' cannot be used"),
        (["--steps", "0"], "0 is not in the range"),
    ],
)
def test_bad_arguments_exit_with_2(arguments, sentence, tmp_path):
    result = CliRunner().invoke(main, ["demo", "--out", str(tmp_path / "x"), *arguments])
    assert result.exit_code == 2 and sentence in result.output
    assert not (tmp_path / "x").exists()


def test_out_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("mine")
    assert CliRunner().invoke(main, ["demo", "--out", str(tmp_path / "file")]).exit_code == 2
    assert (tmp_path / "file").read_text() == "mine"


def test_label_words():
    tokenizer = demo.load().tokenizer
    assert label_token_ids(tokenizer, [" code", " prose"]) == demo.load().train.options
    with pytest.raises(ValueError, match="label word ' supercalifragilistic' is not one token"):
        label_token_ids(tokenizer, [" code", " supercalifragilistic"])
    with pytest.raises(ValueError, match="not different tokens"):
        label_token_ids(tokenizer, [" code", " code"])


def test_the_task_asks_what_the_model_was_made_for():
    """tools/make_demo.py writes the cards that the model learned from; the task file is what runs
    ask."""
    rows = [
        json.loads(line)
        for line in (Path(str(demo.ASSETS)) / "train.jsonl").read_text().splitlines()
    ]
    task = load_task("demo")
    for row in rows[:50]:
        example = task.example(row)
        assert example.prompt == make_demo.TEMPLATE.format(text=row["text"])
        assert task.separator + example.golds[0] == make_demo.LABEL_WORDS[row["label"]]


def test_batches_are_whole_and_balanced():
    data = demo.load().train
    drawn = [next(it) for it in [demo.batches(data, 24, seed=1)] for _ in range(45)]
    assert all(
        len(batch["labels"]) == 24 and abs(int(batch["labels"].sum()) - 12) <= 1 for batch in drawn
    )
    assert len({int(i) for batch in drawn[:41] for i in batch["rows"]}) == 41 * 24, (
        "an epoch repeats a line"
    )
