"""The command line trains, replays and evaluates masked language models and classifiers."""

import json

import pytest
import torch
from helpers import assert_same_weights, last_json, pseuzo, weights
from tiny_models import encoder_tokenizer, tiny_encoder

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick")]

TASK = """
name: own
kind: classification
data: rows.jsonl
prompt: "{{ text }} w1"
label: label
labels: {0: w2, 1: w3}
"""
SETTINGS = [
    *"--task task.yaml --train-size 16 --dev-size 8 --test-size 8 --batch-size 4 --quiet".split(),
    *"--steps 4 --lr 1e-2 --eval-every 2 --keep last --model base".split(),
]


@pytest.fixture
def here(tmp_path, monkeypatch):
    tiny_encoder("bert", "masked").save_pretrained(tmp_path / "base")
    encoder_tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "task.yaml").write_text(TASK)
    draw = torch.Generator().manual_seed(0)
    rows = []
    for i in range(40):
        words = 10 + 20 * (i % 2) + torch.randint(20, (3 + i % 5,), generator=draw)
        rows.append({"text": " ".join(f"w{w}" for w in words.tolist()), "label": i % 2})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "kind, method, mode",
    [
        ("auto", "pseuzo", "full"),
        ("auto", "mezo", "full"),
        ("classifier", "pseuzo", "full"),
        ("classifier", "mezo", "lora"),
        ("classifier", "fo-adam", "full"),
    ],
)
def test_train_replay_eval(here, kind, method, mode):
    zeroth = method != "fo-adam"
    journal = ["--journal", "run.pzj"] if zeroth else []
    options = ["--model-kind", kind, "--method", method, "--mode", mode]
    pseuzo("train", *SETTINGS, *options, *journal, "--output", "run")
    results = json.loads((here / "run" / "results.json").read_text())
    scored = last_json(pseuzo("eval", "--model", "run/model", "--task", "task.yaml", "--quiet"))
    assert scored["test"] == pytest.approx(results["test"])
    if not zeroth:
        return
    pseuzo("replay", "--base", "run/start", "--journal", "run.pzj", "--output", "again")
    if mode == "full":
        assert_same_weights(here / "again", here / "run" / "model")
        start, end = weights(here / "run" / "start"), weights(here / "run" / "model")
        still = {name for name in start if torch.equal(start[name], end[name])}
        # PseuZO's noise ends before the head. The weight of a masked model's head is the
        # embedding's.
        head = {"auto": {"cls.predictions.bias"}, "classifier": {"classifier.weight"}}[kind]
        assert (head <= still) == (method == "pseuzo")


def test_exact_gradient_of_a_new_head(here):
    options = ["--model-kind", "classifier", "--head", "exact", "--output", "run"]
    pseuzo("train", *SETTINGS, *options)
    first = weights(here / "run" / "checkpoint-2"), weights(here / "run" / "model")
    assert not torch.equal(*(x["classifier.weight"] for x in first))
    resumed = pseuzo("train", *SETTINGS, *options, "--steps", 6, "--resume")
    assert "6 steps" in resumed


@pytest.mark.parametrize("options, sentence", [
    (["--model-kind", "causal"], "is no causal language model but a BertForMaskedLM"),
    (["--mode", "prompt"], "BertForMaskedLM cannot be given a prompt"),
    (["--train-on", "options"], "is trained on its classes, not on 'options'"),
])  # fmt: skip
def test_refusals(here, options, sentence):
    said = pseuzo("train", *SETTINGS, *options, "--output", "run", code=2)
    assert sentence in said and not (here / "run" / "config.yaml").exists()
