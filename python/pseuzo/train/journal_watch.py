"""The watch over the weights of a run, which a journal keeps between steps."""

from collections.abc import Iterable
from operator import attrgetter

import torch
from torch import Tensor


class Watch:
    """Notices writes to weights, by their addresses and by torch's counts of writes."""

    def __init__(self, weights: Iterable[Tensor]):
        self._weights = list(weights)
        self._places: list[int] = []
        self._storages: list[torch.UntypedStorage] = []  # kept, so that addresses are not reused

    def _versions(self) -> list[int]:
        return list(map(attrgetter("_version"), self._weights))

    def marks(self) -> tuple[list[int], list[int]]:
        """Return the addresses and counts, one of which changes if a weight does."""
        return self._places, self._versions()

    def changed(self, marks: tuple[list[int], list[int]] | None) -> str | None:
        """Say how the weights changed since marks() returned these; None if they did not."""
        places = list(map(Tensor.data_ptr, self._weights))
        if marks not in (None, (places, self._versions())):
            return "written" if places == marks[0] else "moved or converted, as by model.to(...),"
        if places != self._places:
            self._places = places
            self._storages = [p.untyped_storage() for p in self._weights]
        return None

    def forget(self) -> None:
        self._storages.clear()
