"""LOZO's trainer: a matrix moves along U V^T, of low rank, and other weights along dense noise.

U [rows, rank] is new in each step, V [columns, rank] every step_interval steps. Both are made from
seeds in fp32 when they are needed, and kept nowhere; the product goes into the weights in one
matrix multiplication, without a matrix of its own.
"""

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from pseuzo_kernels.adapters.patching import Peer, WeightsOf, replace
from pseuzo_kernels.adapters.weights import decayed
from pseuzo_kernels.checks import check_finite
from pseuzo_kernels.ops import noise as make_noise
from pseuzo_kernels.streams import stream_of_name

LOZO = Peer(
    "lozo",
    "optsuite/LOZO at 5d1ade5 (large_models/LOZOtrainer.py)",
    ("lowrank_zo_perturb_parameters", "lowrank_zo_update"),
)
WITHOUT_DECAY = ("bias", "layer_norm", "layernorm")


def factors(
    x: Tensor, name: str, seed: int, v_seed: int, rank: int, noise: str
) -> tuple[Tensor, Tensor]:
    """U [rows, rank] of seed and V [columns, rank] of v_seed for a matrix x, in its dtype."""
    u = make_noise((x.shape[0], rank), seed, stream_of_name(name), noise=noise, device=x.device)
    stream = stream_of_name(name + " V")
    v = make_noise((x.shape[1], rank), v_seed, stream, noise=noise, device=x.device)
    return u.to(x.dtype), v.to(x.dtype)


def patch(trainer: Any, *, noise: str = "normal", rounding: str = "nearest") -> Any:
    """Replace how LOZO's trainer, or all of a class, perturbs and updates; returns it.

    noise, rounding: as in `SeededWeights`; rounding holds for weights that are no matrices. What
    stays: seeds, scaling_factor times args.zo_eps, args.rank_r and args.step_interval,
    _get_learning_rate(), args.weight_decay (not of biases and layer norms), the step of
    lr_scheduler. trainer.v stays empty. An update is along the U that its step perturbed with, in
    steps with a new V too.

    Source: Chen et al., "Enhancing Zeroth-order Fine-tuning for Language Models with Low-rank
    Structures" (2024), Algorithm 1.
    """
    weights = WeightsOf(noise, rounding, exact=False)
    v_seeds: WeakKeyDictionary[Any, int] = WeakKeyDictionary()

    def parts(self):
        pairs = self.named_parameters_to_optim
        matrices = [(name, x) for name, x in pairs if x.ndim >= 2]
        for name, x in matrices:
            if x.ndim > 2:
                raise ValueError(f"lozo: {name} has {x.ndim} dimensions; low rank is for matrices")
        return matrices, weights(self, ((name, x) for name, x in pairs if x.ndim < 2))

    def add(self, matrices, seed, scale, keeps) -> None:
        rank, v_seed = self.args.rank_r, v_seeds[self]
        with torch.no_grad():
            for (name, x), keep in zip(matrices, keeps, strict=True):
                u, v = factors(x, name, int(seed), v_seed, rank, noise)
                x.detach().addmm_(u, v.t(), beta=keep, alpha=scale)

    def lowrank_zo_perturb_parameters(self, random_seed=None, scaling_factor=1):
        seed = self.zo_random_seed if random_seed is None else random_seed
        if self.step % self.args.step_interval == 0 or self not in v_seeds:
            v_seeds[self] = int(seed)
        scale = scaling_factor * self.args.zo_eps
        matrices, others = parts(self)
        add(self, matrices, seed, scale, [1.0] * len(matrices))
        others.perturb(seed, scale)

    def lowrank_zo_update(self):
        lr, wd = self._get_learning_rate(), self.args.weight_decay
        slope = check_finite("lozo", "projected_grad", self.projected_grad)
        matrices, others = parts(self)
        decay = decayed(others.names, wd, WITHOUT_DECAY)
        others.update(self.zo_random_seed, slope, lr=lr, weight_decay=decay)
        decays = decayed((name for name, _ in matrices), wd, WITHOUT_DECAY)
        add(self, matrices, self.zo_random_seed, -lr * slope, [1 - lr * d for d in decays])
        self.lr_scheduler.step()

    functions = dict(
        lowrank_zo_perturb_parameters=lowrank_zo_perturb_parameters,
        lowrank_zo_update=lowrank_zo_update,
    )
    return replace(trainer, LOZO, functions)
