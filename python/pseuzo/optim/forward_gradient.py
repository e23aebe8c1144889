"""Forward gradients: the exact derivative of the loss along a random direction.

Source: Baydin et al., "Gradients without backpropagation" (2022), Algorithm 1; the baseline
Forward-Grad of Zhang et al., "Revisiting zeroth-order optimization for memory-efficient LLM
fine-tuning: a benchmark" (2024).
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pseuzo.optim.base import ZeroOrder
from pseuzo.optim.clip import clip_slopes
from pseuzo.optim.merging import merged_losses
from pseuzo.optim.mezo import Slopes, as_losses, check_closure, mean_direction, unknown_slopes
from pseuzo.optim.passes import without_autograd
from pseuzo.optim.seeds import direction_seed
from pseuzo.optim.update import Direction
from pseuzo_kernels.checks import check_count


class ForwardGradient(ZeroOrder):
    """x <- x - lr mean_j c_j z_j, where c_j = <dL/dx, z_j>, by forward-mode differentiation.

    c_j is the limit of MeZO's difference as eps goes to 0, without rounding errors, so it is the
    best that one direction can give. A pass computes L and c_j together, without a backward pass.
    Where all weights are trained, a pass costs about three forward passes. It takes memory for z in
    the weights' dtype and for twice the activations of inference; nothing is kept between steps.
    With adapters it costs about two forward passes, and z is small.

    params: a module, or its parameters together with model=. Every op between a trained weight and
    the loss needs a forward-mode derivative; NotImplementedError names one that has none. Torch's
    scaled_dot_product_attention runs its plain kernels in such a pass; fused kernels of other
    packages have no such derivative. capture is refused. lr, directions (q passes) and other
    options: see MeZO. There is no eps.
    """

    offloads = False
    own_settings = ("directions",)

    def __init__(
        self,
        params: nn.Module | Iterable,
        lr: float = 1e-6,
        *,
        directions: int = 1,
        **options: Any,
    ):
        check_count("ForwardGradient", "directions", directions)
        if "eps" in options:
            raise ValueError("ForwardGradient: there is no eps, as the derivative is exact")
        if options.get("capture"):
            raise ValueError(
                "ForwardGradient: its passes are not recorded as CUDA graphs; leave capture off"
            )
        self.directions = directions
        super().__init__(params, lr=lr, eps=1.0, **options)
        if self.model is None:
            raise ValueError(
                "ForwardGradient: needs the model, to give its weights tangents; give it the "
                "module, or model="
            )

    def step(  # type: ignore[override]  # torch's closure returns a float
        self, closure: Callable[[], Tensor] | None = None, *, size: float | None = None
    ) -> Tensor | None:
        """closure() -> loss, a differentiable scalar tensor, or per-example losses [B]; called once
        for each direction.

        Returns the loss at x, on the device: reading it waits. Without a closure, applies the last
        estimate; RuntimeError if there is none. If a loss or derivative is NaN or infinite, the
        update is skipped, counted (`skipped_steps`) and warned about.
        """
        return super().step(closure, size=size)

    def measure(self, closure: Callable[[], Tensor]) -> Slopes:
        """Run the passes of a step; see step."""
        check_closure(self, closure)
        seeds = tuple(direction_seed(self.seed, self.steps, j) for j in range(self.directions))

        exchange, n = self.exchange, self.directions
        mine = seeds if exchange is None else [seeds[i] for i in exchange.mine(n)]

        def run() -> list[list[Tensor]]:
            found = [self.passes.derivative(seed, "tangent", closure) for seed in mine]
            return [[as_losses(self, value), as_losses(self, tangent)] for value, tangent in found]

        found = self.passes.run("tangent", (closure,), run)
        merged = found if exchange is None else merged_losses(exchange, found, n, "tangent")
        if merged is None:
            return unknown_slopes(self, "tangent", seeds)
        with without_autograd():
            ok = torch.ones((), dtype=torch.bool, device=self.device)
            losses, slopes = [], []
            for loss, slope in merged:
                ok = ok & loss.isfinite().all() & slope.isfinite().all()
                losses.append(loss.mean())
                slopes.append(clip_slopes(slope, self.clip_examples).mean())
            loss, c = torch.stack(losses).mean(), torch.stack(slopes)
            return Slopes(loss, "tangent", seeds, torch.where(ok, c, 0.0), ok, ())

    def coefficients(self, measured: Slopes) -> Direction:
        return mean_direction(self, measured)

    def kind_of_step(self) -> str:
        return "tangent"

    def own_state(self) -> dict[str, Any]:
        return super().own_state() | {"forward_gradient": {"directions": self.directions}}

    def load_own_state(self, own: Mapping[str, Any]) -> None:
        self.directions = own["forward_gradient"]["directions"]
