"""Makes OPT models at random initialisation, and batches for them."""

import torch
from harness import MODELS
from torch import Tensor, nn
from transformers import OPTConfig, OPTForCausalLM

LABEL_WORDS = [17, 4]


def make_model(name: str, dtype: torch.dtype, device: torch.device) -> nn.Module:
    layers, width, heads, embedding = MODELS[name]
    config = OPTConfig(
        vocab_size=1000 if name == "tiny" else 50272,
        hidden_size=width,
        num_hidden_layers=layers,
        ffn_dim=4 * width,
        num_attention_heads=heads,
        word_embed_proj_dim=embedding,
        do_layer_norm_before=name != "opt-350m",
        max_position_embeddings=2048,
        dropout=0.0,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return OPTForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def make_batch(model: nn.Module, rows: int, tokens: int) -> dict[str, Tensor]:
    device = model.lm_head.weight.device
    ids = torch.randint(3, model.config.vocab_size, (rows, tokens), device=device)
    return {"input_ids": ids, "labels": torch.arange(rows, device=device) % 2}
