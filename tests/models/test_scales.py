"""The scales of 4-bit layers: what the codes stand for, which layers have them, and that training
the scales is exact, is recorded, and learns."""

import copy
import json
import math

import pytest
import torch
from pseuzo import (
    CausalLMObjective,
    MeZO,
    PseuZO,
    PseuZOTrainer,
    PseuZOTrainingArguments,
    offload,
)
from pseuzo.files import save_model
from pseuzo.models.groupwise import GroupwiseLinear, layers_in_groups, quantise
from pseuzo.models.loading import load_model, quantised
from pseuzo.models.modes import tune
from pseuzo.models.offloading import skeleton
from pseuzo.perturb.module import known_passes
from pseuzo.tasks import TaskData, evaluate, load_task
from pseuzo.train.journal_file import read_journal
from pseuzo.train.replay import replay
from tiny_models import ALL_KINDS, batch_of, causal_lm
from torch import nn
from torch.func import functional_call
from transformers import BertConfig, BertForSequenceClassification
from tuned_models import DEMO, LABELS, parts, trained

EPS = torch.finfo(torch.float32).eps


def layer_of(weight: torch.Tensor, group_size: int, bias=None) -> GroupwiseLinear:
    layer = GroupwiseLinear(weight.shape[1], weight.shape[0], group_size, bias)
    layer.quantise(weight)
    return layer


def test_codes_and_scales_of_known_weights():
    """Codes 7, -7, 0, 3 of a group of 4: byte 0 has codes 0 and 2, byte 1 has codes 1 and 3. The
    second group is one weight and three zeros. A row of zeros has codes 0 and scale 0."""
    weight = torch.tensor([[3.5, -3.5, 0.0, 1.3, -0.7], [0.0] * 5])
    layer = layer_of(weight, 4)
    one = [7 + 8 | 0 + 8 << 4, -7 + 8 | 3 + 8 << 4, -7 + 8 | 0 + 8 << 4, 0x88]
    assert layer.codes.tolist() == [one, [0x88] * 4]
    assert torch.equal(layer.scales, torch.tensor([[0.5, 0.7 / 7], [0.0, 0.0]]))
    assert layer.weight.tolist()[0][:4] == [3.5, -3.5, 0.0, 1.5]
    assert (layer.weight[1] == 0).all() and layer.weight.shape == weight.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size, group", [((5, 64), 64), ((3, 70), 16), ((7, 1), 2), ((2, 131), 64)])
