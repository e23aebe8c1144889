"""Small models that the tests share."""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

VOCAB = 1100


def causal_lm(kind: str) -> nn.Module:
    """A random causal LM with weights on both sides of what a perturbed pass copies whole, and with non-zero biases."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    if kind in ("opt", "opt-projected"):
        model = OPTForCausalLM(
            OPTConfig(
                vocab_size=VOCAB, hidden_size=64, ffn_dim=1100, num_hidden_layers=2, num_attention_heads=4,
                max_position_embeddings=64, word_embed_proj_dim=64 if kind == "opt" else 32,
            )
        )  # fmt: skip
    elif kind == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=64, n_layer=2, n_head=4, n_positions=64))
    elif kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, tie_word_embeddings=False, **sizes))
    elif kind == "qwen2":
        model = Qwen2ForCausalLM(
            Qwen2Config(vocab_size=VOCAB, num_key_value_heads=2, tie_word_embeddings=True, **sizes)
        )
    else:
        raise ValueError(kind)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return model


KINDS = ("opt", "opt-projected", "gpt2", "llama", "qwen2")


def batch_of(rows: int = 4, length: int = 12, seed: int = 0) -> dict[str, torch.Tensor]:
    """Left-padded prompts of different lengths."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.ones(rows, length, dtype=torch.long)
    for row in range(1, rows):
        mask[row, : row % 4] = 0
    return {"input_ids": torch.randint(3, VOCAB, (rows, length), generator=g), "attention_mask": mask}


class Tied(nn.Module):
    """Uses its large embedding's weight as output head without calling the embedding, and keeps a view of another."""

    def __init__(self, vocab: int = 300, width: int = 256, keep_view: bool = False):
        super().__init__()
        torch.manual_seed(1)
        self.embed = nn.Embedding(vocab, width)
        self.mix = nn.Linear(width, width * 2)
        self.drop = nn.Dropout(0.5)
        self.norm = nn.LayerNorm(width * 2)
        self.down = nn.Linear(width * 2, width, bias=False)
        self.kept = [self.down.weight.view(-1)] if keep_view else None

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        h = self.norm(self.drop(self.mix(self.embed(ids))))
        weight = self.kept[0].view(self.down.weight.shape) if self.kept else self.down.weight
        return F.linear(F.linear(h, weight), self.embed.weight).mean(1)
