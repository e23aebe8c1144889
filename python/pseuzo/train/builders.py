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
    }


def mezo(setup: Setup) -> Optimizer:
    from pseuzo.optim import MeZO

    args = setup.args
    own: dict[str, Any] = {
        "two_sided": args.two_sided is not False,
        "directions": args.directions,
    }
    if args.method == "mezo-momentum":
        own |= {"momentum": args.momentum, "window": args.window}
    return MeZO(setup.groups, **own, **zeroth_order_options(setup))


def zo_adam(setup: Setup) -> Optimizer:
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


def population(setup: Setup) -> Optimizer:
    from pseuzo.optim import FZOO, Evolution

    args = setup.args
    own: dict[str, Any] = {"directions": args.directions, "split_batch": args.split_batch}
    own |= zeroth_order_options(setup)
    if args.method == "fzoo":
        return FZOO(setup.groups, two_sided=bool(args.two_sided), **own)
    two_sided = args.two_sided is not False
    return Evolution(setup.groups, two_sided=two_sided, weights=args.weights, **own)


def sparse(setup: Setup) -> Optimizer:
    from pseuzo.optim import SparseMeZO

    args = setup.args
    own = {name: getattr(args, name) for name in ("sparsity", "mask", "renew_mask", "directions")}
    two_sided = args.two_sided is not False
    return SparseMeZO(setup.groups, two_sided=two_sided, **own, **zeroth_order_options(setup))


def svrg(setup: Setup) -> Optimizer:
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


def deepzero(setup: Setup) -> Optimizer:
    from pseuzo.optim import DeepZero

    args = setup.args
    own = {name: getattr(args, name) for name in ("coordinates", "scores", "directions")}
    two_sided = bool(args.two_sided)
    return DeepZero(setup.groups, two_sided=two_sided, **own, **zeroth_order_options(setup))


def forward_gradient(setup: Setup) -> Optimizer:
    from pseuzo.optim import ForwardGradient

    options = zeroth_order_options(setup)
    del options["eps"]
    return ForwardGradient(setup.groups, directions=setup.args.directions, **options)


def zo_bench(setup: Setup) -> Optimizer:
    from pseuzo.optim import ZOBlocks, ZOConservative, ZOSign

    args = setup.args
    own = {"two_sided": args.two_sided is not False} | zeroth_order_options(setup)
    if args.method == "zo-conservative":
        return ZOConservative(setup.groups, **own)
    if args.method == "zo-sign":
        return ZOSign(setup.groups, directions=args.directions, **own)
    return ZOBlocks(setup.groups, directions=args.directions, blocks=args.blocks, **own)


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
