"""ZO-Adam: Adam on MeZO's gradient estimates, without a state of the model's size.

Sources: Kingma and Ba, "Adam" (2015), Algorithm 1, with the weight decay of AdamW. The moments are
made from the seeds and coefficients of the last steps, as in Cai, Chen and Zhu, "AdaMeZO" (2026).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pseuzo.optim import groups
from pseuzo.optim.mezo import MeZO, Slopes, mean_direction
from pseuzo.optim.seeds import ROUNDING_DOMAIN, step_seed
from pseuzo.optim.update import (
    CHUNK,
    Direction,
    Update,
    estimate_of,
    rounded,
    rounding_bits,
    step_and_keep,
    writes,
)
from pseuzo_kernels.adam import adam_factors, after, check_adam, move
from pseuzo_kernels.ops import adam_list_

MOMENTS = ("seeds", "state")


class ZOAdam(MeZO):
    """x <- (1 - lr wd) x - lr m / (sqrt(v) + adam_eps), for two forward passes and one seed a step.

    g = mean_j c_j z_j is MeZO's estimate of the gradient; m and v are the means of g and g^2 over
    past steps with weights betas[0]^age and betas[1]^age. Each is divided by the sum of the
    weights of the steps that it includes, which is Adam's correction of the bias.

    moments "seeds": m and v include the last `window` steps, K of them. The pass that updates the
    weights makes their g again from seeds and coefficients, so K q seeds and coefficients are kept
    between steps, and no tensor of the model's size. Older steps have no weight, and their share
    goes to the others: 0.23 of the total at beta1 = 0.9 with K = 14, 0.05 with K = 28. At
    beta2 = 0.999 that is nearly all of it, so v is about the plain mean over the window.
    moments "state": m and v include all steps and are two fp32 tensors per weight, as in torch's
    Adam; window then has no effect.

    A skipped step counts as a step with gradient 0. noise_scale multiplies g, so Adam divides it
    out again. params, lr, eps (of the perturbation) and further options: see MeZO. A journal is
    refused, because it records sums of seeded noise, which this update is not. `update_rms` is
    empty, because the size of an update (about lr times 0.2 to 1 per weight) is not known without
    reading it.
    """

    offloads = False
    recordable = False

    def __init__(
        self,
        params: nn.Module | Iterable,
        lr: float = 1e-5,
        eps: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        adam_eps: float = 1e-8,
        window: int = 14,
        moments: str = "seeds",
        **options: Any,
    ):
        check_adam("ZOAdam", *betas, adam_eps, "adam_eps")
        if moments not in MOMENTS:
            raise ValueError(f"ZOAdam: moments must be seeds or state, got {moments!r}")
        self.betas, self.adam_eps = (float(betas[0]), float(betas[1])), float(adam_eps)
        self.moments = moments
        self._sums: dict[Tensor, tuple[Tensor, Tensor]] = {}  # under "state", fp32, as adam.after
        super().__init__(params, lr, eps, window=window, momentum=0.0, **options)

    def coefficients(self, measured: Slopes) -> Direction:
        now = mean_direction(self, measured)
        stats = {**now.stats, "momentum": self.betas[0]}
        if self.moments == "state":
            return replace(now, stats=stats)
        seeds, coefs = self.window_with(now.seeds, now.coefs)
        return replace(
            now,
            seeds=seeds.flatten(),
            coefs=coefs.flatten(),
            state=((seeds, coefs), None),
            stats=stats | {"window": len(seeds)},
        )

    def prepare(self, direction: Direction) -> Update:
        op, stochastic = "ZOAdam.step", self.rounding == "stochastic"
        unused = self.passes.unused(op, direction.kind)
        rounding_seed = step_seed(self.seed, self._steps, ROUNDING_DOMAIN)
        together: dict[tuple, tuple[list[Tensor], list[float], list[float]]] = {}
        for group, params in groups.trained(op, self.param_groups):
            step, keep = step_and_keep(group)
            for p in params:
                if p not in unused:
                    members, keeps, scales = together.setdefault((step, p.device), ([], [], []))
                    members.append(p)
                    keeps.append(keep)
                    scales.append(group["noise_scale"])
        # Other updates take the shift of bare parameters back in their sum of noise. This one is
        # not such a sum.
        self.passes.restore()
        launches: list[Callable[[], Any]] = []
        for (step, device), (members, keeps, scales) in together.items():
            seeds, coefs = direction.seeds.to(device), direction.coefs.to(device)
            skip, at = direction.found_inf.to(device), [self._streams[p] for p in members]
            if self.moments == "seeds":
                numbers = self._numbers(step, len(coefs) // self.directions)
                how = numbers, self.noise, stochastic, rounding_seed, skip
                terms = members, seeds, coefs, self.directions, at, keeps, scales
                launches.append(partial(adam_list_, *terms, *how))
                continue
            slot: dict[str, Any] = {}
            for p, stream, keep, scale in zip(members, at, keeps, scales, strict=True):
                bits = rounding_bits(p, rounding_seed, stream, stochastic)
                noise = seeds, coefs, [stream], [1.0], [scale], self.noise.removesuffix("-fp16")
                launches += self._by_state(p, noise, step, keep, skip, bits, slot)
        written = [p for members, *_ in together.values() for p in members]
        launches.append(partial(torch.autograd.graph.increment_version, written))
        launches.append(torch.clear_autocast_cache)  # it holds casts of the old weights
        return Update(launches, [], unused, rounding_seed)

    def _numbers(self, step: float, n: int) -> list[float]:
        return [*self.betas, *adam_factors(step, *self.betas, n), self.adam_eps]

    def _by_state(self, p, noise, step, keep, skip, bits, slot) -> Iterator[Callable[[], None]]:
        """Update one parameter whose moments are in memory, some elements at a time."""
        if p not in self._sums:
            sums = torch.zeros(2, p.numel(), dtype=torch.float32, device=p.device)
            self._sums[p] = sums[0], sums[1]
        numbers = [*self._numbers(step, self._steps + 1), keep]
        parts = (x.split(CHUNK) for x in (*self._sums[p], p.view(-1)))
        for i, (m, v, x) in enumerate(zip(*parts, strict=True)):
            compute = partial(_stepped, m, v, x, partial(estimate_of, p, noise, i, slot))
            yield from writes([m, v, x], partial(compute, numbers, skip, bits), slot)

    def own_state(self) -> dict[str, Any]:
        sums = {self._streams[p]: sums for p, sums in self._sums.items()}
        adam = {"betas": self.betas, "eps": self.adam_eps, "moments": self.moments, "sums": sums}
        return super().own_state() | {"adam": adam}

    def load_own_state(self, own: Mapping[str, Any]) -> None:
        super().load_own_state(own)
        adam = own["adam"]
        self.betas, self.adam_eps, self.moments = adam["betas"], adam["eps"], adam["moments"]
        self._sums = {
            p: tuple(x.to(p.device, copy=True) for x in adam["sums"][stream])  # type: ignore[misc]
            for p, stream in self._streams.items()
            if stream in adam["sums"]
        }


def _stepped(m, v, x, gradient, numbers, skip, bits) -> tuple[Tensor, Tensor, Tensor]:
    beta1, beta2, first, second, eps, keep = numbers
    new_m, new_v = after(m, v, gradient(), beta1, beta2)
    y = x.float() * keep + move(new_m, new_v, first, second, eps)
    return new_m, new_v, rounded(torch.where(skip != 0, x.float(), y), x.dtype, bits)
