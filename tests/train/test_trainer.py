"""PseuZOTrainer trains like plain loops over the same batches."""

import math

import pytest
import torch
from pseuzo import MeZO, PseuZO
from pseuzo.models.placement import param_groups, place
from pseuzo.models.positions import predicted
from pseuzo.train.trainer import PseuZOTrainer
from tiny_models import VOCAB, causal_lm
from trainer_cases import Rows, arguments, fresh, loop, of_a_classifier, of_a_regression

pytestmark = pytest.mark.slow


def test_pseuzo_is_the_plain_loop(tmp_path, demo):
    data, _ = demo
    args = arguments(
        tmp_path, method="pseuzo", window=4, momentum=0.8, groups="label", clip_examples=1.5
    )
    model = fresh()
    PseuZOTrainer(model, args, train_dataset=data["train"]).train()

    def make(m):
        groups = param_groups(m, place(m, ["all"]), lr=2e-4, weight_decay=0.02)
        return PseuZO(
            groups, lr=2e-4, eps=1e-3, window=4, momentum=0.8, seed=3, model=m, clip_examples=1.5
        )

    def step(optimizer, objective, batch):
        forward, head = objective(batch, reduction="none")
        optimizer.step(forward, head, groups=batch["groups"])

    want = loop(data["train"], args, make, step)
    start = dict(fresh().named_parameters())
    assert any(not torch.equal(p, start[n]) for n, p in model.named_parameters())
    for name, p in model.named_parameters():
        assert torch.equal(p, want[name]), name


def test_mezo_on_some_weights_is_the_plain_loop(tmp_path, demo):
    data, _ = demo
    args = arguments(
        tmp_path, method="mezo", directions=2, noise_on=["attention-out", "*fc1.weight=0.5"]
    )
    model = fresh()
    PseuZOTrainer(model, args, train_dataset=data["train"]).train()

    def make(m):
        groups = param_groups(
            m, place(m, ["attention-out", "*fc1.weight=0.5"]), lr=2e-4, weight_decay=0.02
        )
        return MeZO(groups, lr=2e-4, eps=1e-3, directions=2, seed=3, model=m)

    def step(optimizer, objective, batch):
        forward, head = objective(batch)
        optimizer.step(lambda: head(forward()))

    want = loop(data["train"], args, make, step)
    start = dict(fresh().named_parameters())
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, start[n])}
    assert moved == {
        n
        for n in start
        if n.endswith("fc1.weight")
        or (n.endswith(("v_proj.weight", "out_proj.weight")) and ".layers.0." not in n)
    }
    for name, p in model.named_parameters():
        assert torch.equal(p, want[name]), name


