"""Whole runs of the command line on tiny models of every family move and save the right weights."""

import json
import math

import pytest
import torch
from cli_families import (
    BATCH,
    EPS,
    EPS32,
    LR,
    SIZES,
    WORDS,
    arguments,
    load,
    loss_of_prompts,
    losses,
    replay,
    same,
    tokenizer,
    tokens_of,
    train,
)
from helpers import assert_same_weights, pseuzo, weights
from peft import PeftModel
from pseuzo import CausalLMObjective, PseuZO
from pseuzo.models.loading import load_model
from pseuzo.tasks import TaskData, load_task
from safetensors.torch import load_file
from tiny_models import ALL_KINDS, VOCAB, batch_of

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick")]


@pytest.mark.parametrize("kind", ALL_KINDS)
@pytest.mark.parametrize(
    "tied, method, rows",
    [
        (True, ["pseuzo"], "all"),
        (False, ["pseuzo"], "none"),  # --head frozen
        # The loss depends on no other weights.
        (
            False,
            ["pseuzo", "--head", "exact", "--head-lr", "0.02"],
            "label words",
        ),
        (False, ["mezo"], "all"),
    ],
    ids=["tied pseuzo", "untied pseuzo", "untied pseuzo exact", "untied mezo"],
)
def test_families_train_and_are_saved(tmp_path, folder, task, kind, tied, method, rows):
    base, out = folder(kind, tied), tmp_path / "run"
    results = train(base, task(), out, "--weight-decay", 0.1, "--method", *method)
    start, end = load(base), load(out / "model")
    head = [m.get_output_embeddings().weight for m in (start, end)]
    assert all(
        (m.get_input_embeddings().weight is h) == tied
        for m, h in zip((start, end), head, strict=True)
    )
    moved = (head[0] != head[1]).any(1).nonzero().flatten().tolist()
    assert (
        moved
        == {"all": list(range(VOCAB)), "none": [], "label words": sorted(tokens_of(WORDS))}[rows]
    )
    before, after = dict(start.named_parameters()), dict(end.named_parameters())
    assert before.keys() == after.keys()
    still = {name for name, p in after.items() if torch.equal(p, before[name])}
    assert still == {name for name, p in after.items() if p is head[1] and rows == "none"}
    # The saved model is the trained one. There are two logits per row, each below 1, so each is off
    # by at most 32 ulps of 1.
    assert results["test"]["loss"] == pytest.approx(
        loss_of_prompts(out / "model", task()), abs=64 * EPS32
    )
    assert results["test"]["loss"] != pytest.approx(loss_of_prompts(base, task()), abs=64 * EPS32)


@pytest.mark.parametrize(
    "mode, kind, method",
    [
        ("lora", "gpt2", "mezo"),
        ("lora", "neox", "pseuzo"),
        ("prefix", "llama", "pseuzo"),
        ("prefix", "qwen3", "mezo"),
    ],
)
def test_adapters_of_other_families_replay_and_load_by_peft(
    tmp_path, folder, task, mode, kind, method
):
    base, out, journal = folder(kind, False), tmp_path / "run", tmp_path / "run.pzj"
    train(base, task(), out, "--mode", mode, "--method", method, "--journal", journal)
    pseuzo(*replay(out / "start", journal, tmp_path / "replayed"))
    start, end, again = (
        load_file(d / "adapter_model.safetensors")
        for d in (out / "start", out / "model", tmp_path / "replayed")
    )
    assert start.keys() == end.keys() and all(
        not torch.equal(p, end[name]) for name, p in start.items()
    )
    assert same(again, end)
    assert not (out / "model" / "model.safetensors").exists()
    model, _ = load_model(out / "model", device="cpu")
    by_peft = PeftModel.from_pretrained(load(base), out / "model").eval()
    with torch.no_grad():
        want = model(**batch_of()).logits
        assert torch.equal(by_peft(**batch_of()).logits, want)
        assert not torch.equal(load(base)(**batch_of()).logits, want)


