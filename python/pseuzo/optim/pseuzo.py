"""PseuZO: perturbed outputs, the head's gradient and a window of output changes.

Symbols of the paper: h = forward, g = head, o = h(x), e = dg/do, z(s) = the perturbation of seed s,
lambda = momentum. Source: PseuZO (NeurIPS 2025).
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pseuzo.optim.base import ZeroOrder
from pseuzo.optim.clip import clip_rows
from pseuzo.optim.estimator import Measured
from pseuzo.optim.groups import not_frozen
from pseuzo.optim.mezo import Slopes, mean_direction, measure_slopes
from pseuzo.optim.schedule import Schedule, as_schedule
from pseuzo.optim.seeds import step_seed
from pseuzo.optim.update import Direction
from pseuzo.perturb.contexts import outside_inference_mode
from pseuzo_kernels import EmaWindow
from pseuzo_kernels.window import Proposal


@dataclass(frozen=True)
class Outputs(Measured):
    """The outputs of a step's passes.

    seed: of the perturbation. base, output: [B, P, D] or [B, D], the clean and the perturbed
    output; base None: output is their difference. e: dg/do, of the same shape. groups: see
    EmaWindow. finite: [] fp32, NaN where the step must be skipped. gradients: parameters of
    exact_gradient groups -> dg/dx. momentum, eps: of this step.
    """

    seed: int
    base: Tensor | None
    output: Tensor
    e: Tensor
    groups: Tensor | list[int] | None
    finite: Tensor
    gradients: Mapping[Tensor, Tensor]
    momentum: float
    eps: float


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
    The group option exact_gradient=True is for weights of the head that h does not use, such as an
    untied output layer. They take no noise, and x <- (1 - lr * weight_decay) x - lr * dg/dx, with
    the gradient from the autograd through the head that is done anyway. MeZO steps leave them
    alone. Without the option, PseuZO leaves such weights as they are.
    capture: see MeZO; forward and head must be the same objects at every step. Other arguments: see
    MeZO. Source: PseuZO (NeurIPS 2025).
    """

    has_gradient = True

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
        **options: Any,
    ):
        if weighting not in ("sum", "mean"):
            raise ValueError(f"PseuZO: weighting must be sum or mean, got {weighting!r}")
        self.two_sided, self.weighting = two_sided, weighting
        self.schedule = as_schedule(momentum)
        super().__init__(params, lr=lr, eps=eps, weight_decay=weight_decay, noise=noise, **options)
        self.window = EmaWindow(window, eps=eps)

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
        is an example. If the loss or a coefficient is NaN or infinite, the update is skipped,
        counted (`skipped_steps`) and warned about.
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
    ) -> Outputs | Slopes:
        """Run the passes of a step; see step."""
        if not callable(forward) or not callable(head):
            raise TypeError(
                "PseuZO.step: needs forward() -> o and head(o) -> loss, or nothing after "
                "estimate(...)"
            )
        momentum, eps = self.schedule(self.steps), self.eps
        if momentum == 0:
            return measure_slopes(self, (forward, head), lambda: head(as_output(forward())))
        seed = step_seed(self.seed, self.steps)
        exact = [
            p for g in self.param_groups if g["exact_gradient"] for p in not_frozen(g["params"])
        ]

        def clean() -> tuple[Tensor, ...]:
            o = as_output(forward())
            return o, *head_gradients(head, o, exact)

        def run() -> tuple[Any, ...]:
            o0, loss, e, *gradients = self.passes.clean(clean)
            if groups is not None and len(groups) != len(o0):
                raise ValueError(
                    f"PseuZO.step: groups must be one per row of the output, {len(o0)}, got "
                    f"{len(groups)}"
                )

            def output_at(sign: int) -> Tensor:
                o = self.passes.perturbed(seed, sign * eps, "output", forward)
                return as_output(o, like=o0)

            o1, base = output_at(1), o0
            if self.two_sided:
                o1, base = (o1.float() - output_at(-1).float()) / 2, None
            if self.clip_examples is not None:
                change = o1 if base is None else o1.float() - base.float()
                e = clip_rows(e, change, self.clip_examples, examples)
            return loss, base, o1, e, gradients

        loss, base, o1, e, gradients = self.passes.run("output", (forward, head, *exact), run)
        finite = loss
        for gradient in gradients:  # the step is skipped if one is not finite, as for a loss
            ok = gradient.isfinite().all().to(loss.device)
            finite = torch.where(ok, finite, float("nan"))
        by_parameter = dict(zip(exact, gradients, strict=True))
        return Outputs(
            loss, "output", seed, base, o1, e, groups, finite, by_parameter, momentum, eps
        )

    def coefficients(self, measured: Outputs | Slopes) -> Direction:
        if isinstance(measured, Slopes):
            return mean_direction(self, measured)
        m = measured
        proposal = self.window.propose(
            *(m.seed, m.base, m.output, m.e, m.groups, m.finite),
            momentum=m.momentum,
            eps=m.eps,
            restart=self.schedule.clears(self.steps),
        )
        stats = {"projected_grad": proposal.coefs[-1:], "momentum": m.momentum}
        coefs = proposal.coefs
        if self.weighting == "mean":
            coefs = coefs / weight_of_window(proposal, m.momentum)
        return Direction(
            proposal.seeds,
            coefs,
            proposal.found_inf,
            m.kind,
            proposal,
            stats | {"window": len(proposal.seeds)},
            m.gradients,
        )

    def keep(self, state: Any) -> None:
        if state is None:
            self.window.clear()  # MeZO steps move the weights at which its entries were measured
        else:
            self.window.commit(state)

    @property
    def history(self) -> int:
        return self.window.capacity

    def kind_of_step(self) -> str:
        return "output" if self.schedule(self.steps) else "loss"

    def own_state(self) -> dict[str, Any]:
        own = {"window": self.window.state_dict(), "weighting": self.weighting}
        return super().own_state() | own

    def check_own_state(self, own: Mapping[str, Any]) -> None:
        EmaWindow().load_state_dict(own["window"])

    def load_own_state(self, own: Mapping[str, Any]) -> None:
        self.weighting, window = own["weighting"], own["window"].items()
        moved = {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in window}
        self.window.load_state_dict(moved)


