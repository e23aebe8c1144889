"""A model is split at its output head. The tests check the choice of that module, and what the
model does after it."""

import pytest
import torch
from objective_cases import OPTIONS, full_logits
from pseuzo import CausalLMObjective
from pseuzo.models.modes import tune
from pseuzo.models.split import head_parameters
from tiny_models import ALL_KINDS, VOCAB, batch_of, causal_lm
from torch.nn import functional as F
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
)


def test_soft_capped_logits():
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        final_logit_softcapping=0.5,
    )
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
        CausalLMObjective(model, OPTIONS)(
            {**batch_of(), "labels": torch.zeros(4, dtype=torch.long)}
        )


def test_an_odd_head_is_refused_once_a_label_carries_a_loss():
    model, labels = causal_lm("opt"), torch.full((4, 12), -100)
    objective = CausalLMObjective(model)
    objective({**batch_of(), "labels": labels})  # no row has a loss to compare
    model.lm_head.register_forward_hook(
        lambda module, args, out: out + torch.arange(VOCAB) if out.shape[1] > 1 else None
    )
    labels[2, -1] = 5
    with pytest.raises(RuntimeError, match="does more to its logits"):
        objective({**batch_of(), "labels": labels})


def test_lower_matmul_precision_is_no_reason_to_refuse():
    torch.set_float32_matmul_precision("medium")
    try:
        CausalLMObjective(causal_lm("opt"), OPTIONS)(
            {**batch_of(), "labels": torch.tensor([0, 2, 1, 2])}
        )
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_head_parameters(kind):
    for mode in ("full", "lora", "prefix"):
        assert head_parameters(tune(causal_lm(kind, True), mode)) == []
        model = tune(causal_lm(kind, False), mode)
        assert head_parameters(model) == [model.get_output_embeddings().weight]