@pytest.mark.parametrize("mode", ["lora", "prefix"])
def test_an_adapter_loads_in_any_directory(tmp_path, monkeypatch, folder, task, mode):
    base, out, journal = folder("opt"), tmp_path / "run", tmp_path / "run.pzj"
    monkeypatch.chdir(base.parent)
    train(
        base.name,
        task(),
        out,
        "--mode",
        mode,
        "--method",
        "mezo",
        "--journal",
        journal,
        "--save-every",
        3,
    )
    monkeypatch.chdir(tmp_path)
    pseuzo(*replay("run/start", journal, tmp_path / "replayed"))
    end = load_file(out / "model" / "adapter_model.safetensors")
    for name in (tmp_path / "replayed", "run/model", "run/checkpoint-3"):
        model, _ = load_model(name, device="cpu")
        found = {key: p for key, p in model.named_parameters() if p.requires_grad}
        assert len(found) == len(end) and all(
            any(torch.equal(p, q) for q in end.values()) for p in found.values()
        )


def test_checkpoints_are_models_with_their_tokenizer(tmp_path, folder, task):
    """The config of the model is unchanged: the tokenizer's special tokens are not written into
    it."""
    base, out = folder("gpt2"), tmp_path / "run"
    train(base, task(), out, "--save-every", 3)
    model, tokens = load_model(out / "checkpoint-3", device="cpu")
    assert same(
        dict(model.named_parameters()),
        dict(load_model(out / "model", device="cpu")[0].named_parameters()),
    )
    assert tokens("bravo delta").input_ids == tokenizer()("bravo delta").input_ids
    before, after = (
        json.loads((d / "config.json").read_text()) for d in (base, out / "checkpoint-3")
    )
    assert before["bos_token_id"] != tokens.bos_token_id
    assert {k: v for k, v in after.items() if k.endswith("_token_id")} == {
        k: v for k, v in before.items() if k.endswith("_token_id")
    }


@pytest.mark.parametrize("kind, method", [("opt", "pseuzo"), ("llama", "mezo")])
def test_options_and_label_words_are_the_same_loss(tmp_path, folder, task, kind, method):
    found = {}
    for name in ("label-words", "options", "auto"):
        args = ["--method", method, "--eps", EPS, "--train-on", name]
        found[name] = losses(train(folder(kind, False), task(), tmp_path / name, *args))[0]
    # There are two logits per row, each below 1 and so off by at most 32 ulps of 1. Logged numbers
    # are rounded to six places.
    assert found["options"] == pytest.approx(found["label-words"], abs=64 * EPS32 + 1e-6)
    assert abs(found["options"] - math.log(2)) > 1e-3, (
        "the losses of the words are too similar to test this"
    )
    assert_same_weights(tmp_path / "auto" / "model", tmp_path / "label-words" / "model")
    start = weights(folder(kind, False))
    for name in ("label-words", "options"):
        assert not same(weights(tmp_path / name / "model"), start)


def test_a_label_of_two_tokens_is_trained_on_as_an_option(tmp_path, folder, task):
    base, two = folder("opt"), task(("bravo delta", "ba"))
    text = pseuzo(*arguments(base, two, tmp_path / "words", "--train-on", "label-words"), code=2)
    refused = text.strip().splitlines()[-1]
    assert (
        refused.startswith("Error: ")
        and "'bravo delta' is not one token" in refused
        and "options" in refused
    )
    for name in ("options", "auto"):
        train(base, two, tmp_path / name, "--train-on", name)
    assert_same_weights(tmp_path / "options" / "model", tmp_path / "auto" / "model")
    assert not same(weights(tmp_path / "options" / "model"), weights(base))


def test_two_sided_pseuzo_is_the_optimizer_driven_by_hand(tmp_path, folder, task):
    base, out = folder("gemma", False), tmp_path / "run"
    results = train(
        base, task(), out, "--two-sided", "--eps", EPS, "--window", 2, "--momentum", 0.5
    )
    assert results["forwards"] == 3 * 3

    def by_hand(two_sided: bool) -> dict[str, torch.Tensor]:
        model, tokens = load_model(base, device="cpu")
        own = load_task(str(task()))
        data = TaskData(own.load(None, **SIZES, seed=0)["train"], own, tokens, max_length=64)
        objective = CausalLMObjective(model, data.options)
        trained = [p for p in model.parameters() if p is not model.lm_head.weight]
        optimizer = PseuZO(
            trained, LR, EPS, window=2, momentum=0.5, two_sided=two_sided, seed=0, model=model
        )
        for rows in torch.tensor(list(data.sampler(BATCH, 0))).split(BATCH)[:3]:
            batch = data.collate([data[i] for i in rows.tolist()])
            optimizer.step(*objective(batch), groups=batch["groups"])
        return dict(model.named_parameters())

    end = dict(load(out / "model").named_parameters())
    assert same(by_hand(True), end)
    assert not same(by_hand(False), end)
