"""Trainers with the methods and attributes of those that adapters patch: as small as they can be.

Their losses are given, so that what they do to weights is known without a model that computes.
"""

from collections import deque
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

EPS, RATE, DECAY = 1e-2, 0.5, 0.1


def small_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Two blocks that have the same names inside, layer norms, biases, and a frozen weight."""

    def block() -> nn.Module:
        return nn.ModuleDict(dict(fc=nn.Linear(37, 5), layer_norm=nn.LayerNorm(5)))

    torch.manual_seed(3)
    model = nn.ModuleDict(dict(blocks=nn.ModuleList([block(), block()]), head=nn.Linear(5, 33)))
    for x in model.parameters():
        x.data = torch.randn(x.shape)
    model["head"].bias.requires_grad_(False)
    return model.to(dtype)


def plain_noise(seed: int, x: Tensor) -> Tensor:
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).to(x.dtype)


class LossesGiven:
    """A trainer that knows its losses. seen: the weights at each forward pass."""

    def __init__(self, model: nn.Module, losses: list[float], **args: Any):
        self.model, self.losses = model, iter(losses)
        self.args = SimpleNamespace(**dict(dict(zo_eps=EPS, weight_decay=DECAY), **args))
        self.lr_scheduler = SimpleNamespace(steps=0)
        self.lr_scheduler.step = lambda: vars(self.lr_scheduler).update(
            steps=self.lr_scheduler.steps + 1
        )
        self.seen: list[dict[str, Tensor]] = []
        self.next_seed = 10

    def _get_learning_rate(self) -> float:
        return RATE / (1 + self.lr_scheduler.steps)

    def trained(self) -> list[tuple[str, Tensor]]:
        return [(name, x) for name, x in self.model.named_parameters() if x.requires_grad]

    def zo_forward(self, model, inputs) -> Tensor:
        self.seen.append({name: x.detach().clone() for name, x in model.named_parameters()})
        return torch.tensor(next(self.losses))

    def begin(self) -> None:
        self.named_parameters_to_optim = self.trained()
        self.zo_random_seed = self.next_seed
        self.next_seed += 1


class MeZOTrainer(LossesGiven):
    def zo_perturb_parameters(self, random_seed=None, scaling_factor=1):
        for _, x in self.named_parameters_to_optim:
            x.data += scaling_factor * EPS * plain_noise(self.zo_random_seed, x)

    def zo_update(self, model):
        for _, x in self.named_parameters_to_optim:
            x.data -= RATE * self.projected_grad * plain_noise(self.zo_random_seed, x)
        self.lr_scheduler.step()

    def zo_step(self, model, inputs):
        self.begin()
        self.zo_perturb_parameters(scaling_factor=1)
        loss = self.zo_forward(model, inputs)
        self.zo_perturb_parameters(scaling_factor=-2)
        self.projected_grad = (loss - self.zo_forward(model, inputs)).item() / (2 * EPS)
        self.zo_perturb_parameters(scaling_factor=1)
        return loss


class PZOTrainer(MeZOTrainer):
    def __init__(self, model, losses, **args):
        super().__init__(model, losses, **args)
        self.sliding_window, self.coefficients = deque(maxlen=2), [0.25, 0.5, 1.0]

    def pzo_perturb_parameters(self, random_seed, scaling_factor=1):
        raise AssertionError("the stand-in's own noise")

    def pzo_update(self, model):
        raise AssertionError("the stand-in's own noise")

    def pzo_step(self, change: Tensor, gradient: Tensor):
        self.begin()
        self.pzo_perturb_parameters(self.zo_random_seed, 1)
        self.zo_forward(self.model, None)
        self.pzo_perturb_parameters(self.zo_random_seed, -1)
        self.sliding_window.append((self.zo_random_seed, change))
        self.grad_last = gradient


class LOZOTrainer(LossesGiven):
    step = -1

    def lowrank_zo_perturb_parameters(self, random_seed=None, scaling_factor=1):
        raise AssertionError("the stand-in's own noise")

    def lowrank_zo_update(self):
        raise AssertionError("the stand-in's own noise")

    def lowrank_zo_step(self, model, inputs):
        self.step += 1
        self.begin()
        self.lowrank_zo_perturb_parameters(scaling_factor=1)
        loss = self.zo_forward(model, inputs)
        self.lowrank_zo_perturb_parameters(scaling_factor=-2)
        self.projected_grad = (loss - self.zo_forward(model, inputs)).item() / (2 * EPS)
        self.lowrank_zo_perturb_parameters(scaling_factor=1)


class MeZOSGD(torch.optim.Optimizer):
    """ZO2's optimizer of a model that stays on one device."""

    def __init__(self, model: nn.Module, losses: list[float]):
        self.model, self.losses = model, iter(losses)
        self.lr, self.weight_decay, self.zo_eps, self.debug_mode = RATE, DECAY, EPS, False
        self.seeds, self.seen = iter(range(10, 20)), []
        super().__init__(model.parameters(), {})

    def zo_perturb_parameters(self, module, scaling_factor=1):
        for x in module.parameters():
            x.data += scaling_factor * EPS if self.debug_mode else float("nan")

    def zo_update(self, module, weight_decay=None):
        for x in module.parameters():
            x.data -= self.lr if self.debug_mode else float("nan")

    def inner_zo_forward(self) -> float:
        self.seen.append({name: x.detach().clone() for name, x in self.model.named_parameters()})
        return next(self.losses)

    @torch.inference_mode()
    def zo_forward(self):
        self.zo_random_seed = next(self.seeds)
        self.zo_perturb_parameters(self.model, 1)
        loss = self.inner_zo_forward()
        self.zo_perturb_parameters(self.model, -2)
        self.projected_grad = (loss - self.inner_zo_forward()) / (2 * EPS)
        self.zo_perturb_parameters(self.model, 1)
        self.zo_update(self.model)


