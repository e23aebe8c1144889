"""Whole runs of the command line on tiny models of every family: what moves, what is saved, what a replay gives back.

Other options whose effect on a whole run is checked here: --noise, --two-sided, --train-on, --head, --until.
"""

import functools
import gc
import json
import math
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from helpers import assert_same_weights, pseuzo, weights
from peft import PeftModel
from pseuzo import CausalLMObjective, PseuZO
from pseuzo.cli import run as runs
from pseuzo.models.loading import load_model
from pseuzo.tasks import TaskData, load_task
from pseuzo.train.journal_file import read_journal
from safetensors.torch import load_file
from tiny_models import ALL_KINDS, VOCAB, batch_of, causal_lm
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import pseuzo_kernels

pytestmark = pytest.mark.slow
VOCABULARY = [first + second for first in "bdfgklmnprst" for second in "aeiou"]
WORDS = ("bravo", "delta")
TASK = """
name: own
kind: classification
data: rows.jsonl
prompt: "{{ text }}"
label: label
labels: {0: FIRST, 1: SECOND}
"""
SIZES = {"train": 24, "dev": 8, "test": 8}
LR, EPS, BATCH = 1e-3, 1e-3, 4
EPS32 = torch.finfo(torch.float32).eps


@pytest.fixture(scope="module", autouse=True)
def quick():
    """No pictures, which test_cli.py has, and no search for garbage among what is imported: a second a run."""
    gc.freeze()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "plot_runs", lambda *args: None)
        yield
    gc.unfreeze()


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE, as Transformers takes every tokenizer of a Qwen2 for one; a word is one token."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=["<pad>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    bpe.train_from_iterator([" ".join(["", *VOCABULARY, *WORDS])] * 2, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", eos_token="</s>")


def tokens_of(words: tuple[str, ...]) -> list[int]:
    """Of words after others."""
    return [i for word in words for i in tokenizer()(f" {word}")["input_ids"]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """folder(kind, tied): a tiny random model with its tokenizer, saved."""
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
    """task(words): a file of a task with these label words; rows of different lengths, so that batches are padded."""
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


def arguments(model: Path, task: Path, out: Path, *args: object, steps: int = 3) -> list[str]:
    """The arguments of pseuzo train. The last of an option's values counts."""
    sizes = [x for part, size in SIZES.items() for x in (f"--{part}-size", size)]
    # one row at a time: the loss on the test rows is then that of prompts without padding
    all_of_them = ["train", "--model", model, "--task", task, *sizes, "--steps", steps, "--batch-size", BATCH,
                   "--eval-batch-size", 1, "--eval-every", 0, "--save-every", 0, "--log-every", 1, "--keep", "last",
                   "--lr", LR, "--device", "cpu", "--quiet", *args, "--output", out]  # fmt: skip
    return [str(a) for a in all_of_them]


def train(model: Path, task: Path, out: Path, *args: object, steps: int = 3) -> dict:
    """Run pseuzo train; its results, which have to be finite, and what it printed as `text`."""
    text = pseuzo(*arguments(model, task, out, *args, steps=steps))
    results = json.loads((out / "results.json").read_text())
    assert results["steps"] == steps and results["skipped_steps"] == 0
    rows = [results["test"], *results["history"]]
    assert all(
        isinstance(v, int | float) and math.isfinite(v) for row in rows for v in row.values()
    ), rows
    assert len(losses(results)) == steps
    return results | {"text": text}


def replay(base: Path, journal: Path, out: Path, *args: object) -> list[str]:
    """The arguments of pseuzo replay."""
    return [
        str(a) for a in ("replay", "--base", base, "--journal", journal, *args, "--output", out)
    ]


def losses(results: dict) -> list[float]:
    return [row["loss"] for row in results["history"] if "loss" in row]


def load(path: Path) -> nn.Module:
    """By Transformers alone."""
    model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert (
        not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    ), info
    return model.eval()


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(p, b[name]) for name, p in a.items())


@torch.no_grad()
def loss_of_prompts(path: Path, task: Path) -> float:
    """Cross entropy over the label words' logits after each test prompt, by Transformers alone."""
    model, tokens, words = load(path), AutoTokenizer.from_pretrained(path), tokens_of(WORDS)
    examples = load_task(str(task)).load(None, **SIZES, seed=0)["test"]
    logits = [model(**tokens(e.prompt, return_tensors="pt")).logits[0, -1, words] for e in examples]
    return float(F.cross_entropy(torch.stack(logits), torch.tensor([e.answer for e in examples])))


@pytest.mark.parametrize("kind", ALL_KINDS)
@pytest.mark.parametrize("tied, method, rows", [
    (True, ["pseuzo"], "all"),
    (False, ["pseuzo"], "none"),  # --head frozen
    (False, ["pseuzo", "--head", "exact", "--head-lr", "0.02"], "label words"),  # the loss depends on no others
    (False, ["mezo"], "all"),
], ids=["tied pseuzo", "untied pseuzo", "untied pseuzo exact", "untied mezo"])  # fmt: skip
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
    # the saved model is the trained one: two logits a row, each to 32 ulps of 1, which none of them reaches
    assert results["test"]["loss"] == pytest.approx(
        loss_of_prompts(out / "model", task()), abs=64 * EPS32
    )
    assert results["test"]["loss"] != pytest.approx(loss_of_prompts(base, task()), abs=64 * EPS32)


@pytest.mark.parametrize("mode, kind, method", [
    ("lora", "gpt2", "mezo"), ("lora", "neox", "pseuzo"), ("prefix", "llama", "pseuzo"), ("prefix", "qwen3", "mezo"),
])  # fmt: skip
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
    """And with the config of the model as it was: the tokenizer's special tokens are not written into it."""
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


def test_replay_until_a_step_is_the_run_up_to_it(tmp_path, folder, task):
    base, out, journal = folder("qwen2"), tmp_path / "run", tmp_path / "run.pzj"
    args = ["--dtype", "bf16", "--weight-decay", 0.1, "--lr", 3e-3]
    train(base, task(), out, *args, "--save-every", 2, "--journal", journal, steps=6)
    train(base, task(), tmp_path / "short", *args, steps=3)

    def replayed(until: int, steps: int) -> Path:
        target = tmp_path / f"until-{until}"
        text = pseuzo(*replay(base, journal, target, "--until", until))
        assert f"{steps} steps replayed, up to step {steps}" in text
        return target

    untouched = {name: p.to(torch.bfloat16) for name, p in weights(base).items()}
    assert same(weights(replayed(0, 0)), untouched)
    assert_same_weights(replayed(3, 3), tmp_path / "short" / "model")
    assert_same_weights(replayed(4, 4), out / "checkpoint-4")
    assert_same_weights(replayed(99, 6), out / "model")
    assert not same(weights(tmp_path / "until-3"), weights(tmp_path / "until-4"))


def test_the_best_step_is_replayed_as_the_run_says(tmp_path, folder, task):
    base, out, journal = folder("opt"), tmp_path / "run", tmp_path / "run.pzj"
    results = train(base, task(), out, "--lr", "1e-2", "--keep", "best", "--eval-every", 1, "--save-every", 1,
                    "--journal", journal, steps=6)  # fmt: skip
    best = results["best_step"]
    accuracies = [
        row["eval_accuracy"]
        for row in results["history"]
        if row.get("step") and "eval_accuracy" in row
    ]
    assert best == 1 + accuracies.index(max(accuracies))
    assert (f"pseuzo replay --until {best} makes it" in results["text"]) == (best < 6)
    pseuzo(*replay(base, journal, tmp_path / "best", "--until", best))
    assert_same_weights(tmp_path / "best", out / "model")


@pytest.mark.parametrize("kind, method", [("opt", "pseuzo"), ("llama", "mezo")])
def test_options_and_label_words_are_the_same_loss(tmp_path, folder, task, kind, method):
    found = {}
    for name in ("label-words", "options", "auto"):
        args = ["--method", method, "--eps", EPS, "--train-on", name]
        found[name] = losses(train(folder(kind, False), task(), tmp_path / name, *args))[0]
    # two logits a row, each to 32 ulps of 1, which none reaches; what is logged is rounded to six places
    assert found["options"] == pytest.approx(found["label-words"], abs=64 * EPS32 + 1e-6)
    assert abs(found["options"] - math.log(2)) > 1e-3, (
        "the words are not alike, so that it says something"
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


@pytest.mark.parametrize("method", ["pseuzo", "mezo"])
def test_every_noise_trains_and_replays(tmp_path, folder, task, method):
    base = folder("gpt2")
    found = []
    for noise in ("hadamard", "rademacher", "normal"):
        out, journal = tmp_path / noise, tmp_path / f"{noise}.pzj"
        train(base, task(), out, "--method", method, "--noise", noise, "--dtype", "bf16", "--lr", "1e-2",
              "--weight-decay", 0.1, "--journal", journal)  # fmt: skip
        assert read_journal(journal)[0]["noise"] == noise
        pseuzo(*replay(base, journal, tmp_path / "replayed" / noise))
        assert_same_weights(out / "model", tmp_path / "replayed" / noise)
        found.append(weights(out / "model"))
    hadamard, rademacher, normal = found
    assert (
        not same(hadamard, rademacher)
        and not same(hadamard, normal)
        and not same(rademacher, normal)
    )


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


ELSEWHERE = """
import json, sys
sys.modules["pseuzo_kernels._C"] = None  # as where it was not built
import torch
from pseuzo.cli.commands import main
import pseuzo_kernels
from pseuzo_kernels import ops
from pseuzo_kernels.triton import launch

def native():
    return torch._C._dispatch_has_kernel_for_dispatch_key("pseuzo::add_noise_steps_", "CPU")
assert pseuzo_kernels._C is None
for backend, args in json.loads(sys.argv[1]):
    if backend == "triton" and not native():  # from here on, on tensors of the CPU, in its interpreter
        ops.lib.impl("add_noise_steps_", launch.add_noise_steps_triton_, "CPU")
    assert native() == (backend == "triton")
    main(args, standalone_mode=False)
"""


@pytest.mark.skipif(
    pseuzo_kernels._C is None,
    reason="_C is not built: PSEUZO_BUILD=cpu pip install --no-build-isolation -e .",
)
def test_a_run_is_replayed_by_another_backend(tmp_path, folder, task):
    """C++ against plain torch, both ways, and against Triton in its interpreter, which is slow: on few weights."""
    base, rademacher = folder("llama"), ["--noise", "rademacher"]
    few = [
        x
        for name in ("self_attn.v_proj", "post_attention_layernorm")
        for x in ("--noise-on", f"*1.{name}.weight")
    ]
    ways = {"hadamard": ["--dtype", "bf16"], "rademacher": ["--dtype", "bf16", *rademacher],
            "normal": ["--noise", "normal"], "triton": ["--dtype", "bf16", *few],
            "torch": ["--dtype", "bf16", "--lr-scheduler", "linear"]}  # fmt: skip

    def run(name: str) -> list[str]:
        return ["--eps", str(EPS), "--lr", "1e-2", "--weight-decay", "0.1", "--window", "2", "--momentum", "0.7",
                *ways[name], "--journal", str(journal(name))]  # fmt: skip

    def journal(name: str) -> Path:
        return tmp_path / f"{name}.pzj"

    def replayed(name: str) -> Path:
        return tmp_path / "replayed" / name

    by_cpp = ["hadamard", "rademacher", "normal", *(["triton"] if find_spec("triton") else [])]
    for name in by_cpp:
        train(base, task(), tmp_path / name, *run(name))
    jobs = [("torch", arguments(base, task(), tmp_path / "torch", *run("torch")))]
    jobs += [
        ("triton" if n == "triton" else "torch", replay(base, journal(n), replayed(n)))
        for n in by_cpp
    ]
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, json.dumps(jobs)], env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    pseuzo(*replay(base, journal("torch"), replayed("torch")))

    for name in {*by_cpp, "torch"} - {"normal"}:
        assert_same_weights(tmp_path / name / "model", replayed(name))
        assert [len(record.seeds) for record in read_journal(journal(name))[1]] == [1, 2, 2]
        assert not same(
            weights(tmp_path / name / "model"), {n: p.bfloat16() for n, p in weights(base).items()}
        )
    # no such promise for normal noise: |z| < 8, so 4 ulps of it are 2e-6 at most; a sum of K terms rounds K + 2 times
    records = list(read_journal(journal("normal"))[1])
    noise = sum(record.groups[0][0] * float(record.coefs.abs().sum()) for record in records)
    got, want = weights(replayed("normal")), weights(tmp_path / "normal" / "model")
    largest = max(float(p.abs().max()) for p in want.values())
    for name, p in want.items():
        torch.testing.assert_close(
            got[name], p, rtol=0, atol=2e-6 * noise + len(records) * 4 * EPS32 * largest
        )
    assert not same(want, weights(base))
