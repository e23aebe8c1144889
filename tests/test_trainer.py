"""PseuZOTrainer against plain loops over the same batches, and what it refuses."""

import json
import math

import pytest
import torch
from models import VOCAB, batch_of, causal_lm
from pseuzo import CausalLMObjective, MeZO, PseuZO
from pseuzo.placement import param_groups, place
from pseuzo.runs import max_length, model_path
from pseuzo.tasks import TaskData, load_task
from pseuzo.trainer import PseuZOTrainer, PseuZOTrainingArguments
from pseuzo.tuning import load_model
from transformers import TrainerCallback


@pytest.fixture(scope="module")
def demo():
    task = load_task("demo")
    examples = task.load(None, train=50, dev=20, test=20, seed=0)
    model, tokenizer = load_model(model_path("demo"))
    data = {k: TaskData(e, task, tokenizer, max_length=max_length(model, 2048)) for k, e in examples.items()}
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
            batch = data.collate([data[i] for i in order[first : first + args.per_device_train_batch_size]])
            step(optimizer, objective, batch)
            done += 1
        epoch += 1
    return dict(model.named_parameters())


def test_pseuzo_is_the_plain_loop(tmp_path, demo):
    data, _ = demo
    args = arguments(tmp_path, method="pseuzo", window=4, momentum=0.8, groups="label", clip_examples=1.5)
    model = fresh()
    PseuZOTrainer(model, args, train_dataset=data["train"]).train()

    def make(m):
        groups = param_groups(m, place(m, ["all"]), lr=2e-4, weight_decay=0.02)
        return PseuZO(groups, lr=2e-4, eps=1e-3, window=4, momentum=0.8, seed=3, model=m, clip_examples=1.5)

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
    args = arguments(tmp_path, method="mezo", directions=2, noise_on=["attention-out", "*fc1.weight=0.5"])
    model = fresh()
    PseuZOTrainer(model, args, train_dataset=data["train"]).train()

    def make(m):
        groups = param_groups(m, place(m, ["attention-out", "*fc1.weight=0.5"]), lr=2e-4, weight_decay=0.02)
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
        batch = torch.utils.data.default_collate(rows.rows)
        positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)  # GPT-2 alone would count the padding
        whole = float(model(**batch, position_ids=positions).loss)
    assert len(losses) == 2 and losses[-1] < losses[0]
    assert losses[-1] == pytest.approx(whole, rel=1e-5) and losses[0] > 0.9 * math.log(VOCAB)


def test_resumed_in_the_middle_of_an_epoch_is_bit_for_bit_the_same(tmp_path, demo):
    data, _ = demo
    settings = dict(method="pseuzo", window=5, max_steps=13, save_strategy="steps", save_steps=6,
                    lr_scheduler_type="linear", warmup_steps=2)  # fmt: skip
    whole = fresh()
    PseuZOTrainer(whole, arguments(tmp_path / "a", **settings), train_dataset=data["train"]).train()
    resumed = fresh()
    trainer = PseuZOTrainer(resumed, arguments(tmp_path / "a", **settings), train_dataset=data["train"])
    trainer.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-6"))
    for (name, p), q in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q), name
    seconds = [row["train_seconds"] for row in trainer.state.log_history if "train_seconds" in row]
    assert seconds == sorted(seconds)


def test_logs_what_a_run_is_judged_by(tmp_path, demo):
    data, _ = demo
    model = fresh()
    trainer = PseuZOTrainer(
        model, arguments(tmp_path, method="pseuzo", window=3, max_steps=5), train_dataset=data["train"]
    )
    with torch.no_grad():
        batch = data["train"].collate([data["train"][i] for i in list(data["train"].sampler(7, 3))[:7]])
        forward, head = CausalLMObjective(model, data["train"].options)(batch)
        clean = float(head(forward()))
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert abs(rows[0]["loss"] - clean) < 1e-4  # logged with four digits: at the clean weights, before the update
    assert [row["window"] for row in rows] == [1, 2, 3, 3, 3]
    assert all(row["momentum"] == 1.0 and row["skipped_steps"] == 0 for row in rows)
    assert all(row["update_ulps_float32"] > 0 and row["tokens_per_second"] > 0 < row["peak_memory_mib"] for row in rows)
    assert [row["forwards"] for row in rows] == [2, 4, 6, 8, 10]
    assert "grad_norm" not in rows[0]


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
    trainer = PseuZOTrainer(fresh(), args, train_dataset=data["train"], eval_dataset=data["dev"], callbacks=[Seen()])
    trainer.train()
    assert seen == [1, 2, 3, 4, 5, 6]
    history = {row["step"]: row["eval_accuracy"] for row in trainer.state.log_history if "eval_accuracy" in row}
    assert history[trainer.state.best_global_step] == max(history.values())
    assert trainer.evaluate()["eval_accuracy"] == max(history.values())  # its weights were loaded
    assert any((tmp_path / "runs").rglob("events*")) or any(tmp_path.rglob("events*"))


