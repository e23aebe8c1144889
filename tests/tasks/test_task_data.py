"""Examples become token rows and batches. They are cut and scored correctly, or refused."""

import pytest
import torch
from pseuzo import CausalLMObjective
from pseuzo.tasks import Example, Task, TaskData, load_task
from public_rows import PUBLIC
from task_examples import CODE, DEMO_MODEL, LONG, TEXTS, decoded, examples_of
from transformers import AutoModelForCausalLM, AutoTokenizer


def test_batches_of_label_words(tokenizer):
    data = TaskData(examples_of(CODE), CODE, tokenizer, max_length=100)
    assert data.train_on == "label-words" and data.options == tokenizer.convert_tokens_to_ids(
        ["Ġcode", "Ġprose"]
    )
    assert data.labels == [0, 1, 0, 1]
    batch = data.collate([data[i] for i in (2, 1, 3)])
    assert set(batch) == {"input_ids", "attention_mask", "labels", "groups", "rows"}
    assert batch["labels"].tolist() == batch["groups"].tolist() == [0, 1, 1] and batch[
        "rows"
    ].tolist() == [2, 1, 3]
    texts = [f"</s>{TEXTS[i]}\n# kind:" for i in (2, 1, 3)]
    assert decoded(tokenizer, batch["input_ids"], batch["attention_mask"]) == texts
    assert (batch["attention_mask"][:, -1] == 1).all() and batch["attention_mask"][0, 0] == 0
    assert (batch["input_ids"][batch["attention_mask"] == 0] == tokenizer.pad_token_id).all()


def test_batches_of_options(tokenizer):
    data = TaskData(
        examples_of(LONG, ("code", "prose", "none", "prose")), LONG, tokenizer, max_length=100
    )
    assert data.train_on == "options" and data.options is None and data.labels == [0, 1, 2, 1]
    batch = data.collate([data[i] for i in (2, 1)])
    words = [" a piece of code", " prose", " neither of them"]
    texts = [f"</s>{TEXTS[i]}\n# kind:{word}" for i in (2, 1) for word in words]
    assert decoded(tokenizer, batch["input_ids"], batch["attention_mask"]) == texts
    assert decoded(tokenizer, batch["labels"], batch["labels"] != -100) == words * 2
    assert batch["examples"].tolist() == [0, 0, 0, 1, 1, 1] and batch["answers"].tolist() == [2, 4]
    assert batch["rows"].tolist() == [2, 1] and batch["groups"].tolist() == [6, 7, 8, 3, 4, 5]
    assert batch["option_rows"].tolist() == [[0, 1, 2], [3, 4, 5]]
    device_free = {
        k: v for k, v in batch.items() if k not in ("positions", "targets", "option_rows")
    }
    objective = CausalLMObjective(AutoModelForCausalLM.from_pretrained(DEMO_MODEL).eval())
    (forward, head), (forward_too, head_too) = objective(batch), objective(device_free)
    assert torch.equal(head(forward()), head_too(forward_too()))


def test_batches_of_answers(tokenizer):
    choice = Task(
        name="c", kind="choice", prompt="{{ q }} Answer:", options="options", answer="answer"
    )
    rows = [
        {"q": "1?", "options": ["one", "two or so", "three"], "answer": 1},
        {"q": "Longer than 1?", "options": ["one", "two"], "answer": 0},
    ]
    examples = choice.examples(rows)
    data = TaskData(examples, choice, tokenizer, max_length=60)
    assert data.train_on == "answer" and data.options is None and data.labels is None
    batch = data.collate([data[i] for i in range(2)])
    assert set(batch) == {"input_ids", "attention_mask", "labels", "rows", "positions", "targets"}
    assert decoded(tokenizer, batch["labels"], batch["labels"] != -100) == [" two or so", " one"]
    assert (
        decoded(tokenizer, batch["input_ids"], batch["attention_mask"])[0]
        == "</s>1? Answer: two or so"
    )
    ragged = TaskData(examples, choice, tokenizer, max_length=60, train_on="options")
    batch = ragged.collate([ragged[i] for i in (1, 0)])
    assert batch["examples"].tolist() == [0, 0, 1, 1, 1] and batch["answers"].tolist() == [0, 3]
    assert "groups" not in batch
    free = Task(name="g", kind="generation", prompt="{{ q }}\nAnswer:", answers="a", stop="\n")
    data = TaskData(
        free.examples([{"q": "Who?", "a": ["the king", "a king"]}]), free, tokenizer, max_length=60
    )
    batch = data.collate([data[0]])
    (answer,) = decoded(tokenizer, batch["labels"], batch["labels"] != -100)
    assert answer == " the king\n", "the answer does not end with a line break"


