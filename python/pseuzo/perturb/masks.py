"""Which elements of the weights take noise, and the ops that add noise to those alone."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pseuzo_kernels import ops


@dataclass(frozen=True)
class Masks:
    """A limit for each weight, and the seed of random masks. None: the masks are of small elements.

    See pseuzo_kernels.masks, which makes the masks again wherever they are used.
    """

    limits: Mapping[Tensor, float]
    seed: int | None = None

    def alike(self, other: "Masks | None") -> bool:
        """Whether the same launches work for both; only the seed may differ."""
        if other is None or (self.seed is None) != (other.seed is None):
            return False
        return self.limits is other.limits or self.limits == other.limits

    def of(
        self, params: Sequence[Tensor], seed: Tensor | None = None
    ) -> tuple[list[float], Tensor | None]:
        """The last arguments of the masked ops, for params on one device.

        seed: the tensor that holds the seed; None: a new tensor is made.
        """
        if seed is None and self.seed is not None:
            seed = torch.full((1,), self.seed, dtype=torch.int64, device=params[0].device)
        return [self.limits[p] for p in params], seed


Mask = tuple[()] | tuple[list[float], Tensor | None]


def mask_of(masks: Masks | None, params: Sequence[Tensor], seed: Tensor | None = None) -> Mask:
    """The last arguments of the ops below; without masks there are none."""
    return () if masks is None else masks.of(params, seed)


def op_in_place(masks: Masks | None) -> Callable[..., Any]:
    return ops.add_noise_list_ if masks is None else ops.add_noise_masked_list_


def op_out(masks: Masks | None) -> Callable[..., Any]:
    return ops.add_noise_list_out if masks is None else ops.add_noise_masked_list_out
