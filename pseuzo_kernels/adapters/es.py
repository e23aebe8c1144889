"""Evolution strategies: a population update in one pass, and the workers that hold the weights.

A worker perturbs its weights by a seed, others measure a reward, the worker restores, and in the
end weights rise along the rewards. Workers of vLLM are of a class that vLLM imports by its name, so
the line that patches it goes below the class, in its own file.
"""

from collections.abc import Sequence
from typing import Any

import torch

from pseuzo_kernels.adapters.patching import Peer, WeightsOf, replace
from pseuzo_kernels.adapters.weights import Pairs, SeededWeights
from pseuzo_kernels.checks import check_finite
from pseuzo_kernels.ops import update as updated
from pseuzo_kernels.streams import streams_of_names

ES = Peer(
    "es",
    "VsonicV/es-fine-tuning-paper at 523afc8 and sunrainyg/RandOpt at fbb7744 "
    "(utils/worker_extn.py)",
    ("perturb_self_weights", "restore_self_weights"),
)
ENSEMBLE = ("store_base_weights", "apply_perturbation", "apply_averaged_perturbations")


def update(
    weights: SeededWeights,
    seeds: Sequence[int],
    rewards: Sequence[float],
    *,
    lr: float,
    sigma: float = 1.0,
) -> None:
    """x <- x + lr / (N sigma) sum_k rewards[k] z(seeds[k], name), for N seeds, in one pass.

    rewards: higher is better, normalised or not, as the strategy has it. sigma: the scale of the
    perturbations; with 1 lr holds for noise of variance 1. Source: Salimans et al., "Evolution
    Strategies as a Scalable Alternative to Reinforcement Learning" (2017), Algorithm 1.
    """
    if len(rewards) != len(seeds) or not len(seeds):
        raise ValueError(
            f"es.update: one reward for each seed is needed, got {len(rewards)} for {len(seeds)}"
        )
    share = 1 / (len(seeds) * check_finite("es.update", "sigma", sigma))
    weights.update(seeds, [-share * float(reward) for reward in rewards], lr=lr)


def patch(
    worker: Any, *, noise: str = "normal", rounding: str = "nearest", exact: bool = False
) -> Any:
    """Replace how a worker, or all of a class, makes noise; returns it.

    The worker's weights are those of model_runner.model, without those for which _should_perturb,
    if it has one, is false. noise, rounding, exact: as in `SeededWeights`. What stays: arguments,
    signs and results of perturb_self_weights and restore_self_weights, and of RandOpt's
    update_weights_from_seeds, apply_perturbation and apply_averaged_perturbations. Every worker
    gets update_weights_from_seeds. Each weight has noise of its own; the original workers give all
    weights of one shape the same.
    """
    weights = WeightsOf(noise, rounding, exact)

    def pairs(self) -> list[tuple[str, torch.Tensor]]:
        wanted = getattr(self, "_should_perturb", lambda name: True)
        named = self.model_runner.model.named_parameters()
        return [(name, x) for name, x in named if wanted(name)]

    def perturb_self_weights(self, seed, noise_scale, negate=False):
        moved = weights(self, pairs(self))
        moved.settle()  # a call may be an update, or come after weights were replaced
        moved.perturb(seed, -noise_scale if negate else noise_scale)
        return _done()

    def restore_self_weights(self, seed, SIGMA, negate=False):
        weights(self, pairs(self)).perturb(seed, SIGMA if negate else -SIGMA)
        return _done()

    def update_weights_from_seeds(self, seeds, coeffs, alpha=1.0, population_size=1):
        coefs = [-float(c) / population_size for c in coeffs]
        weights(self, pairs(self)).update([int(s) for s in seeds], coefs, lr=alpha)
        return _done()

    def apply_perturbation(self, seed, sigma):
        return apply_averaged_perturbations(self, [(seed, sigma)])

    def apply_averaged_perturbations(self, seeds_sigmas, weights=None):
        if not hasattr(self, "_base_weights"):
            raise RuntimeError("es: call store_base_weights first")
        shares = [1.0] * len(seeds_sigmas) if weights is None else [float(w) for w in weights]
        coefs = [
            -share / sum(shares) * float(sigma)
            for share, (_, sigma) in zip(shares, seeds_sigmas, strict=True)
        ]
        seeds = [int(seed) for seed, _ in seeds_sigmas]
        base = self._base_weights
        _from_base(pairs(self), base, seeds, coefs, noise)
        return _done()

    functions: dict[str, Any] = dict(
        perturb_self_weights=perturb_self_weights,
        restore_self_weights=restore_self_weights,
        update_weights_from_seeds=update_weights_from_seeds,
    )
    if all(hasattr(worker, name) for name in ENSEMBLE):
        functions.update(
            apply_perturbation=apply_perturbation,
            apply_averaged_perturbations=apply_averaged_perturbations,
        )
    return replace(worker, ES, functions)


def _from_base(
    pairs: Pairs, base: dict[str, torch.Tensor], seeds: list[int], coefs: list[float], noise: str
) -> None:
    """x <- base - sum_k coefs[k] z(seeds[k], name), x by x, as base may be on another device."""
    for name, x in pairs:
        streams = streams_of_names("es", [name])
        start = base[name].to(x.device)
        updated([start], seeds, coefs, lr=1.0, out=[x], streams=streams, noise=noise)


def _done() -> bool:
    """Wait for the device, as the workers do before they answer."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return True
