"""With the same arguments, data and weights, PseuZOTrainer and Transformers' own Trainer see and
report the same.

The learning rate is so small that no weight moves, so that the figures of all steps belong to the
same weights.
"""

from functools import partial

import datasets
import numpy as np
import pytest
import torch
from pseuzo import PseuZOTrainer, PseuZOTrainingArguments
from tiny_models import VOCAB, causal_lm
from torch.utils.data import IterableDataset
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerCallback as Events

pytestmark = pytest.mark.slow
LR = 1e-30  # rounds away
# Its name in this version of Transformers.
CHECKPOINTING = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if hasattr(TrainingArguments, name)
)
METHODS = ("pseuzo", "mezo", "fo-sgd")
OWN = {
    "forwards",
    "train_seconds",
    "tokens_per_second",
    "peak_memory_mib",
    "projected_grad",
    "momentum",
    "window",
    "skipped_steps",
    "update_ulps_float32",
}
CLOCK = ("runtime", "per_second", "preparation_time")


def rows(n: int = 10, **more) -> list[dict]:
    """Return rows of 6 to 10 tokens, padded on the right. Labels of the first tokens carry no
    loss."""
    g = torch.Generator().manual_seed(1)
    made = []
    for i in range(n):
        length = 6 + i % 5
        ids = torch.randint(3, VOCAB, (10,), generator=g)
        mask = (torch.arange(10) < length).long()
        labels = ids.masked_fill((mask == 0) | (torch.arange(10) < i % 3 + 1), -100)
        made.append(
            {
                "input_ids": ids.tolist(),
                "attention_mask": mask.tolist(),
                "labels": labels.tolist(),
                **more,
            }
        )
    return made


class Stream(IterableDataset):
    def __iter__(self):
        return iter(rows(7))


def accuracy(prediction) -> dict:
    """Return the accuracy of the next tokens, and the means of the inputs and losses if given."""
    logits, labels = prediction.predictions, prediction.label_ids
    if isinstance(logits, list):  # eval_do_concat_batches=False
        logits, labels = np.concatenate(logits), np.concatenate(labels)
    given = {"inputs": prediction.inputs, "losses": prediction.losses}
    found = {f"mean_of_{name}": float(np.mean(x)) for name, x in given.items() if x is not None}
    chosen = logits if logits.ndim == 2 else logits.argmax(-1)
    there = labels[:, 1:] != -100
    return {
        "accuracy": float((chosen[:, :-1] == labels[:, 1:])[there].mean()),
        "size": float(np.abs(logits).mean()),
        **found,
    }


class Summed:
    """A compute_metrics that is called for each batch, as with batch_eval_metrics."""

    def __init__(self):
        self.total = 0.0

    def __call__(self, prediction, compute_result):
        self.total += float(prediction.predictions.abs().mean())
        return {"total": self.total} if compute_result else {}


class Seen(TrainerCallback):
    """Records the events in their order, each with its step."""

    def __init__(self):
        self.events = []


def _recorded(event: str):
    def record(self, args, state, control, **kwargs):
        self.events.append((event, state.global_step, round(state.epoch or 0, 6), sorted(kwargs)))

    return record


for _event in [name for name in vars(Events) if name.startswith("on_")]:
    setattr(Seen, _event, _recorded(_event))