def test_a_layer_is_its_codes_times_its_scales(size, group, dtype):
    g = torch.Generator().manual_seed(1)
    weight = torch.randn(size, generator=g)
    bias = nn.Parameter(torch.randn(size[0], generator=g).to(dtype))
    layer = layer_of(weight, group, bias)
    codes = torch.stack([layer.codes & 15, layer.codes >> 4]).double() - 8  # [2, out, bytes]
    codes = codes.unflatten(2, (-1, group // 2)).movedim(0, 2).flatten(2)  # [out, groups, group]
    assert codes.abs().max() == 7
    exact = (codes * layer.scales.double()[..., None]).flatten(1)[:, : size[1]]
    # The product of 4 bits and 24 bits is exact in float64, so it is rounded once to fp32.
    assert torch.equal(layer.dequantised(torch.float32), exact.float())
    used = layer.dequantised(dtype)
    assert torch.equal(used, exact.float().to(dtype))
    # Half a step, and the rounding of w / scale and of the product.
    steps = layer.scales.repeat_interleave(group, 1)[:, : size[1]]
    assert ((layer.weight - weight).abs() <= steps * (0.5 + 16 * EPS)).all()
    x = torch.randn(4, size[1], generator=g).to(dtype)
    y, want = layer(x), x.double() @ used.double().T + bias.double()
    sizes = x.double().abs() @ used.double().abs().T + bias.double().abs()
    # fp32 sums in any order, then one rounding to dtype, or two where the bias is added after it.
    limit = (size[1] + 1) * EPS * sizes + 2 * torch.finfo(dtype).eps * sizes
    assert y.dtype is dtype and ((y.double() - want).abs() <= limit).all()


def test_derivatives_with_respect_to_the_scales():
    g = torch.Generator().manual_seed(2)
    layer = layer_of(torch.randn(3, 10, generator=g), 4).double()
    x = torch.randn(5, 10, generator=g, dtype=torch.float64)
    outputs = lambda scales: functional_call(layer, {"scales": scales}, (x,))  # noqa: E731
    assert torch.autograd.gradcheck(outputs, (layer.scales,), check_forward_ad=True)


@torch.no_grad()
@pytest.mark.parametrize("kind", ALL_KINDS)
def test_the_layers_of_a_model_are_replaced(kind):
    model = causal_lm(kind).eval()
    dense = copy.deepcopy(model)
    before = dict(model.named_parameters())
    quantise(model, 48)
    layers = layers_in_groups(model)
    each = {"gpt2": 4, "neox": 4, "opt": 6, "opt-projected": 6}.get(kind, 7)
    assert len(layers) == 2 * each + (2 if kind == "opt-projected" else 0)
    assert not quantised(model)  # the scales are numbers
    for name, p in model.named_parameters():
        assert p is before.get(name) or name.removesuffix(".scales") in layers
    for name, layer in layers.items():
        weight = dense.get_submodule(name).weight
        weight.copy_(layer.weight.T if kind == "gpt2" else layer.weight)
    want = dense(**batch_of()).logits
    # The same product may be summed in another order: a few roundings of two layers.
    limit = 64 * EPS * want.abs().max()
    assert ((model(**batch_of()).logits - want).abs() <= limit).all()


def test_scales_alone_are_trained_in_fp32():
    model = tune(causal_lm("llama").to(torch.bfloat16), "scales", group_size=16)
    layers = layers_in_groups(model)
    assert trained(model) == {f"{name}.scales" for name in layers}
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    for layer in layers.values():
        held = layer.codes.nbytes + layer.scales.nbytes
        assert 8 * held == (4 + 32 / 16) * layer.in_features * layer.out_features
    assert tune(model, "scales", group_size=16) is model
    assert layers_in_groups(model) == layers


def test_a_classifier_is_trained_with_its_head():
    model = BertForSequenceClassification(
        BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=50)
    )
    others = {n for n in trained(tune(model, "scales")) if not n.endswith(".scales")}
    ends = ("bert.pooler.dense", "classifier")
    assert others == {f"{name}.{part}" for name in ends for part in ("weight", "bias")}


@pytest.mark.parametrize("mode", ["prefix", "prompt", "head"])
def test_other_modes_on_codes(mode):
    model = tune(causal_lm("opt"), "scales", group_size=32)
    assert not any("scales" in name for name in trained(tune(model, mode)))


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_modes_that_codes_refuse(mode):
    model = tune(causal_lm("opt"), "scales")
    with pytest.raises(ValueError, match=f"4-bit codes, which mode {mode} cannot train; use mode"):
        tune(model, mode)


@pytest.mark.parametrize("size", [0, 3, -2, 2.0])
def test_a_group_size_that_is_not_even_is_refused(size):
    with pytest.raises(ValueError, match="group_size must be an even whole number from 2, got"):
        tune(causal_lm("opt"), "scales", group_size=size)


def test_models_that_cannot_be_quantised_are_refused_as_they_were():
    model = causal_lm("opt")
    with torch.no_grad():
        model.model.decoder.layers[1].fc2.weight[3, 4] = math.inf
    with pytest.raises(ValueError, match="must be finite, and some of OPTForCausalLM are not"):
        tune(model, "scales")
    assert not layers_in_groups(model)
    model = tune(causal_lm("opt"), "scales", group_size=32)
    with pytest.raises(ValueError, match="in groups of 32 already, got group_size 64; give 32"):
        tune(model, "scales")
    with pytest.raises(ValueError, match="no Linear layers before its head to quantise"):
        quantise(model)
    other = causal_lm("opt")
    other.model.decoder.layers[0].fc1.weight = nn.Parameter(
        torch.zeros(4, 4, dtype=torch.int8), requires_grad=False
    )
    with pytest.raises(ValueError, match="1 weights of OPTForCausalLM are quantised by another"):
        tune(other, "scales")


@pytest.mark.parametrize("make", [MeZO, PseuZO])
def test_passes_hold_perturbed_scales_and_no_weights(make):
    model = tune(causal_lm("opt"), "scales", group_size=16)
    forward, head = parts(model)
    optimizer = make(model, lr=1e-4, eps=1e-3)
    for _ in range(3):
        optimizer.step(forward, head, LABELS) if make is PseuZO else optimizer.step(
            lambda: head(forward())
        )
    passes = known_passes(model)
    assert set(passes.whole_pass) == {p for p in model.parameters() if p.requires_grad}
    assert passes.scratch.sizes == []


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_model_is_saved_and_loaded_to_the_bit(tmp_path, dtype):
    causal_lm("gpt2").save_pretrained(tmp_path / "base")
    load = lambda name: load_model(  # noqa: E731
        tmp_path / name, dtype=dtype, device="cpu", need_tokenizer=False
    )[0]
    model = tune(load("base"), "scales", group_size=24)
    for layer in layers_in_groups(model).values():
        layer.scales += 1e-3 * torch.rand_like(layer.scales)
    save_model(model, None, tmp_path / "saved")
    again = load("saved").eval()
    want = model.state_dict()
    assert want.keys() == again.state_dict().keys()
    for name, x in again.state_dict().items():
        assert x.dtype is want[name].dtype and torch.equal(x, want[name])
    assert torch.equal(again(**batch_of()).logits, model.eval()(**batch_of()).logits)
    tune(again, "scales", group_size=24)
    save_model(again, None, tmp_path / "saved")
    # Offloading it needs no room for weights of 32 bits.
    assert skeleton(str(tmp_path / "base"), torch.float32) is not None
    assert skeleton(str(tmp_path / "saved"), torch.float32) is None
    assert torch.equal(load("saved").eval()(**batch_of()).logits, again(**batch_of()).logits)


def test_a_folder_that_is_not_whole_is_refused(tmp_path):
    model = tune(causal_lm("llama"), "scales", group_size=16)
    config = model.config.quantization_config
    for name, changed, why in (
        ("bits", {"bits": 8}, "bits must be 4, got 8"),
        ("odd", {"group_size": 5}, "group_size must be an even whole number from 2, got 5"),
        ("other", {"group_size": 32}, "mismatched|ignore_mismatched_sizes"),
    ):
        save_model(model, None, tmp_path / name)
        file = tmp_path / name / "config.json"
        file.write_text(
            json.dumps(
                json.loads(file.read_text()) | {"quantization_config": config.to_dict() | changed}
            )
        )
        with pytest.raises(ValueError, match=why):
            load_model(tmp_path / name, device="cpu", need_tokenizer=False)
    weights = {n: x for n, x in model.state_dict().items() if not n.endswith("v_proj.scales")}
    model.save_pretrained(tmp_path / "lacking", state_dict=weights)
    with pytest.raises(ValueError, match=r"lacks 2 of the weights of .*v_proj\.scales"):
        load_model(tmp_path / "lacking", device="cpu", need_tokenizer=False)


@pytest.mark.parametrize("make", [MeZO, PseuZO])
def test_steps_of_an_offloaded_model_have_the_same_bits(make):
    """The scales stay on the host, the codes are on the device."""
    states = []
    for offloads in (False, True):
        model = tune(causal_lm("opt"), "scales", group_size=16)
        model = offload(model, "cpu") if offloads else model
        forward, head = parts(model)
        optimizer = make(model, lr=1e-4, eps=1e-3)
        inputs = (forward, head, LABELS) if make is PseuZO else (lambda h=head, f=forward: h(f()),)
        losses = [optimizer.step(*inputs) for _ in range(3)]
        states.append([*losses, *model.state_dict().values()])
    assert all(map(torch.equal, *states))


@pytest.mark.slow
@pytest.mark.parametrize("make, lr", [(MeZO, 1.6e-4), (PseuZO, 1e-5)])
def test_training_the_scales_learns_a_task(make, lr):
    """On the task of the embedded model, from its accuracy with rounded weights, .635. The standard
    error of a difference of two accuracies on 400 rows is sqrt(2 / 4 / 400) at most."""
    model, tokenizer = load_model(DEMO, device="cpu")
    tune(model, "scales")
    task = load_task("demo")
    examples = task.load(None, train=512, dev=1, test=400, seed=0)
    train, test = (
        TaskData(examples[split], task, tokenizer, max_length=128) for split in ("train", "test")
    )
    before = evaluate(model, test, batch_size=100)["accuracy"]
    objective = CausalLMObjective(model, train.options)
    optimizer = make(model, lr=lr, eps=3e-4, seed=0)
    order = [*train.sampler(16, seed=0)] * 4
    for step in range(100):
        batch = train.collate([train[i] for i in order[16 * step :][:16]])
        forward, head = objective(batch)
        if make is PseuZO:
            optimizer.step(forward, head, batch["labels"])
        else:
            optimizer.step(lambda f=forward, h=head: h(f()))
    after = evaluate(model, test, batch_size=100)["accuracy"]
    assert after - before > 3 * math.sqrt(2 / 4 / 400), (before, after)


def rows() -> list[dict]:
    batch = batch_of(rows=8)
    return [
        {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]


@pytest.mark.parametrize(
    "method, dtype", [("mezo", "fp32"), ("pseuzo", "bf16"), ("fo-adam", "fp32")]
)
def test_a_run_is_replayed_and_resumed_to_the_bit(tmp_path, method, dtype):
    causal_lm("llama").save_pretrained(tmp_path / "base")
    load = lambda name: load_model(  # noqa: E731
        tmp_path / name, dtype=dtype, device="cpu", need_tokenizer=False
    )[0]
    journal = None if method == "fo-adam" else str(tmp_path / "run.pzj")

    def trainer(model, **more) -> PseuZOTrainer:
        args = PseuZOTrainingArguments(
            str(tmp_path / "run"),
            method=method,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            max_steps=4,
            learning_rate=1e-4,
            weight_decay=0.1,
            save_strategy="steps",
            save_steps=2,
            **({} if method == "fo-adam" else {"eps": 1e-3}),
            **more,
        )
        return PseuZOTrainer(model, args, train_dataset=rows())

    model = tune(load("base"), "scales", group_size=16)
    save_model(model, None, tmp_path / "start")
    start = {n: x.clone() for n, x in model.state_dict().items()}
    trainer(model, journal=journal).train()
    want = model.state_dict()
    for name, x in want.items():  # every scale has moved, and nothing else
        assert torch.equal(x, start[name]) != name.endswith(".scales"), name
    if journal:
        assert read_journal(journal)[0]["dtype"] == {"fp32": "float32", "bf16": "bfloat16"}[dtype]
        again = load("start")
        assert replay(journal, again) == 4
        assert all(torch.equal(x, want[n]) for n, x in again.state_dict().items())
    resumed = tune(load("base"), "scales", group_size=16)
    trainer(resumed).train(str(tmp_path / "run" / "checkpoint-2"))
    assert all(torch.equal(x, want[n]) for n, x in resumed.state_dict().items())
