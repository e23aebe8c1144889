"""Draws the rows that become training, dev and test examples.

The rows are drawn as in MeZO: disjoint training and dev examples from the training split, and test
examples from the validation split, because public test splits have no labels. Only the seed decides
which they are. Test rows are drawn first, and so do not depend on how many others are asked for:
nothing is evaluated on rows it was trained on.
"""

import warnings
from collections.abc import Mapping

import torch

from pseuzo.tasks.sources import ALL, canonical

PARTS = ("train", "dev", "test")


def split_of_parts(named: Mapping[str, str], found: tuple[str, ...] | None) -> dict[str, str]:
    """Return for train, dev and test the split that each is drawn from.

    named: the splits that the task names, by part. found: the splits that the data have, or None
    if that is not known. ValueError if a part has no split."""
    if found == (ALL,):
        return dict.fromkeys(PARTS, ALL)
    if found is not None:
        named = {part: canonical(split) for part, split in named.items()}
        if not named and {"validation", "test"} <= set(found):
            named = {"dev": "validation", "test": "test"}
    train = named.get("train", "train")
    splits = {
        "train": train,
        "dev": named.get("dev", train),
        "test": named.get("test", "validation"),
    }
    if found is None:
        return splits
    # A local copy may hold fewer splits than the task names.
    instead = {"validation": ("test", train), "test": ("validation", train)}
    for part, split in splits.items():
        usable = next((s for s in (split, *instead.get(split, ())) if s in found), None)
        if usable is None:
            raise ValueError(
                f"{part} examples come from the split {split!r}, but there is only "
                f"{', '.join(found)}"
            )
        splits[part] = usable
    return splits


def draw_rows(
    split: str, n: int, wanted: dict[str, int], *, shared: bool, seed: int, task_name: str
) -> dict[str, list[int]]:
    """Draw for each part the numbers of its random rows among n; the parts are disjoint.

    wanted: part -> how many rows. shared: whether other parts use this split too, even if none of
    their rows are wanted now; then the test rows are at most two fifths of it. If too few rows are
    left for train and dev, these share them in proportion to what is wanted, and a warning says
    so. ValueError if a part would get none."""
    name = "the data" if split == ALL else f"the split {split!r}"
    if n == 0:
        raise ValueError(f"{name} is empty")
    if n < len(wanted):
        raise ValueError(f"{name} has {n} row(s), too few for {' and '.join(wanted)}")
    test = min(wanted.get("test", 0), max(1, 2 * n // 5) if shared else n)
    others = {part: size for part, size in wanted.items() if part != "test"}
    sizes, left, total = {"test": test}, n - test, sum(others.values())
    if left < total:
        sizes |= {part: max(1, left * size // total) for part, size in others.items()}
        sizes[max(others, key=others.__getitem__)] += n - sum(sizes.values())
    else:
        sizes |= others
    if any(sizes[part] < size for part, size in wanted.items()):
        shares = ", ".join(f"{sizes[part]} of {size} for {part}" for part, size in wanted.items())
        warnings.warn(f"task {task_name}: {name} has {n} rows, too few: {shares}", stacklevel=3)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    drawn = order[: sum(sizes.values())].split(list(sizes.values()))
    parts = dict(zip(sizes, (rows.tolist() for rows in drawn), strict=True))
    return {part: parts[part] for part in wanted}
