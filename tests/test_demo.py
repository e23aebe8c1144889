"""The demo through its command line, in a short form; its data; and the helpers it is made of."""

import json

import pytest
import torch
from click.testing import CliRunner
from pseuzo.cli import main
from pseuzo.data import Prompts, label_token_ids
from pseuzo.demo import run as demo
from transformers import AutoModelForCausalLM, AutoTokenizer


def test_demo_writes_what_it_promises(tmp_path):
    out = tmp_path / "out"
    for _ in range(2):  # the second run replaces the first one's files
        result = CliRunner().invoke(main, ["demo", "--steps", "3", "--out", str(out), "--method", "mezo-attention-out",
                                           "--method", "pseuzo-groups"])  # fmt: skip
        assert result.exit_code == 0, result.output
    summary = json.loads((out / "summary.json").read_text())
    assert list(summary["methods"]) == ["pseuzo-groups", "mezo-attention-out"]
    for figures in summary["methods"].values():
        assert 0.55 < figures["test_accuracy_before"] < 0.66 and 0.4 < figures["test_accuracy_after"] <= 1
        assert figures["steps_per_s"] > 0 and figures["peak_memory_mib"] > 10 and figures["skipped_steps"] == 0
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [(r["method"], r["step"]) for r in rows] == [
        ("pseuzo-groups", 0), ("pseuzo-groups", 3), ("mezo-attention-out", 0), ("mezo-attention-out", 3),
    ]  # fmt: skip
    assert (out / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert {p.suffix for p in (out / "model").iterdir()} <= {".json", ".safetensors"}
    model = AutoModelForCausalLM.from_pretrained(out / "model")
    start = AutoModelForCausalLM.from_pretrained(demo.load_task().model_folder)
    assert any(not torch.equal(p, q) for p, q in zip(model.parameters(), start.parameters(), strict=True))
    assert AutoTokenizer.from_pretrained(out / "model").padding_side == "left"
    assert "0.634" in result.output and "steps/s" in result.output


def test_demo_learns():
    """A third of the demo's steps with the noise on few weights: well above the start, whatever the machine."""
    task = demo.load_task()
    method = next(m for m in demo.METHODS if m.name == "mezo-attention-out")
    _, figures = demo.train(method, task, 120, 16, 0, torch.device("cpu"), lambda row: None)
    assert figures["test_accuracy_after"] > 0.75


def test_data_is_balanced_and_split_by_file():
    folder = demo.load_task().model_folder.parent
    rows = {s: [json.loads(line) for line in (folder / f"{s}.jsonl").read_text().splitlines()]
            for s in ("train", "val", "test")}  # fmt: skip
    assert {s: len(r) for s, r in rows.items()} == {"train": 1000, "val": 400, "test": 1000}
    for split in rows.values():
        assert sum(r["label"] == "code" for r in split) * 2 == len(split)
    files = {s: {r["file"] for r in split} for s, split in rows.items()}
    texts = {s: {r["text"] for r in split} for s, split in rows.items()}
    for a, b in (("train", "val"), ("train", "test"), ("val", "test")):
        assert not files[a] & files[b] and not texts[a] & texts[b]


@pytest.mark.parametrize("arguments, sentence", [
    (["--method", "adam"], "unknown method 'adam'; known: mezo"),
    (["--device", "abacus"], "device 'abacus' cannot be used"),
    (["--steps", "0"], "0 is not in the range"),
])  # fmt: skip
def test_bad_arguments_exit_with_2(arguments, sentence, tmp_path):
    result = CliRunner().invoke(main, ["demo", "--out", str(tmp_path / "x"), *arguments])
    assert result.exit_code == 2 and sentence in result.output
    assert not (tmp_path / "x").exists()


def test_out_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("mine")
    assert CliRunner().invoke(main, ["demo", "--out", str(tmp_path / "file")]).exit_code == 2
    assert (tmp_path / "file").read_text() == "mine"


def test_label_words():
    tokenizer = AutoTokenizer.from_pretrained(demo.load_task().model_folder)
    assert label_token_ids(tokenizer, [" code", " prose"]) == demo.load_task().options
    with pytest.raises(ValueError, match="label word ' supercalifragilistic' is not one token"):
        label_token_ids(tokenizer, [" code", " supercalifragilistic"])
    with pytest.raises(ValueError, match="not different tokens"):
        label_token_ids(tokenizer, [" code", " code"])
    rows = [{"text": "x", "label": "verse"}]
    with pytest.raises(ValueError, match="label 'verse' has no label word; known: 'code', 'prose'"):
        Prompts.encode(tokenizer, rows, "{text}", ["code", "prose"], 10)
    with pytest.raises(ValueError, match="a row lacks the field 'text'"):
        Prompts.encode(tokenizer, [{"label": "code"}], "{text}", ["code"], 10)
    with pytest.raises(ValueError, match="the data set is empty"):
        Prompts.encode(tokenizer, [], "{text}", ["code"], 10)


def test_batches():
    tokens = [[5] * n for n in range(1, 31)]
    prompts = Prompts(tokens, torch.arange(30) % 3, pad=1)
    batches = prompts.stratified(6, seed=1)
    drawn = [next(batches) for _ in range(5)]
    assert sorted(i for b in drawn for i in b) == list(range(30)), "every row once an epoch"
    assert all(prompts.labels[b].bincount().tolist() == [2, 2, 2] for b in drawn)
    again = prompts.stratified(6, seed=1)
    assert drawn == [next(again) for _ in range(5)] and next(prompts.stratified(6, seed=2)) != drawn[0]
    batch = prompts.batch([0, 3])
    assert batch["input_ids"].tolist() == [[1, 1, 1, 5], [5, 5, 5, 5]]
    assert batch["attention_mask"].tolist() == [[0, 0, 0, 1], [1, 1, 1, 1]]
    assert sorted(i for b in prompts.by_length(7) for i in b) == list(range(30))
