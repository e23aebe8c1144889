"""What the steps of each method cost, in forward passes; a backward pass counts as two.

Each function takes the options of a run by keyword, with the method's own defaults filled in, and
returns the average number of passes per step. A function called *_total also takes the number of
steps, and returns the passes of all of them. This module imports neither torch nor Transformers.
"""

import math
from typing import Any

from pseuzo.train.batches import count_batches


def mezo_passes(directions: int = 1, two_sided: bool | None = None, **unused: Any) -> int:
    return 1 + directions if two_sided is False else 2 * directions


def fzoo_passes(
    directions: int = 1, two_sided: bool | None = None, split_batch: bool = False, **unused: Any
) -> int:
    q = 1 if split_batch else directions  # passes of all parts together cost one of the batch
    return 2 * q if two_sided else 1 + q


def evolution_passes(two_sided: bool | None = None, **options: Any) -> int:
    return fzoo_passes(two_sided=two_sided is not False, **options)


def svrg_total(
    steps: int,
    anchor_every: int = 10,
    anchor_batches: int | None = None,
    train_size: int = 1000,
    batch_size: int = 16,
    **options: Any,
) -> int:
    anchors, each = math.ceil(steps / anchor_every), mezo_passes(**options)
    batches = count_batches(train_size, batch_size, anchor_batches)
    return each * (anchors * batches + 2 * (steps - anchors))


def svrg_passes(anchor_every: int = 10, **options: Any) -> float:
    return svrg_total(anchor_every, anchor_every, **options) / anchor_every


def deepzero_passes(coordinates: int = 32, two_sided: bool | None = None, **unused: Any) -> int:
    return 1 + (2 if two_sided else 1) * coordinates


def deepzero_total(steps: int, scores: str = "grasp", directions: int = 16, **options: Any) -> int:
    once = 2 * directions + 1 if scores == "grasp" and steps else 0
    return steps * deepzero_passes(**options) + once


def forward_gradient_passes(directions: int = 1, **unused: Any) -> int:
    return 3 * directions  # the derivative costs two more matrix products for each one of a pass


def conservative_passes(two_sided: bool | None = None, **unused: Any) -> int:
    return 4 if two_sided is False else 5


def pseuzo_passes(two_sided: bool | None = None, **unused: Any) -> int:
    return 3 if two_sided else 2


def first_order_passes(**unused: Any) -> int:
    return 3
