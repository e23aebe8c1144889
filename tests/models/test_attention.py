"""Padding changes nothing, and no forward waits for the device to find the padding."""

from contextlib import nullcontext

import pytest
import torch
from helpers import Waits
from objective_cases import OPTIONS
from pseuzo import CausalLMObjective, perturbed
from pseuzo.models.attention import seeing_itself
from pseuzo.models.modes import tune
from tiny_models import ALL_KINDS, KINDS, VOCAB, batch_of, causal_lm
from torch.nn import functional as F
from transformers import (
    OPTConfig,
    OPTForCausalLM,
)
from transformers.masking_utils import AttentionMaskInterface


@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_nothing(kind):
    """Rows of a padded batch have the model's own logits of the same rows alone."""
    model = causal_lm(kind).eval()
    batch = batch_of()
    objective = CausalLMObjective(model, OPTIONS)
    scores = objective.scores({**batch, "labels": torch.zeros(4, dtype=torch.long)})
    with torch.no_grad():
        alone = [
            model(ids[mask != 0][None]).logits[0, -1, OPTIONS]
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        ]
    # The logits are about 1. Other shapes round differently, and so do the rotary angles of other
    # positions, by 2^-24 of up to 64.
    torch.testing.assert_close(scores, torch.stack(alone), rtol=0, atol=1e-5)


def attentive_lm(dtype):
    """Return a model whose states change by far more than their rounding if a token attends to
    wrong tokens."""
    torch.manual_seed(0)
    sizes = dict(
        hidden_size=256,
        ffn_dim=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=256,
    )
    model = OPTForCausalLM(OPTConfig(vocab_size=1000, max_position_embeddings=256, **sizes))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "_proj.weight" in name:
                p.mul_(5)
    return model.to(dtype).eval()


