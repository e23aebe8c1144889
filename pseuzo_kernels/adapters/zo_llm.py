"""ZO-LLM's trainer (ZO-Bench), whose step makes noise again for its optimizer, one weight at a
time.

The step is replaced as a whole: an optimizer that is SGD without momentum is what an update in one
pass computes, for any number of directions q.
"""

import math
from typing import Any

import torch

from pseuzo_kernels.adapters.patching import Peer, WeightsOf, replace
from pseuzo_kernels.checks import check_finite

ZO_LLM = Peer(
    "zo_llm",
    "ZO-Bench/ZO-LLM at bf210fa (zo-bench/trainer.py)",
    ("zo_perturb_parameters", "zo_step", "zo_step_v1", "get_grad_sparsity_by_name"),
)
NOT_COVERED = (
    "zo_step_v2",
    "zo_conserv_step",
    "zo_step_with_module_wise_perturbation",
    "zo_step_with_module_wise_perturbation_coordinate",
)


def patch(
    trainer: Any, *, noise: str = "normal", rounding: str = "nearest", exact: bool = False
) -> Any:
    """Replace the step of ZO-LLM's trainer, or of all of a class; returns it.

    noise, rounding, exact: as in `SeededWeights`. What stays: args.q, args.zo_eps,
    args.perturbation_mode, the sign of args.trainer "zo_sign_opt", and lr and weight_decay of the
    optimizer, torch's SGD with one group. NotImplementedError, before anything is perturbed, for an
    optimizer with a state (momentum, Adam), for gradient_sparsity, and for conservative steps and
    those by modules.
    """
    from numpy.random import randint  # the trainer seeds it and draws its own seeds with it

    weights = WeightsOf(noise, rounding, exact)

    def zo_perturb_parameters(self, random_seed=None, scaling_factor=1):
        seed = self.zo_random_seed if random_seed is None else random_seed
        moved = weights(self, self.named_parameters_to_optim)
        moved.perturb(seed, scaling_factor * self.args.zo_eps)

    @torch.no_grad()
    def zo_step(self, model, inputs):
        args = self.args
        group = rate_of(self)
        self.named_parameters_to_optim = [
            (name, x) for name, x in model.named_parameters() if x.requires_grad
        ]
        two_sided = args.perturbation_mode != "one_side"
        seeds, slopes = [], []
        for _ in range(args.q):
            self.zo_random_seed = randint(1000000000)
            self.zo_perturb_parameters(scaling_factor=1)
            loss1 = self.zo_forward(model, inputs)
            self.zo_perturb_parameters(scaling_factor=-2 if two_sided else -1)
            loss2 = self.zo_forward(model, inputs)
            if two_sided:
                self.zo_perturb_parameters(scaling_factor=1)
            width = (2 if two_sided else 1) * args.zo_eps
            slope = ((loss1 - loss2) / width).item()
            self.projected_grad = check_finite("zo_llm", "projected_grad", slope)
            seeds.append(self.zo_random_seed)
            slopes.append(self.projected_grad)
        if args.trainer == "zo_sign_opt":
            slopes = [math.copysign(1.0, slope) if slope else 0.0 for slope in slopes]
        coefs = [slope / args.q for slope in slopes]
        moved = weights(self, self.named_parameters_to_optim)
        moved.update(seeds, coefs, lr=group["lr"], weight_decay=group["weight_decay"])
        return loss1

    functions = dict(zo_perturb_parameters=zo_perturb_parameters, zo_step=zo_step)
    functions["zo_step_v1"] = zo_step
    functions.update({name: _refused(name) for name in NOT_COVERED if hasattr(trainer, name)})
    return replace(trainer, ZO_LLM, functions)


def rate_of(trainer: Any) -> dict[str, Any]:
    """The one group of the trainer's optimizer. NotImplementedError if it is not plain SGD."""
    optimizer = trainer.optimizer
    groups = getattr(optimizer, "param_groups", [])
    plain = isinstance(optimizer, torch.optim.SGD) and len(groups) == 1
    if not plain or groups[0]["momentum"] or groups[0]["maximize"]:
        raise NotImplementedError(
            "zo_llm: the optimizer must be torch.optim.SGD with one group and without momentum, "
            f"got {optimizer!r}; use --optimizer sgd --momentum 0, or unpatch the trainer"
        )
    if getattr(trainer, "gradient_sparsity", None) is not None:
        raise NotImplementedError(
            "zo_llm: gradient_sparsity is not covered; set it to None, or unpatch the trainer"
        )
    return groups[0]


def _refused(name: str):
    def method(self, *args, **kwargs):
        raise NotImplementedError(
            f"zo_llm: {name} is not covered, its update would draw other noise than the "
            "perturbation; unpatch the trainer"
        )

    return method