class MeZO2SGD(MeZOSGD):
    """ZO2's optimizer that takes blocks one by one, and updates each of them one step later."""

    def __init__(self, model, losses):
        super().__init__(model, losses)
        self.rstate_queue, self.projected_grad = deque(maxlen=2), 0

    def zo_update(self, module, weight_decay=None):
        super().zo_update(module, weight_decay)
        return module

    @torch.inference_mode()
    def zo_forward(self):
        self.zo_random_seed = next(self.seeds)
        losses = next(self.losses), next(self.losses)
        for part in (*self.model["blocks"], self.model["head"]):
            if self.projected_grad:
                decay = 0.0 if part is self.model["head"] else None
                assert self.zo_update(part, decay) is part
            for scale in (1, -2, 1):
                self.zo_perturb_parameters(part, scale)
                self.seen.append({n: x.clone() for n, x in self.model.named_parameters()})
        self.projected_grad = (losses[0] - losses[1]) / (2 * EPS)


class ZOLLMTrainer(LossesGiven):
    """ZO-LLM's, whose step is replaced as a whole."""

    gradient_sparsity = None

    def __init__(self, model, losses, **args):
        super().__init__(
            model, losses, **dict(dict(q=1, perturbation_mode="two_side", trainer="zo_sgd"), **args)
        )
        self.optimizer = torch.optim.SGD(model.parameters(), lr=RATE, weight_decay=DECAY)

    def zo_perturb_parameters(self, random_seed=None, scaling_factor=1):
        raise AssertionError("the stand-in's own noise")

    zo_step = zo_step_v1 = zo_conserv_step = zo_perturb_parameters

    def get_grad_sparsity_by_name(self, name):
        return self.gradient_sparsity


class Worker:
    """A worker of the paper on evolution strategies."""

    def __init__(self, model: nn.Module):
        self.model_runner = SimpleNamespace(model=model)

    def perturb_self_weights(self, seed, noise_scale, negate=False):
        raise AssertionError("the stand-in's own noise")

    restore_self_weights = perturb_self_weights


class EnsembleWorker(Worker):
    """RandOpt's, which skips weights, and averages perturbations of stored ones."""

    def _should_perturb(self, name: str) -> bool:
        return not name.startswith("head.")

    def store_base_weights(self):
        named = self.model_runner.model.named_parameters()
        self._base_weights = {name: x.data.clone() for name, x in named}

    def apply_perturbation(self, seed, sigma):
        raise AssertionError("the stand-in's own noise")

    apply_averaged_perturbations = update_weights_from_seeds = apply_perturbation
