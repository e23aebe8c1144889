"""The ways that are timed: our ops, a copy, and how others add seeded noise."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle

import torch
from torch import Tensor

from pseuzo_kernels import adam, ops

LR, EPS = 1e-6, 1e-3
DIRECTIONS = 14  # the window of PseuZO's paper
NOISE = "hadamard"
OURS = "pseuzo"
SMALL = 0.32  # the limit of a mask that a quarter of normal weights are within
Run = Callable[[Tensor, Tensor], object]


def coefs_of(K: int) -> list[float]:
    return [0.5 + 0.1 * (k % 14) for k in range(K)]


def torch_loop(x: Tensor, seeds: Sequence[int], coefs: Sequence[float], lr: float) -> None:
    """Reseed, make the whole perturbation and add it, for each seed, as published code does."""
    for seed, coef in zip(seeds, coefs, strict=True):
        torch.manual_seed(seed)
        z = torch.normal(mean=0, std=1, size=x.shape, dtype=x.dtype, device=x.device)
        x.add_(z, alpha=-lr * coef)


@dataclass(frozen=True)
class Way:
    """A way of computing an op.

    passes: how often the op has to read or write x at least, whatever this way does. run takes x
    and y, another tensor like it. counted: the op of limits.COSTS whose kernel runs, or "".
    """

    op: str
    impl: str
    K: int
    passes: int
    run: Run
    counted: str = ""

    @property
    def name(self) -> str:
        return f"{self.op} {self.impl}"


def ways(dtype: torch.dtype, device: torch.device) -> list[Way]:
    """All ways for weights of this dtype. Our ops are the unchecked ones that optimizers call."""
    stochastic = dtype is not torch.float32
    rest = [0], [1.0], [1.0], NOISE  # stream, keep, scale

    def terms(coefs: Sequence[float], factor: float) -> tuple[Tensor, Tensor]:
        seeds = torch.arange(len(coefs), device=device)
        return seeds, factor * torch.tensor(coefs, device=device)

    def in_place(seeds: Tensor, coefs: Tensor, rounding: bool) -> Run:
        return lambda x, y: ops.add_noise_list_([x], seeds, coefs, *rest, rounding, 3, None)

    def out_of(seeds: Tensor, coefs: Tensor, has_x: bool) -> Run:
        how = *rest, False, 0, None
        return lambda x, y: ops.add_noise_list_out([x] * has_x, seeds, coefs, *how, out=[y])

    def masked(seeds: Tensor, coefs: Tensor) -> Run:
        how = *rest, False, 0, None, [SMALL], None
        return lambda x, y: ops.add_noise_masked_list_out([x], seeds, coefs, *how, out=[y])

    def moments(seeds: Tensor, coefs: Tensor) -> Run:
        numbers = [0.9, 0.999, *adam.adam_factors(-LR, 0.9, 0.999, DIRECTIONS), 1e-8]
        how = *rest[:-1], numbers, NOISE, stochastic, 3, None
        return lambda x, y: ops.adam_list_([x], seeds, coefs, 1, *how)

    plus, minus = terms([1.0], EPS), terms([1.0], -EPS)
    found = [
        Way("copy", "torch copy_", 0, 2, lambda x, y: y.copy_(x)),
        Way("noise", "torch.randn", 1, 1, lambda x, y: torch.randn(x.shape, out=y)),
        Way("noise", OURS, 1, 1, out_of(*terms([1.0], 1.0), False), "noise"),
        Way("perturb", OURS, 1, 2, out_of(*plus, True), "perturb"),
        Way("perturb, masked", OURS, 1, 2, masked(*plus)),
        Way("restore", OURS, 1, 2, in_place(*minus, False), "perturb"),
    ]
    for K in (1, DIRECTIONS):
        op, updates = f"update, K = {K}", terms(coefs_of(K), -LR)
        found.append(Way(op, OURS, K, 2, in_place(*updates, stochastic), "update"))
        found.append(Way(op, "torch loop", K, 2, loop(K)))
        if device.type == "cuda" and (run := tl_randn(*updates)):
            found.append(Way(op, "Triton, tl.randn", K, 2, run))
    adam_terms = terms(coefs_of(DIRECTIONS), 1.0)
    return [*found, Way(f"Adam, K = {DIRECTIONS}", OURS, DIRECTIONS, 2, moments(*adam_terms))]


def loop(K: int) -> Run:
    seeds, coefs = list(range(K)), coefs_of(K)
    return lambda x, y: torch_loop(x, seeds, coefs, LR)


def tl_randn(seeds: Tensor, coefs: Tensor) -> Run | None:
    """The kernel with Triton's own noise, or None without Triton."""
    try:
        from pseuzo_kernels.bench.randn import add_tl_randn
    except ImportError:
        return None
    return lambda x, y: add_tl_randn(x, seeds, coefs, out=x)


def bound(way: Way, pairs: list[tuple[Tensor, Tensor]]) -> Callable[[], object]:
    """The way on one pair of tensors after the other."""
    turn = cycle(pairs)
    return lambda: way.run(*next(turn))
