"""A run logs the right figures at the right time, and callbacks see them."""

import itertools
import json
import math

import pytest
import torch
from pseuzo import CausalLMObjective
from pseuzo.machine import Fetched
from pseuzo.models.positions import predicted, with_positions
from pseuzo.train.journal_file import read_journal
from pseuzo.train.trainer import PseuZOTrainer
from tiny_models import causal_lm
from trainer_cases import Rows, arguments, fresh
from transformers import (
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

pytestmark = pytest.mark.slow


def test_logs_what_a_run_is_judged_by(tmp_path, demo):
    data, _ = demo
    model = fresh()
    trainer = PseuZOTrainer(
        model,
        arguments(tmp_path, method="pseuzo", window=3, max_steps=5),
        train_dataset=data["train"],
    )
    with torch.no_grad():
        batch = data["train"].collate(
            [data["train"][i] for i in list(data["train"].sampler(7, 3))[:7]]
        )
        forward, head = CausalLMObjective(model, data["train"].options)(batch)
        clean = float(head(forward()))
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    # The loss at the clean weights, before the update, is logged with four digits.
    assert abs(rows[0]["loss"] - clean) < 1e-4
    assert [row["window"] for row in rows] == [1, 2, 3, 3, 3]
    assert all(row["momentum"] == 1.0 and row["skipped_steps"] == 0 for row in rows)
    assert all(
        row["update_ulps_float32"] > 0 and row["tokens_per_second"] > 0 < row["peak_memory_mib"]
        for row in rows
    )
    assert [row["forwards"] for row in rows] == [2, 4, 6, 8, 10]
    assert "grad_norm" not in rows[0]


class Late(Fetched):
    """Behaves as on a GPU that is far behind: nothing has arrived before it is waited for.

    The tensors are copies, which do not see later writes.
    """

    waits = 0

    def __init__(self, *tensors):
        super().__init__(*(t.clone() for t in tensors))

    def here(self):
        return False

    def get(self):
        Late.waits += 1
        return super().get()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["pseuzo", "mezo"])
