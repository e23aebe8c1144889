"""Models, adapters and tokenizers load, or are refused in one sentence."""

import json
import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from peft import PeftModel
from pseuzo import MeZO
from pseuzo.files import save_model
from pseuzo.models.loading import load_model
from pseuzo.models.modes import tune
from safetensors.torch import save_file
from tiny_models import ALL_KINDS, VOCAB, batch_of, causal_lm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForTokenClassification,
    GPT2Config,
    GPT2Model,
    T5Config,
)
from tuned_models import DEMO, TOKENS, parts, small_tokenizer, trained


def test_load_model():
    for dtype, wanted in (
        ("fp32", torch.float32),
        ("bf16", torch.bfloat16),
        ("fp16", torch.float16),
    ):
        model, tokenizer = load_model(DEMO, dtype=dtype, device="cpu")
        assert model.dtype is wanted and not model.training
    assert tokenizer.padding_side == "left" and tokenizer.pad_token is not None
    assert load_model(str(DEMO), device="cpu")[0].dtype is torch.float32


def folder_of(tmp_path, **changes):
    """Return a folder with the demo's model and other entries in its config."""
    folder = tmp_path / "model"
    shutil.copytree(DEMO, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


def test_padding_defaults_to_the_end_of_text(tmp_path):
    folder = folder_of(tmp_path)
    for file in folder.glob("*token*"):
        file.unlink()
    small_tokenizer(pad_token=None).save_pretrained(folder)
    _, tokenizer = load_model(folder, device="cpu")
    assert tokenizer.pad_token == "</s>" and tokenizer("w0 w3").input_ids == [3, 6]
    small_tokenizer(pad_token=None, eos_token=None, unk_token=None).save_pretrained(folder)
    with pytest.raises(ValueError, match="has no padding token, and none that could serve"):
        load_model(folder, device="cpu")


def test_a_generation_config_is_saved_as_it_was_loaded(tmp_path):
    """Transformers keeps sampling values without do_sample in an unchanged config, and refuses them
    in a changed one."""
    folder = folder_of(tmp_path)
    sampling = {"bos_token_id": 1, "eos_token_id": 2, "temperature": 0.9, "top_p": 0.6}
    (folder / "generation_config.json").write_text(json.dumps(sampling))
    for mode in ("full", "head"):
        model, tokenizer = load_model(folder, device="cpu")
        save_model(tune(model, mode), tokenizer, tmp_path / mode)
        saved = json.loads((tmp_path / mode / "generation_config.json").read_text())
        assert {k: v for k, v in saved.items() if k != "transformers_version"} == sampling


def test_pickled_weights_are_refused_unopened(tmp_path, monkeypatch):
    folder = folder_of(tmp_path)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    monkeypatch.setattr(torch, "load", None)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is a pickle") as error:
        load_model(folder, device="cpu")
    assert "use_safetensors=False" in str(error.value) and "\n" not in str(error.value)


def test_the_command_that_converts_pickled_weights(tmp_path, monkeypatch):
    folder = folder_of(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ValueError) as error:
        load_model(folder, device="cpu")
    command = str(error.value).split('python -c "')[1].split('"')[0]
    monkeypatch.chdir(tmp_path)
    exec(command)
    again, _ = load_model("./model-safetensors", device="cpu")
    assert all(
        torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True)
    )


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("kind", ALL_KINDS)
@pytest.mark.parametrize("mode", ["lora", "prefix", "prompt"])
def test_adapters_are_saved_and_loaded(kind, mode, tmp_path):
    base = causal_lm(kind)
    base.save_pretrained(tmp_path / "base")
    small_tokenizer().save_pretrained(tmp_path / "base")
    model, _ = load_model(tmp_path / "base", device="cpu")
    model = tune(model, mode, prefix_from=TOKENS, prompt_tokens=5, prompt_from=TOKENS, lora_r=3)
    for p in model.parameters():
        if p.requires_grad:
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    model.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert not list((tmp_path / "adapter").glob("*.bin"))
    again, tokenizer = load_model(tmp_path / "adapter", device="cpu")
    assert (
        isinstance(again, PeftModel)
        and tokenizer.padding_side == "left"
        and trained(again) == trained(model)
    )
    want = model.eval()(**batch_of()).logits
    assert torch.equal(again(**batch_of()).logits, want)
    assert not torch.equal(base.eval()(**batch_of()).logits, want)
    forward, head = parts(again)  # its training can continue
    MeZO(again, lr=0.1).step(lambda: head(forward()))
    assert not torch.equal(again(**batch_of()).logits, want)
    places = [p.data_ptr() for p in again.parameters()]
    # This is how the Trainer resumes.
    again.load_adapter(str(tmp_path / "adapter"), "default", is_trainable=True)
    assert (
        torch.equal(again(**batch_of()).logits, want)
        and [p.data_ptr() for p in again.parameters()] == places
    )


def based_on(folder, base):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": base}))


