"""A probe that measures, by forward passes, how the loss curves along noise on groups of weights.

The largest stable learning rate along noise of scales D is about 1 / T, T = tr(D^2 H) with H the
Hessian of the loss. So T gives the rates and perturbations that suit a placement of the noise:

    rows = probe(model, {"all": place(model, ["all"]), "here": place(model, where)}, closures)
    lr, eps, how = equal_change(1e-6, 1e-3, *rows)
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pseuzo.optim.curvature import of_examples, terms_of
from pseuzo.optim.seeds import step_seed
from pseuzo.perturb.contexts import frozen_mode
from pseuzo.perturb.module import forget_passes, passes_of

PROBE_DOMAIN = 0x70726F6265  # keeps the probe's noise apart from the run's
MAX_EPS_FACTOR = 10.0  # a small group is probed with at most this multiple of eps


@dataclass
class Row:
    """What the probe measured of one group; z is noise on that group alone.

    Errors are standard errors of the means.
    """

    name: str
    parameters: float  # number of elements, each counted with the square of its noise scale
    curvature: float  # mean of z^T H z
    curvature_error: float
    fisher: float = math.nan  # mean of the examples' (z . gradient_i)^2, if they have losses
    fisher_error: float = math.nan

    @property
    def cost(self) -> tuple[float, float]:
        """The cost of noise on the group, tr H, and its standard error; from fisher if there is
        one."""
        if math.isfinite(self.fisher):
            return self.fisher, self.fisher_error
        return self.curvature, self.curvature_error


@torch.no_grad()
def probe(
    model: nn.Module,
    groups: Mapping[str, Iterable[nn.Parameter] | Mapping[nn.Parameter, float]],
    closures: Iterable[Callable[[], Tensor]],
    *,
    eps: float = 1e-3,
    noise: str = "hadamard",
    seed: int = 0,
    progress: Callable[[], object] | None = None,
) -> list[Row]:
    """Measure slope and curvature of the loss along noise on each group alone, by forward passes.
    The weights are not written.

    groups: name -> parameters, or parameter -> noise scale. closures: one per batch, () -> loss of
    that batch (a scalar, per-example losses [B], or those of tokens, see terms_of), each called
    1 + 2 * groups times, in eval mode. progress: called after every pass. For each batch there is
    fresh noise z on the group, with losses L0 at x and L+ and L- at x +- eps z:

        curvature = (L+ + L- - 2 L0) / eps^2    its mean estimates tr H (with scales D: tr D^2 H)

    It is noisy, and the estimate is often negative. If the closures return per-example losses,
    fisher is the mean over examples (or tokens) of the squares of their slopes (L+ - L-) / (2 eps):
    for negative log likelihoods of a roughly calibrated model it also estimates tr H (its
    Gauss-Newton part, which has nearly all of the trace), and it is never negative and much less
    noisy. For other losses, return their mean.

    If eps is small, rounding hides the differences of losses. So a group that has a share f of all
    parameters of `groups` is probed with eps / sqrt(f), which is as long a step as noise on all of
    them, but with at most 10 eps.
    """
    closures = list(closures)
    if not closures or not groups:
        raise ValueError("probe: needs at least one group and one closure")
    if not (math.isfinite(eps) and eps > 0):
        raise ValueError(f"probe: eps must be positive, got {eps}")
    streams = {p: i for i, p in enumerate(model.parameters())}
    scales = {
        name: dict(g) if isinstance(g, Mapping) else dict.fromkeys(g, 1.0)
        for name, g in groups.items()
    }
    sizes = {name: size_of(g) for name, g in scales.items()}
    if not all(sizes.values()):
        raise ValueError(
            "probe: a group has no parameters: "
            + ", ".join(n for n, size in sizes.items() if not size)
        )
    whole = sum(p.numel() for p in {p for g in scales.values() for p in g})

    def losses_of(closure: Callable[[], Tensor]) -> Tensor:
        losses = torch.as_tensor(closure()).float()
        if progress is not None:
            progress()
        return losses

    rows = []
    with frozen_mode(model):
        at_clean = [losses_of(f) for f in closures]
        for name, group in scales.items():
            places = {p: (streams[p], scale) for p, scale in group.items()}
            scaled_eps = eps * longer(whole, sizes[name])
            passes, seen = passes_of(model, places, noise), []
            for i, (closure, at_x) in enumerate(zip(closures, at_clean, strict=True)):
                z = step_seed(seed, i, PROBE_DOMAIN)
                with passes.at(z, scaled_eps, "probe"):
                    plus = losses_of(closure)
                with passes.at(z, -scaled_eps, "probe"):
                    minus = losses_of(closure)
                slopes = (plus - minus) / (2 * scaled_eps)
                curvature = ((plus - at_x) + (minus - at_x)) / (scaled_eps * scaled_eps)
                n, factor = terms_of(plus)
                fisher = (slopes * factor).square().sum() / n
                if slopes.numel() == 1:
                    fisher = torch.full_like(fisher, math.nan)
                seen.append(torch.stack([of_examples(curvature).mean(), fisher]))
            row = Row(name, sizes[name], *_means_and_errors(torch.stack(seen)))
            rows.append(row)
    forget_passes(model)  # frees their scratch
    return rows


def size_of(scales: Mapping[nn.Parameter, float]) -> float:
    """The number of elements, each with the square of its noise scale."""
    return sum(p.numel() * scale * scale for p, scale in scales.items())


def longer(whole: float, part: float) -> float:
    """The factor of eps that makes noise on a part as long as that on the whole, of these sizes; at
    most MAX_EPS_FACTOR."""
    return min(MAX_EPS_FACTOR, max(1.0, math.sqrt(whole / part)))


def _means_and_errors(samples: Tensor) -> list[float]:
    """Return the mean of each column of [n, m], each followed by its standard error, which is
    infinite for one sample."""
    samples = samples.double().cpu()
    n = len(samples)
    errors = samples.std(0) / math.sqrt(n) if n > 1 else torch.full_like(samples[0], math.inf)
    return torch.stack([samples.mean(0), errors], dim=1).flatten().tolist()


@torch.no_grad()
def first_outliers(model: nn.Module, forward: Callable[[], object]) -> str | None:
    """Return the name of the first layer whose output has outliers; None if no layer runs.

    forward: a clean pass of a batch. The measure of a layer is max |h| / rms(h) over its output h
    [..., width]; the first layer is meant that has at least half of the largest. The layer that
    first has massive activations is where noise in one layer alone is said to do as well as
    everywhere (Dominant-Layer ZO, 2025).
    """
    found: dict[str, float] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: object, output: object) -> None:
            h = output[0] if isinstance(output, tuple | list) else output
            if isinstance(h, Tensor) and h.is_floating_point() and h.numel():
                size = h.float().abs()
                found[name] = float(size.max() / size.square().mean().sqrt())

        return hook

    handles = [
        module.register_forward_hook(note(name))
        for name, module in model.named_modules()
        if re.fullmatch(r"\D+\.\d+", name) and any(p.requires_grad for p in module.parameters())
    ]
    try:
        with frozen_mode(model):
            forward()
    finally:
        for handle in handles:
            handle.remove()
    finite = {name: size for name, size in found.items() if math.isfinite(size)}
    return next((n for n in finite if finite[n] >= max(finite.values()) / 2), None)


class Scaled(NamedTuple):
    """lr and eps for another placement of the noise, and a sentence that says how they were
    scaled."""

    lr: float
    eps: float
    how: str


def equal_change(lr: float, eps: float, everywhere: Row, here: Row) -> Scaled:
    """Return lr and eps with which noise `here` changes the loss as much, on average, as noise
    `everywhere` does at the given lr and eps.

    E[L(x + eps z) - L(x)] = eps^2 / 2 * tr(D^2 H) =: eps^2 / 2 * T, and the largest stable lr is
    about 1 / T. So lr is multiplied by the ratio T_everywhere / T_here, and eps by its root. T is
    the cost of the rows if both are more than twice their standard error; else it is taken to be
    proportional to the number of parameters (each with its scale squared).
    """
    (whole, whole_error), (part, part_error) = everywhere.cost, here.cost
    if all(math.isfinite(error) and t > 2 * error for t, error in (everywhere.cost, here.cost)):
        ratio = whole / part
        how = (
            f"the curvature along the noise is {1 / ratio:.3g} of that along noise on all "
            "parameters"
        )
    else:
        ratio = everywhere.parameters / here.parameters
        how = (
            f"the curvature along the noise could not be measured ({part:.3g} +- "
            f"{part_error:.2g}, on all parameters {whole:.3g} +- {whole_error:.2g}); by the share "
            f"of the parameters, {1 / ratio:.3g}"
        )
    return Scaled(lr * ratio, eps * math.sqrt(ratio), how)
