"""Named weights that move along noise from seeds: what every zeroth-order trainer does to them."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pseuzo_kernels.checks import check_finite, check_noise, check_rounding, per_tensor
from pseuzo_kernels.ops import perturb, perturb_, update_
from pseuzo_kernels.streams import streams_of_names

Pairs = Iterable[tuple[str, Tensor]]


class _Group(NamedTuple):
    """The weights on one device. A call of an op takes one device's."""

    at: list[int]  # positions in the list
    tensors: list[Tensor]
    streams: list[int]


class SeededWeights:
    """Weights of a model under their names; the noise of each is that of a seed and of its name.

        perturb(seed, scale)              x <- x + scale * z(seed, name)
        update(seeds, coefs, lr=lr)       x <- (1 - lr * decay) x - lr sum_k coefs[k] z(seeds[k])

    in one pass over x each, in place, whatever the number of seeds.

    named_parameters: pairs of a name and a tensor, as module.named_parameters() has them: fp32,
    bf16 or fp16, on any devices. Use the names of the whole model: a part of it then has the noise
    it has in the whole. noise: a law of `pseuzo_kernels.noise`; "normal" is what most trainers
    draw, "hadamard" is the library's default, nearly normal and cheaper on GPUs. rounding: of
    updates, "nearest" or "stochastic", which keeps on average what is smaller than half an ulp.

    exact: perturbed weights are made from a copy, which has to fit in memory, and going back to
    scale 0 gives the bits of before. Without it weights are perturbed in place, and each of the
    calls that go there and back rounds in the dtype of x: in bf16 and fp16 weights drift.

    Source: MeZO (Malladi et al. 2023), Algorithm 1. Raises ValueError for two weights with one
    name, and what `pseuzo_kernels.perturb_` raises for tensors that it does not take.
    """

    def __init__(
        self,
        named_parameters: Pairs,
        *,
        noise: str = "normal",
        rounding: str = "nearest",
        exact: bool = False,
    ):
        check_noise("SeededWeights", noise)
        check_rounding("SeededWeights", rounding)
        pairs = list(named_parameters)
        self.names = tuple(name for name, _ in pairs)
        self.tensors = tuple(x for _, x in pairs)
        self.devices = tuple(x.device for x in self.tensors)
        self.noise, self.rounding, self.exact = noise, rounding, exact
        self.groups: dict[torch.device, _Group] = {}
        streams = streams_of_names("SeededWeights", self.names)
        for i, (x, stream) in enumerate(zip(self.tensors, streams, strict=True)):
            group = self.groups.setdefault(x.device, _Group([], [], []))
            group.at.append(i)
            group.tensors.append(x)
            group.streams.append(stream)
        self._copies: dict[torch.device, list[Tensor]] = {}
        self._seed: int | None = None  # the weights are at copies + _scale * z(_seed)
        self._scale = 0.0

    def holds(self, named_parameters: Sequence[tuple[str, Tensor]]) -> bool:
        """Whether these are the weights, under the same names, in this order and on the same
        devices."""
        return len(named_parameters) == len(self.names) and all(
            name == known and x is y and x.device == device
            for (name, x), known, y, device in zip(
                named_parameters, self.names, self.tensors, self.devices, strict=True
            )
        )

    def perturb(self, seed: int, scale: float) -> None:
        """x <- x + scale * z(seed, name); scale is of either sign, and undone by its negative."""
        seed, scale = int(seed), check_finite("perturb", "scale", scale)
        if self.exact:
            self._perturb_copies(seed, scale)
            return
        for group in self.groups.values():
            perturb_(group.tensors, seed, scale, streams=group.streams, noise=self.noise)

    def _perturb_copies(self, seed: int, scale: float) -> None:
        if self._seed is None or self._seed != seed:
            self.settle()
            self._save()
        self._seed, self._scale = seed, self._scale + scale
        back = abs(self._scale) <= 1e-6 * abs(scale)  # scales are sums of few floats
        for device, group in self.groups.items():
            copies = self._copies[device]
            if back:
                _copy(group.tensors, copies)
            else:
                perturb(
                    copies,
                    seed,
                    self._scale,
                    out=group.tensors,
                    streams=group.streams,
                    noise=self.noise,
                )
        if back:
            self.settle()

    def _save(self) -> None:
        for device, group in self.groups.items():
            if device not in self._copies:
                self._copies[device] = [x.detach().clone() for x in group.tensors]
            else:
                _copy(self._copies[device], group.tensors)

    def settle(self) -> None:
        """Take the weights as they are for those from which the next perturbation starts."""
        self._seed, self._scale = None, 0.0

    def update(
        self,
        seeds: int | Sequence[int],
        coefs: float | Sequence[float],
        *,
        lr: float,
        weight_decay: float | Sequence[float] = 0.0,
    ) -> None:
        """x <- (1 - lr * weight_decay) x - lr * sum_k coefs[k] z(seeds[k], name).

        coefs: projected gradients; a reward that should rise has a negative one. weight_decay: a
        number, or one for each name. Stochastic rounding draws from the last seed, so seeds should
        be new ones in each step. ValueError for numbers that are not finite, before any weight is
        changed.
        """
        numbers = list(map(int, seeds)) if isinstance(seeds, Iterable) else [int(seeds)]
        decays = per_tensor("update", "weight_decay", weight_decay, len(self.names))
        self.settle()
        for group in self.groups.values():
            update_(
                group.tensors,
                numbers,
                coefs,
                lr=lr,
                weight_decay=[decays[i] for i in group.at],
                streams=group.streams,
                noise=self.noise,
                rounding=self.rounding,
                rounding_seed=numbers[-1],
            )


def _copy(to: Sequence[Tensor], xs: Sequence[Tensor]) -> None:
    with torch.no_grad():
        torch._foreach_copy_(list(to), list(xs))


def decayed(names: Iterable[str], weight_decay: float, without: Iterable[str]) -> list[float]:
    """The weight decay of each name: 0 for those that contain one of the words `without`."""
    words = tuple(without)
    return [0.0 if any(word in name for word in words) else weight_decay for name in names]
