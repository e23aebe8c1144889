"""h and g of a causal LM against its own full logits and autograd."""

import copy

import pytest
import torch
from models import KINDS, VOCAB, batch_of, causal_lm
from pseuzo import CausalLMObjective, PseuZO
from torch.nn import functional as F
from transformers import Gemma2Config, Gemma2ForCausalLM

OPTIONS = [17, 4, 900]


def full_logits(model, batch):
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()


def head_input(model, batch):
    """The hidden states before the output head, and autograd's gradient of a loss with respect to them, in full."""
    seen = []
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda _, a: seen.append(a[0]))
    logits = full_logits(model, batch)
    handle.remove()
    seen[0].retain_grad()
    return seen[0], logits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_options_loss_and_gradient(kind, side):
    model = causal_lm(kind).eval()
    batch = batch_of()
    if side == "right":
        batch = {k: v.flip(1) for k, v in batch.items()}
    labels = torch.tensor([0, 2, 1, 2])
    forward, head = CausalLMObjective(model, OPTIONS)({**batch, "labels": labels})
    last = torch.tensor([11] * 4) if side == "left" else batch["attention_mask"].sum(1) - 1
    states, logits = head_input(model, batch)
    want = F.cross_entropy(logits[torch.arange(4), last][:, OPTIONS], labels)
    want.backward()
    with torch.no_grad():
        o = forward()
    assert o.shape == (4, 1, states.shape[-1])
    assert torch.equal(o[:, 0], states[torch.arange(4), last])
    o.requires_grad_()
    loss = head(o)
    loss.backward()
    # logits about 1 by a product of another shape: a few rounding errors of 2^-24, through a softmax
    torch.testing.assert_close(loss, want, rtol=0, atol=1e-6)
    torch.testing.assert_close(o.grad[:, 0], states.grad[torch.arange(4), last], rtol=0, atol=1e-6)
    elsewhere = states.grad.clone()
    elsewhere[torch.arange(4), last] = 0
    assert (elsewhere == 0).all(), "the gradient is zero where there is no loss: nothing else need be kept"


@pytest.mark.parametrize("kind", KINDS)
def test_language_modelling_loss_and_gradient(kind):
    model = causal_lm(kind).eval()
    batch = batch_of()
    labels = batch["input_ids"].clone()
    for row, first in enumerate((3, 9, 11, 7)):  # 9, 3, 1 and 5 answer tokens
        labels[row, :first] = -100
    labels[3, 9] = -100  # a gap
    forward, head = CausalLMObjective(model)({**batch, "labels": labels})
    want = model(**batch, labels=labels).loss
    with torch.no_grad():
        o = forward()
    assert o.shape[:2] == (4, 9) and (o[2, :8] == 0).all()
    o.requires_grad_()
    loss = head(o)
    loss.backward()
    states, logits = head_input(model, batch)
    F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()).backward()
    torch.testing.assert_close(loss, want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(o.grad[0], states.grad[0, 2:11], rtol=0, atol=1e-6)
    torch.testing.assert_close(o.grad[3, -4:], states.grad[3, [6, 7, 9, 10]], rtol=0, atol=1e-6)
    assert (o.grad[2, :8] == 0).all()


def test_soft_capped_logits():
    torch.manual_seed(0)
    config = Gemma2Config(vocab_size=VOCAB, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                          num_attention_heads=4, num_key_value_heads=2, head_dim=16,
                          final_logit_softcapping=0.5)  # fmt: skip
    model = Gemma2ForCausalLM(config).eval()
    batch = {**batch_of(), "labels": torch.tensor([0, 2, 1, 2])}
    forward, head = CausalLMObjective(model, OPTIONS)(batch)
    want = F.cross_entropy(full_logits(model, batch)[:, -1, OPTIONS], batch["labels"])
    torch.testing.assert_close(head(forward()), want, rtol=0, atol=1e-6)


def test_a_head_that_does_more_is_refused():
    class Odd(type(causal_lm("opt"))):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = out.logits.square()
            return out

    model = causal_lm("opt")
    model.__class__ = Odd
    with pytest.raises(RuntimeError, match="does more to its logits"):
        CausalLMObjective(model, OPTIONS)({**batch_of(), "labels": torch.zeros(4, dtype=torch.long)})


def test_a_step_of_pseuzo_runs_the_head_on_loss_positions_once():
    model = causal_lm("opt")
    objective = CausalLMObjective(model, OPTIONS)
    batch = {**batch_of(), "labels": torch.tensor([0, 2, 1, 2])}
    forward, head = objective(batch)  # verifies, once
    rows = []
    handle = model.lm_head.register_forward_hook(lambda m, a, out: rows.append(out.shape[1]))
    logits, before = [], copy.deepcopy(model.state_dict())
    plain, objective.logits = objective.logits, lambda o: (logits.append(o.shape), plain(o))[1]
    loss = PseuZO(model, lr=1e-3, eps=1e-3).step(forward, head, groups=batch["labels"])
    handle.remove()
    assert rows == [] and logits == [(4, 1, 64)]
    assert loss.dtype is torch.float32
    assert any(not torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not model.lm_head._forward_pre_hooks


def test_garbage_at_positions_without_loss_stays_there():
    """An infinity in the states of a padded position must not reach o."""
    model = causal_lm("opt").eval()
    labels = batch_of()["input_ids"].clone()
    labels[0, :9] = labels[1, :11] = -100
    objective = CausalLMObjective(model)
    forward, _ = objective({**batch_of(), "labels": labels})
    norm = model.model.decoder.final_layer_norm
    handle = norm.register_forward_hook(lambda m, a, out: out.index_fill(1, torch.tensor([0]), float("inf")))
    o = forward()[:2]  # the other rows have a loss there
    handle.remove()
    assert o.isfinite().all()


def test_lower_matmul_precision_is_no_reason_to_refuse():
    torch.set_float32_matmul_precision("medium")
    try:
        CausalLMObjective(causal_lm("opt"), OPTIONS)({**batch_of(), "labels": torch.tensor([0, 2, 1, 2])})
    finally:
        torch.set_float32_matmul_precision("highest")


def test_bf16_model_gives_an_fp32_loss():
    model = causal_lm("opt").to(torch.bfloat16).eval()
    batch = {**batch_of(), "labels": torch.tensor([0, 2, 1, 2])}
    forward, head = CausalLMObjective(model, OPTIONS)(batch)
    with torch.no_grad():
        o = forward()
        loss = head(o)
        want = F.cross_entropy((o[:, 0].double() @ model.lm_head.weight.double().T)[:, OPTIONS], batch["labels"])
    assert o.dtype is torch.bfloat16 and loss.dtype is torch.float32
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options, sentence", [
    ([5], "two or more different"), ([5, 5], "two or more different"), ([5, VOCAB], "token ids below"),
])  # fmt: skip
def test_bad_options(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        CausalLMObjective(causal_lm("opt"), options)


def test_bad_input():
    with pytest.raises(TypeError, match="no Linear output head"):
        CausalLMObjective(torch.nn.Linear(2, 2))
    model = causal_lm("opt")
    with pytest.raises(ValueError, match="no label of the batch carries a loss"):
        CausalLMObjective(model)({**batch_of(), "labels": torch.full((4, 12), -100)})
    with pytest.raises(ValueError, match=r"labels must be \[B\] classes"):
        CausalLMObjective(model, OPTIONS)({**batch_of(), "labels": torch.zeros(3, dtype=torch.long)})
