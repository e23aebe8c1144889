"""Runs with readout=fit: the head that is fitted is part of the run, and of its checkpoints."""

import json

import pytest
import torch
from pseuzo.train.trainer import PseuZOTrainer
from tiny_models import causal_lm
from trainer_cases import Rows, arguments, fresh
from transformers import AutoModelForCausalLM

EXCLUDED = {
    "journal": dict(journal="run.pzj"),
    "offload": dict(offload="cpu"),
    "head=exact": dict(method="pseuzo", head="exact"),
    "objective=metric": dict(objective="metric"),
}


def run(folder, data, resume=None, **changes):
    given = dict(method="mezo", readout="fit", max_steps=8, save_strategy="steps", save_steps=5)
    trainer = PseuZOTrainer(
        fresh(), arguments(folder, **given | changes), train_dataset=data["train"]
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.slow
@pytest.mark.parametrize("method", ["mezo", "pseuzo"])
def test_resumed_is_bit_for_bit_the_same(tmp_path, demo, method):
    data, _ = demo
    whole = run(tmp_path, data, method=method)
    resumed = run(tmp_path, data, str(tmp_path / "checkpoint-5"), method=method)
    for (name, p), q in zip(
        whole.model.named_parameters(), resumed.model.parameters(), strict=True
    ):
        assert torch.equal(p, q), name
    for name, x in whole.readout.state.items():
        assert torch.equal(x, resumed.readout.state[name]), name


@pytest.mark.slow
def test_the_saved_model_has_the_fitted_head(tmp_path, demo):
    data, _ = demo
    trainer = run(tmp_path, data, save_strategy="no")
    embedding = trainer.model.get_input_embeddings().weight
    trainer.save_model(str(tmp_path / "model"))
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    batch = data["train"].collate([data["train"][i] for i in range(6)])
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask") if k in batch}
    logits = saved(**inputs).logits
    torch.testing.assert_close(logits, trainer.model(**inputs).logits)
    assert not torch.equal(saved.lm_head.weight, embedding)
    options = data["train"].options
    others = [i for i in range(len(embedding)) if i not in options]
    assert torch.equal(saved.lm_head.weight[others], fresh().lm_head.weight[others])


@pytest.mark.parametrize("name", EXCLUDED)
def test_what_excludes_a_readout_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=f"readout=fit cannot be used with {name}: "):
        arguments(tmp_path, **dict(method="mezo", readout="fit") | EXCLUDED[name])


def test_auto_fits_where_it_can(tmp_path, demo):
    data, _ = demo
    given = dict(method="mezo", readout="auto", max_steps=2)
    make = lambda **more: PseuZOTrainer(  # noqa: E731
        fresh(), arguments(tmp_path, **given | more), train_dataset=data["train"]
    )
    assert make().readout is not None
    assert make(journal=str(tmp_path / "run.pzj")).readout is None
    assert make(objective="metric").readout is None
    rows = Rows()
    trainer = PseuZOTrainer(causal_lm("opt"), arguments(tmp_path, **given), train_dataset=rows)
    assert trainer.readout is None


@pytest.mark.slow
def test_at_lr_0_the_readout_alone_learns_by_one_pass_a_step(tmp_path, demo):
    data, _ = demo
    trainer = run(tmp_path, data, learning_rate=0.0)
    before, options = fresh(), data["train"].options
    for (name, p), q in zip(
        trainer.model.named_parameters(), before.named_parameters(), strict=False
    ):
        if name != "lm_head.weight":
            assert torch.equal(p, q[1]), name
    assert len(trainer.readout.state["classes"]) == len(data["train"]), "8 steps are an epoch"
    assert not torch.equal(trainer.model.lm_head.weight[options], before.lm_head.weight[options])
    assert trainer.forwards(8) == 8 == trainer.zero_order.steps
    resumed = run(tmp_path, data, str(tmp_path / "checkpoint-5"), learning_rate=0.0)
    assert torch.equal(resumed.model.lm_head.weight, trainer.model.lm_head.weight)
    with pytest.raises(ValueError, match="learning_rate must be positive, got 0; with readout=fit"):
        arguments(tmp_path, method="mezo", learning_rate=0.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "method, readout, steps, taken",
    [("mezo", "fit", 3, 6), ("pseuzo", "auto", 3, 6), ("mezo", "auto", 9, 8)],
)
def test_too_small_a_budget_for_a_race_trains_the_readout_alone(
    tmp_path, demo, method, readout, steps, taken, capsys
):
    """Two passes a step with noise, and one without. All rows are seen in eight steps."""
    data, _ = demo
    given = dict(method=method, readout=readout, max_steps=steps, find_lr=True, weight_decay=0.0)
    trainer = PseuZOTrainer(fresh(), arguments(tmp_path, **given), train_dataset=data["train"])
    passes = 0

    def count(*unused):
        nonlocal passes
        passes += 1

    with torch.no_grad():
        rows = [data["train"][i] for i in range(2)]
        trainer.losses.loss(data["train"].collate(rows))
    trainer.model.register_forward_pre_hook(count)
    trainer.train()
    few = f"the readout alone learns: {steps // 2} of the run's {2 * steps} forward passes"
    assert few in capsys.readouterr().out
    assert trainer.state.global_step == taken == passes == trainer.forwards(taken)
    changed = arguments(tmp_path, **given | dict(noise_on=["auto"]))
    other = PseuZOTrainer(fresh(), changed, train_dataset=data["train"])
    with pytest.raises(ValueError, match=r"holds the decision for noise_on \['all'\], not"):
        other.train()


