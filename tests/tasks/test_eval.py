"""Evaluation gives the figures worked out by hand, for a model whose every probability is known."""

import math
from pathlib import Path

import pseuzo
import pytest
import torch
from known_models import logp, model_of
from pseuzo import perturbed
from pseuzo.tasks import Example, Task, TaskData, evaluate, load_task, nondiff_loss
from pseuzo.tasks.evaluation import generate
from transformers import AutoModelForCausalLM, AutoTokenizer

DEMO_MODEL = Path(pseuzo.__file__).parent / "demo" / "assets" / "model"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO_MODEL)


CHOICE = Task(name="c", kind="choice", prompt="{{ q }}", options="options", answer="answer")
# The second option has several tokens.
OPTIONS = (" x", " return value of it")


def test_accuracy_of_options_is_by_mean_log_likelihood(tokenizer):
    ids = tokenizer(" =" + OPTIONS[1], add_special_tokens=False)["input_ids"]
    n = len(ids) - 1
    assert n >= 3 and len(set(ids)) == n + 1
    assert len(tokenizer(" = x", add_special_tokens=False)["input_ids"]) == 2
    # The single token has logit 4, the other option's first token 1, and its other tokens 7 each.
    model = model_of(tokenizer, " = x", " =" + OPTIONS[1], logits=(4.0, 7.0))
    with torch.no_grad():
        model.lm_head.weight[ids[1], ids[0]] = 1.0
    short = logp(4.0, 1.0)
    total = logp(1.0, 4.0) + (n - 1) * logp(7.0)
    assert total < short < total / n, "the sum should choose the short option"
    examples = [
        Example("a =", tuple(o.strip() for o in OPTIONS), answer, (OPTIONS[answer].strip(),))
        for answer in (0, 1, 1)
    ]
    data = TaskData(examples, CHOICE, tokenizer, max_length=60)
    figures = evaluate(model, data, batch_size=2)
    assert figures["accuracy"] == pytest.approx(2 / 3) and figures["examples"] == 3
    # The loss is that of the answers' tokens.
    assert figures["loss"] == pytest.approx(-(short + 2 * total) / (1 + 2 * n), abs=1e-5)
    data = TaskData(examples, CHOICE, tokenizer, max_length=60, train_on="options")
    figures = evaluate(model, data)
    normaliser = math.log(math.exp(short) + math.exp(total / n))
    assert figures["loss"] == pytest.approx(normaliser - (short + 2 * total / n) / 3, abs=1e-5)
    assert figures["accuracy"] == pytest.approx(2 / 3)
    assert float(nondiff_loss(model, data, torch.tensor([0, 1]))) == 0.5
    assert (
        float(nondiff_loss(model, data, [1, 2])) == 0.0
        and nondiff_loss(model, data, [0]).dtype is torch.float32
    )


def test_any_accepted_option_is_right(tokenizer):
    model = model_of(tokenizer, " = x")
    both = Example("a =", ("y", "x"), 0, ("y", "x"))
    one = Example("a =", ("y", "x"), 0, ("y",))
    data = TaskData([both, one, one, both], CHOICE, tokenizer, max_length=60)
    assert evaluate(model, data)["accuracy"] == 0.5


def test_scores_that_are_not_finite_are_never_right(tokenizer):
    """argmax takes a NaN for the largest: a diverged model would be right whenever the first
    option is."""
    words = Task(
        name="w", kind="classification", prompt="{{ q }}", label="a", labels={0: "x", 1: "y"}
    )
    examples = [Example("a =", ("x", "y"), a, ("xy"[a],)) for a in (0, 1, 0)] + [
        Example("a :", ("x", "y"), 0, ("x",))
    ]
    for broken in (float("nan"), float("inf"), -float("inf")):
        model = model_of(tokenizer, " = x", " : x")
        ids = tokenizer(" =", add_special_tokens=False)["input_ids"]
        both = []
        for train_on in ("label-words", "options"):
            data = TaskData(examples, words, tokenizer, max_length=60, train_on=train_on)
            assert evaluate(model, data)["accuracy"] == 0.75
            both.append(data)
        with torch.no_grad():
            model.embed.weight[ids[0], ids[0]] = broken  # this breaks all logits after " ="
        for data in both:
            assert evaluate(model, data)["accuracy"] == 0.25
            assert float(nondiff_loss(model, data, [0, 1, 2])) == 1.0


