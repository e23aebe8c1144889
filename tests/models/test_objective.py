"""h and g of a causal LM against its own full logits and autograd."""

import copy
from contextlib import nullcontext

import pytest
import torch
from helpers import Waits
from pseuzo import CausalLMObjective, MeZO, PseuZO, perturbed
from pseuzo.models.attention import seeing_itself
from pseuzo.models.modes import tune
from pseuzo.models.positions import loss_positions, rows_of_options, with_positions
from tiny_models import ALL_KINDS, KINDS, VOCAB, batch_of, causal_lm
from torch.nn import functional as F
from transformers import BatchEncoding, Gemma2Config, Gemma2ForCausalLM, OPTConfig, OPTForCausalLM
from transformers.masking_utils import AttentionMaskInterface

OPTIONS = [17, 4, 900]


def full_logits(model, batch):
    """Of the model itself, with positions counted from the first token with attention."""
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    return model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], position_ids=positions
    ).logits.float()


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
    assert (elsewhere == 0).all(), (
        "the gradient is zero where there is no loss: nothing else need be kept"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_language_modelling_loss_and_gradient(kind):
    model = causal_lm(kind).eval()
    batch = batch_of()
    labels = batch["input_ids"].clone()
    for row, first in enumerate((3, 9, 11, 7)):  # 9, 3, 1 and 5 answer tokens
        labels[row, :first] = -100
    labels[3, 9] = -100  # a gap
    forward, head = CausalLMObjective(model)({**batch, "labels": labels})
    want = F.cross_entropy(full_logits(model, batch)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
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


@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_nothing(kind):
    """Rows of a padded batch against the same rows alone, by the model's own logits."""
    model = causal_lm(kind).eval()
    batch = batch_of()
    objective = CausalLMObjective(model, OPTIONS)
    scores = objective.scores({**batch, "labels": torch.zeros(4, dtype=torch.long)})
    with torch.no_grad():
        alone = [model(ids[mask != 0][None]).logits[0, -1, OPTIONS]
                 for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]  # fmt: skip
    # logits about 1; other shapes round differently, and rotary angles of other positions by 2^-24 of up to 64
    torch.testing.assert_close(scores, torch.stack(alone), rtol=0, atol=1e-5)


def attentive_lm(dtype):
    """One whose states change by far more than they are rounded by if a token sees others than it should."""
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
    """Clean and perturbed. On a GPU other kernels attend with a mask, and others by the length."""
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
        # 8 ulps of bf16 between 2 and 4, where the largest states are
        torch.testing.assert_close(got, alone, rtol=0, atol=0.125)
        assert ((unmasked - alone)[:2].abs().amax((1, 2)) > 4 * 0.125).all(), (
            "a mask that is ignored would show"
        )


def attention_with_nan(q, k, v, attn_mask=None, is_causal=False, scale=None, **kwargs):
    """Some backends make NaN of a query that sees no key."""
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


# rows of options: example 1 has three, 0 and 2 have two; not in order; the right ones are rows 2, 0 and 6
RAGGED = {"examples": torch.tensor([1, 0, 0, 1, 1, 2, 2]), "answers": torch.tensor([2, 0, 6])}
OPTION_TOKENS = (3, 1, 2, 5, 1, 4, 4)


def option_batch():
    batch = batch_of(rows=7, seed=3)
    labels = torch.full_like(batch["input_ids"], -100)
    for row, n in enumerate(OPTION_TOKENS):
        labels[row, -n:] = batch["input_ids"][row, -n:]
    return {**batch, "labels": labels, **RAGGED}


def plain_option_losses(model, batch):
    """[B] in float64 from the model's full logits, one row and token at a time; and the scores [R]."""
    logp = full_logits(model, batch).double().log_softmax(-1)
    scores = []
    for row, n in enumerate(OPTION_TOKENS):
        places = range(12 - n, 12)
        scores.append(sum(logp[row, t - 1, batch["input_ids"][row, t]] for t in places) / n)
    rows = [[1, 2], [0, 3, 4], [5, 6]]
    losses = [torch.stack([scores[r] for r in mine]).logsumexp(0) - scores[right]
              for mine, right in zip(rows, (2, 0, 6), strict=True)]  # fmt: skip
    return torch.stack(losses), torch.stack(scores)


@pytest.mark.parametrize("kind", KINDS)
def test_loss_over_options(kind):
    model = causal_lm(kind).double().eval()
    batch = option_batch()
    want, row_scores = plain_option_losses(model, batch)
    states, _ = head_input(model, batch)
    wanted_gradient = torch.autograd.grad(
        plain_option_losses_of(model, states, batch).mean(), states
    )[0]
    objective = CausalLMObjective(model)
    forward, head = objective(batch)
    with torch.no_grad():
        o = forward()
    assert o.shape[:2] == (7, 5) and (o[1, :4] == 0).all()
    o.requires_grad_()
    loss = head(o)
    loss.backward()
    # the logits are cast to fp32: losses about 1, means of at most 5 log-likelihoods of about 7
    torch.testing.assert_close(loss.double(), want.mean(), rtol=0, atol=4e-6)
    each = objective(batch, reduction="none")[1](o)
    torch.testing.assert_close(each.double(), want, rtol=0, atol=4e-6)
    torch.testing.assert_close(o.grad[3], wanted_gradient[3, 6:11], rtol=0, atol=1e-6)
    torch.testing.assert_close(o.grad[1, -1], wanted_gradient[1, 10], rtol=0, atol=1e-6)
    assert (o.grad[1, :4] == 0).all()
    scores = objective.scores(batch)
    assert scores.shape == (3, 3) and scores[0, 2] == scores[2, 2] == -torch.inf
    torch.testing.assert_close(scores[1].double(), row_scores[[0, 3, 4]], rtol=0, atol=4e-6)
    torch.testing.assert_close(objective.row_scores(batch).double(), row_scores, rtol=0, atol=4e-6)


def plain_option_losses_of(model, states, batch):
    """The losses again, in float64, as a function of the head's input."""
    logp = model.get_output_embeddings()(states).log_softmax(-1)
    token = logp[:, :-1].gather(2, batch["input_ids"][:, 1:, None])[..., 0]
    scores = torch.stack([token[row, -n:].mean() for row, n in enumerate(OPTION_TOKENS)])
    rows = [[1, 2], [0, 3, 4], [5, 6]]
    return torch.stack([scores[mine].logsumexp(0) - scores[right]
                        for mine, right in zip(rows, (2, 0, 6), strict=True)])  # fmt: skip


def test_options_of_one_token_are_label_words():
    """The loss over options and the loss over label words, where both can be had."""
    model = causal_lm("gpt2").double().eval()
    prompts = batch_of()
    classes = torch.tensor([0, 2, 1, 2])
    forward, head = CausalLMObjective(model, OPTIONS)(
        {**prompts, "labels": classes}, reduction="none"
    )
    words = torch.tensor(OPTIONS).repeat(4)[:, None]
    labels = torch.cat([torch.full((12, 12), -100), words], 1)
    batch = {
        "input_ids": torch.cat([prompts["input_ids"].repeat_interleave(3, 0), words], 1), "labels": labels,
        "attention_mask": torch.cat([prompts["attention_mask"].repeat_interleave(3, 0), torch.ones_like(words)], 1),
        "examples": torch.arange(4).repeat_interleave(3), "answers": torch.arange(4) * 3 + classes,
    }  # fmt: skip
    forward_options, head_options = CausalLMObjective(model)(batch, reduction="none")
    # fp32 rounding of log-likelihoods of about 7
    torch.testing.assert_close(head_options(forward_options()), head(forward()), rtol=0, atol=2e-6)


def test_losses_of_examples():
    """Their mean is the loss; for answers of several tokens each example counts with its tokens."""
    model = causal_lm("opt").eval()
    labels = batch_of()["input_ids"].clone()
    for row, first in enumerate((3, 9, 11, 7)):
        labels[row, :first] = -100
    objective = CausalLMObjective(model)
    forward, head = objective({**batch_of(), "labels": labels}, reduction="none")
    losses = head(forward())
    logp = full_logits(model, batch_of()).log_softmax(-1)
    token = -logp[:, :-1].gather(2, batch_of()["input_ids"][:, 1:, None])[..., 0]
    want = [token[row, -n:].sum() * 4 / 18 for row, n in enumerate((9, 3, 1, 5))]
    torch.testing.assert_close(losses, torch.stack(want), rtol=1e-6, atol=1e-6)
    _, mean = objective({**batch_of(), "labels": labels})
    torch.testing.assert_close(losses.mean(), mean(forward()), rtol=1e-6, atol=0)
    with_words = CausalLMObjective(model, OPTIONS)
    batch = {**batch_of(), "labels": torch.tensor([0, 2, 1, 2])}
    forward, head = with_words(batch, reduction="none")
    losses = head(forward())
    assert losses.shape == (4,)
    torch.testing.assert_close(losses.mean(), with_words(batch)[1](forward()), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["opt", "llama", "gpt2"])
def test_the_head_is_differentiable_in_its_weight(kind):
    """The exact gradient of an output head, for label words and for the whole vocabulary."""
    model = causal_lm(kind).eval()
    weight = model.lm_head.weight
    batch = {**batch_of(), "labels": torch.tensor([0, 2, 1, 2])}
    o = CausalLMObjective(model, OPTIONS)(batch)[0]().detach()
    forward, head = CausalLMObjective(model, OPTIONS)(batch)
    (got,) = torch.autograd.grad(head(o), weight)
    (want,) = torch.autograd.grad(
        F.cross_entropy((o[:, 0] @ weight.T)[:, OPTIONS], batch["labels"]), weight
    )
    torch.testing.assert_close(got, want, rtol=0, atol=1e-7)
    assert got.abs().amax(1).nonzero().flatten().tolist() == sorted(OPTIONS)
    forward, head = CausalLMObjective(model)(option_batch())
    (got,) = torch.autograd.grad(head(forward().detach()), weight)
    states, _ = head_input(model, option_batch())
    (want,) = torch.autograd.grad(
        plain_option_losses_of(model, states.detach(), option_batch()).mean(), weight
    )
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
    with torch.no_grad(), perturbed(model, 3, 1e-3):
        assert not head(forward()).requires_grad


def test_the_model_gets_its_inputs_alone():
    model = causal_lm("opt").eval()
    seen = []
    handle = model.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(set(kwargs)), with_kwargs=True
    )
    batch = option_batch()
    positions, targets = loss_positions(batch["labels"])
    option_rows = rows_of_options(batch["examples"], 3)
    assert option_rows.tolist() == [[1, 2, -1], [0, 3, 4], [5, 6, -1]]
    more = {"groups": torch.arange(7), "rows": torch.arange(3), "positions": positions, "targets": targets,
            "option_rows": option_rows}  # fmt: skip
    forward, head = CausalLMObjective(model)({**batch, **more})
    with_them = head(forward())
    forward, head = CausalLMObjective(model)(batch)
    assert torch.equal(with_them, head(forward()))
    handle.remove()
    assert set().union(*seen) == {"input_ids", "attention_mask", "position_ids", "use_cache"}


def test_a_planned_batch_makes_nothing_wait():
    """Of the objective's own; what a model does in its forward is its own affair."""
    batch = option_batch()
    positions, targets = loss_positions(batch["labels"])
    batch |= {
        "positions": positions,
        "targets": targets,
        "option_rows": rows_of_options(batch["examples"], 3),
    }
    words = {**batch_of(), "labels": torch.tensor([0, 2, 1, 2])}
    for options, one in ((None, batch), (OPTIONS, words)):
        objective = CausalLMObjective(causal_lm("gpt2"), options)
        o = objective(one)[0]().detach()
        for reduction in ("mean", "none"):
            with Waits() as waits:
                _, head = objective(one, reduction)
                head(o)
            assert waits.seen == []
    with Waits() as waits:
        CausalLMObjective(causal_lm("gpt2"), verify=False)(option_batch())
    assert waits.seen, "the counter counts"


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
    """Transformers alone reads the mask, or without one the positions."""
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
    """Without a mask torch attends causally by itself, where no window is shorter; with one a mask is made, padding or
    not: nobody looks. A forward that fails leaves nothing behind in Transformers."""
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
    assert waits.seen, "Transformers need not be told"
    for length in (6, 12):
        ids = batch_of(length=length)["input_ids"]
        batch = {"input_ids": ids, "labels": torch.tensor([0, 2, 1, 2])}
        for mask in ({}, {"attention_mask": torch.ones_like(ids)}):
            objective(batch | mask)  # verified
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
    assert waits.seen, "it was told for ever"
    monkeypatch.setitem(
        AttentionMaskInterface._global_mapping, "sdpa", lambda **kwargs: masks.append("theirs")
    )
    masks.clear()
    objective(batch)[0]()
    assert masks[0] == "theirs"


def test_a_model_inside_of_the_model_keeps_its_padding():
    """A frozen encoder, say, with rows that are padded where the batch is not."""
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
    """Their positions say so, which a mask would hide."""
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
    torch.testing.assert_close(o, second, rtol=0, atol=1e-5)  # as in test_padding_changes_nothing


@pytest.mark.parametrize("collated", [False, True])
def test_the_first_token_of_a_padded_text_is_not_predicted(collated):
    """As where the row is alone, though its label says that it carries a loss."""
    model = causal_lm("llama").eval()
    batch = batch_of()
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    alone = [
        ids[None, mask == 1]
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    with torch.no_grad():
        want = sum(model(input_ids=ids, labels=ids).loss * (ids.shape[1] - 1) for ids in alone)
        want /= sum(ids.shape[1] - 1 for ids in alone)
        forward, head = CausalLMObjective(model)(with_positions(dict)(batch) if collated else batch)
        torch.testing.assert_close(
            head(forward()), want, rtol=1e-5, atol=0
        )  # sums of fp32 in another order


def test_a_collator_with_positions():
    labels = batch_of()["input_ids"].clone()
    labels[0, :7] = -100
    objective = CausalLMObjective(causal_lm("opt").eval())
    for kind in (dict, BatchEncoding):
        plain = {**batch_of(), "labels": labels}
        batch = with_positions(lambda rows: rows)(kind({k: v[[2, 0]] for k, v in plain.items()}))
        assert type(batch) is kind and set(batch) == {*plain, "positions", "targets"}
        mask = plain["attention_mask"][[2, 0]]
        for got, want in zip(
            (batch["positions"], batch["targets"]),
            loss_positions(labels[[2, 0]], mask),
            strict=True,
        ):
            assert torch.equal(got, want)
        assert (batch["labels"] != labels[[2, 0]]).nonzero().tolist() == [
            [0, 1],
            [0, 2],
        ]  # it begins at 2
        with Waits() as waits:
            objective(batch)
        assert kind is dict or waits.seen == []  # the first one is verified
    unpadded = {k: v[:1] for k, v in plain.items()}
    assert set(with_positions(lambda rows: rows)(dict(unpadded))) == {
        "input_ids",
        "labels",
        "positions",
        "targets",
    }
    for other in ({"labels": torch.tensor([0, 1])}, {"input_ids": labels}, option_batch()):
        assert with_positions(lambda rows: rows)(other) is other and "positions" not in other
    import pickle

    assert pickle.loads(pickle.dumps(with_positions(dict)))({"a": 1}) == {"a": 1}


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
        CausalLMObjective(model, OPTIONS)(
            {**batch_of(), "labels": torch.zeros(4, dtype=torch.long)}
        )


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
    handle = norm.register_forward_hook(
        lambda m, a, out: out.index_fill(1, torch.tensor([0]), float("inf"))
    )
    o = forward()[:2]  # the other rows have a loss there
    handle.remove()
    assert o.isfinite().all()


def test_lower_matmul_precision_is_no_reason_to_refuse():
    torch.set_float32_matmul_precision("medium")
    try:
        CausalLMObjective(causal_lm("opt"), OPTIONS)(
            {**batch_of(), "labels": torch.tensor([0, 2, 1, 2])}
        )
    finally:
        torch.set_float32_matmul_precision("highest")


def test_bf16_model_gives_an_fp32_loss():
    model = causal_lm("opt").to(torch.bfloat16).eval()
    batch = {**batch_of(), "labels": torch.tensor([0, 2, 1, 2])}
    forward, head = CausalLMObjective(model, OPTIONS)(batch)
    with torch.no_grad():
        o = forward()
        loss = head(o)
        want = F.cross_entropy(
            (o[:, 0].double() @ model.lm_head.weight.double().T)[:, OPTIONS], batch["labels"]
        )
    assert o.dtype is torch.bfloat16 and loss.dtype is torch.float32
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options, sentence", [
    ([5], "two or more different"), ([5, 5], "two or more different"), ([5, VOCAB], "token ids below"),
])  # fmt: skip
def test_bad_options(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        CausalLMObjective(causal_lm("opt"), options)


@pytest.mark.parametrize("kind", ["opt", "llama"])
def test_a_batch_without_a_label_that_carries_a_loss_is_a_skipped_step(kind):
    """As Transformers' own loss of it is NaN; rows among others count for nothing."""
    model = causal_lm(kind).eval()
    start = [p.detach().clone() for p in model.parameters()]
    masked = {**batch_of(), "labels": torch.full((4, 12), -100)}
    assert model(**masked).loss.isnan()
    objective = CausalLMObjective(model)
    for optimizer in (PseuZO(model, 1e-2, weight_decay=0.1), MeZO(model, 1e-2, weight_decay=0.1)):
        for reduction in ("mean", "none"):
            forward, head = objective(masked, reduction)
            with (
                pytest.warns(UserWarning, match="as where no label carries a loss")
                if reduction == "mean"
                else nullcontext()
            ):
                pair = (
                    (forward, head)
                    if isinstance(optimizer, PseuZO)
                    else (lambda f=forward, h=head: h(f()),)
                )
                assert optimizer.step(*pair).isnan()
        assert optimizer.skipped_steps == 2
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), start, strict=True))
    some = {**masked, "labels": masked["labels"].clone()}
    some["labels"][2, -3:] = some["input_ids"][2, -3:]
    alone = {name: x[2:3] for name, x in some.items()}
    losses = [h(f()) for f, h in (objective(some), objective(alone))]
    torch.testing.assert_close(
        losses[0], losses[1], rtol=0, atol=1e-5
    )  # as in test_padding_changes_nothing
    torch.testing.assert_close(losses[0], model(**alone).loss, rtol=0, atol=1e-5)
    assert loss_positions(torch.full((2, 1), 5))[0].tolist() == [[-1], [-1]]