@pytest.mark.slow
@pytest.mark.parametrize("method, steps", [("pseuzo", 120), ("mezo", 100)])
def test_passes_of_a_race_with_a_readout_are_counted(tmp_path, demo, method, steps):
    """Also where candidates start again, and where a step of the method has three passes."""
    data, _ = demo
    own = dict(two_sided=True) if method == "pseuzo" else {}
    given = dict(method=method, readout="fit", max_steps=steps, find_lr=True, weight_decay=0.0)
    given |= dict(search_share=0.9)
    trainer = PseuZOTrainer(
        fresh(), arguments(tmp_path, **given | own), train_dataset=data["train"]
    )
    passes = 0

    def count(*unused):
        nonlocal passes
        passes += 1

    with torch.no_grad():
        trainer.losses.loss(data["train"].collate([data["train"][i] for i in range(2)]))
    trainer.model.register_forward_pre_hook(count)
    trainer.create_optimizer()
    found = json.loads((tmp_path / "found.json").read_text())
    assert {row["name"] for row in found["table"]} > {"no weights"}
    assert passes == trainer.search_forwards > 100


def test_lr_0_takes_no_probe_and_no_search(tmp_path, demo):
    data, _ = demo
    given = dict(method="mezo", readout="fit", learning_rate=0.0, noise_on=["attention-out"])
    args = arguments(tmp_path, **given, scale_eps=True, scale_lr=True)
    trainer = PseuZOTrainer(fresh(), args, train_dataset=data["train"])
    trainer.model.register_forward_pre_hook(lambda *unused: pytest.fail("a pass"))
    trainer.create_optimizer()
    assert trainer.readout.kept == len(data["train"]) and trainer.forwards(5) == 5
    for search in (dict(noise_on=["auto"], find_lr=True), dict(find_lr=True)):
        with pytest.raises(ValueError, match="learning_rate must be positive, got 0"):
            arguments(tmp_path, **given | search)
    with pytest.raises(ValueError, match=r"learning_rate must be positive, got 0$"):
        arguments(tmp_path, method="fo-sgd", learning_rate=0.0)


@pytest.mark.slow
def test_a_race_fits_the_readout_of_each_candidate_and_forgets_them(tmp_path, demo):
    data, _ = demo
    given = dict(method="mezo", readout="fit", max_steps=150, find_lr=True, weight_decay=0.0)
    given |= dict(search_share=0.5)
    trainer = PseuZOTrainer(
        fresh(), arguments(tmp_path, **given), train_dataset=data["train"], eval_dataset=data["dev"]
    )
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    state = dict(trainer.readout.state)
    trainer.create_optimizer()
    for name, p in trainer.model.named_parameters():
        assert torch.equal(p, before[name]), name
    assert all(torch.equal(trainer.readout.state[name], x) for name, x in state.items())
    found = json.loads((tmp_path / "found.json").read_text())
    (rests,) = (row for row in found["table"] if row["lr"] == 0)
    # The head alone is fitted there, which lowers the loss.
    assert rests["name"] == "no weights" and max(rests["losses"].values()) < found["start"]
