"""Makes the steps of the published codes, written from scratch with the same operations.

MeZO makes three passes over the weights to perturb and restore them and one to update, each with
torch.normal after a reseed, and rebinds the weights. PseuZO perturbs, restores and makes one pass
per entry of its window, with a number fetched from the device for each. Weight decay is left out,
and the output head runs once, where that code runs it twice.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

LR, EPS, WINDOW = 1e-7, 1e-3, 14


class PublishedMeZO:
    """x + eps z, x - eps z, x, and the update, each a loop over the weights with fresh normals."""

    def __init__(self, model: nn.Module):
        self.params = [p for p in model.parameters() if p.requires_grad]

    def shift(self, seed: int, factor: float, size: float) -> None:
        torch.manual_seed(seed)
        for p in self.params:
            z = torch.normal(mean=0, std=1, size=p.shape, device=p.device, dtype=p.dtype)
            p.data = p.data + factor * z * size

    @torch.no_grad()
    def step(self, loss: Callable[[], Tensor], seed: int) -> None:
        self.shift(seed, 1, EPS)
        plus = loss().item()
        self.shift(seed, -2, EPS)
        minus = loss().item()
        self.shift(seed, 1, EPS)
        self.shift(seed, (plus - minus) / (2 * EPS), -LR)


class PublishedPseuZO(PublishedMeZO):
    """Keeps a list of seeds and output changes of all positions, and makes a pass over the weights
    for each."""

    def __init__(self, model: nn.Module, output: Tensor):
        super().__init__(model)
        self.window = [(seed, torch.zeros_like(output)) for seed in range(WINDOW)]

    def step(
        self, output: Callable[[], Tensor], head: Callable[[Tensor], Tensor], seed: int
    ) -> None:
        with torch.no_grad():
            o0 = output()
        o = o0.clone().requires_grad_()
        (e,) = torch.autograd.grad(head(o), o)
        with torch.no_grad():
            self.shift(seed, 1, EPS)
            change = output() - o0
            self.shift(seed, -1, EPS)
            self.window = [*self.window[1:], (seed, change)]
            for old_seed, old in self.window:
                self.shift(old_seed, (old * e).sum().item() / EPS, -LR)
