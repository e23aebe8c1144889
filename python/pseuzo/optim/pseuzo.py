"""PseuZO: perturbed outputs, the head's gradient and a window of output changes.

Symbols of the paper: h = forward, g = head, o = h(x), e = dg/do, z(s) = the perturbation of seed s,
lambda = momentum. Source: PseuZO (NeurIPS 2025).
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pseuzo.optim.base import ZeroOrder
from pseuzo.optim.clip import clip_rows, example_sizes
from pseuzo.optim.curvature import of_examples, square_of
from pseuzo.optim.estimator import Measured
from pseuzo.optim.groups import not_frozen
from pseuzo.optim.mezo import (
    Slopes,
    check_curvature_window,
    check_decay,
    curvature_of,
    mean_direction,
    measure_slopes,
)
from pseuzo.optim.outputs import Outputs, as_output, head_gradients
from pseuzo.optim.pooling import pooled_outputs
from pseuzo.optim.schedule import Schedule, as_schedule
from pseuzo.optim.seeds import step_seed
from pseuzo.optim.update import Direction
from pseuzo_kernels import EmaWindow
from pseuzo_kernels.window import Proposal


class PseuZO(ZeroOrder):
    """x <- x - lr * sum_k c_k z(s_k), c_k = lambda^age_k <do_k, e> / eps, over the last K output
    changes do_k.

    A step: o0 = h(x); e = dg/do at o0, by autograd through the head alone; o1 = h(x + eps z); the
    change o1 - o0 enters the window; every entry is projected on e; one fused update follows.
    momentum: lambda, a number or a pseuzo.Schedule; while it is 0 the step is a two-sided MeZO step
    on the loss. window: K. two_sided: changes are (h(x + eps z) - h(x - eps z)) / 2, for a third
    pass.
    weighting: "sum", as in the published code, or "mean", as in the paper (Algorithm 2, its weights
    lambda^age (1 - lambda) normalised). "mean" divides c_k by the sum of lambda^age over the
    entries, so that at lambda 1 the update is their plain mean. An entry that the window dropped,
    because its own coefficient was not finite, does not count.
    clip_examples: r; the rows of e are scaled so that no example's projected gradient
    <do_i, e_i> / eps for the newest entry exceeds r times the batch's median size (no scaling where
    that is 0); older entries are projected on the same e. A MeZO step clips as MeZO does, so the
    head must then return per-example losses.
    curvature_window: lr is in units of 1 / T, as in MeZO; a sum of entries is divided by the sum of
    lambda^age over all K, too. MeZO steps need per-example losses. Not with several ranks.
    The group option exact_gradient=True is for weights of the head that h does not use, such as an
    untied output layer. They take no noise, and x <- (1 - lr * weight_decay) x - lr * dg/dx, with
    the gradient from the autograd through the head that is done anyway. MeZO steps leave them
    alone. Without the option, PseuZO leaves such weights as they are.
    capture: see MeZO; forward and head must be the same objects at every step. Other arguments: see
    MeZO. Source: PseuZO (NeurIPS 2025).
    """

    has_gradient = True

    own_settings = ("weighting", "curvature_window")

    def __init__(
        self,
        params: nn.Module | Iterable,
        lr: float = 1e-6,
        eps: float = 1e-3,
        window: int = 14,
        momentum: float | Schedule = 1.0,
        weight_decay: float = 0.0,
        noise: str = "hadamard",
        *,
        two_sided: bool = False,
        weighting: str = "sum",
        curvature_window: int = 0,
        **options: Any,
    ):
        if weighting not in ("sum", "mean"):
            raise ValueError(f"PseuZO: weighting must be sum or mean, got {weighting!r}")
        self.two_sided, self.weighting = two_sided, weighting
        self.schedule = as_schedule(momentum)
        super().__init__(params, lr=lr, eps=eps, weight_decay=weight_decay, noise=noise, **options)
        self.window = EmaWindow(window, eps=eps)
        self.curvature_window = curvature_window
        check_curvature_window(self, curvature_window)
        check_decay(self)
        self._curvature = curvature_of(self)

    def step(  # type: ignore[override]  # torch's takes a closure
        self,
        forward: Callable[[], Tensor] | None = None,
        head: Callable[[Tensor], Tensor] | None = None,
        groups: Tensor | list[int] | None = None,
        examples: Tensor | None = None,
        *,
        size: float | None = None,
    ) -> Tensor | None:
        """forward() -> o, [B, P, D] or [B, D]; head(o) -> loss, a scalar or per-example losses,
        differentiable in o. Returns the loss at x. Without arguments, applies the last estimate;
        RuntimeError if there is none.

        groups: [B] integers, see EmaWindow: rows of old batches are paired with rows of the same
        group (the label, for classification); None pairs row by row, as published. examples: [B]
        integers, for clip_examples: rows with the same number belong to one example; None: each row
        is an example. size: of this rank's part of the batch, see pseuzo.optim.ranks. If the loss
        or a coefficient is NaN or infinite, the update is skipped, counted (`skipped_steps`) and
        warned about.
        """
        if forward is None and head is None:
            return super().step()
        return super().step(forward, head, groups, examples, size=size)

    def measure(
        self,
        forward: Callable[[], Tensor],
        head: Callable[[Tensor], Tensor],
        groups: Tensor | list[int] | None = None,
        examples: Tensor | None = None,
    ) -> Measured:
        """Run the passes of a step; see step."""
        if not callable(forward) or not callable(head):
            raise TypeError(
                "PseuZO.step: needs forward() -> o and head(o) -> loss, or nothing after "
                "estimate(...)"
            )
        check_decay(self)
        momentum, eps = self.schedule(self.steps), self.eps
        if momentum == 0:
            return measure_slopes(self, (forward, head), lambda: head(as_output(forward())))
        seed = step_seed(self.seed, self.steps)
        if self.exchange is not None:
            inputs = forward, head, groups, examples
            return pooled_outputs(self, self.exchange, seed, momentum, *inputs)
        exact = [
            p for g in self.param_groups if g["exact_gradient"] for p in not_frozen(g["params"])
        ]

        def clean() -> tuple[Tensor, ...]:
            o, losses = as_output(forward()), []

            def of_each(o: Tensor) -> Tensor:
                loss = head(o)
                if not isinstance(loss, Tensor):  # which is refused
                    return loss
                losses.append(loss.detach())
                return of_examples(loss)

            if not self.curvature_window:
                return o, *head_gradients(head, o, exact)
            return o, *head_gradients(of_each, o, exact), *losses

        def run() -> tuple[Any, ...]:
            perturbed, signs = self.passes.perturbed, (1, -1) if self.two_sided else (1,)
            calls = [partial(perturbed, seed, sign * eps, "output", forward) for sign in signs]
            measured, *outputs = self.passes.together([partial(self.passes.clean, clean), *calls])
            o0, loss, e, *gradients = measured
            if groups is not None and len(groups) != len(o0):
                raise ValueError(
                    f"PseuZO.step: groups must be one per row of the output, {len(o0)}, got "
                    f"{len(groups)}"
                )

            o1, *opposite = [as_output(o, like=o0) for o in outputs]
            base = o0
            for o2 in opposite:
                o1, base = (o1.float() - o2.float()) / 2, None
            square = None
            if self.curvature_window or self.clip_examples is not None:
                change = o1 if base is None else o1.float() - base.float()
                if self.curvature_window:
                    square = curvature_along(e, change, examples, gradients.pop(), eps)
                if self.clip_examples is not None:
                    e = clip_rows(e, change, self.clip_examples, examples)
            return loss, base, o1, e, square, gradients

        measured = self.passes.run("output", (forward, head, *exact), run)
        loss, base, o1, e, square, gradients = measured
        finite = loss
        for gradient in gradients:  # the step is skipped if one is not finite, as for a loss
            ok = gradient.isfinite().all().to(loss.device)
            finite = torch.where(ok, finite, float("nan"))
        by_parameter = dict(zip(exact, gradients, strict=True))
        numbers = momentum, eps, None, square
        return Outputs(loss, "output", seed, base, o1, e, groups, finite, by_parameter, *numbers)

    def coefficients(self, measured: Outputs | Slopes) -> Direction:
        if isinstance(measured, Slopes):
            return self._scaled(mean_direction(self, measured), measured.square)
        m = measured
        proposal = self.window.propose(
            *(m.seed, m.base, m.output, m.e, m.groups, m.finite),
            momentum=m.momentum,
            eps=m.eps,
            restart=self.schedule.clears(self.steps),
        )
        coefs = proposal.coefs
        if m.newest is not None:
            newest = torch.where(proposal.found_inf != 0, 0.0, m.newest)
            coefs = torch.cat([coefs[:-1], newest])
        stats = {"projected_grad": coefs[-1:], "momentum": m.momentum}
        terms = 1.0
        if self.weighting == "mean":
            coefs = coefs / weight_of_window(proposal, m.momentum)
        else:
            terms = sum(m.momentum**age for age in range(self.window.capacity))
        direction = Direction(
            proposal.seeds,
            coefs,
            proposal.found_inf,
            m.kind,
            proposal,
            stats | {"window": len(proposal.seeds)},
            m.gradients,
        )
        return self._scaled(direction, m.square, terms)

    def _scaled(self, direction: Direction, square: Tensor | None, terms: float = 1.0) -> Direction:
        """The direction, over T if rates are in units of 1 / T; its state is that of the window and
        the squares."""
        direction, squares = self._curvature.scaled(direction, square, terms)
        return replace(direction, state=(direction.state, squares))

    def keep(self, state: Any) -> None:
        proposal, squares = state or (None, None)
        if proposal is None:
            self.window.clear()  # MeZO steps move the weights at which its entries were measured
        else:
            self.window.commit(proposal)
        if squares is not None:
            self._curvature.squares = squares

    @property
    def history(self) -> int:
        return max(self.window.capacity, self.curvature_window)

    def kind_of_step(self) -> str:
        return "output" if self.schedule(self.steps) else "loss"

    def own_state(self) -> dict[str, Any]:
        own = {"window": self.window.state_dict(), "weighting": self.weighting}
        return super().own_state() | own | {"squares": self._curvature.squares}

    def check_own_state(self, own: Mapping[str, Any]) -> None:
        EmaWindow().load_state_dict(own["window"])
        check_curvature_window(self, 0 if own["squares"] is None else len(own["squares"]))

    def load_own_state(self, own: Mapping[str, Any]) -> None:
        self.weighting, window = own["weighting"], own["window"].items()
        squares = own["squares"]
        self.curvature_window = 0 if squares is None else len(squares)
        self._curvature = curvature_of(self, squares)
        moved = {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in window}
        self.window.load_state_dict(moved)


def curvature_along(
    e: Tensor, change: Tensor, examples: Tensor | None, losses: Tensor, eps: float
) -> Tensor:
    """[]: the curvature along the perturbation, see square_of. The loss of each of n examples has
    the slope n <change_i, e_i> / eps, with e that of the mean loss, which stands for all of them.

    losses: [] or [B], or of tokens [B, P], whose slopes are those of the positions of the output.
    """
    if losses.dim() == 2:
        if losses.shape != e.shape[:-1]:
            raise ValueError(
                "PseuZO.step: with curvature_window, head may return losses of tokens, one for "
                f"each position of the output, {tuple(e.shape[:-1])}, got {tuple(losses.shape)}"
            )
        return square_of((change.float() * e.float()).sum(-1) * (len(e) / eps), losses.float())
    loss = losses.float().mean()
    sizes, first = example_sizes((change.float() * e.float()).flatten(1).sum(1), examples)
    n = first.sum()
    slopes = n * torch.where(first, sizes, 0.0) / eps  # [rows], 0 but for the first of an example
    return square_of(slopes, loss.expand_as(slopes)) * len(sizes) / n


def weight_of_window(proposal: Proposal, momentum: float) -> Tensor:
    """[] fp32: the sum of momentum^age over the entries present, at least 1."""
    present = proposal.present
    ages = torch.arange(len(present) - 1, -1, -1, device=present.device)
    weights = torch.pow(torch.full_like(ages, momentum, dtype=torch.float64), ages)
    # The newest entry has weight 1. Without it the step is skipped, and all coefficients are 0.
    return torch.where(present, weights, 0.0).sum().clamp(min=1.0).float()
