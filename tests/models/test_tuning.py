"""Modes of tuning: which weights they train, that a prefix is what its tokens were, and that steps see exact noise."""

import copy
import json
import shutil
from importlib import resources
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
import yaml
from helpers import perturbed_copy
from peft import PeftModel
from pseuzo import CausalLMObjective, MeZO, PseuZO, perturbed
from pseuzo.files import save_model
from pseuzo.models.loading import load_model
from pseuzo.models.modes import MODES, tune
from pseuzo.models.split import head_parameters
from pseuzo.optim.seeds import step_seed
from safetensors.torch import save_file
from tiny_models import ALL_KINDS, VOCAB, batch_of, causal_lm
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2Model,
    MambaConfig,
    MambaForCausalLM,
    MptConfig,
    MptForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
)

from pseuzo_kernels import reference

DEMO = Path(str(resources.files("pseuzo.demo") / "assets" / "model"))
EXAMPLES = Path(__file__).parents[2] / "examples"
OPTIONS = [17, 4, 900]
LABELS = torch.tensor([0, 2, 1, 2])
TOKENS = [5, 17, 900, 44, 1021]


def tuned(kind, mode, tied=None, **options):
    """A tuned model whose adapters are past their start, at which half of LoRA's weights do nothing."""
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


@torch.no_grad()
@pytest.mark.parametrize("kind", ALL_KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_prefix_is_what_its_tokens_are_to_the_model(kind, dtype):
    model = causal_lm(kind).eval().to(dtype)
    batch = batch_of(length=9)
    before = torch.tensor([TOKENS]).expand(4, -1)
    ids = torch.cat([before, batch["input_ids"]], 1)
    mask = torch.cat([torch.ones_like(before), batch["attention_mask"]], 1)
    want = model(input_ids=ids, attention_mask=mask).logits[:, 5:]
    plain = model(**batch).logits
    prefixed = tune(model, "prefix", prefix_from=TOKENS)
    got = prefixed(**batch, use_cache=False).logits
    there = batch["attention_mask"].bool()
    # logits about 1, through two layers whose products are of another shape: a few roundings each
    torch.testing.assert_close(got[there], want[there], rtol=0, atol=16 * torch.finfo(dtype).eps)
    assert (got - plain)[there].abs().max() > 64 * torch.finfo(dtype).eps
    assert trained(prefixed) == {"prompt_encoder.default.embedding.weight"}
    assert prefixed.prompt_encoder["default"].embedding.weight.dtype is torch.float32


@pytest.mark.parametrize("kind", ["opt-projected", "qwen3"])
def test_generation_with_a_prefix(kind):
    model = causal_lm(kind).eval()
    batch = batch_of(rows=3, length=7)
    before = torch.tensor([TOKENS]).expand(3, -1)
    ids = torch.cat([before, batch["input_ids"]], 1)
    mask = torch.cat([torch.ones_like(before), batch["attention_mask"]], 1)
    options = dict(max_new_tokens=6, do_sample=False, pad_token_id=1, eos_token_id=2)
    want = model.generate(input_ids=ids, attention_mask=mask, **options)[:, 12:]
    got = tune(model, "prefix", prefix_from=TOKENS).generate(**batch, **options)[:, 7:]
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


@pytest.mark.parametrize("mode", ["lora", "prefix"])
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


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("kind", ALL_KINDS)
@pytest.mark.parametrize("mode", MODES)
def test_a_perturbed_pass_is_one_with_perturbed_weights(kind, mode):
    model = tuned(kind, mode)
    before = [p.clone() for p in model.parameters()]
    others = {sign: perturbed_copy(model, 7, sign * 0.1) for sign in (1, -1)}
    for options in (OPTIONS, None):
        forward, head = parts(model, options)
        clean = head(forward())
        for sign in (1, -1, 1):  # under the watch, and without it
            want, want_head = parts(others[sign], options)
            with perturbed(model, 7, 0.1, sign=sign):
                o = forward()
                loss = head(o)
            assert torch.equal(o, want()) and torch.equal(loss, want_head(o))
            assert loss != clean
    assert all(torch.equal(p, was) for p, was in zip(model.parameters(), before, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("mode", ["lora", "prefix"])
@pytest.mark.parametrize(
    "kind", [kind for kind in ALL_KINDS if kind != "mistral"]
)  # its window counts padding, too
def test_padding_does_not_matter(kind, mode):
    model = tuned(kind, mode)
    batch = batch_of() | {"labels": LABELS}
    o = CausalLMObjective(model, OPTIONS)(batch)[0]()
    for row in range(1, 4):
        alone = {
            k: v[row : row + 1, row:] if v.dim() > 1 else v[row : row + 1] for k, v in batch.items()
        }
        assert alone["attention_mask"].all()
        # normed states up to 4, from products of another shape
        torch.testing.assert_close(
            CausalLMObjective(model, OPTIONS)(alone)[0]()[0], o[row], rtol=0, atol=4e-6
        )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["opt-projected", "gpt2", "qwen3", "neox"])
@pytest.mark.parametrize("mode", ["lora", "prefix"])
def test_steps_are_the_formula_and_keep_to_their_weights(kind, mode):
    lr, eps = 0.05, 0.1
    for make in (MeZO, PseuZO):
        model = tuned(kind, mode)
        want = {n: p.detach().clone() for n, p in model.named_parameters()}
        forward, head = parts(model)
        opt = make(model, lr=lr, eps=eps, seed=11)
        loss = (
            opt.step(forward, head, LABELS)
            if make is PseuZO
            else opt.step(lambda f=forward, h=head: h(f()))
        )
        seed = step_seed(11, 0)
        with torch.no_grad():
            fresh = tuned(kind, mode)
            (f, h), (up, h_up), (down, h_down) = (
                parts(m)
                for m in (
                    fresh,
                    perturbed_copy(fresh, seed, eps),
                    perturbed_copy(fresh, seed, -eps),
                )
            )
            o0, o1 = f(), up()
            g = (h_up(o1) - h_down(down())) / (2 * eps)
            want_loss = (h_up(o1) + h_down(down())) / 2
        if make is PseuZO:
            o = o0.clone().requires_grad_()
            (e,) = torch.autograd.grad(h(o), o)
            g, want_loss = ((o1 - o0) * e).sum() / eps, h(o0)
        torch.testing.assert_close(
            loss, want_loss.detach().reshape(loss.shape), rtol=1e-6, atol=1e-6
        )
        for i, (name, p) in enumerate(model.named_parameters()):
            if not p.requires_grad:
                assert torch.equal(p, want[name]), f"{name} is not of the mode"
                continue
            step = lr * g * reference.noise(p.shape, seed, i)
            # g is known to a few roundings of losses about 1, over eps; |z| < 6
            torch.testing.assert_close(p, want[name] - step, rtol=0, atol=lr * 6 * 4e-6 / eps)
            assert step.abs().max() > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("make, kind, mode, lr", [
    (MeZO, "opt", "lora", 0.03), (PseuZO, "opt", "lora", 3e-3), (MeZO, "neox", "lora", 0.01),
    (MeZO, "opt", "prefix", 10.0), (PseuZO, "gpt2", "prefix", 1.0), (PseuZO, "qwen3", "prefix", 0.1),
])  # fmt: skip
def test_training_lowers_the_loss(make, kind, mode, lr):
    model = tuned(kind, mode)
    forward, head = parts(model)
    opt = make(model, lr=lr, eps=1e-2, seed=1)
    losses = []
    for _ in range(60):
        losses.append(
            opt.step(forward, head, LABELS) if make is PseuZO else opt.step(lambda: head(forward()))
        )
    assert opt.skipped_steps == 0
    assert losses[-1] < losses[0] - 0.1, (losses[0], losses[-1])


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
        PseuZO(model).step(
            forward, loss_of
        )  # h ends before the head: only its exact gradient can train it


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_head_parameters(kind):
    for mode in ("full", "lora", "prefix"):
        assert head_parameters(tune(causal_lm(kind, True), mode)) == []
        model = tune(causal_lm(kind, False), mode)
        assert head_parameters(model) == [model.get_output_embeddings().weight]


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("kind", ALL_KINDS)
@pytest.mark.parametrize("mode", ["lora", "prefix"])
def test_adapters_are_saved_and_loaded(kind, mode, tmp_path):
    base = causal_lm(kind)
    base.save_pretrained(tmp_path / "base")
    small_tokenizer().save_pretrained(tmp_path / "base")
    model, _ = load_model(tmp_path / "base", device="cpu")
    model = tune(model, mode, prefix_from=TOKENS, lora_r=3)
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
    forward, head = parts(again)  # it can be trained on
    MeZO(again, lr=0.1).step(lambda: head(forward()))
    assert not torch.equal(again(**batch_of()).logits, want)
    places = [p.data_ptr() for p in again.parameters()]
    again.load_adapter(
        str(tmp_path / "adapter"), "default", is_trainable=True
    )  # as the Trainer resumes
    assert (
        torch.equal(again(**batch_of()).logits, want)
        and [p.data_ptr() for p in again.parameters()] == places
    )


@torch.no_grad()
@pytest.mark.parametrize("mode", ["lora", "prefix"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_adapters_of_16_bit_models(mode, dtype):
    """They are fp32, and what they do to a 16-bit model is exact too."""
    model = tune(causal_lm("llama").to(dtype), mode).eval()
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    forward, _ = parts(model)
    for _ in range(3):
        with perturbed(model, 2, 0.3):
            o = forward()
        assert o.dtype is dtype and torch.equal(o, parts(perturbed_copy(model, 2, 0.3))[0]())
    assert not torch.equal(o, forward())


def test_other_models():
    """Attention heads that peft cannot read off a config are read off the activations; what has none is refused."""
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


def test_a_prefix_that_does_not_work_is_refused():
    class Swaps(type(causal_lm("llama"))):
        def forward(self, *args, past_key_values=None, **kwargs):
            for layer in past_key_values.layers if past_key_values is not None else ():
                layer.keys = layer.keys.flip(1)  # the heads
            return super().forward(*args, past_key_values=past_key_values, **kwargs)

    class Fails(type(causal_lm("llama"))):
        def forward(self, *args, past_key_values=None, **kwargs):
            if past_key_values is not None:
                raise NotImplementedError("no past here\nat all")
            return super().forward(*args, **kwargs)

    for kind, sentence in ((Swaps, "does not see past keys and values as the tokens they were made of"),
                           (Fails, r"Fails cannot be given a prefix \(no past here\); use mode 'lora'")):  # fmt: skip
        model = causal_lm("llama")
        model.__class__ = kind
        with pytest.raises(ValueError, match=sentence):
            tune(model, "prefix")


@pytest.mark.parametrize("mode, options, sentence", [
    ("lroa", {}, "mode must be one of full, lora, prefix, head, got 'lroa'"),
    ("lora", {"lora_r": 0}, "lora_r must be a whole number from 1"),
    ("lora", {"lora_targets": ["nope"]}, "has no layers named nope; give lora_targets, some of "),
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
    """The demo's model, with other entries in its config."""
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
    """Transformers keeps sampling values without do_sample in a config that nobody changed, and refuses them else."""
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


def based_on(folder, base):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": base}))


@pytest.mark.parametrize("do, sentence", [
    (lambda f: (f / "adapter_config.json").write_text("[]"), "does not say which model the adapter is for"),
    (lambda f: (f / "adapter_config.json").write_text("[" * 9999), "does not say which model the adapter is for"),
    (lambda f: based_on(f, None), "does not say which model the adapter is for"),
    (lambda f: based_on(f, ["a"]), "does not say which model the adapter is for"),
    (lambda f: based_on(f, str(f)), "for the model /.*/adapter, and that is an adapter which in the end is for itself"),
    (lambda f: (shutil.copytree(f, f"{f}-2"), based_on(f, f"{f}-2"), based_on(Path(f"{f}-2"), str(f))),
     "adapter for the model /.*/adapter-2, and that is an adapter which in the end is for itself"),
    (lambda f: (f / "adapter_model.safetensors").write_bytes(b"no"), "the adapter in .* cannot be loaded"),
    (lambda f: (f / "adapter_model.safetensors").unlink(), r"has no weights \(adapter_model.safetensors\)"),
    (lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"), "is a pickle.* saved anew by peft"),
    (lambda f: save_file({}, f / "adapter_model.safetensors"), "lacks 16 weights, the first being "),
    (lambda f: shutil.rmtree(f.parent / "base"), "adapter is an adapter for the model .*/base, and there is no folder"),
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


def masked(folder):
    BertForMaskedLM(BertConfig(vocab_size=50, hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
                               intermediate_size=8)).save_pretrained(folder)  # fmt: skip


def widen_tokenizer(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<{i}>" for i in range(500)])
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("do, sentence", [
    (lambda f: (f / "config.json").unlink(), "has no config.json"),
    (lambda f: (f / "config.json").write_text("{"), "cannot be loaded: .*config"),
    (lambda f: (f / "config.json").write_text("{}"), "cannot be loaded: .*model_type"),
    (lambda f: (f / "config.json").write_text('{"a": ' * 9999), "cannot be loaded: .*recursion"),
    (lambda f: configured(f, vocab_size="x"), "cannot be loaded: .*'vocab_size' expected int, got str"),
    (lambda f: configured(f, hidden_size=0), "cannot be loaded: "),
    (lambda f: configured(f, num_attention_heads=0), "cannot be loaded: .*division"),
    (lambda f: configured(f, activation_function="none"), "cannot be loaded: .*none"),
    (lambda f: (f / "model.safetensors").unlink(), r"has no weights \(model.safetensors\)"),
    (damage, "cannot be loaded"),
    (lose_weights, "lacks 1 of the weights of GPT2LMHeadModel, the first being lm_head.weight"),
    (masked, "is no causal language model but a BertForMaskedLM"),
    (lambda f: T5Config().save_pretrained(f), "is no causal language model but a t5"),
    (lambda f: [p.unlink() for p in f.glob("*token*")], "has no tokenizer; save"),
    (widen_tokenizer, "has 2548 tokens, its model only 2048 embeddings"),
], ids=lambda x: x if isinstance(x, str) else x.__name__)  # fmt: skip
def test_folders_that_do_not_load(tmp_path, do, sentence):
    folder = folder_of(tmp_path)
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


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("opt-*.yaml")), ids=lambda file: file.stem)
def test_examples_are_options_of_the_command(file, tmp_path):
    from pseuzo.cli.commands import train

    given = train.make_context(
        "train", ["--config", str(file), "--output", str(tmp_path / "run")]
    ).params
    published = {"full": (1e-3, 1e-7), "lora": (1e-2, 5e-5), "prefix": (1e-1, 1e-3)}[given["mode"]]
    assert (given["eps"], given["lr"]) == published
    assert (
        given["window"] == 14
        and given["schedule"] == "cyclic-hyperbola"
        and given["groups"] == "row"
    )
    assert given["batch_size"] == 16 and given["steps"] == 10_000 and given["dtype"] == "fp16"
    assert set(yaml.safe_load(file.read_text())) <= set(given)


def test_head_mode_needs_a_linear_head():
    model = causal_lm("opt")
    model.lm_head = nn.Identity()
    with pytest.raises(ValueError, match="has no Linear output head"):
        tune(model, "head")
