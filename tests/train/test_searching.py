"""The trainer finds where the noise goes within the forward passes of its run."""

import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pseuzo.models.placement import place
from pseuzo.optim.curvature import RELATIVE_LR, STEPS
from pseuzo.train.trainer import PseuZOTrainer
from trainer_cases import Rows, arguments, fresh, of_a_regression

pytestmark = pytest.mark.slow


class Counted:
    """A trainer whose model's forwards are counted, as multiples of a training batch."""

    def __init__(self, folder, data, dev=None, model=None, **settings):
        self.model, self.rows = model or fresh(), 0
        self.args = arguments(folder, **settings)
        self.trainer = PseuZOTrainer(
            self.model, self.args, train_dataset=data["train"], eval_dataset=dev
        )
        rows = [data["train"][i] for i in range(2)]
        with torch.no_grad():  # the first loss of a run also checks the model
            self.trainer.losses.loss(data["train"].collate(rows))
        self.model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module, args, kwargs):
        self.rows += len((args or tuple(kwargs.values()))[0])

    @property
    def forwards(self):
        return self.rows / self.args.per_device_train_batch_size


AUTO = dict(method="mezo", noise_on=["auto"], find_lr=True, weight_decay=0.0)
AUTO |= dict(per_device_train_batch_size=5)
BOTH = AUTO | dict(max_steps=300)
OWN_AND_ALL = ("attention-out", "all")


def bits(model):
    return [p.detach().clone() for p in model.parameters()]


def test_a_race_comes_out_of_the_run_and_leaves_no_trace(tmp_path, demo):
    data, _ = demo
    counted = Counted(tmp_path, data, data["dev"], **BOTH)
    collate = counted.trainer.data_collator
    counted.trainer.data_collator = lambda x: (random.random(), np.random.rand(), collate(x))[2]
    before, state = bits(counted.model), torch.random.get_rng_state()
    others = random.getstate(), np.random.get_state()[1].tolist()
    optimizer = counted.trainer.create_optimizer()
    found = json.loads((tmp_path / "found.json").read_text())
    spent = counted.trainer.search_forwards
    assert spent == found["forwards"] == counted.forwards, "a pass was not counted"
    assert 100 < spent <= 0.25 * 600
    assert all(map(torch.equal, bits(counted.model), before))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == others
    assert counted.trainer.planned_steps() == (600 - spent) // 2
    assert counted.trainer.forwards(counted.trainer.planned_steps()) in (599, 600)
    assert {g["lr"] for g in optimizer.param_groups} == {found["lr"]} == {RELATIVE_LR}
    assert optimizer.eps == found["eps"] and optimizer.curvature_window == STEPS
    assert set(optimizer.streams) == set(place(counted.model, found["noise_on"]))
    assert optimizer.steps == 0 and optimizer.journal is None
    assert {row["name"] for row in found["table"]} >= {"all", "attention-out"}


def test_the_run_after_a_race_is_that_of_what_it_found(tmp_path, demo):
    """A run that is given what the race found has the same bits; a resumed one does not race."""
    data, _ = demo
    settings = AUTO | dict(max_steps=120, search_share=0.7)
    raced = Counted(tmp_path, data, data["dev"], **settings)
    raced.trainer.train()
    steps = raced.trainer.state.global_step
    assert raced.args.max_steps == 120 and steps == (240 - raced.trainer.search_forwards) // 2
    found = json.loads((tmp_path / "found.json").read_text())
    assert raced.trainer.search_forwards == found["forwards"] > 60
    assert raced.forwards == 2 * steps + found["forwards"]
    logged = [row["forwards"] for row in raced.trainer.state.log_history if "loss" in row]
    assert logged[0] == found["forwards"] + 2 and logged[-1] == raced.forwards
    given = AUTO | dict(noise_on=found["noise_on"], max_steps=steps)
    plain = Counted(tmp_path / "given", data, data["dev"], **given)
    plain.trainer.train()
    assert all(map(torch.equal, bits(plain.model), bits(raced.model)))
    found |= {"lr": 0.125, "forwards": 100}
    (tmp_path / "found.json").write_text(json.dumps(found))
    again = Counted(tmp_path, data, data["dev"], **settings)
    assert again.trainer.create_optimizer().param_groups[0]["lr"] == 0.125
    assert again.forwards == 0 and again.trainer.planned_steps() == 70
    other = Counted(tmp_path, data, data["dev"], **settings | {"search_share": 0.2})
    with pytest.raises(ValueError, match=r"holds the decision for search_share 0.7, not 0.2"):
        other.trainer.create_optimizer()


