"""Makes small models that the tests share."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
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
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCAB = 1100


def causal_lm(kind: str, tied: bool | None = None) -> nn.Module:
    """Return a random causal LM with non-zero biases, whose weights are smaller and larger than
    those that a perturbed pass copies whole.

    tied: whether the output head is the embedding's weight; None keeps the default of the kind.
    """
    torch.manual_seed(0)
    sizes = dict(vocab_size=VOCAB, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
    wide = dict(
        intermediate_size=128,
        tie_word_embeddings=kind in ("qwen2", "gemma") if tied is None else tied,
    )
    tie = {} if tied is None else {"tie_word_embeddings": tied}
    if kind in ("opt", "opt-projected"):
        projected = 64 if kind == "opt" else 32
        model = OPTForCausalLM(
            OPTConfig(
                ffn_dim=1100,
                max_position_embeddings=64,
                word_embed_proj_dim=projected,
                **sizes,
                **tie,
            )
        )
    elif kind == "gpt2":
        model = GPT2LMHeadModel(
            GPT2Config(vocab_size=VOCAB, n_embd=64, n_layer=2, n_head=4, n_positions=64, **tie)
        )
    elif kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(**sizes, **wide))
    elif kind == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(num_key_value_heads=2, **sizes, **wide))
    elif kind == "qwen3":  # all heads together are wider than the model
        model = Qwen3ForCausalLM(Qwen3Config(num_key_value_heads=2, head_dim=24, **sizes, **wide))
    elif kind == "mistral":  # some tokens of batch_of() are outside its window
        model = MistralForCausalLM(
            MistralConfig(num_key_value_heads=2, sliding_window=8, **sizes, **wide)
        )
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
    """Return left-padded prompts of different lengths."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.ones(rows, length, dtype=torch.long)
    for row in range(1, rows):
        mask[row, : row % 4] = 0
    return {
        "input_ids": torch.randint(3, VOCAB, (rows, length), generator=g),
        "attention_mask": mask,
    }