@pytest.mark.parametrize("method", ["pseuzo", "mezo", "fo-adam"])
def test_trains_and_evaluates_any_dataset_with_labels(tmp_path, method):
    model = causal_lm("gpt2")
    lr, steps = {"pseuzo": (3e-4, 90), "mezo": (5e-4, 90), "fo-adam": (1e-3, 12)}[method]
    args = arguments(
        tmp_path,
        method=method,
        max_steps=steps,
        learning_rate=lr,
        eval_strategy="steps",
        eval_steps=steps,
        eval_on_start=True,
        per_device_train_batch_size=4,
        weight_decay=0.0,
        logging_steps=30,
        window=3,
        momentum=0.3,
        per_device_eval_batch_size=12,
    )
    rows = Rows()
    trainer = PseuZOTrainer(model, args, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    losses = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    with torch.no_grad():
        model.eval()
        texts = [row["input_ids"][None, row["attention_mask"] == 1] for row in rows.rows]
        # Each row is evaluated alone.
        sums = [model(input_ids=ids, labels=ids).loss * (ids.shape[1] - 1) for ids in texts]
        whole = float(sum(sums) / sum(ids.shape[1] - 1 for ids in texts))
    assert len(losses) == 2 and losses[-1] < losses[0]
    assert losses[-1] == pytest.approx(whole, rel=1e-5) and losses[0] > 0.9 * math.log(VOCAB)


def test_non_differentiable_objective(tmp_path, demo):
    """mezo descends 1 - accuracy over the batch. This is a step function, nearly flat for a small
    eps."""
    data, _ = demo
    args = arguments(
        tmp_path, method="mezo", objective="metric", eps=5e-2, max_steps=3, learning_rate=1e-4
    )
    trainer = PseuZOTrainer(fresh(), args, train_dataset=data["train"])
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    # The loss is the mean of two shares of 7 rows, or of fewer rows in the last batch.
    sevenths = [row["loss"] * 14 for row in rows]
    assert all(abs(x - round(x)) < 1e-3 for x in sevenths[:2])


@pytest.mark.parametrize("head", ["frozen", "exact"])
def test_untied_head_is_frozen_or_descends_its_exact_gradient(tmp_path, head):
    model = causal_lm("llama")
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    rows = Rows(4)
    args = arguments(
        tmp_path,
        head=head,
        head_lr=0.25,
        max_steps=1,
        per_device_train_batch_size=4,
        weight_decay=0.1,
    )
    batch = torch.utils.data.default_collate(rows.rows)
    batch["labels"] = predicted(batch["labels"], batch["attention_mask"])
    model.eval()
    (gradient,) = torch.autograd.grad(model(**batch).loss, model.lm_head.weight)
    PseuZOTrainer(model, args, train_dataset=rows).train()
    now = dict(model.named_parameters())
    want = start["lm_head.weight"] - (0.25 * gradient if head == "exact" else 0)
    # Only weights that get noise decay. The fp32 products are summed in another order.
    torch.testing.assert_close(now["lm_head.weight"], want, rtol=0, atol=1e-6)
    assert not torch.equal(now["model.embed_tokens.weight"], start["model.embed_tokens.weight"])


@pytest.mark.parametrize(
    "more",
    [dict(groups="label"), dict(groups="none"), dict(method="mezo"), dict(method="fo-sgd")],
    ids=str,
)
@pytest.mark.parametrize("make", [of_a_regression, of_a_classifier])
def test_own_objective_on_any_module(tmp_path, make, more):
    """With groups="none", pseuzo's window pairs every row with every other."""
    (model, rows, objective, before_the_head), (twin, _, of_twin, _) = make(), make()
    args = arguments(
        tmp_path,
        **dict(method="pseuzo", window=3, max_steps=3, per_device_train_batch_size=8) | more,
        weight_decay=0.0,
        label_names=["labels" if "labels" in rows[0] else "y"],
    )
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    batch = torch.utils.data.default_collate(rows)
    trainer = PseuZOTrainer(model, args, lambda items: dict(batch), rows, rows, objective=objective)
    trainer.train()
    logged = [row for row in trainer.state.log_history if "loss" in row]
    assert len(logged) == 3 and all(math.isfinite(row["loss"]) for row in logged)
    assert all(("tokens_per_second" in row) == ("input_ids" in rows[0]) for row in logged)
    with torch.no_grad():
        forward, head = objective(batch)
        assert trainer.evaluate()["eval_loss"] == pytest.approx(float(head(forward())), rel=1e-5)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, start[n])}
    if args.method != "pseuzo":
        return
    assert moved == before_the_head
    opt = PseuZO(twin, lr=2e-4, window=3, seed=3)
    groups = torch.zeros(8, dtype=torch.int64) if args.groups == "none" else None
    for _ in range(3):
        opt.step(*of_twin(batch), groups=groups)
    assert all(
        torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True)
    )


def test_metrics_and_predictions_with_an_objective_of_ones_own(tmp_path):
    """The loss is the objective's, and the predictions are the outputs of the model's forward."""
    model, rows, objective, _ = of_a_regression()
    batch = torch.utils.data.default_collate(rows)
    args = arguments(tmp_path, method="mezo", label_names=["y"], per_device_eval_batch_size=8)

    def error(prediction):
        return {"error": float(((prediction.predictions - prediction.label_ids) ** 2).mean())}

    for metrics in (error, None):
        trainer = PseuZOTrainer(
            model, args, None, rows, rows, objective=objective, compute_metrics=metrics
        )
        trainer.data_collator = torch.utils.data.default_collate
        found = trainer.evaluate()
        with torch.no_grad():
            forward, head = objective(batch)
            want = model(batch["x"])
        assert found["eval_loss"] == pytest.approx(float(head(forward())), rel=1e-5)
        assert metrics is None or found["eval_error"] == pytest.approx(found["eval_loss"], rel=1e-5)
        predicted = trainer.predict(rows)
        torch.testing.assert_close(torch.tensor(predicted.predictions), want)
        assert predicted.metrics["test_loss"] == found["eval_loss"]


def test_own_optimizer_and_several_evaluation_sets(tmp_path, demo):
    data, _ = demo
    model = fresh()
    optimizer = MeZO(model, lr=1e-4, seed=5)
    trainer = PseuZOTrainer(
        model,
        arguments(tmp_path, method="mezo", max_steps=2),
        train_dataset=data["train"],
        eval_dataset={"dev": data["dev"], "test": data["test"]},
        optimizers=(optimizer, None),
    )
    trainer.train()
    assert optimizer.state_dict()["state"]["zero_order"]["step"] == 2
    assert {"eval_dev_accuracy", "eval_test_accuracy"} <= trainer.evaluate().keys()
    with pytest.raises(ValueError, match="needs MeZO or PseuZO"):
        sgd = torch.optim.SGD(model.parameters(), 0.1)
        PseuZOTrainer(
            model, arguments(tmp_path), train_dataset=data["train"], optimizers=(sgd, None)
        )
    with pytest.raises(ValueError, match="model_init"):
        PseuZOTrainer(None, arguments(tmp_path), train_dataset=data["train"], model_init=fresh)
