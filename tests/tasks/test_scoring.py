"""The right tokens of an option are scored and calibrated, compared with figures worked out by
hand."""

import math
from dataclasses import replace

import pytest
from known_models import logp, model_of
from pseuzo.tasks import BUILTIN, Example, Task, TaskData, evaluate, load_task
from public_rows import PUBLIC
from tiny_models import encoder_tokenizer, tiny_encoder

SENTENCE = {
    "sentence": "They use the _ it.",
    "option1": "value of",
    "option2": "name",
    "answer": "2",
}


def test_the_rest_of_a_sentence_is_scored_after_each_option(tokenizer):
    (example,) = load_task("winogrande").examples([SENTENCE])
    data = TaskData([example], load_task("winogrande"), tokenizer, max_length=60)
    rows = data.token_rows(0, "options")
    begin = data.encoder.before
    for row, option in zip(rows, ("value of", "name"), strict=True):
        whole = tokenizer(f"They use the {option} it.", add_special_tokens=False)["input_ids"]
        assert row.tokens == begin + whole
        assert tokenizer.decode(row.answer) == " it."
        assert tokenizer.decode(row.prompt[len(begin) :]) == f"They use the {option}"
    assert data.token_rows(0, "answer")[0] == rows[1]  # training uses the right option
    # Of the two tokens of the answer, the first has logit 2 after "of" and 5 after "name". All
    # other logits are 0.
    model = model_of(tokenizer, " of it", " name it", logits=(2.0, 5.0))
    assert len(rows[0].answer) == 2
    figures = evaluate(model, data)
    assert figures["accuracy"] == 1
    assert figures["loss"] == pytest.approx(-(logp(5.0) + logp(0.0)) / 2, abs=1e-5)
    wrong = replace(example, answer=0, golds=("value of",))
    other = TaskData([wrong], data.task, tokenizer, max_length=60)
    figures = evaluate(model, other)
    assert figures["accuracy"] == 0
    assert figures["loss"] == pytest.approx(-(logp(2.0) + logp(0.0)) / 2, abs=1e-5)
    # A shot is the whole sentence, and a long prompt loses its beginning.
    shot = TaskData([example], data.task, tokenizer, max_length=60, shots=[example])
    text = tokenizer.decode(shot.token_rows(0, "options")[0].tokens[len(begin) :])
    assert text == "They use the name it.\n\nThey use the value of it."
    short = TaskData([example], data.task, tokenizer, max_length=len(begin) + 4)
    cut = short.token_rows(0, "options")[0]
    assert cut.answer == rows[0].answer and cut.prompt == begin + rows[0].prompt[-2:]


def test_what_is_no_continuation():
    row = SENTENCE | {"sentence": "There is no blank."}
    with pytest.raises(ValueError, match="continuation must give a text"):
        load_task("winogrande").examples([row])
    with pytest.raises(ValueError, match="'continuation' belongs to tasks of the kind choice"):
        replace(load_task("sst2"), continuation="x")


WORDS = Task(
    name="w",
    kind="classification",
    prompt="{{ q }}",
    sfc="b :",
    label="a",
    labels={0: "x", 1: "y"},
)


@pytest.mark.parametrize("train_on", ["label-words", "options"])
@pytest.mark.parametrize("above", [False, True])
def test_calibrated_label_words(tokenizer, train_on, above):
    """After the prompt, x has logit 4 and y has 2. After the domain's prompt, x has a little more
    or less than this difference of 2. So the calibrated choice is y or x."""
    of_domain = 2.1 if above else 1.9
    model = model_of(tokenizer, " = x", " = y", " : x", logits=(4.0, 2.0, of_domain))
    examples = WORDS.examples([{"q": "a =", "a": 1}, {"q": "c =", "a": 0}])
    data = TaskData(examples, WORDS, tokenizer, max_length=60, train_on=train_on)
    plain, figures = evaluate(model, data), evaluate(model, data, sfc=True)
    assert plain["accuracy"] == 0.5 and figures["loss"] == pytest.approx(plain["loss"])
    first = TaskData(examples[:1], WORDS, tokenizer, max_length=60, train_on=train_on)
    assert evaluate(model, first)["accuracy"] == 0
    assert evaluate(model, first, sfc=True)["accuracy"] == float(above)


