"""Adapters, prefixes and heads are trained on quantised base models, and the codes of the models'
weights never change.

A test is skipped if the library that quantises its model is not installed.
"""

import contextlib
import functools
import io

import pytest
import torch
from pseuzo import CausalLMObjective, PseuZOTrainer, PseuZOTrainingArguments, offload
from pseuzo.files import save_model
from pseuzo.machine import parts_of
from pseuzo.models.loading import keep_as_loaded, load_model, quantised
from pseuzo.models.modes import tune
from pseuzo.train.journal_file import fingerprint, read_journal
from pseuzo.train.replay import replay
from tiny_models import batch_of, causal_lm
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

pytestmark = pytest.mark.slow
KINDS = ("bitsandbytes 8-bit", "bitsandbytes 4-bit", "torchao", "torchao, activations too")


def config_of(kind: str, head: bool = False):
    """Return the config of a kind. head: quantise the output head as well, which is left out by
    default."""
    pytest.importorskip(kind.split()[0].strip(","))
    if kind.startswith("bitsandbytes"):
        skip = {"llm_int8_skip_modules": []} if head else {}
        if "8" in kind:
            return BitsAndBytesConfig(load_in_8bit=True, **skip)
        return BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, **skip
        )
    from torchao import quantization
    from transformers import TorchAoConfig

    how = (
        "Int8DynamicActivationInt8WeightConfig" if "activations" in kind else "Int8WeightOnlyConfig"
    )
    return TorchAoConfig(getattr(quantization, how)(), include_input_output_embeddings=head)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return folder(kind), which quantises a tiny Llama and saves it with Transformers."""
    root = tmp_path_factory.mktemp("models")
    causal_lm("llama").save_pretrained(root / "base")

    @functools.cache
    def saved(kind: str):
        model = AutoModelForCausalLM.from_pretrained(
            root / "base", quantization_config=config_of(kind)
        )
        model.save_pretrained(root / kind)
        return root / kind

    return saved


def load(path) -> torch.nn.Module:
    return load_model(path, device="cpu", need_tokenizer=False)[0]


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(**batch_of()).logits


def codes(model) -> str:
    return fingerprint({name: p for name, p in model.named_parameters() if not p.requires_grad})


def rows() -> list[dict]:
    batch = batch_of(rows=8)
    return [
        {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]


def trainer(model, folder, method="mezo", **more) -> PseuZOTrainer:
    args = PseuZOTrainingArguments(
        str(folder),
        method=method,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        max_steps=4,
        learning_rate=1e-3,
        save_strategy="steps",
        save_steps=2,
        **more,
    )
    return PseuZOTrainer(model, args, train_dataset=rows(), eval_dataset=rows())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "mode, method", [("lora", "pseuzo"), ("lora", "mezo"), ("prefix", "mezo"), ("head", "mezo")]
)
def test_a_quantised_base_is_tuned_saved_replayed_and_resumed_to_the_bit(
    tmp_path, folder, kind, mode, method
):
    base = folder(kind)
    model = tune(load(base), mode)
    start, names = codes(model), [n for n, p in model.named_parameters() if p.requires_grad]
    before = {n: p.detach().clone() for n, p in model.named_parameters() if n in names}
    save_model(model, None, tmp_path / "start")
    trainer(model, tmp_path / "run", method, journal=str(tmp_path / "run.pzj")).train()
    assert codes(model) == start and all(
        not torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before
    )
    want = logits(model)
    save_model(model, None, tmp_path / "saved")
    assert torch.equal(logits(load(tmp_path / "saved")), want)
    assert read_journal(tmp_path / "run.pzj")[0]["dtype"] == "float32"
    again = load(tmp_path / "start")
    assert replay(tmp_path / "run.pzj", again) == 4
    assert torch.equal(logits(again), want)
    resumed = tune(load(base), mode)
    logits(resumed)  # some weights of bitsandbytes cannot be loaded again after that
    last = trainer(
        resumed,
        tmp_path / "run",
        method,
        load_best_model_at_end=True,
        eval_strategy="steps",
        eval_steps=2,
    )
    last.train(str(tmp_path / "run" / "checkpoint-2"))
    assert torch.equal(logits(resumed), want)
    last.state.best_model_checkpoint = str(tmp_path / "run" / "checkpoint-2")
    last._load_best_model()
    assert not torch.equal(logits(resumed), want)
    last._load_from_checkpoint(str(tmp_path / "run" / "checkpoint-4"))
    assert torch.equal(logits(resumed), want)


@pytest.mark.parametrize("kind", KINDS)
def test_what_steps_cannot_change_is_refused(tmp_path, folder, kind):
    model = load(folder(kind))
    assert len(quantised(model)) == 14 and not any("norm" in name for name in quantised(model))
    with pytest.raises(
        ValueError,
        match=r"14 weights of LlamaForCausalLM are quantised, model\.layers\.0.* use mode lora",
    ):
        tune(model, "full")
    with pytest.raises(ValueError, match=r"14 weights .* are quantised by another library"):
        tune(model, "scales")
    with pytest.raises(ValueError, match="offload: the model is quantised, so its weights cannot"):
        offload(tune(load(folder(kind)), "lora"), "cpu")
    with pytest.raises(ValueError, match="purely quantized models"):  # from the stock Trainer
        trainer(model, tmp_path)
    if "activations" in kind:
        with pytest.raises(ValueError, match="method fo-adam: no gradient reaches the weights"):
            trainer(tune(model, "lora"), tmp_path, "fo-adam").train()
    else:
        trainer(tune(model, "lora"), tmp_path, "fo-adam").train()


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_head_gives_label_words_and_is_not_trained(tmp_path, folder, kind):
    model = AutoModelForCausalLM.from_pretrained(
        folder(kind).parent / "base", quantization_config=config_of(kind, head=True)
    ).eval()
    assert "lm_head.weight" in quantised(model)
    keep_as_loaded(model)
    batch = {**batch_of(length=12)} | {"labels": torch.tensor([0, 1, 1, 0])}
    batch.pop("attention_mask")
    forward, head = CausalLMObjective(model, [17, 4])(batch)
    with torch.no_grad():
        want = F.cross_entropy(
            model(batch["input_ids"]).logits[:, -1, [17, 4]].float(), batch["labels"]
        )
        assert float(head(forward())) == pytest.approx(float(want), rel=1e-5)
    with pytest.raises(ValueError, match="the output head of LlamaForCausalLM is quantised"):
        tune(model, "head")


def test_a_model_is_as_it_was_loaded_whatever_was_done_since(folder):
    """Some processors' forwards of 4-bit weights would round their scales, and a save would keep
    them rounded."""
    loaded = load(folder("bitsandbytes 4-bit"))
    want, state = logits(loaded), {name: x.clone() for name, x in loaded.state_dict().items()}
    assert torch.equal(logits(loaded), want)
    model = AutoModelForCausalLM.from_pretrained(folder("bitsandbytes 4-bit"))
    model(**batch_of())
    keep_as_loaded(model)  # after that forward, its scales may be rounded, but no more than once
    first = logits(model)
    model.state_dict()
    assert torch.equal(logits(model), first)
    assert fingerprint(loaded.state_dict()) == fingerprint(state)


def test_parts_of_a_quantised_weight(folder):
    weight = load(folder("torchao")).model.layers[0].mlp.up_proj.weight
    parts = parts_of(weight)
    assert {p.dtype for p in parts} == {torch.int8, torch.float32} and not any(
        hasattr(p, "qdata") for p in parts
    )
    assert parts_of(torch.ones(3))[0].tolist() == [1, 1, 1]


def write_gguf(model, path) -> None:
    """Write a GGUF file, with the linear layers in blocks of 8-bit codes."""
    gguf = pytest.importorskip("gguf")
    config, q8 = model.config, gguf.GGMLQuantizationType.Q8_0
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    known = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "model.layers": "blk",
    }
    for name, p in model.state_dict().items():
        block = "proj" in name
        for theirs, ours in known.items():
            name = name.replace(theirs, ours)
        x = p.numpy()
        writer.add_tensor(
            name, gguf.quants.quantize(x, q8) if block else x, raw_dtype=q8 if block else None
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_weights_of_a_gguf_file_are_numbers_again_and_take_every_mode(tmp_path, monkeypatch):
    source = causal_lm("llama").eval()
    write_gguf(source, tmp_path / "tiny.gguf")
    monkeypatch.chdir(tmp_path)
    for mode in ("full", "lora", "prefix", "head"):
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path, gguf_file="tiny.gguf", dtype=torch.float32
        ).eval()
        assert not quantised(model)
        # 8-bit codes round each weight by up to half of 1/127 of the largest in its block.
        assert (logits(model) - logits(source)).abs().max() < 0.05 * logits(source).abs().max()
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        model = tune(model, mode)
        trainer(model, tmp_path / mode).train()
        assert all(
            not torch.equal(p, before.get(n, p + 1))
            for n, p in model.named_parameters()
            if p.requires_grad
        )
    for name in (tmp_path, tmp_path / "tiny.gguf"):
        with pytest.raises(
            ValueError, match=r"tiny\.gguf is a GGUF file; dequantise its weights: python"
        ) as error:
            load(name)
    command = str(error.value).split('python -c "')[1].split('"')[0]
    monkeypatch.setattr(
        "transformers.AutoTokenizer.from_pretrained",
        lambda *args, **kwargs: causal_lm("llama").config,
    )
    with contextlib.redirect_stderr(io.StringIO()):
        exec(command)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="tiny.gguf", dtype=torch.float32
    )
    assert torch.equal(
        logits(AutoModelForCausalLM.from_pretrained("tiny-safetensors")), logits(model)
    )
