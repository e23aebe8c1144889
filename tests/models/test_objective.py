"""h and g of a causal LM agree with its own full logits and with autograd."""

import copy
from contextlib import nullcontext

import pytest
import torch
from objective_cases import (
    OPTIONS,
    full_logits,
    head_input,
    option_batch,
    plain_option_losses,
    plain_option_losses_of,
)
from pseuzo import CausalLMObjective, MeZO, PseuZO, perturbed
from pseuzo.models.positions import loss_positions
from tiny_models import KINDS, VOCAB, batch_of, causal_lm
from torch.nn import functional as F


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
    # Logits about 1 come from a product of another shape, so a few roundings of 2^-24 differ and
    # pass through a softmax.
    torch.testing.assert_close(loss, want, rtol=0, atol=1e-6)
    torch.testing.assert_close(o.grad[:, 0], states.grad[torch.arange(4), last], rtol=0, atol=1e-6)
    elsewhere = states.grad.clone()
    elsewhere[torch.arange(4), last] = 0
    assert (elsewhere == 0).all(), (
        "a position without a loss has a gradient, so its states are needed"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_language_modelling_loss_and_gradient(kind):
    model = causal_lm(kind).eval()
    batch = batch_of()
    labels = batch["input_ids"].clone()
    for row, first in enumerate((3, 9, 11, 7)):  # 9, 3, 1 and 5 answer tokens
        labels[row, :first] = -100
    labels[3, 9] = -100  # one answer token has no loss
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
    # The logits are cast to fp32. Losses are about 1, from means of at most 5 log-likelihoods of
    # about 7.
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


def test_options_of_one_token_are_label_words():
    """The loss over options equals the loss over label words, where both exist."""
    model = causal_lm("gpt2").double().eval()
    prompts = batch_of()
    classes = torch.tensor([0, 2, 1, 2])
    forward, head = CausalLMObjective(model, OPTIONS)(
        {**prompts, "labels": classes}, reduction="none"
    )
    words = torch.tensor(OPTIONS).repeat(4)[:, None]
    labels = torch.cat([torch.full((12, 12), -100), words], 1)
    batch = {
        "input_ids": torch.cat([prompts["input_ids"].repeat_interleave(3, 0), words], 1),
        "labels": labels,
        "attention_mask": torch.cat(
            [prompts["attention_mask"].repeat_interleave(3, 0), torch.ones_like(words)], 1
        ),
        "examples": torch.arange(4).repeat_interleave(3),
        "answers": torch.arange(4) * 3 + classes,
    }
    forward_options, head_options = CausalLMObjective(model)(batch, reduction="none")
    # Log-likelihoods of about 7 are rounded to fp32.
    torch.testing.assert_close(head_options(forward_options()), head(forward()), rtol=0, atol=2e-6)


def test_losses_of_examples():
    """Their mean is the loss. With answers of several tokens, each example is weighted by its
    tokens."""
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
    each = objective({**batch_of(), "labels": labels}, reduction="tokens")[1](forward())
    assert each.shape == (4, 9) and (each == 0).sum() == 36 - 18
    torch.testing.assert_close(each[1, -3:], token[1, -3:] * 4 / 18, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(each.sum(1), losses, rtol=1e-6, atol=0)
    _, mean = objective({**batch_of(), "labels": labels})
    torch.testing.assert_close(losses.mean(), mean(forward()), rtol=1e-6, atol=0)
    with_words = CausalLMObjective(model, OPTIONS)
    batch = {**batch_of(), "labels": torch.tensor([0, 2, 1, 2])}
    forward, head = with_words(batch, reduction="none")
    losses = head(forward())
    assert losses.shape == (4,)
    assert torch.equal(with_words(batch, reduction="tokens")[1](forward()), losses)
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


def test_a_step_of_pseuzo_runs_the_head_on_loss_positions_once():
    model = causal_lm("opt")
    objective = CausalLMObjective(model, OPTIONS)
    batch = {**batch_of(), "labels": torch.tensor([0, 2, 1, 2])}
    forward, head = objective(batch)  # the first call verifies
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


@pytest.mark.parametrize(
    "options, sentence",
    [
        ([5], "two or more different"),
        ([5, 5], "two or more different"),
        ([5, VOCAB], "token ids below"),
    ],
)
def test_bad_options(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        CausalLMObjective(causal_lm("opt"), options)


@pytest.mark.parametrize("kind", ["opt", "llama"])
def test_a_batch_without_a_label_that_carries_a_loss_is_a_skipped_step(kind):
    """The loss is NaN, like Transformers' own. Such rows among others do not count."""
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
    # see test_padding_changes_nothing
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=1e-5)
    torch.testing.assert_close(losses[0], model(**alone).loss, rtol=0, atol=1e-5)
    assert loss_positions(torch.full((2, 1), 5))[0].tolist() == [[-1], [-1]]


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