@pytest.mark.parametrize("of_domain", [3.9, 4.1])
def test_calibrated_options(tokenizer, of_domain):
    """One option is a token with logit 4. The other has n tokens, whose first has logit 1. After
    the domain's prompt only the logit of the short option differs."""
    texts = {"prompt": "{{ q }}", "options": "options", "answer": "answer", "sfc": "{{ d }}"}
    task = Task(name="c", kind="choice", **texts)
    options = ("x", "return value of it")
    ids = tokenizer(" = return value of it", add_special_tokens=False)["input_ids"]
    n = len(ids) - 1
    colon = tokenizer(" :", add_special_tokens=False)["input_ids"][-1]
    model = model_of(
        tokenizer, " = x", " = return value of it", " : x", logits=(4.0, 7.0, of_domain)
    )
    weight = model.lm_head.weight.data
    weight[ids[1], ids[0]] = weight[ids[1], colon] = 1.0
    short = logp(4.0, 1.0) - logp(of_domain, 1.0)
    long = (logp(1.0, 4.0) - logp(1.0, of_domain)) / n
    assert math.copysign(1, short - long) == (1 if of_domain < 4 else -1)
    rows = [{"q": "a =", "d": "b :", "options": options, "answer": i} for i in (0, 1)]
    for i, example in enumerate(task.examples(rows)):
        data = TaskData([example], task, tokenizer, max_length=60)
        assert evaluate(model, data)["accuracy"] == i, "without calibration"
        calibrated = 0 if short > long else 1
        assert evaluate(model, data, sfc=True)["accuracy"] == float(i == calibrated)


def test_domains_of_the_builtin_tasks(tokenizer):
    """Label words are the same tokens after the domain's prompt as after a row's."""
    for name in BUILTIN:
        task = load_task(name)
        if name in ("winogrande", "squad", "drop"):
            assert not task.sfc
            continue
        if name == "demo":
            rows = [{"text": "x = 1", "label": "code"}]
        else:
            rows = [row for row, *_ in PUBLIC[name]]
        examples = task.examples(rows)
        assert all(e.domain and e.domain != e.prompt for e in examples)
        TaskData(examples, task, tokenizer, max_length=200).of_domain()
    row = {"premise": "a", "choice1": "b", "choice2": "c", "label": 0}
    causes = [row | {"question": question} for question in ("cause", "effect")]
    assert [e.domain for e in load_task("copa").examples(causes)] == ["because", "so"]


def test_what_cannot_be_calibrated(tokenizer):
    example = Example("a =", ("x", "y"), 0, ("x",))
    data = TaskData([example], replace(WORDS, sfc=""), tokenizer, max_length=60)
    with pytest.raises(ValueError, match="task w: it has no sfc template"):
        evaluate(model_of(tokenizer, " = x"), data, sfc=True)
    with pytest.raises(ValueError, match="a generation has none"):
        replace(load_task("squad"), sfc="Answer:")
    words = replace(WORDS, labels={0: "w2", 1: "w3"}, prompt="w1", sfc="w4")
    rows = words.examples([{"a": 0}])
    with pytest.raises(ValueError, match="a classifier has no label words"):
        TaskData(rows, words, encoder_tokenizer(), max_length=9, kind="classifier").of_domain()
    masked = TaskData(rows, words, encoder_tokenizer(), max_length=9, kind="masked")
    figures = evaluate(tiny_encoder("bert", "masked"), masked, sfc=True)
    assert figures["accuracy"] in (0, 1)
