"""Masked language models and classifiers can be trained and evaluated on tasks."""

from dataclasses import replace

import pytest
import torch
from pseuzo.tasks import Task, TaskData, evaluate
from tiny_models import encoder_tokenizer, tiny_encoder
from torch.nn import functional as F

TASK = Task(
    name="own",
    kind="classification",
    prompt="{{ text }} w1",
    label="label",
    labels={"bad": "w2", "good": "w3", "fair": "w4"},
)
ROWS = [
    {"text": "w10 w11 w12", "label": "good"},
    {"text": "w13", "label": "bad"},
    {"text": "w14 w15 w16 w17 w18", "label": "fair"},
    {"text": "w19 w20", "label": "good"},
]
EXAMPLES = TASK.examples(ROWS)
TEXTS = {"masked": "{} w1 [MASK]", "classifier": "{} w1"}


def data_for(kind, max_length=32, task=TASK, tokenizer=None, **options):
    tokenizer = tokenizer or encoder_tokenizer()
    return TaskData(EXAMPLES, task, tokenizer, max_length=max_length, kind=kind, **options)


@pytest.mark.parametrize("kind", TEXTS)
def test_rows_are_the_tokenizers(kind):
    """The rows are [CLS] prompt [MASK] [SEP], as the tokenizer itself makes them from the text."""
    data, tokenizer = data_for(kind), encoder_tokenizer()
    assert data.train_on == "label-words"
    words = tokenizer.convert_tokens_to_ids(["w2", "w3", "w4"])
    assert data.options == (words if kind == "masked" else [0, 1, 2])
    batch = data.collate([data[i] for i in range(4)])
    there = batch.get("attention_mask") == 1
    for i, row in enumerate(ROWS):
        got = batch["input_ids"][i][there[i]].tolist()
        assert got == tokenizer(TEXTS[kind].format(row["text"]))["input_ids"]
    assert batch["labels"].tolist() == [1, 0, 2, 1]
    if kind == "masked":
        at = batch["input_ids"].gather(1, batch["positions"])
        assert (at == tokenizer.mask_token_id).all()
    else:
        assert "positions" not in batch


@pytest.mark.parametrize("kind", TEXTS)
def test_long_prompts_lose_their_beginning(kind):
    rows = [data_for(kind, max_length=6).token_rows(i, "label-words")[0] for i in range(4)]
    tokens = encoder_tokenizer().convert_ids_to_tokens(rows[2].tokens)
    end = ["w1", "[MASK]", "[SEP]"] if kind == "masked" else ["w18", "w1", "[SEP]"]
    assert len(tokens) == 6 - (kind == "classifier") and tokens[0] == "[CLS]"
    assert tokens[-3:] == end and rows[2].lost > 0 and rows[1].lost == 0


@pytest.mark.parametrize("kind", TEXTS)
def test_evaluation_is_by_the_models_own_logits(kind):
    model, tokenizer = tiny_encoder("bert", kind, num_labels=3), encoder_tokenizer()
    figures = evaluate(model, data_for(kind), batch_size=3)
    texts = [TEXTS[kind].format(row["text"]) for row in ROWS]
    with torch.no_grad():
        logits = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits
    if kind == "masked":
        at = torch.tensor([len(tokenizer(text)["input_ids"]) - 2 for text in texts])
        words = tokenizer.convert_tokens_to_ids(["w2", "w3", "w4"])
        logits = logits[torch.arange(4), at][:, words]
    answers = torch.tensor([1, 0, 2, 1])
    assert figures["accuracy"] == (logits.argmax(1) == answers).float().mean()
    assert figures["loss"] == pytest.approx(float(F.cross_entropy(logits, answers)), abs=1e-6)


def test_what_cannot_be_asked():
    choice = Task(name="pick", kind="choice", prompt="{{ a }}", options=["x", "y"], answer="b")
    long = replace(TASK, labels={"bad": "w2 w5", "good": "w3", "fair": "w4"})
    examples = long.examples(ROWS)
    for kind, options, sentence in (
        ("masked", {"task": choice}, "a masked language model is for classifications, this is a c"),
        ("classifier", {"task": choice}, "a classifier is for classifications, this is a choice"),
        ("masked", {"task": replace(TASK, chat=True)}, "cannot be asked as in a chat"),
        ("classifier", {"train_on": "options"}, "is trained on its classes, not on 'options'"),
        ("masked", {"tokenizer": encoder_tokenizer(mask_token=None)}, "the tokenizer has none"),
    ):
        with pytest.raises(ValueError, match=sentence):
            data_for(kind, **options)
    with pytest.raises(ValueError, match=r"'w2 w5' is not one token .* or the kind classifier"):
        TaskData(examples, long, encoder_tokenizer(), max_length=32, kind="masked")
    assert TaskData(examples, long, encoder_tokenizer(), max_length=32, kind="classifier").options
