"""The interface of both ways to perturb: exactly, through a module, and in place."""

from collections.abc import Callable, Sequence, Set
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor

from pseuzo.perturb.perturbation import Base


class Perturbing(Protocol):
    """Forwards see x + scale * noise_scale * z(seed) in place of each weight x.

    `ModulePasses` never writes the weights; `InPlace` writes them and puts them back. Every pass
    has a kind: passes of one kind take the same way through the model.
    """

    @property
    def replaced(self) -> int:
        """How often memory that passes use was replaced, which makes recorded passes void."""

    def aim(self, seed: int, scale: float | Tensor) -> None:
        """Set what the passes from here on see. A recorded pass reads it when it is replayed.

        scale: a number, or a [] tensor; `InPlace` waits for the device to read a tensor.
        """

    def passing(self, kind: str = "any", base: Base | None = None) -> AbstractContextManager[None]:
        """Inside, forwards see what aim() set. base: see Perturbation; `InPlace` takes none."""

    def together(self, calls: Sequence[Callable[[], Any]]) -> list[Any]:
        """Return the results of calls, each of which makes one pass. Passes of an offloaded model
        share each upload of a layer."""

    def settled(self, kind: str) -> bool:
        """Whether a pass of this kind does nothing in Python that a recorded one would lack."""

    def unused(self, kind: str) -> Set[Tensor]:
        """The weights that no pass of this kind has used so far."""