@pytest.mark.parametrize(
    "settings",
    [
        dict(method="pseuzo", max_steps=90, search_share=0.9),
        dict(method="mezo-momentum", max_steps=120, search_share=0.9),
        dict(method="mezo", directions=3, max_steps=60, search_share=0.9),
    ],
    ids=lambda settings: settings["method"],
)
def test_every_method_with_such_rates_can_race(tmp_path, demo, settings, capsys):
    """Without dev rows, too: the loss is then of training rows."""
    data, _ = demo
    counted = Counted(tmp_path, data, **AUTO | settings)
    before, trained = bits(counted.model), [p.requires_grad for p in counted.model.parameters()]
    trainer = counted.trainer
    optimizer = trainer.create_optimizer()
    found = json.loads((tmp_path / "found.json").read_text())
    assert all(map(torch.equal, bits(counted.model), before))
    spent = found["forwards"]
    assert counted.forwards == spent <= 0.9 * trainer.forwards(settings["max_steps"])
    assert len(found["table"]) >= 2 and "the best of" in capsys.readouterr().out
    assert [p.requires_grad for p in counted.model.parameters()] == trained
    assert {g["lr"] for g in optimizer.param_groups} == {RELATIVE_LR}


def test_an_interrupted_race_leaves_the_weights_and_no_decision(tmp_path, demo):
    data, _ = demo
    counted = Counted(tmp_path, data, data["dev"], **BOTH)
    before = bits(counted.model)

    def hook(*unused):
        if counted.forwards > 40:
            raise KeyboardInterrupt

    handle = counted.model.register_forward_pre_hook(hook)
    with pytest.raises(KeyboardInterrupt):
        counted.trainer.train()
    handle.remove()
    assert all(map(torch.equal, bits(counted.model), before))
    assert not (tmp_path / "found.json").exists()
    assert counted.trainer.planned_steps() == counted.args.max_steps == 300
    assert counted.trainer.search_forwards == 0 and counted.trainer.zero_order is None


def test_an_offloaded_model_races_to_the_same_end(tmp_path, demo):
    data, _ = demo
    tables = []
    for where in ("none", "cpu"):
        settings = AUTO | dict(max_steps=80, search_share=0.8, offload=where)
        counted = Counted(tmp_path / where, data, data["dev"], **settings)
        before = bits(counted.model)
        counted.trainer.create_optimizer()
        assert all(map(torch.equal, bits(counted.model), before))
        tables.append(json.loads((tmp_path / where / "found.json").read_text()))
    assert tables[0] == tables[1] and len(tables[0]["table"]) >= 2


def test_a_search_of_another_run_is_not_taken_over(tmp_path, demo, capsys):
    data, _ = demo

    def again(**changes):
        args = arguments(tmp_path, **BOTH | changes)
        return PseuZOTrainer(fresh(), args, train_dataset=data["train"]).create_optimizer()

    again()
    assert "found.json says" not in capsys.readouterr().out
    again()
    assert "found.json says" in capsys.readouterr().out
    with pytest.raises(ValueError, match="holds the decision for seed 3, not 4"):
        again(seed=4)
    with pytest.raises(ValueError, match="forward passes, and this run has 60 in all"):
        again(max_steps=30)
    few = arguments(tmp_path / "few", **BOTH | dict(dataloader_drop_last=True))
    rows = [data["train"][i] for i in range(3)]
    trainer = PseuZOTrainer(fresh(), few, data["train"].collate, rows)
    with pytest.raises(ValueError, match="have no batch to search with"):
        trainer.create_optimizer()


def test_a_part_whose_tokens_have_no_loss_takes_no_part(tmp_path):
    """The parts of several ranks have the losses and the gradient of the whole batch."""
    args = arguments(tmp_path, method="pseuzo", find_lr=True, weight_decay=0.0)
    trainer = PseuZOTrainer(fresh(), args, train_dataset=Rows())
    optimizer = trainer.create_optimizer()
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    inputs = {k: x[:6] for k, x in inputs.items()}
    inputs["targets"] = torch.where(torch.arange(6)[:, None] < 3, inputs["targets"], -100)

    def measured(row, rows):
        optimizer.ranks = SimpleNamespace(row=row, rows=rows)
        (forward, head), more = trainer.losses.step_inputs(inputs, optimizer)
        o = forward().detach().requires_grad_()
        losses = head(o)
        (e,) = torch.autograd.grad(losses.sum(), o)
        return losses.detach().sum(1), e.flatten(1).norm(dim=1), more["size"]

    (want, e, size), parts = measured(0, 1), [measured(row, 2) for row in (0, 1)]
    assert size == 6 and [part[2] for part in parts] == [3, 3]  # so their mean is over 6 rows
    torch.testing.assert_close(torch.cat([part[0] for part in parts]), want, rtol=1e-5, atol=0)
    torch.testing.assert_close(torch.cat([part[1] for part in parts]), e, rtol=1e-4, atol=0)