def test_an_odd_head_is_refused_once_a_label_carries_a_loss():
    model, labels = causal_lm("opt"), torch.full((4, 12), -100)
    objective = CausalLMObjective(model)
    objective({**batch_of(), "labels": labels})  # nothing to compare
    model.lm_head.register_forward_hook(
        lambda module, args, out: out + torch.arange(VOCAB) if out.shape[1] > 1 else None
    )
    labels[2, -1] = 5
    with pytest.raises(RuntimeError, match="does more to its logits"):
        objective({**batch_of(), "labels": labels})


def test_bad_input():
    with pytest.raises(TypeError, match="no Linear output head"):
        CausalLMObjective(torch.nn.Linear(2, 2))
    model = causal_lm("opt")
    with pytest.raises(ValueError, match=r"labels must be \[B\] classes"):
        CausalLMObjective(model, OPTIONS)(
            {**batch_of(), "labels": torch.zeros(3, dtype=torch.long)}
        )
    with pytest.raises(
        ValueError, match=r"labels must be \[B\] classes, got shape \(7, 12\) and examples"
    ):
        CausalLMObjective(model, OPTIONS)(option_batch())
    with pytest.raises(ValueError, match="labels must be token ids in the shape of input_ids"):
        CausalLMObjective(model)({**batch_of(), "labels": torch.zeros(4, dtype=torch.long)})
    with pytest.raises(ValueError, match="a row of the batch has no token of its option"):
        batch = option_batch()
        batch["labels"][1] = -100
        CausalLMObjective(model)(batch)
    with pytest.raises(ValueError, match="each of the 4 examples"):
        CausalLMObjective(model)({**option_batch(), "answers": torch.tensor([2, 0, 6, 1])})
    with pytest.raises(ValueError, match="reduction must be"):
        CausalLMObjective(model)(option_batch(), reduction="sum")
    with pytest.raises(ValueError, match="the batch has no options"):
        CausalLMObjective(model).scores({**batch_of(), "labels": batch_of()["input_ids"]})
