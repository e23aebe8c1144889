"""The outputs of PseuZO's passes, and the gradient of the loss with respect to them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pseuzo.optim.estimator import Measured
from pseuzo.perturb.contexts import outside_inference_mode


@dataclass(frozen=True)
class Outputs(Measured):
    """The outputs of a step's passes.

    seed: of the perturbation. base, output: [B, P, D] or [B, D], the clean and the perturbed
    output; base None: output is their difference. e: dg/do, of the same shape. groups: see
    EmaWindow. finite: [] fp32, NaN where the step must be skipped. gradients: parameters of
    exact_gradient groups -> dg/dx. momentum, eps: of this step. newest: [] fp32, the coefficient of
    the step's own change, where base and output are pooled so that they do not say it exactly.
    square: [] fp32, the curvature along the perturbation, where the optimizer scales by it.
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
    newest: Tensor | None = None
    square: Tensor | None = None


def as_output(o: Any, like: Tensor | None = None, op: str = "PseuZO.step") -> Tensor:
    """o, detached. Raises if it is not an output, or not of the shape of `like`."""
    if not isinstance(o, Tensor) or not o.dtype.is_floating_point:
        kind = o.dtype if isinstance(o, Tensor) else type(o).__name__
        raise TypeError(f"{op}: forward must return a floating-point tensor, got {kind}")
    if o.dim() not in (2, 3):
        raise ValueError(
            f"{op}: forward must return [B, P, D] or [B, D], got shape {tuple(o.shape)}"
        )
    if like is not None and o.shape != like.shape:
        raise ValueError(
            f"{op}: forward returned {tuple(like.shape)} and then {tuple(o.shape)}; both "
            "passes of a step must run on the same batch"
        )
    return o.detach()


def head_gradients(
    head: Callable[[Tensor], Tensor], o0: Tensor, exact: list[Tensor], op: str = "PseuZO.step"
) -> tuple[Tensor, ...]:
    """The mean loss, e = dg/do at o0, and the gradients of the parameters `exact`."""
    with outside_inference_mode(), torch.enable_grad():
        o = o0.clone().requires_grad_()
        loss = head(o)
        is_vector = isinstance(loss, Tensor) and loss.dim() == 1 and loss.numel() > 0
        if not is_vector and not (isinstance(loss, Tensor) and loss.numel() == 1):
            got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(
                f"{op}: head must return a scalar loss, or a vector of per-example losses, "
                f"got {got}; reduce it, e.g. .mean()"
            )
        loss = loss.mean() if loss.numel() > 1 else loss.reshape(())
        if not loss.requires_grad:
            raise ValueError(f"{op}: the loss does not depend on the output given to head")
        # Another thread would need its own cuBLAS workspace.
        with torch.autograd.set_multithreading_enabled(False):
            e, *gradients = torch.autograd.grad(loss, [o, *exact], allow_unused=True)
    if e is None:
        raise ValueError(f"{op}: the loss does not depend on the output given to head")
    for p, gradient in zip(exact, gradients, strict=True):
        if gradient is None:
            raise ValueError(
                f"{op}: the head does not use a parameter of shape "
                f"{tuple(p.shape)} that is to be trained by the exact gradient "
                "(exact_gradient=True); only weights of the head have one"
            )
    return loss.detach(), e, *gradients
