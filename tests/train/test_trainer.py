"""PseuZOTrainer against plain loops over the same batches, and what it refuses."""

import itertools
import json
import math
import os
import re
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from pseuzo import CausalLMObjective, MeZO, PseuZO
from pseuzo.cli.commands import main
from pseuzo.cli.run import max_length, model_path
from pseuzo.machine import Fetched
from pseuzo.models.loading import load_model
from pseuzo.models.placement import param_groups, place
from pseuzo.models.positions import predicted, with_positions
from pseuzo.tasks import TaskData, load_task
from pseuzo.train.arguments import UNUSED, PseuZOTrainingArguments
from pseuzo.train.checks import NOT_TAKEN
from pseuzo.train.journal_file import read_journal
from pseuzo.train.trainer import PseuZOTrainer
from safetensors.torch import load_file
from tiny_models import VOCAB, batch_of, causal_lm
from torch.nn import functional as F
from transformers import (
    OPTConfig,
    OPTForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_callback import ExportableState

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def demo():
    task = load_task("demo")
    examples = task.load(None, train=50, dev=20, test=20, seed=0)
    model, tokenizer = load_model(model_path("demo"))
    data = {
        k: TaskData(e, task, tokenizer, max_length=max_length(model)) for k, e in examples.items()
    }
    return data, tokenizer


def fresh() -> torch.nn.Module:
    return load_model(model_path("demo"))[0]


def arguments(folder, **changes) -> PseuZOTrainingArguments:
    defaults = dict(
        output_dir=str(folder), max_steps=9, per_device_train_batch_size=7, learning_rate=2e-4, use_cpu=True,
        save_strategy="no", report_to="none", disable_tqdm=True, logging_steps=1, seed=3, weight_decay=0.02,
    )  # fmt: skip
    return PseuZOTrainingArguments(**(defaults | changes))


def loop(data: TaskData, args: PseuZOTrainingArguments, make, step) -> dict[str, torch.Tensor]:
    """The plain loop: batches of the sampler, epoch by epoch."""
    model = fresh()
    objective = CausalLMObjective(model, data.options)
    optimizer = make(model)
    sampler = data.sampler(args.per_device_train_batch_size, args.seed)
    done, epoch = 0, 0
    while done < args.max_steps:
        sampler.set_epoch(epoch)
        order = list(sampler)
        for first in range(0, len(order), args.per_device_train_batch_size):
            if done == args.max_steps:
                break
            batch = data.collate(
                [data[i] for i in order[first : first + args.per_device_train_batch_size]]
            )
            step(optimizer, objective, batch)
            done += 1
        epoch += 1
    return dict(model.named_parameters())


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
    assert moved == {n for n in start if n.endswith("fc1.weight") or (n.endswith(("v_proj.weight", "out_proj.weight"))
                                                                     and ".layers.0." not in n)}  # fmt: skip
    for name, p in model.named_parameters():
        assert torch.equal(p, want[name]), name


class Rows(torch.utils.data.Dataset):
    """A user's own data: token ids and labels."""

    def __init__(self, n: int = 12):
        batch = batch_of(rows=n, length=10)
        self.rows = [{"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
                     for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]  # fmt: skip

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i]


@pytest.mark.parametrize("method", ["pseuzo", "mezo", "fo-adam"])
def test_trains_and_evaluates_any_dataset_with_labels(tmp_path, method):
    model = causal_lm("gpt2")
    lr, steps = {"pseuzo": (3e-4, 90), "mezo": (5e-4, 90), "fo-adam": (1e-3, 12)}[method]
    args = arguments(tmp_path, method=method, max_steps=steps, learning_rate=lr, eval_strategy="steps",
                     eval_steps=steps, eval_on_start=True, per_device_train_batch_size=4, weight_decay=0.0,
                     logging_steps=30, window=3, momentum=0.3, per_device_eval_batch_size=12)  # fmt: skip
    rows = Rows()
    trainer = PseuZOTrainer(model, args, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    losses = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    with torch.no_grad():
        model.eval()
        texts = [row["input_ids"][None, row["attention_mask"] == 1] for row in rows.rows]
        sums = [
            model(input_ids=ids, labels=ids).loss * (ids.shape[1] - 1) for ids in texts
        ]  # each row alone
        whole = float(sum(sums) / sum(ids.shape[1] - 1 for ids in texts))
    assert len(losses) == 2 and losses[-1] < losses[0]
    assert losses[-1] == pytest.approx(whole, rel=1e-5) and losses[0] > 0.9 * math.log(VOCAB)


def test_resumed_in_the_middle_of_an_epoch_is_bit_for_bit_the_same(tmp_path, demo):
    data, _ = demo
    settings = dict(method="pseuzo", window=5, max_steps=13, save_strategy="steps", save_steps=6,
                    lr_scheduler_type="linear", warmup_steps=2)  # fmt: skip
    whole = fresh()
    PseuZOTrainer(whole, arguments(tmp_path / "a", **settings), train_dataset=data["train"]).train()
    resumed = fresh()
    trainer = PseuZOTrainer(
        resumed, arguments(tmp_path / "a", **settings), train_dataset=data["train"]
    )
    trainer.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-6"))
    for (name, p), q in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q), name
    seconds = [row["train_seconds"] for row in trainer.state.log_history if "train_seconds" in row]
    assert seconds == sorted(seconds)


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
    assert (
        abs(rows[0]["loss"] - clean) < 1e-4
    )  # logged with four digits: at the clean weights, before the update
    assert [row["window"] for row in rows] == [1, 2, 3, 3, 3]
    assert all(row["momentum"] == 1.0 and row["skipped_steps"] == 0 for row in rows)
    assert all(
        row["update_ulps_float32"] > 0 and row["tokens_per_second"] > 0 < row["peak_memory_mib"]
        for row in rows
    )
    assert [row["forwards"] for row in rows] == [2, 4, 6, 8, 10]
    assert "grad_norm" not in rows[0]


class Late(Fetched):
    """As on a GPU that is far behind: nothing is here before it is waited for. Copies, blind to later writes."""

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

    settings = dict(method=method, window=3, max_steps=12, logging_steps=2, eval_strategy="steps", eval_steps=6,
                    save_strategy="steps", save_steps=8, include_num_input_tokens_seen="all")  # fmt: skip

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

    args = arguments(tmp_path, method="mezo", learning_rate=1e-3, eval_strategy="steps", eval_steps=2,
                     save_strategy="steps", save_steps=2, load_best_model_at_end=True, save_total_limit=1,
                     metric_for_best_model="accuracy", greater_is_better=True, report_to="tensorboard")  # fmt: skip
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
    assert trainer.evaluate()["eval_accuracy"] == max(history.values())  # its weights were loaded
    assert any((tmp_path / "runs").rglob("events*")) or any(tmp_path.rglob("events*"))


def test_probe_is_kept_for_a_resumed_run(tmp_path, demo):
    data, _ = demo
    settings = dict(
        method="mezo", noise_on=["attention-out"], scale_lr=True, scale_eps=True, probe_forwards=30
    )
    trainer = PseuZOTrainer(fresh(), arguments(tmp_path, **settings), train_dataset=data["train"])
    first = trainer.create_optimizer()
    decided = json.loads((tmp_path / "noise_on.json").read_text())
    assert (
        decided["lr"] == first.param_groups[0]["lr"] > 2e-4 and decided["eps"] == first.eps > 1e-3
    )
    # eps^2 and lr grow by the same share of the curvature
    assert decided["lr"] / 2e-4 == pytest.approx((decided["eps"] / 1e-3) ** 2, rel=1e-6)
    decided["lr"] = 0.125
    (tmp_path / "noise_on.json").write_text(json.dumps(decided))
    again = PseuZOTrainer(
        fresh(), arguments(tmp_path, **settings), train_dataset=data["train"]
    ).create_optimizer()
    assert again.param_groups[0]["lr"] == 0.125


def test_non_differentiable_objective(tmp_path, demo):
    """1 - accuracy over the batch is what mezo then descends: a step function, nearly flat for a small eps."""
    data, _ = demo
    args = arguments(
        tmp_path, method="mezo", objective="metric", eps=5e-2, max_steps=3, learning_rate=1e-4
    )
    trainer = PseuZOTrainer(fresh(), args, train_dataset=data["train"])
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    sevenths = [
        row["loss"] * 14 for row in rows
    ]  # the mean of two shares of 7, or of the last batch's fewer
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
    # weight decay is for the noised weights; fp32 products in another order
    torch.testing.assert_close(now["lm_head.weight"], want, rtol=0, atol=1e-6)
    assert not torch.equal(now["model.embed_tokens.weight"], start["model.embed_tokens.weight"])


def tokens_to_predict() -> dict[str, torch.Tensor]:
    """Rows with 1 to 9 tokens that carry a loss: gradients of different sizes."""
    batch = batch_of(rows=5)
    labels = torch.full_like(batch["input_ids"], -100)
    for row, count in enumerate((1, 1, 2, 3, 9)):
        labels[row, -count:] = batch["input_ids"][row, -count:]
    return {**batch, "labels": labels}


def options_to_choose_from() -> dict[str, torch.Tensor]:
    """Three examples of two or three options, in any order; those of the first have one token, the others' more."""
    batch = batch_of(rows=8)
    examples = torch.tensor([1, 0, 2, 1, 2, 0, 2, 1])
    labels = torch.full_like(batch["input_ids"], -100)
    for row, count in enumerate((5, 1, 6, 6, 7, 1, 5, 4)):
        labels[row, -count:] = batch["input_ids"][row, -count:]
    return {**batch, "labels": labels, "examples": examples, "answers": torch.tensor([5, 3, 2])}


def label_words() -> dict[str, torch.Tensor]:
    return {**batch_of(rows=5), "labels": torch.tensor([0, 1, 1, 0, 1])}


WORDS = [17, 4]
CLIPPED = {  # a batch, a model (llama's head is untied), what is trained, R
    "tokens": (tokens_to_predict, "llama", "all", 1.5),
    "tokens, the head alone": (tokens_to_predict, "llama", "lm_head.weight", 1.5),
    "options": (options_to_choose_from, "qwen2", "all", 1.2),
    "label words": (label_words, "llama", "all", 1.0),
}


def by_hand(
    model: torch.nn.Module, batch: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of each example by the model's own logits, and what its head was given."""
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
    assert (weights < 0.95).any() and (weights == 1).any(), "an example is scaled, and one is not"
    names = [n for n, _ in exact.named_parameters() if trained in ("all", n)]
    params = [dict(exact.named_parameters())[n] for n in names]
    gradients = [torch.autograd.grad(loss, params, retain_graph=True) for loss in losses]
    before = {n: p.detach().clone() for n, p in model.named_parameters()}

    args = arguments(tmp_path, method="fo-sgd", max_steps=1, learning_rate=1.0, weight_decay=0.0, max_grad_norm=0.0,
                     clip_examples=ratio, noise_on=[trained])  # fmt: skip
    objective = CausalLMObjective(model, WORDS) if batch["labels"].dim() == 1 else None
    trainer = PseuZOTrainer(model, args, lambda items: dict(batch), Rows(7), objective=objective)
    trainer.train()
    now = dict(model.named_parameters())
    for name, of_examples in zip(names, zip(*gradients, strict=True), strict=True):
        want = sum(w * g for w, g in zip(weights, of_examples, strict=True)) / len(losses)
        # in fp32: the gradient to some 100 roundings of its largest element, and the weight it is taken from to one
        tolerance = 1e-5 * float(want.abs().max()) + 2**-24 * float(before[name].abs().max())
        torch.testing.assert_close(
            (before[name] - now[name]).double(), want, rtol=0, atol=tolerance
        )
        assert (want - sum(of_examples) / len(losses)).abs().max() > 10 * tolerance
    assert {n for n in now if not torch.equal(now[n], before[n])} == set(names)
    logged = trainer.state.log_history[0]["loss"]  # with four digits
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
    """And a loss of the user's own will do, if it is one for each example."""

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


class Regression(torch.nn.Module):
    """No Transformers model at all."""

    def __init__(self):
        super().__init__()
        self.body, self.out = torch.nn.Linear(5, 40), torch.nn.Linear(40, 1)

    def forward(self, x):
        return self.out(self.body(x).tanh())[:, 0]


def of_a_regression():
    torch.manual_seed(0)
    model, x = Regression(), torch.randn(8, 5)
    rows = [{"x": row, "y": row.sum()} for row in x]

    def objective(batch):
        return lambda: model.body(batch["x"]).tanh(), lambda o: F.mse_loss(
            model.out(o)[:, 0], batch["y"]
        )

    return model, rows, objective, {"body.weight", "body.bias"}


def of_a_classifier():
    torch.manual_seed(0)
    model = OPTForSequenceClassification(
        OPTConfig(vocab_size=VOCAB, hidden_size=32, ffn_dim=64, num_hidden_layers=1, num_attention_heads=2,
                  max_position_embeddings=64)
    )  # fmt: skip
    batch = batch_of(rows=8)
    rows = [{"input_ids": ids, "attention_mask": mask, "labels": torch.tensor(i % 2)}
            for i, (ids, mask) in enumerate(zip(batch["input_ids"], batch["attention_mask"], strict=True))]  # fmt: skip

    def objective(batch):
        def forward():
            return model.model(
                batch["input_ids"], attention_mask=batch["attention_mask"]
            ).last_hidden_state[:, -1]

        return forward, lambda o: F.cross_entropy(model.score(o), batch["labels"])

    return model, rows, objective, {n for n, _ in model.named_parameters() if n != "score.weight"}


@pytest.mark.parametrize("more", [dict(groups="label"), dict(groups="none"), dict(method="mezo"),
                                  dict(method="fo-sgd")], ids=str)  # fmt: skip
@pytest.mark.parametrize("make", [of_a_regression, of_a_classifier])
def test_own_objective_on_any_module(tmp_path, make, more):
    """And pseuzo's window pairs every row with every other where groups is none."""
    (model, rows, objective, before_the_head), (twin, _, of_twin, _) = make(), make()
    args = arguments(tmp_path, **dict(method="pseuzo", window=3, max_steps=3, per_device_train_batch_size=8) | more,
                     weight_decay=0.0, label_names=["labels" if "labels" in rows[0] else "y"])  # fmt: skip
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


def test_first_order_in_mixed_precision(tmp_path):
    """The weights stay in fp32, the head too runs in bf16, and the check of its logits knows."""
    model = causal_lm("llama")
    args = arguments(tmp_path, method="fo-sgd", bf16=True, max_steps=2, clip_examples=2.0)
    result = PseuZOTrainer(model, args, train_dataset=Rows()).train()
    assert math.isfinite(result.training_loss) and model.lm_head.weight.dtype is torch.float32


@pytest.mark.parametrize("method", ["fo-sgd", "fo-adam"])
def test_scale_of_a_first_order_run_is_the_square_root_of_its_rate(tmp_path, method):
    """Powers of two, so that SGD's rates and products are exact."""
    model, twin, rows = causal_lm("llama"), causal_lm("llama"), Rows(4)
    scales = place(twin, ["all", "attention-out=2", "embedding=0.5", "head=0"])
    batch = torch.utils.data.default_collate(rows.rows)  # of all of them: in this order
    forward, head = CausalLMObjective(twin)(batch)
    head(forward()).backward()
    decay = 0.0 if method == "fo-sgd" else 0.5
    args = arguments(tmp_path, method=method, max_steps=1, learning_rate=0.25, weight_decay=decay, max_grad_norm=0.0,
                     noise_on=["all", "attention-out=2", "embedding=0.5", "head=0"],
                     per_device_train_batch_size=4)  # fmt: skip
    trainer = PseuZOTrainer(model, args, lambda items: dict(batch), rows)
    trainer.train()
    rates = {p: g["lr"] for g in trainer.optimizer.param_groups for p in g["params"]}
    decays = {g["lr"] * g["weight_decay"] for g in trainer.optimizer.param_groups}
    assert max(decays) == 0.25 * decay and decays <= {0.0, 0.25 * decay}, (
        "of one rate, as under zeroth-order methods"
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


@pytest.mark.slow
def test_first_order_run_where_a_probe_says(tmp_path):
    """From the command line; and the trainer takes what was found once, as a resumed run must."""
    out = tmp_path / "run"
    args = ["--model", "demo", "--task", "demo", "--train-size", "48", "--dev-size", "24", "--test-size", "24",
            "--eval-batch-size", "24", "--device", "cpu", "--quiet", "--method", "fo-sgd", "--noise-on", "auto",
            "--clip-examples", "2", "--batch-size", "6", "--steps", "4", "--keep", "last"]  # fmt: skip
    result = CliRunner().invoke(main, ["train", *args, "--output", str(out)])
    assert result.exit_code == 0, result.output
    decided = json.loads((out / "noise_on.json").read_text())
    assert 0 < len(decided["noise_on"]) < len(decided["table"]) and all(
        r["name"] in result.output for r in decided["table"]
    )
    model = fresh()
    chosen = place(model, decided["noise_on"])
    now = load_file(out / "model" / "model.safetensors")
    for name, p in model.named_parameters():
        if not name.endswith(
            "k_proj.bias"
        ):  # added to all keys, it changes nothing: its gradient is rounding
            assert torch.equal(now[name], p) == (p not in chosen), name
    figures = json.loads((out / "results.json").read_text())
    assert figures["lr"] == decided["lr"] != 1e-3, "scaled to where it trains"


@pytest.mark.slow
def test_probe_of_a_first_order_run_is_made_once_and_draws_nothing(tmp_path, demo):
    data, _ = demo
    settings = dict(
        method="fo-adam", noise_on=["auto"], scale_lr=True, probe_forwards=30, clip_examples=2.0
    )

    def trainer() -> PseuZOTrainer:
        return PseuZOTrainer(fresh(), arguments(tmp_path, **settings), train_dataset=data["train"])

    first = trainer()
    state = torch.random.get_rng_state()
    optimizer = first.create_optimizer()
    assert torch.equal(torch.random.get_rng_state(), state), (
        "dropout is as in a run that need not probe"
    )
    decided = json.loads((tmp_path / "noise_on.json").read_text())
    assert {g["lr"] for g in optimizer.param_groups} == {decided["lr"]}
    decided |= {"noise_on": ["v:late"], "lr": 0.125}
    (tmp_path / "noise_on.json").write_text(json.dumps(decided))
    again = trainer()
    (group,) = again.create_optimizer().param_groups
    assert group["lr"] == 0.125
    assert {n for n, p in again.model.named_parameters() if p.requires_grad} == {
        n for n, p in fresh().named_parameters() if n.endswith("layers.3.self_attn.v_proj.weight")
    }


def spoil_generation_config(model, trainer):
    model.generation_config.temperature = (
        0.9  # without do_sample; loaded like that, Transformers would let it pass
    )


def share_weights(model, trainer):
    first, second = model.model.decoder.layers
    second.fc1.weight = first.fc1.weight


def spoil_config(model, trainer):
    model.config.kept = {1, 2}


def spoil_arguments(model, trainer):
    trainer.args.kept = lambda: None


def spoil_tokenizer(model, trainer):
    def save_pretrained(folder):
        raise NotImplementedError("This tokenizer cannot be saved.")

    trainer.data_collator.tokenizer = SimpleNamespace(save_pretrained=save_pretrained)


def spoil_callback(model, trainer):
    class Kept(TrainerCallback, ExportableState):
        def state(self):
            return {"args": {}, "attributes": {"seen": torch.ones(2)}}

    trainer.add_callback(Kept())


UNSAVABLE = {
    spoil_generation_config: "`temperature`", share_weights: "shared tensors", spoil_config: "set is not JSON",
    spoil_arguments: "lambda", spoil_tokenizer: "This tokenizer cannot be saved", spoil_callback: "Tensor is not JSON",
}  # fmt: skip


@pytest.mark.parametrize("spoil", UNSAVABLE)
@pytest.mark.parametrize("save_strategy", ["steps", "no"])
def test_what_can_only_fail_at_a_save_fails_before_the_first_step(
    tmp_path, spoil, save_strategy, caplog
):
    model, words = causal_lm("opt"), UNSAVABLE[spoil]
    args = arguments(tmp_path, method="mezo", max_steps=1, save_strategy=save_strategy)
    trainer = PseuZOTrainer(model, args, train_dataset=Rows(7))
    spoil(model, trainer)
    if save_strategy == "no":  # as nothing may ever be saved
        trainer.train()
        assert (
            trainer.state.global_step == 1
            and words in caplog.text
            and "save_model() would fail" in caplog.text
        )
    else:
        with pytest.raises(ValueError, match=f"could not be saved, so no step is made: .*{words}"):
            trainer.train()
        assert trainer.state.global_step == 0
    assert not list(tmp_path.iterdir())


class TiedModule(torch.nn.Module):
    """No Transformers model, and safetensors refuses weights that are one."""

    def __init__(self):
        super().__init__()
        self.body, self.out = torch.nn.Linear(5, 5), torch.nn.Linear(5, 5)
        self.out.weight = self.body.weight


def test_tied_weights_of_any_module_are_refused_before_the_first_step(tmp_path):
    model = TiedModule()
    args = arguments(tmp_path, method="mezo", max_steps=1, save_strategy="steps")
    rows = [{"x": torch.ones(5), "labels": torch.ones(5)}] * 8

    def objective(batch):
        return lambda: model.out(model.body(batch["x"])), lambda o: F.mse_loss(o, batch["labels"])

    trainer = PseuZOTrainer(model, args, train_dataset=rows, objective=objective)
    with pytest.raises(ValueError, match=r"could not be saved, so no step is made: .*share memory"):
        trainer.train()
    assert trainer.state.global_step == 0 and not list(tmp_path.iterdir())


def test_a_disk_without_room_for_a_checkpoint_is_refused_before_the_first_step(
    tmp_path, monkeypatch
):
    model = causal_lm("opt")
    weights = 4 * sum(p.numel() for p in model.parameters())  # the head is the embedding
    for method, needed in {
        "mezo": weights,
        "fo-adam": 3 * weights,
    }.items():  # two moments of Adam's

        def trainer(free: int, method: str = method) -> PseuZOTrainer:
            monkeypatch.setattr(
                "pseuzo.files.shutil.disk_usage", lambda folder: SimpleNamespace(free=free)
            )
            args = arguments(tmp_path / method, method=method, max_steps=1, save_strategy="steps")
            return PseuZOTrainer(causal_lm("opt"), args, train_dataset=Rows(7))

        short = trainer(needed - 1)
        with pytest.raises(ValueError, match="left: make room, or choose a folder on another disk"):
            short.train()
        assert short.state.global_step == 0
        trainer(needed).train()
        assert (tmp_path / method / "checkpoint-1" / "trainer_state.json").exists()


@pytest.mark.parametrize("more", [
    dict(method="pseuzo", window=3), dict(method="mezo", clip_examples=2.0), dict(method="fo-sgd"),
    dict(method="fo-sgd", clip_examples=2.0),
], ids=str)  # fmt: skip
def test_rows_without_a_loss_are_counted_and_said(tmp_path, more, caplog):
    """Row 1 is alone in its batch, rows 4 and 5 are with others; weights, journal and state are as for any skipped
    step, and the mean of the evaluation is that of the stock Trainer."""
    rows = Rows(8).rows
    for i in (1, 4, 5):
        rows[i]["labels"] = torch.full((10,), -100)
    zeroth = not more["method"].startswith("fo")
    journal = {"journal": str(tmp_path / "run.pzj")} if zeroth else {}

    def batches(number):  # 0: 1 alone; 1: 4 among others
        return [rows[1]] if number == 0 else rows[2:5] if number == 1 else rows[5:8]

    model = causal_lm("llama")
    states = [{n: p.detach().clone() for n, p in model.named_parameters()}]

    class Kept(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            states.append({n: p.detach().clone() for n, p in model.named_parameters()})

    args = arguments(tmp_path, **more, **journal, max_steps=3, per_device_train_batch_size=1, learning_rate=1e-2,
                     train_sampling_strategy="sequential", per_device_eval_batch_size=1,
                     remove_unused_columns=False)  # fmt: skip
    collate = lambda items: torch.utils.data.default_collate(batches(items[0]["number"]))  # noqa: E731
    trainer = PseuZOTrainer(
        model, args, collate, [{"number": i} for i in range(3)], rows, callbacks=[Kept()]
    )
    result = trainer.train()
    moved = [
        any(not torch.equal(p, after[n]) for n, p in before.items())
        for before, after in itertools.pairwise(states)
    ]
    decays = not zeroth  # SGD's weight decay is of every step, as in the stock Trainer
    assert moved == [decays, True, True]
    logged = [row for row in trainer.state.log_history if "loss" in row]
    assert [row["masked_rows"] for row in logged] == [1, 2, 3]
    assert (
        "1 training row(s) so far carry no loss" in caplog.text
        and "3 training row(s)" not in caplog.text
    )
    losses = [row["loss"] for row in logged[1:]]
    assert all(math.isfinite(x) for x in (*losses, result.training_loss))
    assert result.training_loss == pytest.approx(
        sum(losses) / 3, abs=1e-5
    )  # of no step before the first
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
    assert trainer.evaluate()["eval_loss"] == pytest.approx(stock.evaluate()["eval_loss"], rel=1e-5)


REFUSED = {
    "accumulation": (dict(gradient_accumulation_steps=4), "gradient_accumulation_steps is 4"),
    "method": (dict(method="zo"), "method must be one of"),
    "groups": (dict(groups="class"), "groups must be one of"),
    "lr": (dict(learning_rate=0.0), "learning_rate must be positive"),
    "smoothing": (dict(label_smoothing_factor=0.1), "label_smoothing_factor"),
    "metric": (dict(objective="metric"), "objective=metric"),
    "journal": (dict(head="exact", journal="j"), "exact gradients"),
    "metric and clip": (
        dict(method="mezo", objective="metric", clip_examples=2.0),
        "loss of each example",
    ),
    "metric of a first-order run": (
        dict(method="fo-adam", objective="metric"),
        "need a zeroth-order method",
    ),
    "journal of a first-order run": (
        dict(method="fo-sgd", journal="j"),
        "need a zeroth-order method",
    ),
    "clip": (dict(method="fo-sgd", clip_examples=0.0), "clip_examples must be positive"),
}


UNUSED_VALUES = {
    "optim": "adafactor", "optim_args": "a=1", "optim_target_modules": ["x"], "label_smoothing_factor": 0.1,
    "torch_compile": True, "use_liger_kernel": True, "deepspeed": {"a": 1}, "fsdp": "full_shard",
    "parallelism_config": object(), "auto_find_batch_size": True, "fp16_full_eval": True, "bf16_full_eval": True,
    "fp16": True, "bf16": True, "activation_checkpointing": True, "gradient_checkpointing": True,
    "torch_empty_cache_steps": 5, "max_grad_norm": 0.5, "neftune_noise_alpha": 5.0, "adam_beta1": 0.5,
    "adam_beta2": 0.5, "adam_epsilon": 1e-4,
}  # fmt: skip


@pytest.mark.parametrize("methods, names, instead", UNUSED)
def test_arguments_without_effect_are_refused(tmp_path, methods, names, instead):
    method = methods[-1]
    for name in names:
        with pytest.raises(
            ValueError, match=f"^{name}=.* does not go with method {method}: {re.escape(instead)}$"
        ):
            arguments(tmp_path, method=method, **{name: UNUSED_VALUES[name]})
        late = arguments(tmp_path, method=method)
        setattr(late, name, UNUSED_VALUES[name])
        with pytest.raises(ValueError, match=f"^{name}="):
            PseuZOTrainer(causal_lm("opt"), late, train_dataset=Rows())
    assert (
        "ACCELERATE_DYNAMO_BACKEND" not in os.environ
    )  # torch_compile sets it, for all that follows
    arguments(tmp_path, method=method, max_grad_norm=0.0)


def test_accumulation_is_refused_wherever_it_is_asked_for(tmp_path):
    args = arguments(
        tmp_path,
        method="mezo",
        accelerator_config={"gradient_accumulation_kwargs": {"num_steps": 2}},
    )
    with pytest.raises(ValueError, match="gradient_accumulation_steps is 2"):
        PseuZOTrainer(causal_lm("opt"), args, train_dataset=Rows())


@pytest.mark.parametrize("name", NOT_TAKEN)
def test_arguments_of_the_stock_trainer_that_are_not_taken_are_refused(tmp_path, name):
    with pytest.raises(
        ValueError, match=f"PseuZOTrainer: {name} is not supported; {re.escape(NOT_TAKEN[name])}"
    ):
        PseuZOTrainer(
            causal_lm("opt"), arguments(tmp_path), train_dataset=Rows(), **{name: lambda: None}
        )
    with pytest.raises(ValueError, match="hyperparameter_search is not supported"):
        PseuZOTrainer(
            causal_lm("opt"), arguments(tmp_path), train_dataset=Rows()
        ).hyperparameter_search()


def test_what_does_nothing_with_a_task_is_refused(tmp_path, demo):
    data, _ = demo
    for name, value in (("compute_metrics", dict), ("preprocess_logits_for_metrics", dict),
                        ("remove_unused_columns", True), ("train_sampling_strategy", "sequential")):  # fmt: skip
        given = {name: value} if callable(value) else {}
        args = arguments(tmp_path, **({} if given else {name: value}))
        with pytest.raises(ValueError, match=f"PseuZOTrainer: {name} does nothing with a TaskData"):
            PseuZOTrainer(fresh(), args, None, data["train"], data["dev"], **given)
    with pytest.raises(ValueError, match="must both be TaskData, or neither"):
        PseuZOTrainer(fresh(), arguments(tmp_path), None, data["train"], Rows())
    with pytest.raises(ValueError, match="for a TaskData use evaluate"):
        PseuZOTrainer(fresh(), arguments(tmp_path), None, data["train"]).predict(data["test"])


def test_metrics_and_predictions_with_an_objective_of_ones_own(tmp_path):
    """The loss is the objective's, the predictions are what the model's forward gives."""
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


RESUMED = {  # what is changed, and what goes on
    "pseuzo": (dict(eps=1e-2, seed=4, learning_rate=1e-3, weight_decay=0.5, noise="rademacher", window=9),
               dict(eps=1e-3, seed=3, learning_rate=2e-4, noise="hadamard", window=14)),
    "mezo": (dict(eps=1e-2, seed=4, learning_rate=1e-3, directions=2, rounding="nearest"),
             dict(eps=1e-3, seed=3, learning_rate=2e-4, directions=1, rounding="stochastic")),
    "fo-sgd": (dict(learning_rate=1e-3, momentum=0.5, eps=1e-2), dict(learning_rate=2e-4, momentum=0.0)),
    "fo-adam": (dict(learning_rate=1e-3, adam_beta1=0.5), dict(learning_rate=2e-4, betas=(0.9, 0.999))),
}  # fmt: skip


@pytest.mark.parametrize("method", RESUMED)
def test_a_resume_with_other_arguments_says_what_it_takes(tmp_path, method, caplog):
    """The checkpoint's, as the stock Trainer does without a word."""
    changed, goes_on = RESUMED[method]
    settings = dict(method=method, max_steps=4, save_strategy="steps", save_steps=2)
    whole = causal_lm("opt")
    PseuZOTrainer(whole, arguments(tmp_path, **settings), train_dataset=Rows(7)).train()
    assert "resumed:" not in caplog.text
    resumed = causal_lm("opt")
    args = arguments(tmp_path, **settings | changed)
    trainer = PseuZOTrainer(resumed, args, train_dataset=Rows(7))
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, value in goes_on.items():
        asked = (0.5, 0.999) if name == "betas" else changed[name]
        assert f"resumed: {name} {value} of the checkpoint goes on, not {asked}" in caplog.text
    assert ("the order of the batches is that of seed 4" in caplog.text) == ("seed" in goes_on)
    assert caplog.text.count("resumed:") == len(goes_on) + ("weight_decay" in changed)
    if method == "mezo":  # an epoch is one batch, and the order of its rows is nothing to a mean
        for (name, p), q in zip(whole.named_parameters(), resumed.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-6, msg=name)
    other = arguments(
        tmp_path,
        **settings | {"weight_decay": 0.0, "method": "mezo" if method == "pseuzo" else method},
    )
    with pytest.raises(
        ValueError, match=r"checkpoint-2 cannot be resumed: .*; a run goes on with the method"
    ):
        PseuZOTrainer(causal_lm("opt"), other, train_dataset=Rows(7)).train(
            str(tmp_path / "checkpoint-2")
        )
    caplog.clear()
    again = PseuZOTrainer(causal_lm("opt"), arguments(tmp_path, **settings), train_dataset=Rows(7))
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert "resumed:" not in caplog.text


@pytest.mark.parametrize("what", REFUSED)
def test_refuses_at_the_door(tmp_path, what):
    changes, words = REFUSED[what]
    with pytest.raises(ValueError, match=words):
        arguments(tmp_path, **changes)


def test_the_exact_gradient_of_a_tied_head_is_refused(tmp_path, demo):
    data, _ = demo
    trainer = PseuZOTrainer(
        fresh(), arguments(tmp_path, method="pseuzo", head="exact"), train_dataset=data["train"]
    )
    with pytest.raises(ValueError, match=r"head=exact.*tied.*head=frozen"):
        trainer.create_optimizer()


def test_a_probe_for_other_settings_is_refused(tmp_path, demo):
    data, _ = demo
    settings = dict(method="mezo", noise_on=["attention-out"], scale_lr=True, probe_forwards=10)
    PseuZOTrainer(
        fresh(), arguments(tmp_path, **settings), train_dataset=data["train"]
    ).create_optimizer()
    other = PseuZOTrainer(fresh(), arguments(tmp_path, **settings | {"noise_on": ["last-half"]}),
                          train_dataset=data["train"])  # fmt: skip
    with pytest.raises(ValueError, match="was decided for noise_on"):
        other.create_optimizer()


def test_own_optimizer_and_several_evaluation_sets(tmp_path, demo):
    data, _ = demo
    model = fresh()
    optimizer = MeZO(model, lr=1e-4, seed=5)
    trainer = PseuZOTrainer(
        model, arguments(tmp_path, method="mezo", max_steps=2), train_dataset=data["train"],
        eval_dataset={"dev": data["dev"], "test": data["test"]}, optimizers=(optimizer, None),
    )  # fmt: skip
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


def test_refuses_other_arguments_and_empty_data(tmp_path, demo):
    from transformers import TrainingArguments

    with pytest.raises(TypeError, match="PseuZOTrainingArguments"):
        PseuZOTrainer(fresh(), TrainingArguments(str(tmp_path)), train_dataset=demo[0]["train"])
    with pytest.raises(ValueError, match="empty"):
        PseuZOTrainer(causal_lm("opt"), arguments(tmp_path), train_dataset=[])
