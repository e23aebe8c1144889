"""Prompts can be put in a tokenizer's chat template."""

from pathlib import Path

import pytest
from pseuzo.tasks import Example, Task, TaskData
from task_examples import CODE, DEMO_MODEL, LONG, TEXTS, examples_of
from transformers import AutoTokenizer


def with_chat(template):
    """Return the demo's tokenizer, whose texts begin with </s>, with this template and its turn
    tokens."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|user|>", "<|assistant|>", "<|end|>"]}
    )
    tokenizer.chat_template = template
    return tokenizer


TURNS = (
    "{{ bos_token }}{% for m in messages %}"
    "<|{{ m.role }}|>\n{{ m.content | trim }}<|end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


# This template writes nothing before the coming turn, and a space before the answer.
SPACED = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'user' %}<|user|> {{ m.content }} <|end|>"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)


THINKING = TURNS.replace(
    "{{ m.content | trim }}",
    "{% if m.role == 'assistant' and loop.last %}<x>\n\n</x>\n{% endif %}{{ m.content | trim }}",
)


CHAT = Task(**(vars(CODE) | {"chat": True, "labels": {"code": "code", "prose": "text"}}))


@pytest.mark.parametrize("template", [TURNS, SPACED], ids=["turns", "spaced"])
def test_chat(template):
    """A prompt is the tokenizer's text of the conversation, with one BOS, and the answer is the
    assistant's tokens after it."""
    tokenizer = with_chat(template)

    def asked(*turns):
        messages = [
            {"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)
        ]
        last = len(turns) % 2 == 1
        return tokenizer.apply_chat_template(
            messages, add_generation_prompt=last, return_dict=False
        )

    examples = examples_of(CHAT)
    data = TaskData(examples, CHAT, tokenizer, max_length=100)
    word = (" code", " text") if template == SPACED else ("code", "text")
    assert data.train_on == "label-words" and data.options == [
        data.encoder.token_ids([w])[0][0] for w in word
    ]
    for i, example in enumerate(examples):
        (row,) = data.token_rows(i, "label-words")
        assert row.tokens == asked(example.prompt) and row.tokens.count(tokenizer.bos_token_id) == 1
    shots = TaskData(examples[3:], CHAT, tokenizer, max_length=200, shots=examples[:3])
    turns = [text for e in examples[:3] for text in (e.prompt, e.golds[0])] + [examples[3].prompt]
    assert shots[0]["tokens"][0].tokens == asked(*turns) and shots[0]["tokens"][0].shots == 3
    # A row leaves room for the word, so with as many tokens as this one the first shot is dropped.
    n = len(asked(*turns))
    fewer = TaskData(examples[3:], CHAT, tokenizer, max_length=n, shots=examples[:3])
    assert fewer[0]["tokens"][0].tokens == asked(*turns[2:]) and fewer[0]["tokens"][0].shots == 2

    options = TaskData(examples, CHAT, tokenizer, max_length=100, train_on="options")
    for row, w in zip(options[0]["tokens"], word, strict=True):
        assert row.prompt == asked(examples[0].prompt) and tokenizer.decode(row.answer) == w
    free = Task(
        name="g", kind="generation", prompt="{{ q }}", answers="a", chat=True, max_new_tokens=20
    )
    data = TaskData(
        free.examples([{"q": "Who is it?", "a": "the king"}]), free, tokenizer, max_length=100
    )
    (row,), (prompt,) = data.token_rows(0, "answer"), data.token_rows(0, "prompt")
    assert prompt.tokens == row.prompt == asked("Who is it?")
    assert row.tokens == asked("Who is it?", "the king")[: len(row.tokens)], (
        "the answer does not end the turn"
    )
    end = "<|end|>" if template == TURNS else tokenizer.eos_token
    assert tokenizer.convert_ids_to_tokens(row.answer)[-1] == end and data.end_tokens() == {
        row.answer[-1]
    }


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/statm").exists(), reason="templates are tried within limits on Linux alone"
)
@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% set n = namespace(x='x' * 99999) %}"
        "{% for a in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
        "{{ 'x' * 10 ** 11 }}",
    ],
    ids=["loops", "doubles", "wide"],
)
def test_a_chat_template_without_bounds_is_refused(template, monkeypatch):
    monkeypatch.setattr("pseuzo.tasks.chat.SECONDS", 1)
    monkeypatch.setattr("pseuzo.tasks.chat.MEMORY", 1 << 28)
    with pytest.raises(
        ValueError, match="the tokenizer's chat template takes more than 1 s or 256 MB"
    ):
        TaskData(examples_of(CHAT), CHAT, with_chat(TURNS + template), max_length=100)


