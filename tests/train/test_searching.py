"""The trainer finds the placement and the rate within the forward passes of its run."""

import json

import pytest
import torch
from pseuzo.models.placement import place
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


AUTO = dict(method="mezo", noise_on=["auto"], find_lr=True, per_device_train_batch_size=5)
BOTH = AUTO | dict(max_steps=300)


def bits(model):
    return [p.detach().clone() for p in model.parameters()]


def test_a_race_comes_out_of_the_run_and_leaves_no_trace(tmp_path, demo):
    data, _ = demo
    counted = Counted(tmp_path, data, data["dev"], **BOTH)
    before, state = bits(counted.model), torch.random.get_rng_state()
    optimizer = counted.trainer.create_optimizer()
    found = json.loads((tmp_path / "found.json").read_text())
    spent = counted.trainer.search_forwards
    assert spent == found["forwards"] == counted.forwards, "a pass was not counted"
    assert 100 < spent <= 0.25 * 600
    assert all(map(torch.equal, bits(counted.model), before))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert counted.trainer.planned_steps() == (600 - spent) // 2
    assert counted.trainer.forwards(counted.trainer.planned_steps()) in (599, 600)
    assert {g["lr"] for g in optimizer.param_groups} == {found["lr"]}
    assert optimizer.eps == found["eps"]
    assert set(optimizer.streams) == set(place(counted.model, found["noise_on"]))
    assert optimizer.steps == 0 and optimizer.journal is None
    assert {row["name"] for row in found["table"]} >= {"all", "attention-out"}


def test_the_run_after_a_race_is_that_of_what_it_found(tmp_path, demo):
    """A run that is given what the race found has the same bits; a resumed one does not race."""
    data, _ = demo
    settings = AUTO | dict(max_steps=120, noise_on=["attention-out"], search_share=0.7)
    raced = Counted(tmp_path, data, data["dev"], **settings)
    raced.trainer.train()
    steps = raced.trainer.state.global_step
    assert raced.args.max_steps == 120 and steps == (240 - raced.trainer.search_forwards) // 2
    found = json.loads((tmp_path / "found.json").read_text())
    assert raced.trainer.search_forwards == found["forwards"] > 60
    assert raced.forwards == 2 * steps + found["forwards"]
    logged = [row["forwards"] for row in raced.trainer.state.log_history if "loss" in row]
    assert logged[0] == found["forwards"] + 2 and logged[-1] == raced.forwards
    given = AUTO | dict(find_lr=False, noise_on=["attention-out"], max_steps=steps)
    given |= dict(learning_rate=found["lr"], eps=found["eps"])
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
        dict(method="zo-adam", max_steps=120, search_share=0.9),
        dict(method="fo-sgd", max_steps=80, search_share=0.9, learning_rate=1e-3),
    ],
    ids=lambda settings: settings["method"],
)
def test_every_kind_of_method_can_race(tmp_path, demo, settings, capsys):
    """Without dev rows, too: the loss is then of training rows."""
    data, _ = demo
    counted = Counted(tmp_path, data, **AUTO | settings | {"weight_decay": 0.0})
    before, trained = bits(counted.model), [p.requires_grad for p in counted.model.parameters()]
    trainer = counted.trainer
    optimizer = trainer.create_optimizer()
    found = json.loads((tmp_path / "found.json").read_text())
    assert all(map(torch.equal, bits(counted.model), before))
    backward = 3 if settings["method"].startswith("fo") else 1
    assert (
        counted.forwards
        <= found["forwards"]
        <= settings["search_share"] * trainer.forwards(settings["max_steps"])
    )
    assert backward == 3 or counted.forwards == found["forwards"]
    assert len(found["table"]) >= 2 and "the best of" in capsys.readouterr().out
    where = place(fresh(), found["noise_on"])
    if backward == 3:
        assert sum(p.requires_grad for p in counted.model.parameters()) == len(where)
    else:
        assert [p.requires_grad for p in counted.model.parameters()] == trained
    assert {g["lr"] for g in optimizer.param_groups} == {found["lr"]}


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


def test_too_small_a_budget_says_so(tmp_path, demo, capsys):
    data, _ = demo
    settings = AUTO | dict(max_steps=5, learning_rate=0.25)
    refused = Counted(tmp_path, data, data["dev"], **settings)
    with pytest.raises(ValueError, match="noise_on=auto needs a race, for which 2 of the run's 10"):
        refused.trainer.train()
    assert refused.forwards == 0 and not (tmp_path / "found.json").exists()
    settings |= dict(noise_on=["attention-out"])
    trainer = Counted(tmp_path, data, data["dev"], **settings).trainer
    assert trainer.create_optimizer().param_groups[0]["lr"] == 0.25
    assert "2 of the run's 10 forward passes are too few for a race" in capsys.readouterr().out
    assert trainer.planned_steps() == 5 and trainer.search_forwards == 0


def test_a_loss_of_ones_own_and_rows_without_a_task_can_race(tmp_path):
    model, rows, objective, _ = of_a_regression()
    args = arguments(
        tmp_path,
        **AUTO | dict(max_steps=320, noise_on=["all"], per_device_train_batch_size=4),
        label_names=["y"],
    )
    trainer = PseuZOTrainer(model, args, train_dataset=rows, objective=objective)
    trainer.create_optimizer()
    assert {row["rung"] for row in json.loads((tmp_path / "found.json").read_text())["table"]} > {0}
    args = arguments(tmp_path / "lm", **AUTO | dict(max_steps=260))
    trainer = PseuZOTrainer(fresh(), args, train_dataset=Rows(), eval_dataset={"rows": Rows()})
    trainer.create_optimizer()
    assert len(json.loads((tmp_path / "lm" / "found.json").read_text())["table"]) >= 2


def test_what_is_refused_of_the_shorter_run_is_refused_before_the_race(tmp_path, demo):
    data, _ = demo
    settings = AUTO | dict(method="pseuzo", max_steps=40, cycles=2, pseuzo_epochs=2)
    counted = Counted(tmp_path, data, data["dev"], **settings)
    with pytest.raises(ValueError, match="pseuzo_epochs is 2, but a cycle has 1"):
        counted.trainer.create_optimizer()
    assert counted.forwards == 0
