"""First-order methods clip examples, use the scales of noise_on, run in mixed precision, and
probe."""

import math

import pytest
import torch
from pseuzo import CausalLMObjective
from pseuzo.models.placement import place
from pseuzo.train.trainer import PseuZOTrainer
from tiny_models import batch_of, causal_lm
from torch.nn import functional as F
from trainer_cases import Rows, arguments

pytestmark = pytest.mark.slow


def tokens_to_predict() -> dict[str, torch.Tensor]:
    """Return rows with 1 to 9 tokens that carry a loss, so that gradients have different sizes."""
    batch = batch_of(rows=5)
    labels = torch.full_like(batch["input_ids"], -100)
    for row, count in enumerate((1, 1, 2, 3, 9)):
        labels[row, -count:] = batch["input_ids"][row, -count:]
    return {**batch, "labels": labels}


def options_to_choose_from() -> dict[str, torch.Tensor]:
    """Return three examples of two or three options, in any order.

    The options of the first have one token, those of the others have more.
    """
    batch = batch_of(rows=8)
    examples = torch.tensor([1, 0, 2, 1, 2, 0, 2, 1])
    labels = torch.full_like(batch["input_ids"], -100)
    for row, count in enumerate((5, 1, 6, 6, 7, 1, 5, 4)):
        labels[row, -count:] = batch["input_ids"][row, -count:]
    return {**batch, "labels": labels, "examples": examples, "answers": torch.tensor([5, 3, 2])}


def label_words() -> dict[str, torch.Tensor]:
    return {**batch_of(rows=5), "labels": torch.tensor([0, 1, 1, 0, 1])}


WORDS = [17, 4]


CLIPPED = {  # batch, model (llama's head is untied), trained weights, R
    "tokens": (tokens_to_predict, "llama", "all", 1.5),
    "tokens, the head alone": (tokens_to_predict, "llama", "lm_head.weight", 1.5),
    "options": (options_to_choose_from, "qwen2", "all", 1.2),
    "label words": (label_words, "llama", "all", 1.0),
}


def by_hand(
    model: torch.nn.Module, batch: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss of each example by the model's own logits, and the input of the head."""
    given = []
    hook = model.lm_head.register_forward_pre_hook(lambda module, args: given.append(args[0]))
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    logits = model(
        batch["input_ids"], attention_mask=batch["attention_mask"], position_ids=positions
    ).logits
    hook.remove()
    labels = batch["labels"]
    if labels.dim() == 1:
        return F.cross_entropy(logits[:, -1, WORDS], labels, reduction="none"), given[0]
    nll = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
    counts = (labels[:, 1:] != -100).sum(1)
    if "examples" not in batch:
        return nll.sum(1) * len(labels) / counts.sum(), given[0]
    scores = -nll.sum(1) / counts
    losses = [
        scores[batch["examples"] == i].logsumexp(0) - scores[row]
        for i, row in enumerate(batch["answers"])
    ]
    return torch.stack(losses), given[0]


@pytest.mark.parametrize("what", CLIPPED)
def test_clipped_first_order_step_is_the_weighted_sum_of_the_examples_gradients(tmp_path, what):
    make_batch, kind, trained, ratio = CLIPPED[what]
    batch, model = make_batch(), causal_lm(kind)
    exact = causal_lm(kind).double()
    losses, o = by_hand(exact, batch)
    sizes = torch.stack(
        [torch.autograd.grad(loss, o, retain_graph=True)[0].norm() for loss in losses]
    )
    weights = (ratio * sizes.median() / sizes).clamp(max=1)  # torch's median is the lower one
    assert (weights < 0.95).any() and (weights == 1).any(), "all examples are scaled alike"
    names = [n for n, _ in exact.named_parameters() if trained in ("all", n)]
    params = [dict(exact.named_parameters())[n] for n in names]
    gradients = [torch.autograd.grad(loss, params, retain_graph=True) for loss in losses]
    before = {n: p.detach().clone() for n, p in model.named_parameters()}

    args = arguments(
        tmp_path,
        method="fo-sgd",
        max_steps=1,
        learning_rate=1.0,
        weight_decay=0.0,
        max_grad_norm=0.0,
        clip_examples=ratio,
        noise_on=[trained],
    )
    objective = CausalLMObjective(model, WORDS) if batch["labels"].dim() == 1 else None
    trainer = PseuZOTrainer(model, args, lambda items: dict(batch), Rows(7), objective=objective)
    trainer.train()
    now = dict(model.named_parameters())
    for name, of_examples in zip(names, zip(*gradients, strict=True), strict=True):
        want = sum(w * g for w, g in zip(weights, of_examples, strict=True)) / len(losses)
        # In fp32 the gradient has the error of some 100 roundings of its largest element, and the
        # weight from which it is subtracted is rounded once.
        tolerance = 1e-5 * float(want.abs().max()) + 2**-24 * float(before[name].abs().max())
        torch.testing.assert_close(
            (before[name] - now[name]).double(), want, rtol=0, atol=tolerance
        )
        assert (want - sum(of_examples) / len(losses)).abs().max() > 10 * tolerance
    assert {n for n in now if not torch.equal(now[n], before[n])} == set(names)
    logged = trainer.state.log_history[0]["loss"]  # logged with four digits
    assert (
        abs(logged - losses.mean().item())
        < 1e-4
        < abs(logged - (weights * losses).mean().item()) - 1e-4
    )


def test_clipping_leaves_evaluation_alone(tmp_path):
    model, rows = causal_lm("llama"), Rows()
    plain, clipped = (
        PseuZOTrainer(
            model,
            arguments(tmp_path, method="fo-sgd", **more),
            train_dataset=rows,
            eval_dataset=rows,
        )
        for more in ({}, {"clip_examples": 0.1})
    )
    assert clipped.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]


