"""The batches of a method that measures all of the training data, or a large part of it, at once.

This module does not import torch, because the table of methods counts batches before torch is
imported.
"""

from collections.abc import Iterator, Sequence
from random import Random


def even_batches(n: int, size: int, most: int | None, seed: int) -> Iterator[Sequence[int]]:
    """Yield the rows 0 .. n - 1 in batches of at most `size`, each row once.

    The sizes differ by one at most, so that the mean of the batches' means is nearly the mean over
    all rows. most: the most batches to make, with rows drawn by seed; None: all rows, in order.
    """
    parts = count_batches(n, size, most)
    rows: Sequence[int] = range(n)
    if parts * size < n:
        rows = Random(seed).sample(rows, parts * size)
    for i in range(parts):
        yield rows[i * len(rows) // parts : (i + 1) * len(rows) // parts]


def count_batches(n: int, size: int, most: int | None) -> int:
    """How many batches even_batches gives."""
    every = -(-n // size)
    return every if most is None else min(most, every)