def test_a_chat_template_that_writes_before_an_answer():
    """A thinking model is asked with an empty thought, and the answer after the thought is
    scored."""
    tokenizer = with_chat(THINKING)
    data = TaskData(examples_of(CHAT), CHAT, tokenizer, max_length=100)
    (row,) = data.token_rows(0, "label-words")
    assert tokenizer.decode(row.tokens).endswith("<|end|>\n<|assistant|>\n<x>\n\n</x>\n")
    assert data.options == tokenizer.convert_tokens_to_ids(["code", "text"])


@pytest.mark.parametrize("length", [60, 24])
def test_what_is_too_long_in_a_chat_is_cut_from_the_users_text(length):
    tokenizer = with_chat(TURNS)
    long = Task(**(vars(LONG) | {"chat": True}))
    text = "one two three four five six seven eight nine ten " * 9
    data = TaskData(
        long.examples([{"text": text, "label": "code"}, {"text": "x", "label": "code"}]),
        long,
        tokenizer,
        max_length=length,
    )
    cut, whole = data.token_rows(0, "options"), data.token_rows(1, "options")
    assert (
        data.fit() == {"cut_prompts": 1, "shots_mean": 0, "shots_least": 0}
        and cut[0].lost > 0 == whole[0].lost
    )
    longest = max(len(row.tokens) for row in cut)
    assert length - 2 <= longest <= length, "a character less should remove at most a token"
    (question,) = {tokenizer.decode(row.prompt) for row in cut}
    assert question.startswith("</s><|user|>\n") and question.endswith(
        "ten \n# kind:<|end|>\n<|assistant|>\n"
    )
    user = question.removeprefix("</s><|user|>\n").removesuffix("<|end|>\n<|assistant|>\n")
    assert data.examples[0].prompt.endswith(user) and len(user) > 10
    with pytest.raises(
        ValueError,
        match=r"task long, row 0 .*: the chat template leaves no room for a prompt in 10 token",
    ):
        TaskData(data.examples, long, tokenizer, max_length=10)[0]


def test_chats_that_cannot_be(tokenizer):
    with pytest.raises(
        ValueError,
        match="task kind: to ask as in a chat takes a tokenizer with a chat template, and this",
    ):
        TaskData(examples_of(CHAT), CHAT, tokenizer, max_length=100)
    picky = (
        "{% if messages | length > 2 %}{{ raise_exception('one, please') }}{% endif %}"
        "{{ messages[0].content }}"
    )
    examples = examples_of(CHAT)
    assert TaskData(examples, CHAT, with_chat(picky), max_length=100)[0]
    with pytest.raises(
        ValueError,
        match="task kind: the tokenizer's chat template cannot be filled in: one, please",
    ):
        TaskData(examples, CHAT, with_chat(picky), max_length=100, shots=examples[:1])[0]
    with pytest.raises(ValueError, match="the tokenizer's chat template cannot be filled in"):
        TaskData(examples, CHAT, with_chat("{% for"), max_length=100)


def test_a_prompt_that_begins_as_every_text_does_gets_no_second_beginning(tokenizer):
    for max_length in (100, 12):
        plain, own = (
            TaskData(
                [Example(f"{begin}{text}", ("a", "b"), 0, ("a",)) for text in TEXTS],
                CODE,
                tokenizer,
                max_length=max_length,
                shots=[Example(f"{begin}one", ("a",), 0, ("a",))] * 2,
                train_on=train_on,
            )
            for begin, train_on in (("", "options"), ("</s>", "options"))
        )
        for i in range(len(TEXTS)):
            assert own[i] == plain[i]
            assert all(row.tokens.count(tokenizer.bos_token_id) == 1 for row in own[i]["tokens"])
    assert plain.fit() == own.fit()
    chat = with_chat(TURNS)
    plain, own = (
        TaskData(
            [Example(f"{begin}{TEXTS[0]}", ("a", "b"), 0, ("a",))],
            CHAT,
            chat,
            max_length=100,
            shots=[Example(f"{begin}one", ("a",), 0, ("a",))],
        )
        for begin in ("", "</s>")
    )
    assert own[0] == plain[0] and own[0]["tokens"][0].tokens.count(chat.bos_token_id) == 1