class StopsAt(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 2
        control.should_evaluate = True


EVAL = dict(eval_strategy="steps", eval_steps=2)
SAVE = dict(save_strategy="steps", save_steps=2)
BEST = dict(load_best_model_at_end=True, metric_for_best_model="loss")
# name: (arguments, other parameters of the trainer, rows)
CASES = {
    "plain": (EVAL, {}, rows()),
    "epochs": (
        dict(max_steps=-1, num_train_epochs=2, logging_strategy="epoch", eval_strategy="epoch"),
        {},
        rows(),
    ),
    "a schedule": (
        dict(lr_scheduler_type="cosine", warmup_steps=2, logging_first_step=True, logging_steps=2),
        {},
        rows(),
    ),
    "last batch dropped": (dict(dataloader_drop_last=True), {}, rows()),
    "by length": (dict(train_sampling_strategy="group_by_length", **EVAL), {}, rows()),
    "in order": (dict(train_sampling_strategy="sequential"), {}, rows()),
    "rebalanced": (dict(train_sampling_strategy="batch_rebalance"), {}, rows()),
    "another seed of the data": (dict(data_seed=5), {}, rows()),
    "a stream": (EVAL, {}, Stream()),
    "columns of a data set": (EVAL, {}, datasets.Dataset.from_list(rows(idx=3, text="a"))),
    "other columns": ({}, {}, rows(idx=3, text="a")),
    "evaluated first": (dict(eval_on_start=True, eval_delay=3, **EVAL), {}, rows()),
    "metrics": (
        dict(include_for_metrics=["inputs", "loss"], **EVAL),
        dict(compute_metrics=accuracy),
        rows(),
    ),
    "metrics by batch": (
        dict(batch_eval_metrics=True, **EVAL),
        dict(compute_metrics=Summed),
        rows(),
    ),
    "metrics, in parts": (
        dict(eval_accumulation_steps=1, eval_do_concat_batches=False, **EVAL),
        dict(compute_metrics=accuracy),
        rows(),
    ),
    "metrics of the chosen": (
        EVAL,
        dict(
            compute_metrics=accuracy,
            preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
        ),
        rows(),
    ),
    "losses alone": (
        dict(prediction_loss_only=True, **EVAL),
        dict(compute_metrics=accuracy),
        rows(),
    ),
    "several sets": (EVAL, dict(eval_dataset={"a": rows(4), "b": rows(6)}), rows()),
    "stopped": ({}, dict(callbacks=[StopsAt]), rows()),
    "stopped early": (
        {**EVAL, **SAVE, **BEST},
        dict(callbacks=[lambda: EarlyStoppingCallback(1)]),
        rows(),
    ),
    "the best is saved": (
        {**EVAL, **BEST, "save_strategy": "best", "save_only_model": True},
        {},
        rows(),
    ),
    "tokens": (
        dict(include_num_input_tokens_seen="non_padding"),
        {},
        [r for r in rows() if all(r["attention_mask"])],
    ),
    "all tokens": (dict(include_num_input_tokens_seen="all"), {}, rows()),
}


SETTINGS = dict(
    per_device_train_batch_size=3,
    seed=7,
    use_cpu=True,
    report_to="none",
    disable_tqdm=True,
    logging_steps=1,
    save_strategy="no",
    lr_scheduler_type="linear",
)


def run(folder, make, kind, case):
    arguments, given, data = CASES[case]
    settings = SETTINGS | dict(max_steps=5, learning_rate=LR, per_device_eval_batch_size=4)
    settings |= arguments
    batches, seen = [], Seen()
    given = dict(given)
    callbacks = [seen, *(one() for one in given.pop("callbacks", ()))]
    if given.get("compute_metrics") is Summed:
        given["compute_metrics"] = Summed()
    model = causal_lm("llama")
    trainer = make(
        model=model,
        args=kind(str(folder), **settings),
        train_dataset=data,
        callbacks=callbacks,
        **dict(eval_dataset=rows(6)) | given,
    )
    collate = trainer.data_collator

    def recorded(features):
        batch = collate(features)
        batches.append(batch["input_ids"].tolist())
        return batch

    trainer.data_collator = recorded
    outcome = trainer.train()
    saved = sorted(f.name for f in folder.glob("checkpoint-*/*.safetensors"))
    seen.events, events = [], seen.events
    predicted = trainer.predict(rows(5))
    metrics = trainer.evaluate()
    return trainer, outcome, events, batches, saved, predicted, metrics


def timeless(row: dict) -> dict:
    return {
        k: v
        for k, v in row.items()
        if not k.endswith(CLOCK) and k not in OWN | {"grad_norm", "total_flos"}
    }


def assert_alike(got: dict, want: dict, rel: float) -> None:
    got, want = timeless(got), timeless(want)
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert got[name] == (
            pytest.approx(value, rel=rel) if isinstance(value, float) else value
        ), name


@pytest.mark.parametrize("case", CASES)
def test_is_the_stock_trainer(tmp_path, case):
    """Losses of the same weights agree to 1e-5, since fp32 sums have another order. Losses of
    MeZO's perturbed passes agree to 1e-3, since their mean differs from the loss at the weights by
    eps^2 times the curvature."""
    stock, outcome, events, batches, saved, predicted, metrics = run(
        tmp_path / "stock", Trainer, TrainingArguments, case
    )
    for method in METHODS[:1] if case not in ("plain", "metrics", "a stream") else METHODS:
        kind = partial(PseuZOTrainingArguments, method=method)
        ours, *found = run(tmp_path / method, PseuZOTrainer, kind, case)
        rel = 1e-3 if method == "mezo" else 1e-5
        assert found[1] == events
        assert found[2] == batches
        assert found[3] == saved
        assert len(ours.state.log_history) == len(stock.state.log_history)
        for got, want in zip(ours.state.log_history, stock.state.log_history, strict=True):
            assert_alike(got, want, rel)
        assert found[0].global_step == outcome.global_step
        assert found[0].training_loss == pytest.approx(outcome.training_loss, rel=rel)
        for name in (
            "epoch",
            "max_steps",
            "num_train_epochs",
            "best_global_step",
            "num_input_tokens_seen",
        ):
            assert getattr(ours.state, name) == getattr(stock.state, name), name
        if stock.state.best_metric is not None:
            assert ours.state.best_metric == pytest.approx(stock.state.best_metric, rel=1e-5)
        assert_alike(found[5], metrics, 1e-5)
        assert_alike(found[4].metrics, predicted.metrics, 1e-5)
        if stock.args.prediction_loss_only:
            assert found[4].predictions is None and predicted.predictions is None
        else:
            parts = (
                (found[4].predictions, found[4].label_ids),
                (predicted.predictions, predicted.label_ids),
            )
            for got, want in zip(*parts, strict=True):
                for g, w in zip(
                    *((x if isinstance(x, list) else [x]) for x in (got, want)), strict=True
                ):
                    np.testing.assert_allclose(g, w, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "more",
    [
        {},
        dict(gradient_accumulation_steps=2),
        dict(max_grad_norm=0.5, weight_decay=0.1),
        {CHECKPOINTING: True},
    ],
    ids=str,
)
def test_first_order_steps_are_the_stock_trainers(tmp_path, more):
    """SGD trains at a rate that matters. Accumulated batches are weighted by their number of
    labels."""
    weights, losses = [], []
    settings = SETTINGS | dict(output_dir=str(tmp_path), max_steps=4, learning_rate=0.5) | more
    for make, kind, which in (
        (Trainer, TrainingArguments, {"optim": "sgd"}),
        (PseuZOTrainer, PseuZOTrainingArguments, {"method": "fo-sgd"}),
    ):
        args = kind(**settings, **which)
        model = causal_lm("llama")
        trainer = make(model, args, train_dataset=rows())
        trainer.train()
        weights.append(dict(model.named_parameters()))
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    start = dict(causal_lm("llama").named_parameters())
    for name, p in weights[0].items():
        # The fp32 sums have another order, so some roundings of the largest step and of the weight
        # differ.
        tolerance = 1e-4 * float((p - start[name]).abs().max()) + 2**-22 * float(p.abs().max())
        torch.testing.assert_close(weights[1][name], p, rtol=0, atol=tolerance)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def padded_left() -> list[dict]:
    return [{name: values[::-1] for name, values in row.items()} for row in rows()]


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_metrics_change_no_evaluation(tmp_path, kind):
    """Rows padded on the left have the same positions as in training, with or without logits in the
    output."""
    found = []
    for given in ({}, {"compute_metrics": lambda prediction: {"n": len(prediction.predictions)}}):
        args = PseuZOTrainingArguments(
            str(tmp_path), use_cpu=True, report_to="none", per_device_eval_batch_size=4
        )
        trainer = PseuZOTrainer(causal_lm(kind), args, eval_dataset=padded_left(), **given)
        found.append(trainer.evaluate())
    assert found[1].pop("eval_n") == 10 and found[0].keys() == found[1].keys()
    assert found[0]["eval_loss"] == pytest.approx(found[1]["eval_loss"], rel=1e-6)
    predicted = trainer.predict(padded_left()).predictions
    alone = PseuZOTrainingArguments(
        str(tmp_path), use_cpu=True, report_to="none", per_device_eval_batch_size=1
    )
    for i, row in enumerate(padded_left()):
        n = sum(row["attention_mask"])
        short = [{name: values[-n:] for name, values in row.items()}]
        logits = PseuZOTrainer(causal_lm(kind), alone).predict(short).predictions
        np.testing.assert_allclose(predicted[i, -n:], logits[0], rtol=0, atol=1e-5)
