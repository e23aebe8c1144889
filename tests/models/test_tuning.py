"""Tuning modes train the right weights, and a prefix starts as its tokens."""

import copy

import pytest
import torch
from pseuzo import MeZO, PseuZO
from pseuzo.models.modes import tune
from pseuzo.models.split import head_parameters
from tiny_models import ALL_KINDS, VOCAB, batch_of, causal_lm
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MptConfig,
    MptForCausalLM,
)
from tuned_models import TOKENS, parts, trained


def with_tokens(batch):
    """Return the batch with TOKENS before each row."""
    before = torch.tensor([TOKENS]).expand(len(batch["input_ids"]), -1)
    return {
        "input_ids": torch.cat([before, batch["input_ids"]], 1),
        "attention_mask": torch.cat([torch.ones_like(before), batch["attention_mask"]], 1),
    }


@torch.no_grad()
@pytest.mark.parametrize("kind", ALL_KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_prefix_is_what_its_tokens_are_to_the_model(kind, dtype):
    model = causal_lm(kind).eval().to(dtype)
    batch = batch_of(length=9)
    want = model(**with_tokens(batch)).logits[:, 5:]
    plain = model(**batch).logits
    prefixed = tune(model, "prefix", prefix_from=TOKENS)
    got = prefixed(**batch, use_cache=False).logits
    there = batch["attention_mask"].bool()
    # Logits are about 1. They pass through two layers, whose products have another shape and so
    # differ by a few roundings each.
    torch.testing.assert_close(got[there], want[there], rtol=0, atol=16 * torch.finfo(dtype).eps)
    assert (got - plain)[there].abs().max() > 64 * torch.finfo(dtype).eps
    assert trained(prefixed) == {"prompt_encoder.default.embedding.weight"}
    assert prefixed.prompt_encoder["default"].embedding.weight.dtype is torch.float32


@torch.no_grad()
@pytest.mark.parametrize("kind", ALL_KINDS)
def test_a_prompt_is_what_its_tokens_are_to_the_model(kind):
    model = causal_lm(kind).eval()
    batch = {k: v.flip(1) for k, v in batch_of(length=9).items()}  # padded on the right
    want = model(**with_tokens(batch)).logits[:, 5:]
    prompted = tune(model, "prompt", prompt_tokens=5, prompt_from=TOKENS)
    assert trained(prompted) == {"prompt_encoder.default.embedding.weight"}
    assert prompted.prompt_encoder["default"].embedding.weight.dtype is torch.float32
    there = batch["attention_mask"].bool()
    got = prompted(**batch).logits[:, 5:]
    torch.testing.assert_close(got[there], want[there], rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["opt-projected", "qwen3"])
@pytest.mark.parametrize("mode", ["prefix", "prompt"])
def test_generation_with_tokens_before_the_text(kind, mode):
    model = causal_lm(kind).eval()
    batch = batch_of(rows=3 if mode == "prefix" else 1, length=7)
    options = dict(max_new_tokens=6, do_sample=False, pad_token_id=1, eos_token_id=2)
    want = model.generate(**with_tokens(batch), **options)[:, 12:]
    model = tune(model, mode, **{f"{mode}_tokens": 5, f"{mode}_from": TOKENS})
    got = model.generate(**batch, **options)[:, 7:]
    assert torch.equal(got, want)


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_what_a_mode_trains(kind):
    layers = {"gpt2": ["c_attn"], "neox": ["query_key_value"]}.get(kind, ["q_proj", "v_proj"])
    names = trained(tune(causal_lm(kind), "lora", lora_r=3))
    assert len(names) == 2 * 2 * len(layers)  # A and B, two layers of the model
    assert all(any(f".{layer}.lora_{ab}." in n for layer in layers for ab in "AB") for n in names)
    model = causal_lm(kind).requires_grad_(False)
    assert trained(tune(model, "full")) == {name for name, _ in model.named_parameters()}


@torch.no_grad()
@pytest.mark.parametrize("kind", ALL_KINDS)
def test_lora_starts_as_the_model_and_scales_as_asked(kind):
    model = causal_lm(kind).eval()
    want = model(**batch_of()).logits
    model = tune(model, "lora", lora_r=3, lora_alpha=7)
    torch.testing.assert_close(model(**batch_of()).logits, want, rtol=0, atol=0)
    name, layer = next((n, m) for n, m in model.named_modules() if hasattr(m, "lora_A"))
    b = layer.lora_B["default"].weight
    b.copy_(torch.randn(b.shape, generator=torch.Generator().manual_seed(1)))
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(2))
    want = layer.base_layer(x) + 7 / 3 * x @ layer.lora_A["default"].weight.T @ b.T
    torch.testing.assert_close(layer(x), want, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("mode", ["lora", "prefix", "prompt"])
def test_random_starts_come_from_the_seed_alone(mode):
    def start(seed):
        return [
            p.detach()
            for p in tune(causal_lm("opt"), mode, seed=seed).parameters()
            if p.requires_grad
        ]

    first = start(4)
    model = causal_lm("opt")
    torch.manual_seed(99)
    before = torch.get_rng_state()
    again = [p for p in tune(model, mode, seed=4).parameters() if p.requires_grad]
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, start(5), strict=True))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", ALL_KINDS)
def test_head_mode(kind, tied, tmp_path, caplog):
    model = causal_lm(kind, tied).eval()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with torch.no_grad():
        want = model(**batch_of()).logits
    tune(model, "head")
    assert ("is now a copy of its own" in caplog.text) == tied
    head = model.get_output_embeddings()
    assert head.weight is not model.get_input_embeddings().weight
    assert (
        {p for p in model.parameters() if p.requires_grad}
        == set(head.parameters())
        == set(head_parameters(model))
    )
    assert not model.config.tie_word_embeddings
    with torch.no_grad():
        assert torch.equal(model(**batch_of()).logits, want)
    forward, loss_of = parts(model)
    opt = MeZO(model, lr=0.03, eps=1e-2)
    losses = [opt.step(lambda: loss_of(forward())) for _ in range(40 if kind == "qwen3" else 2)]
    assert losses[-1] < losses[0] - 0.05 or kind != "qwen3"
    assert not torch.equal(
        head.weight, before.pop("lm_head.weight", model.get_input_embeddings().weight)
    )
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
    model.save_pretrained(tmp_path / "saved")
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert again.get_output_embeddings().weight is not again.get_input_embeddings().weight
    with torch.no_grad():
        got, want = again(**batch_of()).logits, model(**batch_of()).logits
    assert torch.equal(got, want)
    with pytest.raises(RuntimeError, match="used no weight of the model that is trained"):
        # h ends before the head, so only the head's exact gradient can train it.
        PseuZO(model).step(forward, loss_of)


