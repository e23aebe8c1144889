"""The methods: how the optimizer of each is built, what it takes, and what a step costs.

METHODS has one row per method. The choices and the help of the command line, the defaults of the
arguments and the number of forward passes derive from it. To add a method, write its estimator (a
file of pseuzo.optim), a function below that builds it, one of `costs` if its passes are counted in
a new way, and a row. This module imports neither torch nor Transformers: the command line lists the
methods before it imports either.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pseuzo.models.modes import MODES
from pseuzo.train import costs

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from pseuzo.optim.schedule import Schedule
    from pseuzo.train.arguments import PseuZOTrainingArguments


@dataclass(frozen=True)
class Setup:
    """Holds what the optimizer of a run is built from."""

    args: PseuZOTrainingArguments
    model: nn.Module
    groups: list[dict[str, Any]]  # with params, lr, weight_decay and noise_scale
    lr: float
    eps: float
    planned_steps: Callable[[], int]  # of the run
    steps_per_epoch: Callable[[], int]


@dataclass(frozen=True)
class Method:
    help: str
    build: Callable[[Setup], Optimizer]
    # The options of a run by keyword -> forward passes per step; a backward pass counts as two.
    passes: Callable[..., float]
    options: tuple[str, ...]  # which options it takes, of those that not every method takes
    rate: str = "lr"  # the field of a tuning mode that has the default learning rate
    momentum: float = 0.0  # the default of the option
    directions: int = 1  # the default of the option
    # The options of a run, and batch_size, by keyword -> why they do not go together, or None.
    refusal: Callable[..., str | None] = lambda **options: None
    zeroth_order: bool = True
    # (steps, and the options by keyword) -> passes of the first steps, where steps differ.
    total: Callable[..., int] | None = None


# How the optimizers are built


def zeroth_order_options(setup: Setup) -> dict[str, Any]:
    """Return the arguments that every zeroth-order optimizer takes."""
    args = setup.args
    return {
        "lr": setup.lr,
        "eps": setup.eps,
        "noise": args.noise,
        "rounding": args.rounding,
        "seed": args.seed,
        "model": setup.model,
        "clip_examples": args.clip_examples,
        "capture": args.capture,
    }


def _mezo(setup: Setup) -> Optimizer:
    from pseuzo.optim import MeZO

    args = setup.args
    own: dict[str, Any] = {
        "two_sided": args.two_sided is not False,
        "directions": args.directions,
    }
    if args.method == "mezo-momentum":
        own |= {"momentum": args.momentum, "window": args.window}
    return MeZO(setup.groups, **own, **zeroth_order_options(setup))


def _zo_adam(setup: Setup) -> Optimizer:
    from pseuzo.optim import ZOAdam

    args = setup.args
    return ZOAdam(
        setup.groups,
        two_sided=args.two_sided is not False,
        directions=args.directions,
        betas=(args.adam_beta1, args.adam_beta2),
        adam_eps=args.adam_epsilon,
        window=args.window,
        moments=args.moments,
        **zeroth_order_options(setup),
    )


def _population(setup: Setup) -> Optimizer:
    from pseuzo.optim import FZOO, Evolution

    args = setup.args
    own: dict[str, Any] = {"directions": args.directions, "split_batch": args.split_batch}
    own |= zeroth_order_options(setup)
    if args.method == "fzoo":
        return FZOO(setup.groups, two_sided=bool(args.two_sided), **own)
    two_sided = args.two_sided is not False
    return Evolution(setup.groups, two_sided=two_sided, weights=args.weights, **own)


def _svrg(setup: Setup) -> Optimizer:
    from pseuzo.optim import MeZOSVRG

    args = setup.args
    return MeZOSVRG(
        setup.groups,
        two_sided=args.two_sided is not False,
        directions=args.directions,
        anchor_every=args.anchor_every,
        anchor_scale=1.0 if args.anchor_lr is None else args.anchor_lr / setup.lr,
        **zeroth_order_options(setup),
    )


def _deepzero(setup: Setup) -> Optimizer:
    from pseuzo.optim import DeepZero

    args = setup.args
    own = {name: getattr(args, name) for name in ("coordinates", "scores", "directions")}
    two_sided = bool(args.two_sided)
    return DeepZero(setup.groups, two_sided=two_sided, **own, **zeroth_order_options(setup))


def _forward_gradient(setup: Setup) -> Optimizer:
    from pseuzo.optim import ForwardGradient

    options = zeroth_order_options(setup)
    del options["eps"]
    return ForwardGradient(setup.groups, directions=setup.args.directions, **options)


def _pseuzo(setup: Setup) -> Optimizer:
    from pseuzo.models.split import head_parameters
    from pseuzo.optim import PseuZO

    args, groups = setup.args, setup.groups
    head = [p for p in head_parameters(setup.model) if p.requires_grad]
    for group in groups:
        group["params"] = [p for p in group["params"] if not any(p is h for h in head)]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise ValueError(
            "method pseuzo: its perturbed passes end before the output head, and noise_on or the "
            "mode leaves nothing else to train; use mezo, or train the head by fo-sgd or fo-adam"
        )
    if args.head == "exact":
        if not head:
            raise ValueError(
                "head=exact: there is no output head of its own that is trained: it is tied to the "
                "embedding, which takes noise, or the mode or noise_on leaves it out; use "
                "head=frozen"
            )
        head_lr = args.head_lr if args.head_lr is not None else 1000 * setup.lr
        groups.append({"params": head, "lr": head_lr, "weight_decay": 0.0, "exact_gradient": True})
    return PseuZO(
        groups,
        window=args.window,
        momentum=_schedule(setup),
        two_sided=bool(args.two_sided),
        weighting=args.weighting,
        **zeroth_order_options(setup),
    )


def _schedule(setup: Setup) -> Schedule:
    """Make the schedule of lambda."""
    from pseuzo.optim import Constant, Cycles, CyclicHyperbola, Linear, Reciprocal

    args, momentum = setup.args, setup.args.momentum
    given = {"cycles": args.cycles, "pseuzo_epochs": args.pseuzo_epochs}
    in_cycles = {name: value for name, value in given.items() if value is not None}
    if args.schedule == "constant" and not in_cycles:
        return Constant(momentum)
    steps = setup.planned_steps()
    if args.schedule == "linear" and not in_cycles:
        return Linear(momentum, 0.0, steps)
    epoch = setup.steps_per_epoch()
    if args.schedule == "cyclic-hyperbola":
        return CyclicHyperbola.from_steps(steps, epoch, **in_cycles)
    if args.schedule == "reciprocal" and not in_cycles:
        return Reciprocal(momentum, epoch)
    makes = {
        "constant": lambda active: Constant(momentum),
        "linear": lambda active: Linear(momentum, 0.0, active),
        "reciprocal": lambda active: Reciprocal(momentum, epoch),
    }
    return Cycles.from_steps(makes[args.schedule], steps, epoch, **in_cycles)


def _scaled_by_rate(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Turn noise scales into rates, for first-order optimizers.

    Noise of scale s moves weights by -lr s^2 g on average, g their gradient. The product of rate
    and weight decay stays as it is, because decay does not depend on the scale.
    """
    for group in groups:
        group["lr"] *= group["noise_scale"] ** 2
        group["weight_decay"] /= group["noise_scale"] ** 2
    return groups


