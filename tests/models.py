"""Small models that the tests share."""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCAB = 1100


def causal_lm(kind: str, tied: bool | None = None) -> nn.Module:
    """A random causal LM with weights on both sides of what a perturbed pass copies whole, and with non-zero biases.

    tied: is its output head the embedding's weight? By default as its kind usually has it.
    """
    torch.manual_seed(0)
    sizes = dict(vocab_size=VOCAB, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
    wide = dict(intermediate_size=128, tie_word_embeddings=kind in ("qwen2", "gemma") if tied is None else tied)
    tie = {} if tied is None else {"tie_word_embeddings": tied}
    if kind in ("opt", "opt-projected"):
        projected = 64 if kind == "opt" else 32
        model = OPTForCausalLM(
            OPTConfig(ffn_dim=1100, max_position_embeddings=64, word_embed_proj_dim=projected, **sizes, **tie)
        )
    elif kind == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=64, n_layer=2, n_head=4, n_positions=64, **tie))
    elif kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(**sizes, **wide))
    elif kind == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(num_key_value_heads=2, **sizes, **wide))
    elif kind == "qwen3":  # heads together wider than the model
        model = Qwen3ForCausalLM(Qwen3Config(num_key_value_heads=2, head_dim=24, **sizes, **wide))
    elif kind == "mistral":  # a window that some tokens of batch_of() are out of
        model = MistralForCausalLM(MistralConfig(num_key_value_heads=2, sliding_window=8, **sizes, **wide))
    elif kind == "neox":
        model = GPTNeoXForCausalLM(GPTNeoXConfig(max_position_embeddings=64, **sizes, **wide))
    elif kind == "gemma":  # one head of keys and values, wider than hidden_size / heads
        model = GemmaForCausalLM(GemmaConfig(num_key_value_heads=1, head_dim=24, **sizes, **wide))
    else:
        raise ValueError(kind)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return model


KINDS = ("opt", "opt-projected", "gpt2", "llama", "qwen2")
ALL_KINDS = (*KINDS, "qwen3", "mistral", "neox", "gemma")


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