def test_ragged_options(tokenizer):
    model = model_of(tokenizer, " = x")
    examples = [
        Example("a =", ("y", "x"), 1, ("x",)),
        Example("a =", ("z", "y", "w", "x"), 0, ("z",)),
        Example("a =", ("y", "z", "x"), 2, ("x",)),
    ]
    assert evaluate(model, TaskData(examples, CHOICE, tokenizer, max_length=60), batch_size=2)[
        "accuracy"
    ] == pytest.approx(2 / 3)


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_the_demo_task(tokenizer, batch_size):
    """Label words, options and the demo's own count agree, however rows are put into batches."""
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL)
    task = load_task("demo")
    examples = task.load(train=0, dev=0, test=1000)["test"]
    some = examples[:60]
    words = TaskData(some, task, tokenizer, max_length=126)
    options = TaskData(some, task, tokenizer, max_length=126, train_on="options")
    a, b = (
        evaluate(model, words, batch_size=batch_size),
        evaluate(model, options, batch_size=batch_size),
    )
    assert a["accuracy"] == b["accuracy"] and a["loss"] == pytest.approx(b["loss"], abs=1e-5)
    if batch_size == 64:
        everything = TaskData(examples, task, tokenizer, max_length=126)
        right = 0
        for i, example in enumerate(examples):  # these are the model's own logits, prompt by prompt
            ids = tokenizer(example.prompt, return_tensors="pt")["input_ids"][:, -126:]
            with torch.no_grad():
                logits = model(ids).logits[0, -1, everything.options]
            right += int(logits.argmax()) == everything.labels[i]
        assert evaluate(model, everything, batch_size=100)["accuracy"] == right / 1000 == 0.634


def test_modes_are_put_back(tokenizer):
    model = model_of(tokenizer, " = x").train()
    model.embed.eval()
    data = TaskData([Example("a =", ("y", "x"), 1, ("x",))], CHOICE, tokenizer, max_length=60)
    evaluate(model, data)
    assert model.training and model.drop.training and not model.embed.training
    assert not any(p.grad is not None for p in model.parameters())


FREE = Task(name="g", kind="generation", prompt="{{ q }}", answers="a", max_new_tokens=8)


def test_generation_f1_and_exact_match(tokenizer):
    # The model writes these texts after "=", ":" and "(". It ends the first two with a line break,
    # and never ends the third.
    model = model_of(tokenizer, " = The result value\nis", " : a string\nis", " ( loop if loop")
    prompts = [
        Example("what follows =", (), None, golds)
        for golds in (
            ("result value",),  # this is all of it, except for case and the article
            ("value", "other"),  # precision 1/2 of "result value", recall 1: 2/3
            ("none",),
            ("the wrong thing", "result value of it"),  # precision 1, recall 1/2
        )
    ]
    other = [Example("longer, so that rows are padded :", (), None, ("A string!",))]
    data = TaskData(prompts + other, FREE, tokenizer, max_length=60)
    assert generate(model, data, range(5), batch_size=2) == ["The result value"] * 4 + ["a string"]
    figures = evaluate(model, data, batch_size=3)
    assert figures["f1"] == pytest.approx((1 + 2 / 3 + 0 + 2 / 3 + 1) / 5, abs=1e-6)
    assert figures["em"] == pytest.approx(2 / 5) and figures["examples"] == 5
    assert float(nondiff_loss(model, data, [1, 2])) == pytest.approx(1 - 1 / 3, abs=1e-6)
    endless = TaskData([Example("f (", (), None, ("x",))], FREE, tokenizer, max_length=60)
    (text,) = generate(model, endless, [0])
    assert len(
        tokenizer(" " + text, add_special_tokens=False)["input_ids"]
    ) == 8 and text.startswith("loop if loop if")
    assert model.training


