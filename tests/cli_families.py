"""Helpers of the tests that run the command line on every family of models."""

import functools
import json
import math
from pathlib import Path

import torch
from helpers import pseuzo
from pseuzo.tasks import load_task
from tiny_models import VOCAB
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

VOCABULARY = [first + second for first in "bdfgklmnprst" for second in "aeiou"]


WORDS = ("bravo", "delta")


SIZES = {"train": 24, "dev": 8, "test": 8}


LR, EPS, BATCH = 1e-3, 1e-3, 4


EPS32 = torch.finfo(torch.float32).eps


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Make a byte-level BPE, since Transformers loads every tokenizer of a Qwen2 as one. Each word
    is one token."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<pad>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([" ".join(["", *VOCABULARY, *WORDS])] * 2, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", eos_token="</s>")


def tokens_of(words: tuple[str, ...]) -> list[int]:
    """Return the tokens of words that follow other words."""
    return [i for word in words for i in tokenizer()(f" {word}")["input_ids"]]


def arguments(model: Path, task: Path, out: Path, *args: object, steps: int = 3) -> list[str]:
    """Return the arguments of pseuzo train. If an option is repeated, its last value counts."""
    sizes = [x for part, size in SIZES.items() for x in (f"--{part}-size", size)]
    # The rows are evaluated one at a time, so that the test loss is that of unpadded prompts.
    all_of_them = [
        "train",
        "--model",
        model,
        "--task",
        task,
        *sizes,
        "--steps",
        steps,
        "--batch-size",
        BATCH,
        "--eval-batch-size",
        1,
        "--eval-every",
        0,
        "--save-every",
        0,
        "--log-every",
        1,
        "--keep",
        "last",
        "--lr",
        LR,
        "--device",
        "cpu",
        "--quiet",
        *args,
        "--output",
        out,
    ]
    return [str(a) for a in all_of_them]


def train(model: Path, task: Path, out: Path, *args: object, steps: int = 3) -> dict:
    """Run pseuzo train. Return its results, which must be finite, and what it printed as `text`."""
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
    """Return the arguments of pseuzo replay."""
    return [
        str(a) for a in ("replay", "--base", base, "--journal", journal, *args, "--output", out)
    ]


def losses(results: dict) -> list[float]:
    return [row["loss"] for row in results["history"] if "loss" in row]


def load(path: Path) -> nn.Module:
    """Load the model with Transformers alone."""
    model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert (
        not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    ), info
    return model.eval()


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(p, b[name]) for name, p in a.items())


@torch.no_grad()
def loss_of_prompts(path: Path, task: Path) -> float:
    """Return the cross entropy over the label words' logits after each test prompt, by Transformers
    alone."""
    model, tokens, words = load(path), AutoTokenizer.from_pretrained(path), tokens_of(WORDS)
    examples = load_task(str(task)).load(None, **SIZES, seed=0)["test"]
    logits = [model(**tokens(e.prompt, return_tensors="pt")).logits[0, -1, words] for e in examples]
    return float(F.cross_entropy(torch.stack(logits), torch.tensor([e.answer for e in examples])))
