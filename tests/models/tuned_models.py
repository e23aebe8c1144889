"""Makes tuned models for the tests of this folder."""

from importlib import resources
from pathlib import Path

import torch
from objective_cases import OPTIONS
from pseuzo import CausalLMObjective
from pseuzo.models.modes import tune
from tiny_models import batch_of, causal_lm
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    PreTrainedTokenizerFast,
)

DEMO = Path(str(resources.files("pseuzo.demo") / "assets" / "model"))


LABELS = torch.tensor([0, 2, 1, 2])


TOKENS = [5, 17, 900, 44, 1021]


def tuned(kind, mode, tied=None, **options):
    """Return a tuned model whose adapters have moved from their start, since half of LoRA's weights
    have no effect there."""
    model = tune(causal_lm(kind, tied), mode, **options).eval()
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.copy_(0.05 * torch.randn(p.shape, generator=g))
    return model


def small_tokenizer(**special):
    vocabulary = {
        word: i for i, word in enumerate(("<pad>", "</s>", "<unk>", *(f"w{i}" for i in range(60))))
    }
    words = Tokenizer(WordLevel(vocabulary, "<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        **{"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"} | special,
    )


def trained(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def parts(model, options=OPTIONS):
    labels = LABELS if options else batch_of()["input_ids"]
    return CausalLMObjective(model, options)({**batch_of(), "labels": labels})