def test_generation_stops_row_by_row(tokenizer):
    """A short answer ends while the long one in the same batch is still being written."""
    model = model_of(
        tokenizer, " = x\nx is None", " : a if value in self and not result or other\n"
    )
    examples = [Example(p, (), None, ("x",)) for p in ("a =", "a longer :")]
    together = TaskData(examples, FREE, tokenizer, max_length=60)
    texts = generate(model, together, [0, 1], batch_size=2)
    assert texts[0] == "x" and texts[1].startswith("a if value")
    assert generate(model, together, [1], batch_size=1) == [texts[1]]
    no_stop = Task(
        name="g", kind="generation", prompt="{{ q }}", answers="a", max_new_tokens=3, stop=""
    )
    assert generate(model, TaskData(examples[:1], no_stop, tokenizer, max_length=60), [0])[
        0
    ].startswith("x\n")


def test_generation_is_greedy_whatever_the_model_has_set(tokenizer):
    model = model_of(tokenizer, " = x y\n", logits=2.0)
    with torch.no_grad():
        model.lm_head.weight.mul_(4)
    model.generation_config.do_sample, model.generation_config.temperature = True, 50.0
    model.generation_config.repetition_penalty = 100.0
    model.generation_config.num_beams = 3
    data = TaskData([Example("x y =", (), None, ("x y",))], FREE, tokenizer, max_length=60)
    assert [generate(model, data, [0]) for _ in range(3)] == [["x y"]] * 3


def test_loss_of_a_generation_is_that_of_training(tokenizer):
    from pseuzo import CausalLMObjective

    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL)
    examples = [
        Example("def f(x):", (), None, ("return x + 1",)),
        Example("import", (), None, ("sys",)),
    ]
    data = TaskData(examples, FREE, tokenizer, max_length=60)
    forward, head = CausalLMObjective(model)(data.collate([data[0], data[1]]))
    with torch.no_grad():
        want = float(head(forward()))
    assert evaluate(model, data, batch_size=1)["loss"] == pytest.approx(want, abs=1e-5)


@pytest.mark.slow
def test_a_perturbed_model_is_seen_perturbed(tokenizer):
    """nondiff_loss in a perturbed pass is that of a model with the perturbed weights, and changes
    no weight."""
    from pseuzo_kernels import perturb_

    task = load_task("demo")
    examples = task.load(train=0, dev=0, test=40)["test"]
    free = [Example(e.prompt, (), None, e.golds) for e in examples[:6]]
    for data in (
        TaskData(examples, task, tokenizer, max_length=126),
        TaskData(examples, task, tokenizer, max_length=126, train_on="options"),
        TaskData(
            free,
            Task(name="g", kind="generation", prompt="{{ q }}", answers="a", max_new_tokens=2),
            tokenizer,
            max_length=126,
        ),
    ):
        model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL).eval()
        before = [p.detach().clone() for p in model.parameters()]
        rows = list(range(len(data)))
        clean = float(nondiff_loss(model, data, rows))
        values = []
        for seed in range(2):
            with torch.no_grad(), perturbed(model, seed, 3e-2):
                got = float(nondiff_loss(model, data, rows))
            other = AutoModelForCausalLM.from_pretrained(DEMO_MODEL).eval()
            with torch.no_grad():
                perturb_(list(other.parameters()), seed, 3e-2)
            assert got == float(nondiff_loss(other, data, rows))
            values.append(got)
        assert set(values) != {clean}, "the losses are all equal"
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_a_model_is_verified_once_however_its_weights_change(tokenizer, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL).eval()
    examples = [Example(q, ("x", "y"), 0, ("x",)) for q in ("a =", "some longer words =")]
    data = TaskData(examples, CHOICE, tokenizer, max_length=60)
    evaluate(model, data)

    def diverged(split, plan):
        split.known.padding = "nowhere"  # what noise in the weights may look like

    monkeypatch.setattr(pseuzo.models.objective, "find_padding", diverged)
    assert evaluate(model, data)["examples"] == 2
