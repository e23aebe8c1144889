"""ZO-SGD-Sign: each weight moves by the sign of MeZO's estimate.

Source: Liu et al., "signSGD via zeroth-order oracle" (2019); Zhang et al., "Revisiting zeroth-order
optimization for memory-efficient LLM fine-tuning: a benchmark" (2024), which calls it ZO-SGD-Sign.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pseuzo.optim.groups import trained
from pseuzo.optim.mezo import MeZO, Slopes
from pseuzo.optim.seeds import ROUNDING_DOMAIN, step_seed
from pseuzo.optim.state import update_rms
from pseuzo.optim.update import (
    CHUNK,
    Direction,
    Update,
    descended,
    estimate_of,
    rounding_bits,
    step_and_keep,
    writes,
)


class ZOSign(MeZO):
    """x <- (1 - lr * weight_decay) x - lr * sign(g), g the mean of c_j z_j over q directions.

    c_j is as in MeZO. A group's noise_scale multiplies its steps as well as its noise.
    With one direction and Rademacher noise, sign(c z) = sign(c) z: the update is a multiple of
    seeded noise, as fast as MeZO's, and a journal can record it. Otherwise g is made again for one
    tensor after another, which takes fp32 memory for the largest tensor, and a journal is refused.
    Where g is exactly 0, x only decays.
    """

    offloads = False

    def __init__(
        self,
        params: nn.Module | Iterable,
        lr: float = 1e-5,
        eps: float = 1e-3,
        **options: Any,
    ):
        super().__init__(params, lr, eps, momentum=0.0, **options)

    @property
    def recordable(self) -> bool:  # type: ignore[override]  # a loaded state may change the noise
        return self.noise == "rademacher" and self.directions == 1

    def coefficients(self, measured: Slopes) -> Direction:
        direction = super().coefficients(measured)
        return replace(direction, coefs=direction.coefs.sign()) if self.recordable else direction

    def prepare(self, direction: Direction) -> Update:
        if self.recordable:
            return super().prepare(direction)
        op = "ZOSign.step"
        unused = self.passes.unused(op, direction.kind)
        rounding_seed = step_seed(self.seed, self.steps, ROUNDING_DOMAIN)
        launches: list[Callable[[], Any]] = [self.passes.restore]  # bare parameters are shifted
        stochastic = self.rounding == "stochastic"
        moved, slot = [], {}  # type: ignore[var-annotated]
        for group, params in trained(op, self.param_groups):
            params = [p for p in params if p not in unused]
            moved.append((params, group["lr"] * group["noise_scale"]))
            step, keep = step_and_keep(group)
            step *= group["noise_scale"]
            for p in params:
                bits = rounding_bits(p, rounding_seed, self.streams[p], stochastic)
                skip = direction.found_inf.to(p.device) != 0
                seeds, coefs = direction.seeds.to(p.device), direction.coefs.to(p.device)
                terms = seeds, coefs, [self.streams[p]], [1.0], [1.0], self.noise
                for i, x in enumerate(p.view(-1).split(CHUNK)):
                    estimate = partial(estimate_of, p, terms, i, slot)
                    compute = partial(_stepped, x, estimate, keep, step, skip, bits)
                    launches += writes([x], compute, slot)
        launches.append(torch.clear_autocast_cache)  # it holds casts of the old weights
        return Update(launches, moved, unused, rounding_seed)

    def update_rms(self) -> dict[str, Tensor]:
        if self._last is None:
            return {}
        coefs, moved = self._last
        return update_rms(coefs.abs().max().sign().view(1), moved)  # 0 if the step was skipped


def _stepped(x, estimate, keep, step, skip, bits) -> tuple[Tensor]:
    return descended(x, estimate().sign(), keep, step, skip, bits)
