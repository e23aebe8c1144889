"""The methods: how the optimizer of each is built, what it takes, and what a step costs.

METHODS has one row per method. The choices and the help of the command line, the defaults of the
arguments and the number of forward passes derive from it. To add a method, write its estimator (a
file in pseuzo.optim), a function in `builders` that builds it, a function in `costs` if its passes
are counted in a new way, and a row. This module imports neither torch nor Transformers, because the
command line lists the methods before it imports either.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pseuzo.models.modes import MODES
from pseuzo.train import builders, costs
from pseuzo.train.builders import Setup

if TYPE_CHECKING:
    from torch.optim import Optimizer


@dataclass(frozen=True)
class Method:
    help: str
    build: Callable[[Setup], Optimizer]
    # The options of a run by keyword -> forward passes per step; a backward pass counts as two.
    passes: Callable[..., float]
    options: tuple[str, ...]  # the options that it takes, beside those of all methods
    rate: str = "lr"  # the field of a tuning mode that has the default learning rate
    momentum: float = 0.0  # the default of the option
    directions: int = 1  # the default of the option
    # The options of a run, and batch_size, by keyword -> why they exclude each other, or None.
    refusal: Callable[..., str | None] = lambda **options: None
    zeroth_order: bool = True
    in_ranks: bool = True  # whether several processes can share its steps
    # (steps, options by keyword) -> passes of the first steps; needed where steps differ in passes.
    total: Callable[..., int] | None = None


# Which options do not go together


def _fzoo_refusal(
    directions: int,
    two_sided: bool | None,
    split_batch: bool,
    capture: bool,
    batch_size: int,
    weights: str = "spread",
    **unused: Any,
) -> str | None:
    if directions < 2 and not two_sided and weights != "raw":
        return "one-sided directions are compared with each other: it needs directions 2 or more"
    if split_batch and capture:
        return "split_batch makes passes of different parts of the batch, which capture does not"
    if split_batch and batch_size < directions:
        return (
            f"split_batch needs an example for each of the {directions} directions, and a batch "
            f"has {batch_size}: give a larger batch, or fewer directions"
        )
    return None


def _evolution_refusal(two_sided: bool | None, **options: Any) -> str | None:
    return _fzoo_refusal(two_sided=two_sided is not False, **options)


def _sign_refusal(journal: str | None, noise: str, directions: int, **unused: Any) -> str | None:
    if not journal or (noise == "rademacher" and directions == 1):
        return None
    return (
        "a journal records sums of seeded noise, and the signs of an estimate are such a sum only "
        "with noise rademacher and directions 1"
    )


# Options that every zeroth-order method takes, and no first-order method.
PERTURBING = (
    *("eps", "noise", "rounding", "two_sided", "journal", "capture"),
    *("direction_ranks", "readout", "readout_decay"),
)
EAGER = tuple(name for name in PERTURBING if name != "capture")  # for methods without CUDA graphs
# For methods that only run passes at x + eps z, and whose updates are sums of seeded noise.
SEEDED = (*PERTURBING, "offload")
# For methods whose rate may come from the curvature along the noise, and whose placements may race.
RATED = ("find_lr", "search_share")

METHODS = {
    "pseuzo": Method(
        help="PseuZO: the difference of two outputs times the exact gradient there, in a window.",
        build=builders.pseuzo,
        passes=costs.pseuzo_passes,
        options=(
            *(*SEEDED, "window", "momentum", "schedule", "cycles", "pseuzo_epochs"),
            *("weighting", "groups", "head", "head_lr", *RATED),
        ),
        momentum=1.0,
    ),
    "mezo": Method(
        help="MeZO: the difference of the loss at two perturbed points.",
        build=builders.mezo,
        passes=costs.mezo_passes,
        options=(*SEEDED, "directions", "objective", *RATED),
    ),
    "mezo-momentum": Method(
        help="MeZO with momentum over the last perturbations.",
        build=builders.mezo_momentum,
        passes=costs.mezo_passes,
        options=(*SEEDED, "directions", "objective", *RATED, "window", "momentum"),
        momentum=0.9,
    ),
    "zo-adam": Method(
        help="Adam on MeZO's gradient estimates, with moments from the seeds of the last steps.",
        build=builders.zo_adam,
        passes=costs.mezo_passes,
        options=(*PERTURBING, "directions", "objective", "window", "moments"),
        rate="adam_lr",
        refusal=lambda journal, **unused: (
            journal and "a journal replays sums of seeded noise, which Adam's update is not"
        ),
    ),
    "evolution": Method(
        help="Evolution strategies: q directions, weighted by the ranks of their losses.",
        build=builders.evolution,
        passes=costs.evolution_passes,
        options=(*SEEDED, "directions", "objective", "weights", "split_batch"),
        rate="adam_lr",
        directions=8,
        refusal=_evolution_refusal,
    ),
    "fzoo": Method(
        help="FZOO: one-sided differences divided by the spread of the losses.",
        build=builders.fzoo,
        passes=costs.fzoo_passes,
        options=(*SEEDED, "directions", "objective", "split_batch"),
        rate="adam_lr",
        directions=8,
        refusal=_fzoo_refusal,
    ),
    "sparse-mezo": Method(
        help="Sparse-MeZO: MeZO on the small weights alone, or on random ones.",
        build=builders.sparse,
        passes=costs.mezo_passes,
        options=(*PERTURBING, "directions", "objective", "sparsity", "mask", "renew_mask"),
        refusal=lambda sparsity, **unused: (
            "sparsity 1 leaves no weight to train; give a lower one" if sparsity >= 1 else None
        ),
    ),
    "mezo-svrg": Method(
        help="MeZO-SVRG: estimates corrected by an estimate over all the data at an anchor.",
        build=builders.svrg,
        in_ranks=False,
        passes=costs.svrg_passes,
        total=costs.svrg_total,
        options=(
            *(*EAGER, "directions", "objective"),
            *("anchor_every", "anchor_batches", "anchor_lr"),
        ),
    ),
    "deepzero": Method(
        help="DeepZero: differences along single weights, at a sparse pattern; for small models.",
        build=builders.deepzero,
        in_ranks=False,
        passes=costs.deepzero_passes,
        total=costs.deepzero_total,
        options=(*EAGER, "directions", "objective", "coordinates", "scores"),
        rate="sgd_lr",
        directions=16,
        refusal=lambda journal, **unused: (
            journal and "a journal replays sums of seeded noise, but deepzero moves single weights"
        ),
    ),
    "forward-gradient": Method(
        help="The exact derivative along a direction, by forward-mode differentiation.",
        build=builders.forward_gradient,
        passes=costs.forward_gradient_passes,
        options=("noise", "rounding", "journal", "directions", "direction_ranks"),
    ),
    "zo-sign": Method(
        help="MeZO with the sign of its estimate for each weight.",
        build=builders.zo_sign,
        passes=costs.mezo_passes,
        options=(*PERTURBING, "directions", "objective"),
        rate="adam_lr",
        refusal=_sign_refusal,
    ),
    "zo-conservative": Method(
        help="MeZO's step, no step or the opposite one: the one with the lowest loss on the batch.",
        build=builders.zo_conservative,
        passes=costs.conservative_passes,
        options=(*SEEDED, "objective"),
    ),
    "zo-blocks": Method(
        help="MeZO on one block of the weights per step, in a cycle over the blocks.",
        build=builders.zo_blocks,
        passes=costs.mezo_passes,
        options=(*EAGER, "offload", "directions", "objective", "blocks"),
    ),
    "fo-sgd": Method(
        help="SGD with backpropagation, to compare.",
        build=builders.sgd,
        passes=costs.first_order_passes,
        options=("momentum",),
        rate="sgd_lr",
        zeroth_order=False,
        in_ranks=False,
    ),
    "fo-adam": Method(
        help="AdamW with backpropagation, to compare.",
        build=builders.adam,
        passes=costs.first_order_passes,
        options=(),
        rate="adam_lr",
        zeroth_order=False,
        in_ranks=False,
    ),
}
# Options that several processes cannot share, with the values for which this holds.
IN_ONE_PROCESS = {
    "capture": (True,),
    "split_batch": (True,),
    "head": ("exact",),
    "readout": ("fit",),
}
OF_METHOD = ("momentum", "directions")  # options whose default is the method's own
ZEROTH_ORDER = tuple(name for name, method in METHODS.items() if method.zeroth_order)


def methods_with(option: str) -> tuple[str, ...]:
    """The methods that take an option; all of them if no row names it."""
    return tuple(n for n, method in METHODS.items() if option in method.options) or tuple(METHODS)


def with_defaults(method: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options, with the method's own default for those of OF_METHOD that are None."""
    own = {name: getattr(METHODS[method], name) for name in OF_METHOD}
    return {**options} | {k: v for k, v in own.items() if options.get(k) is None}


