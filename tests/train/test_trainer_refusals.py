"""The trainer and its arguments refuse settings that would have no effect or fail later."""

import os
import re
from dataclasses import fields

import pytest
from pseuzo.train.arguments import UNUSED
from pseuzo.train.checks import NOT_TAKEN
from pseuzo.train.methods import methods_with
from pseuzo.train.trainer import PseuZOTrainer
from tiny_models import causal_lm
from trainer_cases import Rows, arguments, fresh
from transformers import TrainingArguments

pytestmark = pytest.mark.slow


def of(option):
    return " or ".join(methods_with(option))


REFUSED = {
    "accumulation": (dict(gradient_accumulation_steps=4), "gradient_accumulation_steps is 4"),
    "method": (dict(method="zo"), "method must be one of"),
    "groups": (dict(groups="class"), "groups must be one of"),
    "lr": (dict(learning_rate=0.0), "learning_rate must be positive"),
    "lr by name": (dict(learning_rate="auto"), "number, got 'auto'; .* set find_lr=True"),
    "smoothing": (dict(label_smoothing_factor=0.1), "label_smoothing_factor"),
    "metric": (dict(objective="metric"), "objective=metric"),
    "journal": (dict(head="exact", journal="j"), "exact gradients"),
    "metric and clip": (
        dict(method="mezo", objective="metric", clip_examples=2.0),
        "loss of each example",
    ),
    "metric of a first-order run": (
        dict(method="fo-adam", objective="metric"),
        f"objective=metric needs method {of('objective')}, not fo-adam",
    ),
    "journal of a first-order run": (
        dict(method="fo-sgd", journal="j"),
        f"journal=j needs method {of('journal')}, not fo-sgd",
    ),
    "directions": (dict(directions=2), f"directions=2 needs method {of('directions')}, not"),
    "weights": (dict(method="fzoo", weights="raw"), "weights=raw needs method evolution, not fzoo"),
    "blocks": (dict(method="mezo", blocks=3), "blocks=3 needs method zo-blocks, not mezo"),
    "moments": (dict(moments="state"), "moments=state needs method zo-adam, not pseuzo"),
    "parts": (dict(split_batch=True), f"split_batch=True needs method {of('split_batch')}, not"),
    "one direction to compare": (
        dict(method="evolution", two_sided=False, directions=1),
        "method evolution: one-sided directions are compared with each other",
    ),
    "fewer examples than parts": (
        dict(method="fzoo", split_batch=True),
        "method fzoo: split_batch needs an example for each of the 8 directions, and a batch has 7",
    ),
    "a rate from the curvature": (
        dict(method="fzoo", find_lr=True),
        f"find_lr=True needs method {of('find_lr')}, not fzoo",
    ),
    "a race of a first-order run": (dict(method="fo-sgd", noise_on=["auto"]), "set find_lr"),
    "a readout of a first-order run": (
        dict(method="fo-adam", readout="fit"),
        f"readout=fit needs method {of('readout')}, not fo-adam",
    ),
    "clip": (dict(method="fo-sgd", clip_examples=0.0), "clip_examples must be positive"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refuses_at_the_door(tmp_path, what):
    changes, words = REFUSED[what]
    with pytest.raises(ValueError, match=words):
        arguments(tmp_path, **changes)


UNUSED_VALUES = {
    "optim": "adafactor",
    "optim_args": "a=1",
    "optim_target_modules": ["x"],
    "label_smoothing_factor": 0.1,
    "torch_compile": True,
    "use_liger_kernel": True,
    "deepspeed": {"a": 1},
    "fsdp": "full_shard",
    "parallelism_config": object(),
    "auto_find_batch_size": True,
    "fp16_full_eval": True,
    "bf16_full_eval": True,
    "fp16": True,
    "bf16": True,
    "activation_checkpointing": True,
    "gradient_checkpointing": True,
    "torch_empty_cache_steps": 5,
    "max_grad_norm": 0.5,
    "neftune_noise_alpha": 5.0,
    "adam_beta1": 0.5,
    "adam_beta2": 0.5,
    "adam_epsilon": 1e-4,
}


@pytest.mark.parametrize("methods, names, instead", UNUSED)
def test_arguments_without_effect_are_refused(tmp_path, methods, names, instead):
    method, usual = methods[-1], {f.name for f in fields(TrainingArguments)}
    for name in filter(usual.__contains__, names):
        with pytest.raises(
            ValueError,
            match=f"^{name}=.* cannot be used with method {method}: {re.escape(instead)}$",
        ):
            arguments(tmp_path, method=method, **{name: UNUSED_VALUES[name]})
        late = arguments(tmp_path, method=method)
        setattr(late, name, UNUSED_VALUES[name])
        with pytest.raises(ValueError, match=f"^{name}="):
            PseuZOTrainer(causal_lm("opt"), late, train_dataset=Rows())
    # torch_compile would set it for the rest of the process.
    assert "ACCELERATE_DYNAMO_BACKEND" not in os.environ
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
    for name, value in (
        ("compute_metrics", dict),
        ("preprocess_logits_for_metrics", dict),
        ("remove_unused_columns", True),
        ("train_sampling_strategy", "sequential"),
    ):
        given = {name: value} if callable(value) else {}
        args = arguments(tmp_path, **({} if given else {name: value}))
        with pytest.raises(ValueError, match=f"{name} has no effect with a TaskData"):
            PseuZOTrainer(fresh(), args, None, data["train"], data["dev"], **given)
    with pytest.raises(ValueError, match="must both be TaskData, or neither"):
        PseuZOTrainer(fresh(), arguments(tmp_path), None, data["train"], Rows())
    with pytest.raises(ValueError, match="for a TaskData use evaluate"):
        PseuZOTrainer(fresh(), arguments(tmp_path), None, data["train"]).predict(data["test"])


def test_the_exact_gradient_of_a_tied_head_is_refused(tmp_path, demo):
    data, _ = demo
    trainer = PseuZOTrainer(
        fresh(), arguments(tmp_path, method="pseuzo", head="exact"), train_dataset=data["train"]
    )
    with pytest.raises(ValueError, match=r"head=exact.*tied.*head=frozen"):
        trainer.create_optimizer()


def test_refuses_other_arguments_and_empty_data(tmp_path, demo):

    with pytest.raises(TypeError, match="PseuZOTrainingArguments"):
        PseuZOTrainer(fresh(), TrainingArguments(str(tmp_path)), train_dataset=demo[0]["train"])
    with pytest.raises(ValueError, match="empty"):
        PseuZOTrainer(causal_lm("opt"), arguments(tmp_path), train_dataset=[])