@pytest.mark.parametrize(
    "device, length",
    [("cpu", 24), *(pytest.param("cuda", n, marks=pytest.mark.gpu) for n in (24, 64, 192))],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_padding_changes_nothing_in_half_precision(dtype, device, length):
    """The test runs clean and perturbed passes. On a GPU the attention kernel depends on the mask
    and the length."""
    model = attentive_lm(dtype).to(device)
    objective = CausalLMObjective(model, OPTIONS)
    ids = torch.randint(3, 1000, (3, length), device=device)
    mask = torch.ones_like(ids)
    mask[0, : length // 3] = mask[1, :5] = 0

    def last_states(ids, **batch):
        return objective({"input_ids": ids, "labels": ids.new_zeros(len(ids)), **batch})[
            0
        ]().float()

    for context in (nullcontext(), perturbed(model, 3, 1e-2)):
        with torch.no_grad(), context:
            got = last_states(ids, attention_mask=mask)
            alone = torch.cat(
                [last_states(row[keep != 0][None]) for row, keep in zip(ids, mask, strict=True)]
            )
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            unmasked = last_states(
                ids, attention_mask=torch.ones_like(mask), position_ids=positions
            )
        # This is 8 ulps of bf16 between 2 and 4, where the largest states are.
        torch.testing.assert_close(got, alone, rtol=0, atol=0.125)
        assert ((unmasked - alone)[:2].abs().amax((1, 2)) > 4 * 0.125).all(), (
            "the test would not notice a mask that is ignored"
        )


def attention_with_nan(q, k, v, attn_mask=None, is_causal=False, scale=None, **kwargs):
    """Attend like backends that return NaN for a query that sees no key."""
    assert attn_mask is not None and not is_causal and not kwargs.get("dropout_p")
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = (q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)).masked_fill(
        ~attn_mask, -torch.inf
    )
    return scores.softmax(-1) @ v


@pytest.mark.parametrize("mode", ["full", "prefix"])
@pytest.mark.parametrize("kind", ["opt", "gpt2", "llama", "mistral"])
def test_no_query_of_a_pad_makes_nan(kind, mode, monkeypatch):
    model = tune(causal_lm(kind), mode).eval()
    batch = batch_of() | {"labels": torch.zeros(4, dtype=torch.long)}
    objective = CausalLMObjective(model, OPTIONS)
    want = objective.scores(batch)
    monkeypatch.setattr(F, "scaled_dot_product_attention", attention_with_nan)
    torch.testing.assert_close(objective.scores(batch), want, rtol=0, atol=1e-5)


def test_queries_that_see_a_key_see_what_they_saw():
    keep = torch.tensor([[0, 0, 0, 1, 1], [1, 1, 1, 1, 1]]).bool()
    mask = torch.ones(4, 5).tril(1).bool() & keep[:, None, None]  # one key comes before the queries
    got = seeing_itself(mask)
    assert torch.equal(got[1], mask[1]) and torch.equal(got[0, 0, 2:], mask[0, 0, 2:])
    assert got[0, 0, :2].tolist() == [
        [False, True, False, False, False],
        [False, False, True, False, False],
    ]


@pytest.mark.parametrize("mode", ["full", "lora", "prefix"])
@pytest.mark.parametrize("kind", ALL_KINDS)
def test_without_padding_the_mask_may_be_left_out(kind, mode):
    model = tune(causal_lm(kind), mode).eval()
    batch = {"input_ids": batch_of()["input_ids"], "labels": torch.tensor([0, 2, 1, 2])}
    masked = batch | {"attention_mask": torch.ones_like(batch["input_ids"])}
    objective = CausalLMObjective(model, OPTIONS)
    with torch.no_grad():
        assert torch.equal(objective(batch)[0](), objective(masked)[0]())


@pytest.mark.parametrize("mode", ["full", "lora", "prefix"])
@pytest.mark.parametrize("kind", ALL_KINDS)
def test_no_forward_waits(kind, mode):
    """Without our objective, Transformers reads the mask, or the positions if there is no mask."""
    model = tune(causal_lm(kind), mode).eval()
    objective = CausalLMObjective(model, OPTIONS, verify=False)
    batch = batch_of() | {"labels": torch.tensor([0, 2, 1, 2])}
    unpadded = {k: v for k, v in batch.items() if k != "attention_mask"}
    with torch.no_grad():
        for one in (
            batch,
            unpadded,
            batch | {"attention_mask": torch.ones_like(batch["input_ids"])},
        ):
            forward, head = objective(one)
            with Waits() as waits:
                head(forward())
            assert waits.seen == []


@pytest.mark.parametrize("kind", ["opt", "llama", "mistral"])
def test_attention_is_told_of_padding(kind, monkeypatch):
    """Without a mask torch attends causally by itself, unless a window is shorter. With a mask, an
    attention mask is made whether or not there is padding, since nothing reads the mask. A forward
    that fails leaves nothing behind in Transformers."""
    model = causal_lm(kind).eval()
    objective = CausalLMObjective(model, OPTIONS)
    masks = []

    def attend(
        *args, attn_mask=None, is_causal=False, attention=F.scaled_dot_product_attention, **kwargs
    ):
        masks.append((attn_mask is None, is_causal))
        return attention(*args, attn_mask=attn_mask, is_causal=is_causal, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    with torch.no_grad(), Waits() as waits:
        model(**batch_of(length=6))
    assert waits.seen, "Transformers reads no mask by itself"
    for length in (6, 12):
        ids = batch_of(length=length)["input_ids"]
        batch = {"input_ids": ids, "labels": torch.tensor([0, 2, 1, 2])}
        for mask in ({}, {"attention_mask": torch.ones_like(ids)}):
            objective(batch | mask)  # the first batch is verified
            masks.clear()
            with torch.no_grad():
                got = objective(batch | mask)[0]()
            without = not mask and not (kind == "mistral" and length > 8)
            assert masks == [(without, without)] * 2
            with torch.no_grad():
                want = model.base_model(ids, use_cache=False).last_hidden_state[:, -1:]
                torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
    with pytest.raises(IndexError):
        objective.hidden_states(
            {**objective.plan(batch), "input_ids": torch.full_like(ids, VOCAB + 5)}
        )
    with torch.no_grad(), Waits() as waits:
        model(**batch_of(length=6))
    assert waits.seen, "Transformers is still told of the padding"
    monkeypatch.setitem(
        AttentionMaskInterface._global_mapping, "sdpa", lambda **kwargs: masks.append("theirs")
    )
    masks.clear()
    objective(batch)[0]()
    assert masks[0] == "theirs"


def test_a_model_inside_of_the_model_keeps_its_padding():
    """The other model may be a frozen encoder whose rows are padded where the batch is not."""
    model, inner, context = causal_lm("opt").eval(), causal_lm("llama").eval(), batch_of()
    seen = []

    def encode(module, args):
        seen.append(inner.model(**context).last_hidden_state)

    model.model.decoder.layers[0].register_forward_pre_hook(encode)
    with torch.no_grad():
        want = inner.model(**context).last_hidden_state
        batch = {"input_ids": context["input_ids"], "labels": torch.tensor([0, 2, 1, 2])}
        CausalLMObjective(model, OPTIONS, verify=False)(batch)[0]()
    assert len(seen) == 1 and torch.equal(seen[0], want)


def test_rows_of_several_texts():
    """Their positions show that a row holds several texts, which a mask would hide."""
    model = causal_lm("llama").eval()
    ids = batch_of()["input_ids"]
    batch = {
        "input_ids": ids,
        "position_ids": torch.arange(6).repeat(4, 2),
        "labels": torch.tensor([0, 2, 1, 2]),
    }
    with torch.no_grad():
        o = CausalLMObjective(model, OPTIONS)(batch)[0]()
        second = model.model(ids[:, 6:]).last_hidden_state[:, -1:]
    torch.testing.assert_close(o, second, rtol=0, atol=1e-5)  # see test_padding_changes_nothing