def test_logs_that_are_late_are_the_same_rows_in_the_same_order(
    tmp_path, demo, method, monkeypatch
):
    data, _ = demo
    behind = []

    class Behind(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            behind.append(
                state.global_step
                - max((r["step"] for r in state.log_history if "loss" in r), default=0)
            )

        def on_log(self, args, state, control, logs=None, **kwargs):
            assert state.log_history[-1]["step"] == state.global_step

    settings = dict(
        method=method,
        window=3,
        max_steps=12,
        logging_steps=2,
        eval_strategy="steps",
        eval_steps=6,
        save_strategy="steps",
        save_steps=8,
        include_num_input_tokens_seen="all",
    )

    def run(name: str) -> tuple[list[dict], float]:
        args = arguments(tmp_path / name, **settings)
        trainer = PseuZOTrainer(
            fresh(), args, None, data["train"], data["dev"], callbacks=[Behind()]
        )
        result = trainer.train()
        return trainer.state.log_history, result.training_loss

    want, want_mean = run("at once")
    assert max(behind) == 2
    behind.clear()
    monkeypatch.setattr("pseuzo.train.logs.Fetched", Late)
    monkeypatch.setattr(Late, "waits", 0)
    got, got_mean = run("late")
    assert behind == [1, 2, 3, 4, 3, 4, 1, 2, 1, 2, 3, 4], (
        "evaluating (6) and saving (8) wait, and so does the next row"
    )
    assert Late.waits == 6

    def timeless(rows: list[dict]) -> list[dict]:
        return [
            {k: v for k, v in r.items() if not k.endswith(("seconds", "second", "runtime", "mib"))}
            for r in rows
        ]

    assert timeless(got) == timeless(want) and got_mean == want_mean
    assert [r["step"] for r in got if "loss" in r] == [2, 4, 6, 8, 10, 12]
    losses = [r["loss"] for r in got if "loss" in r]
    assert want_mean == pytest.approx(sum(losses) / 6, abs=2e-6)
    saved = json.loads((tmp_path / "late" / "checkpoint-8" / "trainer_state.json").read_text())
    assert [r["step"] for r in saved["log_history"]] == [2, 4, 6, 6, 8]


def test_callbacks_best_model_and_tensorboard(tmp_path, demo):
    data, _ = demo
    pytest.importorskip("tensorboard")
    seen = []

    class Seen(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append(state.global_step)
            control.should_training_stop = state.global_step == 6

    args = arguments(
        tmp_path,
        method="mezo",
        learning_rate=1e-3,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        save_total_limit=1,
        metric_for_best_model="accuracy",
        greater_is_better=True,
        report_to="tensorboard",
    )
    trainer = PseuZOTrainer(
        fresh(), args, train_dataset=data["train"], eval_dataset=data["dev"], callbacks=[Seen()]
    )
    trainer.train()
    assert seen == [1, 2, 3, 4, 5, 6]
    history = {
        row["step"]: row["eval_accuracy"]
        for row in trainer.state.log_history
        if "eval_accuracy" in row
    }
    assert history[trainer.state.best_global_step] == max(history.values())
    assert trainer.evaluate()["eval_accuracy"] == max(history.values())  # the best were loaded
    assert any((tmp_path / "runs").rglob("events*")) or any(tmp_path.rglob("events*"))


@pytest.mark.parametrize(
    "more",
    [
        dict(method="pseuzo", window=3),
        dict(method="mezo", clip_examples=2.0),
        dict(method="fo-sgd"),
        dict(method="fo-sgd", clip_examples=2.0),
    ],
    ids=str,
)
def test_rows_without_a_loss_are_counted_and_said(tmp_path, more, caplog):
    """Row 1 is alone in its batch, and rows 4 and 5 share batches with others.

    Weights, journal and state change as in any skipped step, and the mean of the evaluation is that
    of the stock Trainer.
    """
    rows = Rows(8).rows
    for i in (1, 4, 5):
        rows[i]["labels"] = torch.full((10,), -100)
    zeroth = not more["method"].startswith("fo")
    journal = {"journal": str(tmp_path / "run.pzj")} if zeroth else {}

    def batches(number):  # 0: row 1 is alone; 1: row 4 is not
        return [rows[1]] if number == 0 else rows[2:5] if number == 1 else rows[5:8]

    model = causal_lm("llama")
    states = [{n: p.detach().clone() for n, p in model.named_parameters()}]

    class Kept(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            states.append({n: p.detach().clone() for n, p in model.named_parameters()})

    args = arguments(
        tmp_path,
        **more,
        **journal,
        max_steps=3,
        per_device_train_batch_size=1,
        learning_rate=1e-2,
        train_sampling_strategy="sequential",
        per_device_eval_batch_size=1,
        remove_unused_columns=False,
    )

    def collate(items):
        return torch.utils.data.default_collate(batches(items[0]["number"]))

    trainer = PseuZOTrainer(
        model, args, collate, [{"number": i} for i in range(3)], rows, callbacks=[Kept()]
    )
    result = trainer.train()
    moved = [
        any(not torch.equal(p, after[n]) for n, p in before.items())
        for before, after in itertools.pairwise(states)
    ]
    decays = not zeroth  # SGD decays weights at every step, as in the stock Trainer
    assert moved == [decays, True, True]
    logged = [row for row in trainer.state.log_history if "loss" in row]
    assert [row["masked_rows"] for row in logged] == [1, 2, 3]
    assert (
        "1 training row(s) so far have no loss" in caplog.text
        and "3 training row(s)" not in caplog.text
    )
    losses = [row["loss"] for row in logged[1:]]
    assert all(math.isfinite(x) for x in (*losses, result.training_loss))
    # There is no mean before the first step.
    assert result.training_loss == pytest.approx(sum(losses) / 3, abs=1e-5)
    if zeroth:
        assert [row["skipped_steps"] for row in logged] == [1, 1, 1]
        assert [record.skipped for record in read_journal(tmp_path / "run.pzj")[1]] == [
            True,
            False,
            False,
        ]
    plain = TrainingArguments(
        str(tmp_path), per_device_eval_batch_size=1, use_cpu=True, report_to="none"
    )
    texts = [
        row | {"labels": predicted(row["labels"][None], row["attention_mask"][None])[0]}
        for row in rows
    ]
    stock = Trainer(model, plain, torch.utils.data.default_collate, eval_dataset=texts)
    trainer.data_collator = with_positions(torch.utils.data.default_collate)
    want = pytest.approx(stock.evaluate()["eval_loss"], rel=1e-5, nan_ok=True)
    assert trainer.evaluate()["eval_loss"] == want