# These are the sizes of tiny models, by the names that configs use for them. Factors and caps of
# logits have values that make a difference.
TINY = {
    32: "hidden_size n_embd d_model dim emb_dim embedding_dim embedding_size "
        "word_embed_proj_dim lru_width",
    64: "intermediate_size ffn_dim n_inner d_inner dff dim_ff encoder_ffn_dim decoder_ffn_dim "
        "ffn_hidden_size feed_forward_size mamba_d_ssm max_position_embeddings n_positions "
        "n_ctx max_seq_len index_topk",
    2: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers "
       "num_decoder_layers num_encoder_layers num_key_value_heads num_experts_per_tok "
       "linear_num_key_heads index_n_heads mamba_expand eos_token_id type_vocab_size",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads "
       "decoder_attention_heads num_decoder_attention_heads num_encoder_attention_heads "
       "num_experts num_local_experts n_routed_experts moe_num_experts time_step_rank "
       "mamba_n_heads mamba_num_heads mamba_dt_rank linear_num_value_heads rotary_dim",
    8: "head_dim attention_head_dim dim_head d_kv qk_rope_head_dim qk_nope_head_dim v_head_dim "
       "mamba_d_state state_size ssm_state_size sliding_window attention_window_size "
       "window_size linear_key_head_dim linear_value_head_dim index_head_dim",
    16: "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size "
        "q_lora_rank kv_lora_rank qk_head_dim mamba_d_head mamba_head_dim "
        "expert_ffn_hidden_size chunk_size router_hidden_size",
    1: "n_group topk_group mamba_n_groups n_groups mamba_ngroups n_mamba_heads pad_token_id",
    0: "bos_token_id",
    3.0: "logits_scaling",
    2.5: "final_logit_softcapping logits_soft_cap output_logit_soft_cap",
    0.7: "lm_head_multiplier logit_scale logits_mup_width_multiplier",
}  # fmt: skip
TINY = {name: size for size, names in TINY.items() for name in names.split()} | {"is_decoder": True}
_LINEAR, _FULL, _SLIDING = "linear_attention", "full_attention", "sliding_attention"
_LATENT = dict(head_dim=None, num_key_value_heads=4)
_OF_LAYERS = dict(
    vocab_size_per_layer_input=128, hidden_size_per_layer_input=8, num_kv_shared_layers=0
)
_SMALL_TOWER = dict(hidden_size=32, intermediate_size=32, num_attention_heads=2)
_BY_TYPES: list[tuple[str, dict[str, Any]]] = [
    ("axk1 axk2 deepseek_v3 deepseek_v32 glm4_moe_lite glm_moe_dsa minicpm3 youtu", _LATENT),
    (
        "qwen3_next granitemoehybrid qwen3_5_text qwen3_5_moe_text qwen4_exp_text",
        dict(layer_types=[_LINEAR, _FULL]),
    ),
    ("lfm2_moe lfm3", dict(layer_types=["conv", _FULL])),
    ("hunyuan_v1_dense hunyuan_v1_moe ministral", dict(head_dim=8)),
    ("inkling_text inkling2_text", dict(unpadded_vocab_size=120)),
    ("big_bird bigbird_pegasus", dict(attention_type="original_full")),
]
OF_A_TYPE = {name: sizes for names, sizes in _BY_TYPES for name in names.split()} | {
    "deepseek_v2": _LATENT | dict(num_experts_per_tok=2),
    "longcat_flash": dict(head_dim=8, num_key_value_heads=4),
    "bailing_hybrid": _LATENT | dict(layer_types=[_LINEAR, _FULL]),
    "kimi_linear": _LATENT
    | dict(
        layer_types=[_LINEAR, _FULL], linear_head_dim=8, linear_num_heads=2, num_experts_per_token=2
    ),
    "bamba": dict(attn_layer_indices=[1]),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1),
    "recurrent_gemma": dict(block_types=["recurrent", "attention"]),
    "zamba": dict(
        layers_block_type=[_LINEAR, "hybrid"] * 2,
        num_hidden_layers=4,
        attention_hidden_size=64,
        attention_head_dim=16,
    ),
    "zamba2": dict(layers_block_type=[_LINEAR, "hybrid"]),
    "mamba2": dict(head_dim=16),
    "xlstm": dict(hidden_size=64, embedding_dim=64, qk_dim_factor=1.0),
    "zaya": dict(num_experts_per_tok=1),
    "dots1": dict(
        layer_types=[_SLIDING, _FULL], n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2
    ),
    "ernie4_5_moe": dict(moe_k=2),
    "dbrx": dict(
        attn_config=dict(kv_n_heads=2, rope_theta=1e4, clip_qkv=8.0),
        ffn_config=dict(hidden_size=32, ffn_hidden_size=32, moe_num_experts=4, moe_top_k=2),
    ),
    "cohere_compass_text": dict(
        layer_types=[_SLIDING, _FULL],
        rope_parameters={
            kind: {"rope_type": "default", "rope_theta": 1e4} for kind in (_SLIDING, _FULL)
        },
    ),
    "gemma3n_text": _OF_LAYERS
    | dict(
        layer_types=[_SLIDING, _FULL],
        laurel_rank=8,
        intermediate_size=64,
        activation_sparsity_pattern=[0.0, 0.0],
    ),
    "gemma4_text": _OF_LAYERS | dict(layer_types=[_SLIDING, _FULL]),
    "gpt_neo": dict(attention_types=[[["global", "local"], 1]]),
    "reformer": dict(
        axial_pos_shape=(8, 8),
        axial_pos_embds_dim=(16, 16),
        attn_layers=["local", "lsh"],
        lsh_attn_chunk_length=8,
        local_attn_chunk_length=8,
    ),
    "roc_bert": dict(
        pronunciation_vocab_size=128,
        shape_vocab_size=128,
        pronunciation_embed_dim=32,
        shape_embed_dim=32,
    ),
    "xmod": dict(default_language="en_XX"),
    "phi4_multimodal": dict(
        vision_config=_SMALL_TOWER | dict(num_hidden_layers=1),
        audio_config=_SMALL_TOWER
        | dict(
            num_blocks=1,
            ext_pw_out_channel=32,
            depthwise_separable_out_channel=32,
            nemo_conv_channels=32,
        ),
    ),
}


def tiny_config(model_type: str, vocab: int = 128, **more: Any) -> Any:
    """Return a config of two layers of width 32, of any type that Transformers has."""
    known = CONFIG_MAPPING[model_type]

    def sizes(of: dict[str, Any]) -> dict[str, Any]:
        may_be_none = {
            "is_decoder",
            "num_key_value_heads",
            *(k for k in TINY if k.endswith(("token_id", "cap", "scale"))),
        }
        changed = {
            k: TINY[k] for k, v in of.items() if k in TINY and (v is not None or k in may_be_none)
        }
        return changed | ({"vocab_size": vocab} if "vocab_size" in of else {})

    of = known().to_dict()
    parts = {
        name: of[name]
        for name in getattr(known, "sub_configs", {})
        if isinstance(of.get(name), dict)
    }
    parts = {
        name: sizes(part) | OF_A_TYPE.get(part.get("model_type"), {})
        for name, part in parts.items()
    }
    changes = sizes(of) | parts | OF_A_TYPE.get(model_type, {}) | more
    return known(**{k: v for k, v in changes.items() if v is not None})