def test_a_batch_without_padding_has_no_mask(tokenizer, demo_model):
    """The loss of the batch has the same bits as with a mask of ones."""
    for task, keys in (
        (CODE, {"labels"}),
        (LONG, {"labels", "examples", "answers", "option_rows"}),
    ):
        # Both rows are cut to one length.
        data = TaskData([examples_of(task)[3]] * 2, task, tokenizer, max_length=10)
        batch = data.collate([data[0], data[1]])
        assert "attention_mask" not in batch and keys < set(batch)
        assert len({*map(len, batch["input_ids"])}) == 1
        objective = CausalLMObjective(demo_model, data.options)
        (forward, head), (masked, head_too) = (
            objective(b)
            for b in (batch, batch | {"attention_mask": torch.ones_like(batch["input_ids"])})
        )
        assert torch.equal(head(forward()), head_too(masked()))
    data = TaskData(examples_of(CODE), CODE, tokenizer, max_length=100)
    assert "attention_mask" in data.collate([data[0], data[1]])


def test_label_words_and_options_of_one_token_are_the_same_loss(tokenizer, demo_model):
    """This also holds if prompts are cut. Losses are in float64, except that logits are cast to
    fp32."""
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL).double().eval()
    for max_length in (100, 12):
        losses = []
        for train_on in ("label-words", "options"):
            data = TaskData(
                examples_of(CODE), CODE, tokenizer, max_length=max_length, train_on=train_on
            )
            batch = data.collate([data[i] for i in range(4)])
            assert ("examples" in batch) == (train_on == "options")
            forward, head = CausalLMObjective(model, data.options)(batch, reduction="none")
            losses.append(head(forward()))
        # Log-likelihoods are about 3, in fp32.
        torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=2e-6)
    assert losses[0].std() > 1e-3, "the losses are all equal"


def test_prompts_are_cut_on_the_left(tokenizer):
    whole = TaskData(examples_of(LONG), LONG, tokenizer, max_length=100)
    cut = TaskData(examples_of(LONG), LONG, tokenizer, max_length=14)
    for long, short in zip(whole[3]["tokens"], cut[3]["tokens"], strict=True):
        option = long.answer
        assert len(short.tokens) == 14 and short.answer == option
        # The token before every text and the end of the prompt are kept.
        assert short.tokens == [2, *long.tokens[-13:]]
    words = TaskData(examples_of(CODE), CODE, tokenizer, max_length=8)
    assert len(words[3]["tokens"][0].tokens) == 7, "the word has no room"
    assert tokenizer.decode(words[3]["tokens"][0].tokens).endswith("# kind:")
    free = Task(
        name="g", kind="generation", prompt="{{ q }}\nAnswer:", answers="a", max_new_tokens=6
    )
    data = TaskData(
        free.examples([{"q": "one two three " * 9, "a": "x"}]), free, tokenizer, max_length=20
    )
    assert [some.fit()["cut_prompts"] for some in (data, whole, words)] == [1, 0, 4]
    lengths = [len(row[0].tokens) for row in (whole.token_rows(i, "options") for i in range(4))]
    assert cut.fit()["cut_prompts"] == sum(length > 14 for length in lengths)
    assert len(data.token_rows(0, "prompt")[0].tokens) == 14
    assert len(data.token_rows(0, "answer")[0].tokens) == 20
    with pytest.raises(
        ValueError,
        match=r"task long: an answer of . tokens, beginning ' a piece of code', leaves no room",
    ):
        TaskData(examples_of(LONG), LONG, tokenizer, max_length=4)[0]
    with pytest.raises(
        ValueError,
        match="task g: max_new_tokens 6 leaves no room for a prompt in max_length, 7 tokens",
    ):
        TaskData(data.examples, free, tokenizer, max_length=7).token_rows(0, "prompt")


def test_shots(tokenizer):
    *shots, example = examples_of(CODE)
    data = TaskData([example], CODE, tokenizer, max_length=100, shots=shots)
    parts = [
        f"{TEXTS[0]}\n# kind: code",
        f"{TEXTS[1]}\n# kind: prose",
        f"{TEXTS[2]}\n# kind: code",
        f"{TEXTS[3]}\n# kind:",
    ]
    (row,) = data[0]["tokens"]
    assert tokenizer.decode(row.tokens) == "</s>" + "\n\n".join(parts)
    # A row that is too long by one token loses its first shot as a whole, and so on.
    n = len(row.tokens)
    short = TaskData([example], CODE, tokenizer, max_length=n, shots=shots)[0]["tokens"][0]
    assert tokenizer.decode(short.tokens) == "</s>" + "\n\n".join(parts[1:])
    assert data[0] == TaskData([example], CODE, tokenizer, max_length=n + 1, shots=shots)[0]
    some = TaskData(examples_of(CODE), CODE, tokenizer, max_length=n, shots=shots)
    used = [some[i]["tokens"][0].shots for i in range(4)]
    assert (
        some.fit() == {"cut_prompts": 0, "shots_mean": sum(used) / 4, "shots_least": 2}
        and used[3] == 2
    )
    none = TaskData([example], CODE, tokenizer, max_length=25, shots=shots)[0]
    assert none == TaskData([example], CODE, tokenizer, max_length=25)[0]
    lines = TaskData(
        load_task("rte").examples([PUBLIC["rte"][1][0]]),
        load_task("rte"),
        tokenizer,
        max_length=120,
        shots=load_task("rte").examples([PUBLIC["rte"][0][0]]),
    )
    assert "is true? Yes or No?\nYes\n\nA cat sat.\n" in tokenizer.decode(
        lines[0]["tokens"][0].tokens
    )


