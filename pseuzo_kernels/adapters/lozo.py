"""LOZO's trainer: a matrix moves along U V^T, of low rank, and other weights along dense noise.

U [rows, rank] is new in each step, V [columns, rank] every step_interval steps. Both are made from
seeds when they are needed, and kept nowhere; see `pseuzo_kernels.low_rank_perturb_`, whose noise is
U V^T / sqrt(rank) where LOZO's is U V^T.
"""

import math
from typing import Any
from weakref import WeakKeyDictionary

from pseuzo_kernels.adapters.mezo import WITHOUT_DECAY
from pseuzo_kernels.adapters.patching import Peer, WeightsOf, replace
from pseuzo_kernels.adapters.weights import decayed
from pseuzo_kernels.checks import check_finite
from pseuzo_kernels.ops import low_rank_perturb_, low_rank_update_

LOZO = Peer(
    "lozo",
    "optsuite/LOZO at 5d1ade5 (large_models/LOZOtrainer.py)",
    ("lowrank_zo_perturb_parameters", "lowrank_zo_update"),
)


def patch(trainer: Any, *, noise: str = "normal", rounding: str = "nearest") -> Any:
    """Replace how LOZO's trainer, or all of a class, perturbs and updates; returns it.

    noise, rounding: as in `SeededWeights`. What stays: seeds, scaling_factor times args.zo_eps,
    args.rank_r and args.step_interval, _get_learning_rate(), args.weight_decay (not of biases and
    layer norms), the step of lr_scheduler. trainer.v stays empty. An update is along the U that its
    step perturbed with, in steps with a new V too.

    Source: Chen et al., "Enhancing Zeroth-order Fine-tuning for Language Models with Low-rank
    Structures" (2024), Algorithm 1.
    """
    matrices, others = (WeightsOf(noise, rounding, exact=False) for _ in range(2))
    v_seeds: WeakKeyDictionary[Any, int] = WeakKeyDictionary()

    def parts(self):
        pairs = self.named_parameters_to_optim
        return (
            matrices(self, ((name, x) for name, x in pairs if x.ndim >= 2)),
            others(self, ((name, x) for name, x in pairs if x.ndim < 2)),
        )

    def lowrank_zo_perturb_parameters(self, random_seed=None, scaling_factor=1):
        seed = int(self.zo_random_seed if random_seed is None else random_seed)
        if self.step % self.args.step_interval == 0 or self not in v_seeds:
            v_seeds[self] = seed
        rank, scale = self.args.rank_r, scaling_factor * self.args.zo_eps
        thin, dense = parts(self)
        how = dict(rank=rank, right_seed=v_seeds[self], noise=noise)
        for group in thin.groups.values():
            low_rank_perturb_(
                group.tensors, seed, scale * math.sqrt(rank), streams=group.streams, **how
            )
        dense.perturb(seed, scale)

    def lowrank_zo_update(self):
        lr, rank, seed = self._get_learning_rate(), self.args.rank_r, int(self.zo_random_seed)
        slope = check_finite("lozo", "projected_grad", self.projected_grad)
        thin, dense = parts(self)
        decays = decayed(thin.names, self.args.weight_decay, WITHOUT_DECAY)
        how = dict(rank=rank, right_seeds=[v_seeds[self]], noise=noise)
        how.update(lr=lr, rounding=rounding, rounding_seed=seed)
        for group in thin.groups.values():
            decay = [decays[i] for i in group.at]
            low_rank_update_(
                group.tensors,
                [seed],
                [slope * math.sqrt(rank)],
                weight_decay=decay,
                streams=group.streams,
                **how,
            )
        decay = decayed(dense.names, self.args.weight_decay, WITHOUT_DECAY)
        dense.update(seed, slope, lr=lr, weight_decay=decay)
        self.lr_scheduler.step()

    functions = dict(
        lowrank_zo_perturb_parameters=lowrank_zo_perturb_parameters,
        lowrank_zo_update=lowrank_zo_update,
    )
    return replace(trainer, LOZO, functions)