def test_too_small_a_budget_takes_noise_on_all_weights(tmp_path, demo, capsys):
    data, _ = demo
    counted = Counted(tmp_path, data, data["dev"], **AUTO | dict(max_steps=5))
    optimizer = counted.trainer.create_optimizer()
    assert set(optimizer.streams) == set(place(counted.model, ["all"]))
    assert "2 of the run's 10 forward passes are too few for a race" in capsys.readouterr().out
    assert counted.trainer.planned_steps() == 5
    assert counted.forwards == counted.trainer.search_forwards == 0


def test_a_rate_alone_takes_no_pass_and_no_race(tmp_path, demo):
    """eps of a part of the weights makes a perturbation as long as one of all."""
    data, _ = demo
    own = dict(noise_on=["attention-out"], max_steps=9, scale_eps=True, eps=1e-3)
    counted = Counted(tmp_path, data, data["dev"], **AUTO | own)
    optimizer = counted.trainer.create_optimizer()
    assert counted.forwards == 0 and counted.trainer.planned_steps() == 9
    assert not (tmp_path / "found.json").exists()
    assert {g["lr"] for g in optimizer.param_groups} == {RELATIVE_LR}
    part, whole = (sum(p.numel() for p in place(counted.model, [w])) for w in OWN_AND_ALL)
    assert optimizer.eps == pytest.approx(1e-3 * (whole / part) ** 0.5)


def test_rows_without_a_task_and_a_loss_of_ones_own_can_race(tmp_path):
    args = arguments(tmp_path / "lm", **AUTO | dict(max_steps=260))
    trainer = PseuZOTrainer(fresh(), args, train_dataset=Rows(), eval_dataset={"rows": Rows()})
    trainer.create_optimizer()
    assert len(json.loads((tmp_path / "lm" / "found.json").read_text())["table"]) >= 2
    model, rows, of_mean, _ = of_a_regression()

    def objective(batch, reduction="mean"):
        forward, head = of_mean(batch)
        if reduction == "mean":
            return forward, head
        return forward, lambda o: (model.out(o)[:, 0] - batch["y"]).square()

    own = dict(noise_on=["all"], max_steps=400, per_device_train_batch_size=4, eps=1e-2)
    args = arguments(tmp_path, **AUTO | own, label_names=["y"])
    trainer = PseuZOTrainer(model, args, train_dataset=rows, objective=objective)
    inputs = {"x": torch.stack([r["x"] for r in rows]), "y": torch.stack([r["y"] for r in rows])}
    with torch.no_grad():
        before = float(trainer.losses.loss(inputs))
        trainer.train()
        assert float(trainer.losses.loss(inputs)) < before / 2


@pytest.mark.parametrize("method", ["mezo", "pseuzo"])
def test_the_curvature_of_a_language_model_is_that_of_its_tokens(tmp_path, method):
    own = dict(method=method, noise_on=["all"], max_steps=2)
    args = arguments(tmp_path, **AUTO | own)
    trainer = PseuZOTrainer(fresh(), args, train_dataset=Rows())
    optimizer = trainer.create_optimizer()
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    functions, _ = trainer.losses.step_inputs(inputs, optimizer)
    with torch.no_grad():
        losses = functions[0]()
        losses = functions[1](losses) if method == "pseuzo" else losses
        assert (losses != 0).sum() == (inputs["targets"] != -100).sum() > 5 * len(losses)
        loss = trainer.losses.loss(inputs)
    torch.testing.assert_close(losses.sum(1).mean(), loss, rtol=1e-6, atol=0)
    trainer.train()
    assert optimizer.stats["curvature"] > 0 == trainer.zero_order.skipped_steps


def test_what_is_refused_of_the_shorter_run_is_refused_before_the_race(tmp_path, demo):
    data, _ = demo
    settings = AUTO | dict(method="pseuzo", max_steps=40, cycles=2, pseuzo_epochs=2)
    counted = Counted(tmp_path, data, data["dev"], **settings)
    with pytest.raises(ValueError, match="pseuzo_epochs is 2, but a cycle has 1"):
        counted.trainer.create_optimizer()
    assert counted.forwards == 0
