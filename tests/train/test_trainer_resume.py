"""A resumed run continues as if it had not stopped, or says what is different."""

import json

import pytest
import torch
from pseuzo.train.trainer import PseuZOTrainer
from tiny_models import causal_lm
from trainer_cases import Rows, arguments, fresh

pytestmark = pytest.mark.slow


def test_resumed_in_the_middle_of_an_epoch_is_bit_for_bit_the_same(tmp_path, demo):
    data, _ = demo
    settings = dict(
        method="pseuzo",
        window=5,
        max_steps=13,
        save_strategy="steps",
        save_steps=6,
        lr_scheduler_type="linear",
        warmup_steps=2,
    )
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


def test_a_resumed_run_logs_and_saves_as_often_as_it_is_told(tmp_path, demo):
    data, _ = demo
    often = dict(method="mezo", save_strategy="steps", save_steps=2, logging_steps=1)
    args = arguments(tmp_path, **often | dict(max_steps=4))
    PseuZOTrainer(fresh(), args, train_dataset=data["train"]).train()
    args = arguments(tmp_path, **often | dict(max_steps=12, save_steps=5, logging_steps=3))
    trainer = PseuZOTrainer(fresh(), args, train_dataset=data["train"])
    trainer.train(resume_from_checkpoint=True)
    logged = [row["step"] for row in trainer.state.log_history if "loss" in row]
    assert logged == [1, 2, 3, 4, 6, 9, 12]
    saved = {int(path.name.split("-")[1]) for path in tmp_path.glob("checkpoint-*")}
    assert saved == {2, 4, 5, 10, 12}


def test_probe_is_kept_for_a_resumed_run(tmp_path, demo):
    data, _ = demo
    settings = dict(
        method="mezo", noise_on=["attention-out"], scale_lr=True, scale_eps=True, probe_forwards=30
    )
    trainer = PseuZOTrainer(fresh(), arguments(tmp_path, **settings), train_dataset=data["train"])
    first = trainer.create_optimizer()
    decided = json.loads((tmp_path / "found.json").read_text())
    assert (
        decided["lr"] == first.param_groups[0]["lr"] > 2e-4 and decided["eps"] == first.eps > 1e-3
    )
    # eps^2 and lr grow by the same factor.
    assert decided["lr"] / 2e-4 == pytest.approx((decided["eps"] / 1e-3) ** 2, rel=1e-6)
    decided["lr"] = 0.125
    (tmp_path / "found.json").write_text(json.dumps(decided))
    again = PseuZOTrainer(
        fresh(), arguments(tmp_path, **settings), train_dataset=data["train"]
    ).create_optimizer()
    assert again.param_groups[0]["lr"] == 0.125


def test_a_probe_for_other_settings_is_refused(tmp_path, demo):
    data, _ = demo
    settings = dict(method="mezo", noise_on=["attention-out"], scale_lr=True, probe_forwards=10)
    PseuZOTrainer(
        fresh(), arguments(tmp_path, **settings), train_dataset=data["train"]
    ).create_optimizer()
    other = PseuZOTrainer(
        fresh(),
        arguments(tmp_path, **settings | {"noise_on": ["last-half"]}),
        train_dataset=data["train"],
    )
    with pytest.raises(ValueError, match="holds the decision for noise_on"):
        other.create_optimizer()


# The first are the arguments that a resume changes, the second those that the checkpoint decides.
RESUMED = {
    "pseuzo": (
        dict(eps=1e-2, seed=4, learning_rate=1e-3, weight_decay=0.5, noise="rademacher", window=9),
        dict(eps=1e-3, seed=3, learning_rate=2e-4, noise="hadamard", window=14),
    ),
    "mezo": (
        dict(eps=1e-2, seed=4, learning_rate=1e-3, directions=2, rounding="nearest"),
        dict(eps=1e-3, seed=3, learning_rate=2e-4, directions=1, rounding="stochastic"),
    ),
    "fo-sgd": (
        dict(learning_rate=1e-3, momentum=0.5, eps=1e-2),
        dict(learning_rate=2e-4, momentum=0.0),
    ),
    "fo-adam": (
        dict(learning_rate=1e-3, adam_beta1=0.5),
        dict(learning_rate=2e-4, betas=(0.9, 0.999)),
    ),
}


@pytest.mark.parametrize("method", RESUMED)
def test_a_resume_with_other_arguments_says_what_it_takes(tmp_path, method, caplog):
    """The run takes the checkpoint's arguments, as the stock Trainer does silently."""
    changed, goes_on = RESUMED[method]
    settings = dict(method=method, max_steps=4, save_strategy="steps", save_steps=2)
    whole = causal_lm("opt")
    PseuZOTrainer(whole, arguments(tmp_path, **settings), train_dataset=Rows(7)).train()
    assert "resumed with" not in caplog.text
    resumed = causal_lm("opt")
    args = arguments(tmp_path, **settings | changed)
    trainer = PseuZOTrainer(resumed, args, train_dataset=Rows(7))
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, value in goes_on.items():
        asked = (0.5, 0.999) if name == "betas" else changed[name]
        assert f"resumed with {name} {value} of the checkpoint, not {asked}" in caplog.text
    assert ("the order of the batches is that of seed 4" in caplog.text) == ("seed" in goes_on)
    assert caplog.text.count("resumed with") == len(goes_on) + ("weight_decay" in changed)
    if method == "mezo":  # an epoch is one batch, so the order does not matter
        for (name, p), q in zip(whole.named_parameters(), resumed.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-6, msg=name)
    other = arguments(
        tmp_path,
        **settings | {"weight_decay": 0.0, "method": "mezo" if method == "pseuzo" else method},
    )
    with pytest.raises(
        ValueError, match=r"checkpoint-2 cannot be resumed: .*; a run is resumed with the method"
    ):
        PseuZOTrainer(causal_lm("opt"), other, train_dataset=Rows(7)).train(
            str(tmp_path / "checkpoint-2")
        )
    caplog.clear()
    again = PseuZOTrainer(causal_lm("opt"), arguments(tmp_path, **settings), train_dataset=Rows(7))
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert "resumed with" not in caplog.text