@pytest.mark.parametrize(
    "factors", [[0.0, 0.0, 0.0, 5.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]]
)
def test_nothing_is_clipped_where_the_median_is_zero_or_all_are_alike(tmp_path, factors):
    """A user's own loss works as well, if it returns a loss for each example."""

    def objective_of(model, each=True):
        def objective(batch, reduction="mean"):
            def head(o):
                losses = torch.tensor(factors) * model.lm_head(o)[:, 0]
                return losses if each and reduction == "none" else losses.mean()

            return lambda: model.model(batch["input_ids"]).last_hidden_state[:, -1], head

        return objective

    def trained(clip, **more):
        model = causal_lm("llama")
        args = arguments(
            tmp_path,
            method="fo-sgd",
            max_steps=2,
            per_device_train_batch_size=4,
            clip_examples=clip,
        )
        PseuZOTrainer(
            model, args, train_dataset=Rows(4), objective=objective_of(model, **more)
        ).train()
        return dict(model.named_parameters())

    plain, clipped = trained(None), trained(1.0)
    assert all(torch.equal(p, clipped[n]) and p.isfinite().all() for n, p in plain.items())
    with pytest.raises(ValueError, match=r"clip_examples needs the loss of each example, \[B\]"):
        trained(1.0, each=False)


def test_first_order_in_mixed_precision(tmp_path):
    """The weights stay in fp32 and the head runs in bf16, which the check of its logits expects."""
    model = causal_lm("llama")
    args = arguments(tmp_path, method="fo-sgd", bf16=True, max_steps=2, clip_examples=2.0)
    result = PseuZOTrainer(model, args, train_dataset=Rows()).train()
    assert math.isfinite(result.training_loss) and model.lm_head.weight.dtype is torch.float32


@pytest.mark.parametrize("method", ["fo-sgd", "fo-adam"])
def test_scale_of_a_first_order_run_is_the_square_root_of_its_rate(tmp_path, method):
    """All numbers are powers of two, so that SGD's rates and products are exact."""
    model, twin, rows = causal_lm("llama"), causal_lm("llama"), Rows(4)
    scales = place(twin, ["all", "attention-out=2", "embedding=0.5", "head=0"])
    batch = torch.utils.data.default_collate(rows.rows)  # all rows, in this order
    forward, head = CausalLMObjective(twin)(batch)
    head(forward()).backward()
    decay = 0.0 if method == "fo-sgd" else 0.5
    args = arguments(
        tmp_path,
        method=method,
        max_steps=1,
        learning_rate=0.25,
        weight_decay=decay,
        max_grad_norm=0.0,
        noise_on=["all", "attention-out=2", "embedding=0.5", "head=0"],
        per_device_train_batch_size=4,
    )
    trainer = PseuZOTrainer(model, args, lambda items: dict(batch), rows)
    trainer.train()
    rates = {p: g["lr"] for g in trainer.optimizer.param_groups for p in g["params"]}
    decays = {g["lr"] * g["weight_decay"] for g in trainer.optimizer.param_groups}
    assert max(decays) == 0.25 * decay and decays <= {0.0, 0.25 * decay}, (
        "the groups should have one rate, as under zeroth-order methods"
    )
    assert (
        set(rates.values()) == {0.25, 1.0, 0.0625}
        and len(rates) == len(scales) == len(list(model.parameters())) - 1
    )
    for (name, p), start in zip(model.named_parameters(), twin.parameters(), strict=True):
        rate = 0.25 * scales.get(start, 0.0) ** 2
        assert rates.get(p, 0.0) == rate and p.requires_grad == (rate > 0), name
        if method == "fo-sgd":
            assert torch.equal(p, start - rate * start.grad), name
