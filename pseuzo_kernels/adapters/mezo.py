"""MeZO's trainer, and those that have its methods: QZO's and PseuZO's.

A step of theirs calls zo_perturb_parameters with scaling_factor 1, -2 and 1, sets projected_grad,
and calls zo_update. In place of a generator that draws one tensor after another, both take the
noise of zo_random_seed and of the weights' names, in named_parameters_to_optim.
"""

from typing import Any

from pseuzo_kernels.adapters.patching import Peer, WeightsOf, replace
from pseuzo_kernels.adapters.weights import decayed

MEZO = Peer(
    "mezo",
    "princeton-nlp/MeZO at 552cb1b (large_models/trainer.py), and of QZO at f843ddc and PseuZO at "
    "a5bd20d",
    ("zo_perturb_parameters", "zo_update"),
)
PSEUZO = ("pzo_perturb_parameters", "pzo_update")
WITHOUT_DECAY = ("bias", "layer_norm", "layernorm")
LARGEST_SLOPE = 100.0  # of QZO's clip_zo_grad


def patch(
    trainer: Any, *, noise: str = "normal", rounding: str = "nearest", exact: bool = False
) -> Any:
    """Replace how a trainer, or all of a class, perturbs and updates; returns it.

    noise, rounding, exact: as in `SeededWeights`. What stays: seeds, scaling_factor times
    args.zo_eps, the learning rate of _get_learning_rate(), args.weight_decay (not of biases and
    layer norms), args.clip_zo_grad, and the step of lr_scheduler. torch's generator is no longer
    seeded in each step. TypeError for a class without these methods; ValueError, before the update,
    if projected_grad is not finite.
    """
    weights = WeightsOf(noise, rounding, exact)

    def zo_perturb_parameters(self, random_seed=None, scaling_factor=1):
        seed = self.zo_random_seed if random_seed is None else random_seed
        moved = weights(self, self.named_parameters_to_optim)
        moved.perturb(seed, scaling_factor * self.args.zo_eps)

    def update(self, seeds, coefs):
        moved = weights(self, self.named_parameters_to_optim)
        decay = decayed(moved.names, self.args.weight_decay, WITHOUT_DECAY)
        moved.update(seeds, coefs, lr=self._get_learning_rate(), weight_decay=decay)
        self.lr_scheduler.step()

    def zo_update(self, model):
        if getattr(self, "momentum", False) or getattr(self, "SW", False):
            raise NotImplementedError(
                "mezo.patch: the trainer's own momentum and window (momentum, SW) are not covered; "
                "unpatch it, or switch them off"
            )
        if getattr(self.args, "clip_zo_grad", False):
            slope = self.projected_grad
            self.projected_grad = min(max(slope, -LARGEST_SLOPE), LARGEST_SLOPE)
        update(self, [self.zo_random_seed], [self.projected_grad])

    def pzo_perturb_parameters(self, random_seed, scaling_factor=1):
        zo_perturb_parameters(self, random_seed, scaling_factor)

    def pzo_update(self, model):
        seeds, dots = [], []
        for seed, change in self.sliding_window:
            n = min(change.shape[1], self.grad_last.shape[1])  # the last tokens, which both have
            dots.append((change[:, -n:] * self.grad_last[:, -n:]).sum().item())
            seeds.append(seed)
        factors = self.coefficients[-len(dots) :]
        coefs = [factor * dot / self.args.zo_eps for factor, dot in zip(factors, dots, strict=True)]
        update(self, seeds, coefs)

    functions: dict[str, Any] = dict(
        zo_perturb_parameters=zo_perturb_parameters, zo_update=zo_update
    )
    if all(hasattr(trainer, name) for name in PSEUZO):
        functions.update(pzo_perturb_parameters=pzo_perturb_parameters, pzo_update=pzo_update)
    return replace(trainer, MEZO, functions)
