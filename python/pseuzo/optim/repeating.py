"""The update of a step that a journal has recorded, made again to the bit."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from pseuzo.optim.update import Direction, Update, prepare

if TYPE_CHECKING:
    from pseuzo.optim.base import ZeroOrder

RECORDED = ("lr", "weight_decay", "noise_scale", "maximize")  # the options of a group in a record


def repeat(
    optimizer: ZeroOrder, record: Any, measured: Direction | None
) -> tuple[Direction, Update]:
    """The direction and the update of a recorded step.

    record: a pseuzo.train.journal_file.Record. Its numbers count, and not what the passes of the
    step measured now, if there were any: other devices, or other shares of the batch, round
    otherwise. Nor do the options that the groups have now: those of the record do.
    """
    o, params = optimizer, [p for group in optimizer.param_groups for p in group["params"]]
    unused = {params[i] for i in record.unused}
    seeds, coefs = record.seeds.to(o.device), record.coefs.to(o.device)
    found_inf = torch.full((1,), float(record.skipped), device=o.device)
    if measured is None:
        kind = o.kind_of_step()
        o.passes.note_used(kind, {o.streams[p] for p in params if p not in unused})
        measured = Direction(seeds, coefs, found_inf, kind)
    state = o.recall(seeds, coefs, measured.state)
    groups = [
        (group | dict(zip(RECORDED, options, strict=True)), group["params"])
        for group, options in zip(o.param_groups, record.groups, strict=True)
        if options[RECORDED.index("noise_scale")]  # otherwise the group was frozen
    ]
    direction = replace(measured, seeds=seeds, coefs=coefs, found_inf=found_inf, state=state)
    return direction, prepare(o, groups, direction, record.rounding_seed, unused)