def test_probe_is_kept_for_a_resumed_run(tmp_path, demo):
    data, _ = demo
    settings = dict(method="mezo", noise_on=["attention-out"], scale_lr=True, scale_eps=True, probe_forwards=30)
    trainer = PseuZOTrainer(fresh(), arguments(tmp_path, **settings), train_dataset=data["train"])
    first = trainer.create_optimizer()
    decided = json.loads((tmp_path / "noise_on.json").read_text())
    assert decided["lr"] == first.param_groups[0]["lr"] > 2e-4 and decided["eps"] == first.eps > 1e-3
    # eps^2 and lr grow by the same share of the curvature
    assert decided["lr"] / 2e-4 == pytest.approx((decided["eps"] / 1e-3) ** 2, rel=1e-6)
    decided["lr"] = 0.125
    (tmp_path / "noise_on.json").write_text(json.dumps(decided))
    again = PseuZOTrainer(fresh(), arguments(tmp_path, **settings), train_dataset=data["train"]).create_optimizer()
    assert again.param_groups[0]["lr"] == 0.125


def test_non_differentiable_objective(tmp_path, demo):
    """1 - accuracy over the batch is what mezo then descends: a step function, nearly flat for a small eps."""
    data, _ = demo
    args = arguments(tmp_path, method="mezo", objective="metric", eps=5e-2, max_steps=3, learning_rate=1e-4)
    trainer = PseuZOTrainer(fresh(), args, train_dataset=data["train"])
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    sevenths = [row["loss"] * 14 for row in rows]  # the mean of two shares of 7, or of the last batch's fewer
    assert all(abs(x - round(x)) < 1e-3 for x in sevenths[:2])


@pytest.mark.parametrize("head", ["frozen", "exact"])
def test_untied_head_is_frozen_or_descends_its_exact_gradient(tmp_path, head):
    model = causal_lm("llama")
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    rows = Rows(4)
    args = arguments(tmp_path, head=head, head_lr=0.25, max_steps=1, per_device_train_batch_size=4, weight_decay=0.1)
    batch = torch.utils.data.default_collate(rows.rows)
    model.eval()
    (gradient,) = torch.autograd.grad(model(**batch).loss, model.lm_head.weight)
    PseuZOTrainer(model, args, train_dataset=rows).train()
    now = dict(model.named_parameters())
    want = start["lm_head.weight"] - (0.25 * gradient if head == "exact" else 0)
    # weight decay is for the noised weights; fp32 products in another order
    torch.testing.assert_close(now["lm_head.weight"], want, rtol=0, atol=1e-6)
    assert not torch.equal(now["model.embed_tokens.weight"], start["model.embed_tokens.weight"])


REFUSED = {
    "accumulation": (dict(gradient_accumulation_steps=4), "gradient_accumulation_steps is 4"),
    "method": (dict(method="zo"), "method must be one of"),
    "groups": (dict(groups="class"), "groups must be one of"),
    "lr": (dict(learning_rate=0.0), "learning_rate must be positive"),
    "smoothing": (dict(label_smoothing_factor=0.1), "label_smoothing_factor"),
    "metric": (dict(objective="metric"), "objective=metric"),
    "journal": (dict(head="exact", journal="j"), "exact gradients"),
    "metric and clip": (dict(method="mezo", objective="metric", clip_examples=2.0), "loss of each example"),
    "noise of a first-order run": (dict(method="fo-adam", noise_on=["auto"]), "makes no noise"),
    "clip": (dict(method="fo-sgd", clip_examples=2.0), "clip_examples"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refuses_at_the_door(tmp_path, what):
    changes, words = REFUSED[what]
    with pytest.raises(ValueError, match=words):
        arguments(tmp_path, **changes)


def test_a_probe_for_other_settings_is_refused(tmp_path, demo):
    data, _ = demo
    settings = dict(method="mezo", noise_on=["attention-out"], scale_lr=True, probe_forwards=10)
    PseuZOTrainer(fresh(), arguments(tmp_path, **settings), train_dataset=data["train"]).create_optimizer()
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
        PseuZOTrainer(model, arguments(tmp_path), train_dataset=data["train"], optimizers=(sgd, None))
    with pytest.raises(ValueError, match="model_init"):
        PseuZOTrainer(None, arguments(tmp_path), train_dataset=data["train"], model_init=fresh)


def test_refuses_other_arguments_and_empty_data(tmp_path, demo):
    from transformers import TrainingArguments

    with pytest.raises(TypeError, match="PseuZOTrainingArguments"):
        PseuZOTrainer(fresh(), TrainingArguments(str(tmp_path)), train_dataset=demo[0]["train"])
    with pytest.raises(ValueError, match="empty"):
        PseuZOTrainer(causal_lm("opt"), arguments(tmp_path), train_dataset=[])