def test_other_models():
    """If peft cannot find the attention heads in a config, the activations show them. A model
    without attention heads is refused."""
    sizes = dict(vocab_size=VOCAB, d_model=64, n_layers=2, n_heads=4)
    with pytest.raises(
        ValueError, match=r"MambaForCausalLM cannot be given a prefix \(it keeps no past"
    ):
        tune(
            MambaForCausalLM(MambaConfig(vocab_size=VOCAB, hidden_size=64, num_hidden_layers=2)),
            "prefix",
        )
    model = MptForCausalLM(MptConfig(**sizes)).eval()
    with pytest.raises(ValueError, match="give lora_targets, some of"):
        tune(copy.deepcopy(model), "lora", lora_targets=["q_proj"])
    assert len(trained(tune(copy.deepcopy(model), "lora", lora_targets=["up_proj"]))) == 4
    assert trained(tune(model, "lora")) and all("Wqkv" in name for name in trained(model))


def test_a_prefix_or_prompt_that_does_not_work_is_refused():
    class Swaps(type(causal_lm("llama"))):
        def forward(self, *args, past_key_values=None, **kwargs):
            for layer in past_key_values.layers if past_key_values is not None else ():
                layer.keys = layer.keys.flip(1)  # this reorders the heads
            return super().forward(*args, past_key_values=past_key_values, **kwargs)

    class Fails(type(causal_lm("llama"))):
        def forward(self, *args, past_key_values=None, **kwargs):
            if past_key_values is not None:
                raise NotImplementedError("no past here\nat all")
            return super().forward(*args, **kwargs)

    class Shifts(type(causal_lm("llama"))):
        def forward(self, input_ids=None, inputs_embeds=None, **kwargs):
            if inputs_embeds is not None:
                inputs_embeds = inputs_embeds.roll(1, 1)
            return super().forward(input_ids=input_ids, inputs_embeds=inputs_embeds, **kwargs)

    for mode, kind, sentence in (
        ("prompt", Shifts, r"Shifts cannot be given a prompt \(it does not see embeddings as"),
        ("prefix", Swaps, "does not see past keys and values as the tokens they were made of"),
        ("prefix", Fails, r"Fails cannot be given a prefix \(no past here\); use mode 'lora'"),
    ):
        model = causal_lm("llama")
        model.__class__ = kind
        with pytest.raises(ValueError, match=sentence):
            tune(model, mode)


@pytest.mark.parametrize("mode, options, sentence", [
    ("lroa", {}, "mode must be one of full, lora, prefix, prompt, head, scales, got 'lroa'"),
    ("lora", {"lora_r": 0}, "lora_r must be a whole number from 1"),
    ("lora", {"lora_targets": ["nope"]}, "has no layers named nope; give lora_targets, some of "),
    ("prompt", {"prompt_tokens": 0}, "prompt_tokens must be a whole number from 1, got 0"),
    ("prompt", {"prompt_from": [1, 2]}, "prompt_from must be 10 token ids below 1100"),
    ("prefix", {"prefix_tokens": 0}, "prefix_tokens must be a whole number from 1, got 0"),
    ("prefix", {"prefix_from": [1, 2]}, "prefix_from must be 5 token ids below 1100"),
    ("prefix", {"prefix_from": [1, 2, 3, 4, VOCAB]}, "prefix_from must be 5 token ids below 1100"),
])  # fmt: skip
def test_bad_arguments(mode, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        tune(causal_lm("opt"), mode, **options)


def test_one_adapter_a_model():
    with pytest.raises(ValueError, match="has an adapter already"):
        tune(tune(causal_lm("opt"), "lora"), "full")


def test_head_mode_needs_a_linear_head():
    model = causal_lm("opt")
    model.lm_head = nn.Identity()
    with pytest.raises(ValueError, match="has no Linear output head"):
        tune(model, "head")