def weight_of_window(proposal: Proposal, momentum: float) -> Tensor:
    """[] fp32: the sum of momentum^age over the entries present, at least 1."""
    present = proposal.present
    ages = torch.arange(len(present) - 1, -1, -1, device=present.device)
    weights = torch.pow(torch.full_like(ages, momentum, dtype=torch.float64), ages)
    # The newest entry has weight 1. Without it the step is skipped, and all coefficients are 0.
    return torch.where(present, weights, 0.0).sum().clamp(min=1.0).float()


def as_output(o: Any, like: Tensor | None = None) -> Tensor:
    """o, detached. Raises if it is not an output, or not of the shape of `like`."""
    if not isinstance(o, Tensor) or not o.dtype.is_floating_point:
        kind = o.dtype if isinstance(o, Tensor) else type(o).__name__
        raise TypeError(f"PseuZO.step: forward must return a floating-point tensor, got {kind}")
    if o.dim() not in (2, 3):
        raise ValueError(
            f"PseuZO.step: forward must return [B, P, D] or [B, D], got shape {tuple(o.shape)}"
        )
    if like is not None and o.shape != like.shape:
        raise ValueError(
            f"PseuZO.step: forward returned {tuple(like.shape)} and then {tuple(o.shape)}; both "
            "passes of a step must run on the same batch"
        )
    return o.detach()


def head_gradients(
    head: Callable[[Tensor], Tensor], o0: Tensor, exact: list[Tensor]
) -> tuple[Tensor, ...]:
    """The mean loss, e = dg/do at o0, and the gradients of the parameters `exact`."""
    with outside_inference_mode(), torch.enable_grad():
        o = o0.clone().requires_grad_()
        loss = head(o)
        is_vector = isinstance(loss, Tensor) and loss.dim() == 1 and loss.numel() > 0
        if not is_vector and not (isinstance(loss, Tensor) and loss.numel() == 1):
            got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(
                "PseuZO.step: head must return a scalar loss, or a vector of per-example losses, "
                f"got {got}; reduce it, e.g. .mean()"
            )
        loss = loss.mean() if loss.numel() > 1 else loss.reshape(())
        if not loss.requires_grad:
            raise ValueError("PseuZO.step: the loss does not depend on the output given to head")
        # Another thread would need its own cuBLAS workspace.
        with torch.autograd.set_multithreading_enabled(False):
            e, *gradients = torch.autograd.grad(loss, [o, *exact], allow_unused=True)
    if e is None:
        raise ValueError("PseuZO.step: the loss does not depend on the output given to head")
    for p, gradient in zip(exact, gradients, strict=True):
        if gradient is None:
            raise ValueError(
                "PseuZO.step: the head does not use a parameter of shape "
                f"{tuple(p.shape)} that is to be trained by the exact gradient "
                "(exact_gradient=True); only weights of the head have one"
            )
    return loss.detach(), e, *gradients