def test_an_answer_that_merges_with_the_prompt(tokenizer):
    """Without a separator the last token of the prompt may become part of the option's first one;
    then it is scored."""
    task = Task(
        name="m",
        kind="classification",
        prompt="{{ text }}",
        label="label",
        labels={0: "turn", 1: "sult"},
        separator="",
    )
    data = TaskData(task.examples([{"text": "x re", "label": 1}]), task, tokenizer, max_length=20)
    assert data.train_on == "options", "label words need prompts with the same tokens"
    rows = data[0]["tokens"]
    assert [tokenizer.decode(row.tokens) for row in rows] == ["</s>x return", "</s>x result"]
    assert [tokenizer.decode(row.answer) for row in rows] == [" return", " result"]


def test_task_data_refuses(tokenizer):
    with pytest.raises(ValueError, match="task kind: no examples: the data set is empty"):
        TaskData([], CODE, tokenizer, max_length=100)
    with pytest.raises(
        ValueError,
        match="task long: the label word 'a piece of code' is not one token of this tokeniz",
    ):
        TaskData(examples_of(LONG), LONG, tokenizer, max_length=100, train_on="label-words")
    with pytest.raises(
        ValueError, match="train_on must be one of auto, label-words, options, answer, got 'prompt'"
    ):
        TaskData(examples_of(CODE), CODE, tokenizer, max_length=100, train_on="prompt")
    free = Task(name="g", kind="generation", prompt="{{ q }}", answers="a")
    example = Example("?", (), None, ("x",))
    for train_on, sentence in (
        ("label-words", "is for classifications"),
        ("options", "needs options"),
    ):
        with pytest.raises(ValueError, match=f"task g: train_on '{train_on}' {sentence}"):
            TaskData([example], free, tokenizer, max_length=100, train_on=train_on)
    with pytest.raises(ValueError, match="max_length must be 2"):
        TaskData([example], free, tokenizer, max_length=1)


def test_a_prompt_without_any_token_before_the_answer():
    gpt2_like = AutoTokenizer.from_pretrained(DEMO_MODEL)
    gpt2_like.backend_tokenizer.post_processor = None  # puts no token before a text
    free = Task(name="g", kind="generation", prompt="{{ q }}", answers="a")
    assert (
        TaskData([Example("x", (), None, ("y",))], free, gpt2_like, max_length=9)[0]["tokens"][
            0
        ].prompt
        != []
    )
    with pytest.raises(ValueError, match="task g: a prompt is empty"):
        TaskData([Example("", (), None, ("x",))], free, gpt2_like, max_length=9)[0]


def test_an_answer_without_a_token_is_refused():
    """Otherwise the last token of the prompt, or nothing, would be scored in place of the
    answer."""
    from tokenizers import normalizers

    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\u200b", "")
    free = Task(name="g", kind="generation", prompt="{{ q }}:\n", answers="a", stop="")
    examples = free.examples([{"q": "x", "a": "y"}, {"q": "x", "a": "\u200b"}])
    data = TaskData(examples, free, tokenizer, max_length=50)
    assert data[0]["tokens"][0].answer
    with pytest.raises(
        ValueError,
        match=r"task g, row 1 \(from 0\): the answer '\\u200b' has no token of this tokenizer",
    ):
        data.fit()


def test_answers_that_are_too_long_are_known_before_a_run(tokenizer):
    """A long answer is refused before the run, not in the middle, when the loss of dev rows is
    computed."""
    free = Task(name="g", kind="generation", prompt="{{ q }}", answers="a", max_new_tokens=5)
    data = TaskData(
        free.examples([{"q": "x", "a": "y"}, {"q": "x", "a": "long " * 50}]),
        free,
        tokenizer,
        max_length=30,
    )
    with pytest.raises(
        ValueError, match=r"task g, row 1 \(from 0\): an answer of \d+ tokens, .* leaves no room"
    ):
        data.fit()


def test_a_row_that_the_tokenizer_does_not_take_is_named(tokenizer):
    examples = [
        Example("x", ("a", "b"), 0, ("a",), "line 1 of x"),
        Example("\ud83d", ("a", "b"), 0, ("a",), "line 2 of x"),
    ]
    with pytest.raises(
        ValueError,
        match=r"^task kind, line 2 of x: the tokenizer does not take the text of this row",
    ):
        TaskData(examples, CODE, tokenizer, max_length=50)


def test_task_data_travels_to_workers(tokenizer):
    import pickle

    data = TaskData(examples_of(CODE), CODE, tokenizer, max_length=100)
    again = pickle.loads(pickle.dumps(data))
    assert again[1] == data[1] and again.options == data.options
