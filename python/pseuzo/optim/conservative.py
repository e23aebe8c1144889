"""Conservative ZO-SGD: a step is made only if it lowers the loss of its batch.

Source: Zhang et al., "Revisiting zeroth-order optimization for memory-efficient LLM fine-tuning: a
benchmark" (2024), ZO-SGD-Cons.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from pseuzo.optim.groups import trained
from pseuzo.optim.mezo import MeZO, Point, Slopes, check_closure, losses_at, measure_slopes
from pseuzo.optim.passes import without_autograd
from pseuzo.optim.update import Direction


@dataclass(frozen=True)
class Chosen(Slopes):
    """choice: [] fp32, 1 for the step, 0 for none, -1 for the opposite one."""

    choice: Tensor


class ZOConservative(MeZO):
    """Takes x - lr c z, x or x + lr c z, whichever has the lowest loss on the batch, c as in MeZO.

    A step makes five passes, or four if not two_sided. The passes that compare the three points do
    not write the weights of a module. Bare parameters are shifted in place, and each step then
    waits for the device to read c. A tie takes the first of the three; this happens where a step is
    below the resolution of 16-bit weights. A point whose loss is not finite is not taken. Weight
    decay is applied once, after the comparison, whichever point is taken. With maximize the highest
    loss wins. ValueError if the groups differ in lr or maximize. The step returns the loss at x.
    """

    def __init__(
        self,
        params: nn.Module | Iterable,
        lr: float = 1e-6,
        eps: float = 1e-3,
        **options: Any,
    ):
        super().__init__(params, lr, eps, directions=1, momentum=0.0, **options)

    def measure(self, closure: Callable[[], Any]) -> Chosen:
        """Run the passes of a step; see step."""
        check_closure(self, closure)
        lr, sign = self._rate()
        slopes = measure_slopes(self, (closure,), closure, self.two_sided)
        (seed,), c = slopes.seeds, slopes.slopes
        if self.exchange is not None:  # all ranks try the same two steps
            (c,) = self.exchange.share(c)
        with without_autograd():
            by = (-sign * lr * c)[0]
            points = [Point(closure)] if self.two_sided else []
            points += [Point(closure, seed, by), Point(closure, seed, -by)]
        losses = losses_at(self, ("candidates", self.two_sided, closure), points)
        if losses is None:
            return Chosen(**vars(slopes), choice=slopes.loss)
        with without_autograd():
            *clean, step, back = (x.mean() for x in losses)
            here = clean[0] if clean else slopes.loss
            of_all = sign * torch.stack([step, here, back])
            choice = 1 - torch.where(of_all.isfinite(), of_all, float("inf")).argmin()
            finite = slopes.finite & here.isfinite()
        measured = vars(slopes) | {"loss": here, "finite": finite}
        return Chosen(**measured, choice=choice.float())

    def coefficients(self, measured: Slopes) -> Direction:
        assert isinstance(measured, Chosen)
        direction = super().coefficients(measured)
        coefs = torch.where(measured.finite, direction.coefs * measured.choice, 0.0)
        return replace(direction, coefs=coefs)

    def _rate(self) -> tuple[float, int]:
        """The lr of all groups, and 1, or -1 where the loss is maximized."""
        groups = trained("ZOConservative.step", self.param_groups)
        found = {(group["lr"], group["maximize"]) for group, params in groups if params}
        if len(found) > 1:
            raise ValueError(
                "ZOConservative.step: it compares steps of one lr, but its groups have lr and "
                f"maximize {', '.join(map(str, sorted(found)))}"
            )
        lr, maximize = next(iter(found), (0.0, False))
        return lr, -1 if maximize else 1