def based_on_each_other(folder):
    other = Path(f"{folder}-2")
    shutil.copytree(folder, other)
    based_on(folder, str(other))
    based_on(other, str(folder))


CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
NO_BASE = "does not say which model the adapter is for"
ITS_OWN_BASE = "and the chain of adapters leads back to this adapter"


@pytest.mark.parametrize("do, sentence", [
    (lambda f: (f / CONFIG).write_text("[]"), NO_BASE),
    (lambda f: (f / CONFIG).write_text("[" * 9999), NO_BASE),
    (lambda f: based_on(f, None), NO_BASE),
    (lambda f: based_on(f, ["a"]), NO_BASE),
    (lambda f: based_on(f, str(f)), f"for the model /.*/adapter, {ITS_OWN_BASE}"),
    (based_on_each_other, f"adapter for the model /.*/adapter-2, {ITS_OWN_BASE}"),
    (lambda f: (f / WEIGHTS).write_bytes(b"no"), "the adapter in .* cannot be loaded"),
    (lambda f: (f / WEIGHTS).unlink(), r"has no weights \(adapter_model.safetensors\)"),
    (lambda f: (f / WEIGHTS).rename(f / "adapter_model.bin"), "is a pickle.* saved anew by peft"),
    (lambda f: save_file({}, f / WEIGHTS), "lacks 16 weights, the first being "),
    (lambda f: shutil.rmtree(f.parent / "base"),
     "adapter is an adapter for the model .*/base, and there is no folder"),
])  # fmt: skip
def test_adapters_that_do_not_load(tmp_path, do, sentence):
    shutil.copytree(DEMO, tmp_path / "base")
    folder = tmp_path / "adapter"
    tune(load_model(tmp_path / "base", device="cpu")[0], "lora").save_pretrained(folder)
    do(folder)
    with pytest.raises(ValueError, match=sentence) as error:
        load_model(folder, device="cpu")
    assert "\n" not in str(error.value)


def configured(folder, **settings):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def damage(folder):
    (folder / "model.safetensors").write_bytes(b"\xff" * 100)


def lose_weights(folder):
    config = GPT2Config(vocab_size=VOCAB, n_embd=64, n_layer=1, n_head=4, tie_word_embeddings=False)
    GPT2Model(config).save_pretrained(folder)


def tags(folder):
    sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    BertForTokenClassification(BertConfig(vocab_size=50, **sizes)).save_pretrained(folder)


def widen_tokenizer(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<{i}>" for i in range(500)])
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("do, sentence", [
    (lambda f: (f / "config.json").unlink(), "has no config.json"),
    (lambda f: (f / "config.json").write_text("{"), "cannot be loaded: .*config"),
    (lambda f: (f / "config.json").write_text("{}"), "cannot be loaded: .*model_type"),
    (lambda f: (f / "config.json").write_text('{"a": ' * 9999), "cannot be loaded: .*recursion"),
    (lambda f: configured(f, vocab_size="x"),
     "cannot be loaded: .*'vocab_size' expected int, got str"),
    (lambda f: configured(f, hidden_size=0), "cannot be loaded: "),
    (lambda f: configured(f, num_attention_heads=0), "cannot be loaded: .*division"),
    (lambda f: configured(f, activation_function="none"), "cannot be loaded: .*none"),
    (lambda f: (f / "model.safetensors").unlink(), r"has no weights \(model.safetensors\)"),
    (damage, "cannot be loaded"),
    (lose_weights, "lacks 1 of the weights of GPT2LMHeadModel, the first being lm_head.weight"),
    (tags, "is no causal language model but a BertForTokenClassification"),
    (lambda f: T5Config().save_pretrained(f), "is no causal language model but a t5"),
    (lambda f: [p.unlink() for p in f.glob("*token*")], "has no tokenizer; save"),
    (widen_tokenizer, "has 2548 tokens, its model only 2048 embeddings"),
], ids=lambda x: x if isinstance(x, str) else x.__name__)  # fmt: skip
def test_folders_that_do_not_load(tmp_path, do, sentence):
    parent = tmp_path / "404, gated, offline"  # words from other errors of the hub's library
    parent.mkdir()
    folder = folder_of(parent)
    do(folder)
    with pytest.raises(ValueError, match=sentence) as error:
        load_model(folder, device="cpu")
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_names_that_do_not_load(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for name in ("./nowhere", "/no/where", "a/b/c", ""):
        with pytest.raises(ValueError, match="there is no folder"):
            load_model(name)
    with pytest.raises(ValueError, match="is a file"):
        load_model(__file__)
    for name in ("nobody/no-such-model", "nowhere"):
        with pytest.raises(ValueError, match=f"{name} is no folder, .* the hub cannot be reached"):
            load_model(name)
    with pytest.raises(ValueError, match="dtype must be one of fp32, fp16, bf16, got 'fp8'"):
        load_model(DEMO, dtype="fp8")
    with pytest.raises(ValueError, match="device 'warp' cannot be used"):
        load_model(DEMO, device="warp")
