"""The order in which examples are drawn."""

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler


class StratifiedSampler(Sampler[int]):
    """Yields every row once per epoch, in an order that gives consecutive batches nearly equal
    shares of the classes.

    Within a batch the order is random: if row i always had the same class, pairing by row would be
    pairing by class. The order is a function of seed and epoch (set_epoch) alone.
    """

    def __init__(self, classes: Sequence[int], batch_size: int, seed: int):
        if batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
        self.classes = torch.as_tensor(classes)
        self.batch_size, self.seed, self.epoch = batch_size, seed, 0

    def __len__(self) -> int:
        return len(self.classes)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed((self.seed * 0x9E3779B1 + self.epoch) % 2**63)
        place = torch.empty(len(self), dtype=torch.float64)
        for label in self.classes.unique():
            # The n rows of a class, shuffled, lie at even distances 1/n from a random start.
            rows = (self.classes == label).nonzero()[:, 0]
            start = torch.rand((), generator=generator, dtype=torch.float64)
            place[rows] = (torch.randperm(len(rows), generator=generator) + start) / len(rows)
        for batch in place.argsort(stable=True).split(self.batch_size):
            yield from batch[torch.randperm(len(batch), generator=generator)].tolist()