def tiny(model_type: str, vocab: int = 128, **more: Any) -> nn.Module:
    """Return a random causal LM of any type that Transformers has, with two layers of width 32, in
    eval mode."""
    config = tiny_config(model_type, vocab, **more)
    with torch.device("meta"):
        count = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if count > 3e6:
        raise ValueError(f"{count} weights are not tiny")
    return _random(AutoModelForCausalLM, config)


def tiny_encoder(model_type: str, kind: str, vocab: int = 128, **more: Any) -> nn.Module:
    """Return a tiny masked language model, or a tiny classifier with num_labels classes."""
    config = tiny_config(model_type, vocab, is_decoder=False, **more)
    masked = kind == "masked"
    return _random(AutoModelForMaskedLM if masked else AutoModelForSequenceClassification, config)


def _random(auto: Any, config: Any) -> nn.Module:
    torch.manual_seed(0)
    model = auto.from_config(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model.eval()


_QV = dict(target_modules=["q_proj", "v_proj"])
_QO = dict(r=4, target_modules=["q_proj", "o_proj"])
# These settings fit an adapter of peft to a tiny Llama. Other adapters get _QV.
OF_AN_ADAPTER: dict[str, dict[str, Any]] = {
    "ADALORA": _QV | dict(init_r=4, target_r=2, total_step=100),
    "ADAPTION_PROMPT": dict(adapter_len=3, adapter_layers=2),
    "BOFT": _QV | dict(boft_block_size=8),
    "C3A": _QV | dict(block_size=8),
    "CARTRIDGE": dict(num_virtual_tokens=3),
    "CPT": dict(cpt_token_ids=[3, 4, 5], cpt_mask=[1, 1, 1], cpt_tokens_type_mask=[1, 2, 4]),
    "FOURIERFT": _QV | dict(n_frequency=20),
    "IA3": dict(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "LN_TUNING": dict(target_modules=["input_layernorm"]),
    "MISS": _QV | dict(r=4),
    "MULTITASK_PROMPT_TUNING": dict(num_virtual_tokens=3, num_tasks=2),
    "OFT": _QV | dict(oft_block_size=8),
    "POLY": _QV | dict(r=4, n_tasks=2, n_skills=2, n_splits=1),
    "PREFIX_TUNING": dict(num_virtual_tokens=3),
    "PROMPT_TUNING": dict(num_virtual_tokens=3),
    "PSOFT": _QV | dict(r=4),
    "P_TUNING": dict(num_virtual_tokens=3, encoder_hidden_size=16),
    "RANDLORA": _QO,
    "ROAD": _QV | dict(group_size=8),
    "SHADOW": {},
    "SHIRA": _QV | dict(r=2),
    "TRAINABLE_TOKENS": dict(token_indices=list(range(3, 60)), target_modules=["embed_tokens"]),
    "VBLORA": _QV | dict(r=4, num_vectors=16, vector_length=8, topk=2),
    "VERA": _QO,
    "WAVEFT": _QV | dict(n_frequency=20),
}  # fmt: skip


def adapted(base: nn.Module, peft_type: str, **more: Any) -> nn.Module:
    """Return base with an adapter of peft that changes its outputs, in eval mode."""
    from peft import get_peft_model
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    torch.manual_seed(1)
    settings = OF_AN_ADAPTER.get(peft_type, _QV) | more
    config = PEFT_TYPE_TO_CONFIG_MAPPING[peft_type](task_type="CAUSAL_LM", **settings)
    model = get_peft_model(base, config)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn_like(p))
    return model.eval()


class Tied(nn.Module):
    """Uses the weight of its large embedding as output head without calling the embedding. It may
    keep a view of another weight."""

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


def encoder_tokenizer(**special: Any) -> Any:
    """Return a tokenizer of the words w0 to w59, one token each, with [CLS] and [SEP] around a text
    as in BERT."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    names = {"pad": "[PAD]", "cls": "[CLS]", "sep": "[SEP]", "unk": "[UNK]", "mask": "[MASK]"}
    vocabulary = [*names.values(), *(f"w{i}" for i in range(60))]
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocabulary)}, "[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    named = {f"{kind}_token": name for kind, name in names.items()} | special
    return PreTrainedTokenizerFast(tokenizer_object=words, **named)
