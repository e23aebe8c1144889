"""pseuzo.optim can stand where torch.optim stands: names, schedulers, zero_grad, scalers."""

import inspect
from functools import partial

import pytest
import torch
from pseuzo import optim
from torch import nn
from torch.optim import lr_scheduler

OPTIMIZERS = [
    name
    for name in optim.__all__
    if inspect.isclass(getattr(optim, name))
    and issubclass(getattr(optim, name), torch.optim.Optimizer)
]


def test_the_optimizers_are_torchs():
    assert {"MeZO", "PseuZO", "ZOAdam", "Evolution", "FZOO", "SparseMeZO"} <= set(OPTIMIZERS)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_arguments_have_the_names_of_torch(name):
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))  # of four parameters, for ZOBlocks
    make = getattr(optim, name)
    optimizer = make(model, lr=0.125, weight_decay=0.5, maximize=True)
    group = optimizer.param_groups[0]
    wanted = ("lr", "weight_decay", "maximize")
    assert [group[key] for key in wanted] == [0.125, 0.5, True]
    assert [p.shape for p in group["params"]] == [p.shape for p in model.parameters()]
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


SCHEDULERS = {
    "StepLR": partial(lr_scheduler.StepLR, step_size=2),
    "LinearLR": partial(lr_scheduler.LinearLR, total_iters=3),
    "CosineAnnealingLR": partial(lr_scheduler.CosineAnnealingLR, T_max=4),
    "CosineAnnealingWarmRestarts": partial(lr_scheduler.CosineAnnealingWarmRestarts, T_0=2),
    "ExponentialLR": partial(lr_scheduler.ExponentialLR, gamma=0.5),
    "OneCycleLR": partial(lr_scheduler.OneCycleLR, max_lr=0.5, total_steps=6, cycle_momentum=False),
    "SequentialLR": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer,
        [lr_scheduler.ConstantLR(optimizer), lr_scheduler.ExponentialLR(optimizer, 0.5)],
        milestones=[2],
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_set_the_rates_that_they_set_for_torch(name):
    ours, torchs = nn.Linear(2, 1), nn.Linear(2, 1)
    x = torch.ones(4, 2)
    rates = []
    for model, optimizer in (
        (ours, optim.MeZO(ours, lr=0.25)),
        (torchs, torch.optim.SGD(torchs.parameters(), lr=0.25)),
    ):
        scheduler = SCHEDULERS[name](optimizer)
        rates.append([])
        for _ in range(5):
            optimizer.zero_grad()
            optimizer.step(lambda model=model: model(x).square().mean())
            scheduler.step()
            rates[-1].append(optimizer.param_groups[0]["lr"])
    assert rates[0] == rates[1] and len(set(rates[0])) > 1


def test_a_plateau_lowers_the_rate_of_a_loss_that_stays():
    model = nn.Linear(2, 1)
    optimizer = optim.MeZO(model, lr=0.5)
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    for _ in range(3):
        optimizer.step(lambda: model(torch.ones(1, 2)).sum() * 0 + 1)
        scheduler.step(1.0)
    assert optimizer.param_groups[0]["lr"] == 0.125


def test_a_disabled_scaler_passes_the_step_on():
    model, x = nn.Linear(2, 1), torch.ones(4, 2)
    optimizer = optim.MeZO(model, lr=0.125)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    before = model.weight.clone()
    loss = scaler.step(optimizer, lambda: model(x).square().mean())
    scaler.update()
    assert loss.isfinite() and not torch.equal(model.weight, before)