def forwards_per_step(method: str, options: Mapping[str, Any] | None = None) -> float:
    """Forward passes per step of a run with these options, on average if steps differ. A backward
    pass counts as two. options: those of the run, with train_size, batch_size and lr."""
    if (options or {}).get("lr") == 0:
        return 1  # a step of pseuzo.optim.still.Still
    return METHODS[method].passes(**with_defaults(method, options or {}))


def forwards_of_steps(method: str, steps: int, options: Mapping[str, Any]) -> int:
    """Forward passes of the first steps of a run; see forwards_per_step."""
    total = METHODS[method].total
    if total is not None and options.get("lr") != 0:
        return total(steps, **with_defaults(method, options))
    return round(steps * forwards_per_step(method, options))


def refused_in_ranks(method: str, options: Mapping[str, Any]) -> str | None:
    """Which of these options needs one process; None if several ranks can share the steps."""
    if not METHODS[method].in_ranks:
        return f"method {method}"
    if method == "pseuzo" and options.get("find_lr"):
        return "find_lr (--lr auto) of method pseuzo"
    for name, values in IN_ONE_PROCESS.items():
        if options.get(name) in values:
            return name if options[name] is True else f"{name}={options[name]}"
    return None


def default_rate(method: str, mode: str) -> float:
    """The learning rate of a method in a tuning mode, if none is given."""
    return getattr(MODES[mode], METHODS[method].rate)
