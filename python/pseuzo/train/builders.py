"""How the optimizer of each method is built from the options of a run.

A row of pseuzo.train.methods.METHODS names one of these functions. torch and the optimizers are
imported when one is called, as the command line reads the rows before it imports either.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from pseuzo.train.arguments import PseuZOTrainingArguments


@dataclass(frozen=True)
class Setup:
    """Holds what the optimizer of a run is built from."""

    args: PseuZOTrainingArguments
    model: nn.Module
    groups: list[dict[str, Any]]  # with params, lr, weight_decay and noise_scale
    lr: float
    eps: float
    planned_steps: Callable[[], int]  # how many steps the run will have
    steps_per_epoch: Callable[[], int]


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
        "direction_ranks": args.direction_ranks,
    }


def curvature_window(setup: Setup) -> dict[str, Any]:
    """Return the argument of optimizers whose rate may be in units of 1 / T."""
    from pseuzo.optim.curvature import STEPS

    return {"curvature_window": STEPS if setup.args.find_lr else 0}


def mezo_options(setup: Setup) -> dict[str, Any]:
    """Return the arguments of optimizers that measure MeZO's slopes, two-sided by default."""
    own = {"two_sided": setup.args.two_sided is not False, "directions": setup.args.directions}
    return own | zeroth_order_options(setup)


def mezo(setup: Setup) -> Optimizer:
    from pseuzo.optim import MeZO

    return MeZO(setup.groups, **curvature_window(setup), **mezo_options(setup))


def still(setup: Setup) -> Optimizer:
    """Build what makes the steps of a run at lr 0, of any zeroth-order method."""
    from pseuzo.optim.still import Still

    frozen = [group | {"noise_scale": 0.0} for group in setup.groups]
    return Still(frozen, **zeroth_order_options(setup))


def mezo_momentum(setup: Setup) -> Optimizer:
    from pseuzo.optim import MeZO

    args = setup.args
    own: dict[str, Any] = {"momentum": args.momentum, "window": args.window}
    return MeZO(setup.groups, **own, **curvature_window(setup), **mezo_options(setup))


def zo_adam(setup: Setup) -> Optimizer:
    from pseuzo.optim import ZOAdam

    args = setup.args
    return ZOAdam(
        setup.groups,
        betas=(args.adam_beta1, args.adam_beta2),
        adam_eps=args.adam_epsilon,
        window=args.window,
        moments=args.moments,
        **mezo_options(setup),
    )


def evolution(setup: Setup) -> Optimizer:
    from pseuzo.optim import Evolution

    args = setup.args
    own = {"weights": args.weights, "split_batch": args.split_batch}
    return Evolution(setup.groups, **own, **mezo_options(setup))


def fzoo(setup: Setup) -> Optimizer:
    from pseuzo.optim import FZOO

    one_sided = mezo_options(setup) | {"two_sided": bool(setup.args.two_sided)}
    return FZOO(setup.groups, split_batch=setup.args.split_batch, **one_sided)


def sparse(setup: Setup) -> Optimizer:
    from pseuzo.optim import SparseMeZO

    own = {name: getattr(setup.args, name) for name in ("sparsity", "mask", "renew_mask")}
    return SparseMeZO(setup.groups, **own, **mezo_options(setup))


def svrg(setup: Setup) -> Optimizer:
    from pseuzo.optim import MeZOSVRG

    args = setup.args
    return MeZOSVRG(
        setup.groups,
        anchor_every=args.anchor_every,
        anchor_scale=1.0 if args.anchor_lr is None else args.anchor_lr / setup.lr,
        **mezo_options(setup),
    )


def deepzero(setup: Setup) -> Optimizer:
    from pseuzo.optim import DeepZero

    args = setup.args
    one_sided = mezo_options(setup) | {"two_sided": bool(args.two_sided)}
    return DeepZero(setup.groups, coordinates=args.coordinates, scores=args.scores, **one_sided)


def forward_gradient(setup: Setup) -> Optimizer:
    from pseuzo.optim import ForwardGradient

    options = zeroth_order_options(setup)
    del options["eps"]
    return ForwardGradient(setup.groups, directions=setup.args.directions, **options)


def zo_sign(setup: Setup) -> Optimizer:
    from pseuzo.optim import ZOSign

    return ZOSign(setup.groups, **mezo_options(setup))


def zo_conservative(setup: Setup) -> Optimizer:
    from pseuzo.optim import ZOConservative

    options = mezo_options(setup)
    del options["directions"]
    return ZOConservative(setup.groups, **options)


def zo_blocks(setup: Setup) -> Optimizer:
    from pseuzo.optim import ZOBlocks

    return ZOBlocks(setup.groups, blocks=setup.args.blocks, **mezo_options(setup))


def pseuzo(setup: Setup) -> Optimizer:
    from pseuzo.models.split import head_parameters
    from pseuzo.optim import PseuZO
    from pseuzo.train.schedules import schedule_of

    args, groups = setup.args, setup.groups
    head = [p for p in head_parameters(setup.model) if p.requires_grad]
    for group in groups:
        group["params"] = [p for p in group["params"] if not any(p is h for h in head)]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise ValueError(
            "method pseuzo: its perturbed passes end before the output head, and noise_on or the "
            "mode leaves nothing else to train; use mezo, or train the head with fo-sgd or fo-adam"
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
        momentum=schedule_of(setup),
        two_sided=bool(args.two_sided),
        weighting=args.weighting,
        **curvature_window(setup),
        **zeroth_order_options(setup),
    )


def _scaled_by_rate(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Turn noise scales into learning rates, for first-order optimizers.

    Noise of scale s moves weights with gradient g by -lr s^2 g on average. The product of rate and
    weight decay stays as it is, because decay does not depend on the scale.
    """
    for group in groups:
        group["lr"] *= group["noise_scale"] ** 2
        group["weight_decay"] /= group["noise_scale"] ** 2
    return groups


def sgd(setup: Setup) -> Optimizer:
    from torch.optim import SGD

    return SGD(_scaled_by_rate(setup.groups), lr=setup.lr, momentum=setup.args.momentum)


def adam(setup: Setup) -> Optimizer:
    from torch.optim import AdamW

    args, groups = setup.args, _scaled_by_rate(setup.groups)
    betas = (args.adam_beta1, args.adam_beta2)
    return AdamW(groups, lr=setup.lr, betas=betas, eps=args.adam_epsilon)