def _sgd(setup: Setup) -> Optimizer:
    from torch.optim import SGD

    return SGD(_scaled_by_rate(setup.groups), lr=setup.lr, momentum=setup.args.momentum)


def _adam(setup: Setup) -> Optimizer:
    from torch.optim import AdamW

    args, groups = setup.args, _scaled_by_rate(setup.groups)
    betas = (args.adam_beta1, args.adam_beta2)
    return AdamW(groups, lr=setup.lr, betas=betas, eps=args.adam_epsilon)


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


# Options that every zeroth-order method takes, and no first-order method.
PERTURBING = ("eps", "noise", "rounding", "two_sided", "journal", "capture")
EAGER = tuple(name for name in PERTURBING if name != "capture")  # where no graph is recorded

METHODS = {
    "pseuzo": Method(
        help="PseuZO: the difference of two outputs times the exact gradient there, and a window.",
        build=_pseuzo,
        passes=costs.pseuzo_passes,
        options=(
            *(*PERTURBING, "window", "momentum", "schedule", "cycles", "pseuzo_epochs"),
            *("weighting", "groups", "head", "head_lr"),
        ),
        momentum=1.0,
    ),
    "mezo": Method(
        help="MeZO: the difference of the loss at two perturbed points.",
        build=_mezo,
        passes=costs.mezo_passes,
        options=(*PERTURBING, "directions", "objective"),
    ),
    "mezo-momentum": Method(
        help="MeZO with momentum over the last perturbations.",
        build=_mezo,
        passes=costs.mezo_passes,
        options=(*PERTURBING, "directions", "objective", "window", "momentum"),
        momentum=0.9,
    ),
    "zo-adam": Method(
        help="Adam of MeZO's gradient estimates, with moments from the seeds of the last steps.",
        build=_zo_adam,
        passes=costs.mezo_passes,
        options=(*PERTURBING, "directions", "objective", "window", "moments"),
        rate="adam_lr",
        refusal=lambda journal, **unused: (
            journal and "a journal replays sums of seeded noise, which Adam's update is not"
        ),
    ),
    "evolution": Method(
        help="Evolution strategies: q directions, weighted by the ranks of their losses.",
        build=_population,
        passes=costs.evolution_passes,
        options=(*PERTURBING, "directions", "objective", "weights", "split_batch"),
        rate="adam_lr",
        directions=8,
        refusal=_evolution_refusal,
    ),
    "fzoo": Method(
        help="FZOO: one-sided differences divided by the spread of the losses.",
        build=_population,
        passes=costs.fzoo_passes,
        options=(*PERTURBING, "directions", "objective", "split_batch"),
        rate="adam_lr",
        directions=8,
        refusal=_fzoo_refusal,
    ),
    "mezo-svrg": Method(
        help="MeZO-SVRG: estimates corrected by one over all the data, at an anchor.",
        build=_svrg,
        passes=costs.svrg_passes,
        total=costs.svrg_total,
        options=(
            *(*EAGER, "directions", "objective"),
            *("anchor_every", "anchor_batches", "anchor_lr"),
        ),
    ),
    "deepzero": Method(
        help="DeepZero: differences along single weights, at a sparse pattern; for small models.",
        build=_deepzero,
        passes=costs.deepzero_passes,
        total=costs.deepzero_total,
        options=(*EAGER, "directions", "objective", "coordinates", "scores"),
        rate="sgd_lr",
        directions=16,
        refusal=lambda journal, **unused: (
            journal and "a journal replays sums of seeded noise, and this moves single weights"
        ),
    ),
    "forward-gradient": Method(
        help="The exact derivative along a direction, by forward-mode differentiation.",
        build=_forward_gradient,
        passes=costs.forward_gradient_passes,
        options=("noise", "rounding", "journal", "directions"),
    ),
    "fo-sgd": Method(
        help="SGD with backpropagation, to compare.",
        build=_sgd,
        passes=costs.first_order_passes,
        options=("momentum",),
        rate="sgd_lr",
        zeroth_order=False,
    ),
    "fo-adam": Method(
        help="AdamW with backpropagation, to compare.",
        build=_adam,
        passes=costs.first_order_passes,
        options=(),
        rate="adam_lr",
        zeroth_order=False,
    ),
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
    """Forward passes per step of a run with these options, on average if steps differ; a backward
    pass counts as two. options: those of the run, train_size and batch_size."""
    return METHODS[method].passes(**with_defaults(method, options or {}))


def forwards_of_steps(method: str, steps: int, options: Mapping[str, Any]) -> int:
    """Forward passes of the first steps of a run; see forwards_per_step."""
    total = METHODS[method].total
    if total is not None:
        return total(steps, **with_defaults(method, options))
    return round(steps * forwards_per_step(method, options))


def default_rate(method: str, mode: str) -> float:
    """The learning rate of a method in a tuning mode where none is given."""
    return getattr(MODES[mode], METHODS[method].rate)
