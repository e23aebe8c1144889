"""Hashes of what all ranks must have alike, so that a rank that differs is found.

They are CRC-32: they find what has gone wrong, not what somebody has forged.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from functools import cache
from inspect import signature
from typing import TYPE_CHECKING

from torch import Tensor

from pseuzo.machine import parts_of
from pseuzo.optim import groups
from pseuzo.optim.seeds import HASH_DOMAIN, step_seed
from pseuzo.optim.wire import buffer_of
from pseuzo.perturb.offload import flush
from pseuzo.perturb.offloaded import store_of
from pseuzo_kernels import __version__
from pseuzo_kernels.reference import ROUNDING_VERSION

if TYPE_CHECKING:
    from pseuzo.optim.base import ZeroOrder
    from pseuzo.optim.ranks import Ranks

CHUNK = 1 << 14  # elements of the trained weights that are hashed at a step
READ = 1 << 22  # elements that are copied to the host at a time
PLAIN = (bool, int, float, str, tuple)


@cache
def arguments(kind: type) -> list[str]:
    """The names of the arguments with which optimizers of this kind are made."""
    inits = [vars(base)["__init__"] for base in kind.__mro__ if "__init__" in vars(base)]
    return sorted({name for init in inits for name in signature(init).parameters})


def of_settings(o: ZeroOrder, ranks: Ranks) -> int:
    """A hash of the numbers and names that decide on an update, as they are now."""
    given = {name: getattr(o, name, None) for name in arguments(type(o))}  # type: ignore[arg-type]
    plain = {name: value for name, value in given.items() if isinstance(value, PLAIN)}
    schedule = getattr(o, "schedule", None)
    momentum = None if schedule is None else schedule(o.steps)
    of_groups = [
        (*(float(group[name]) for name in groups.NUMBERS), bool(group["maximize"]))
        for group in o.param_groups
    ]
    trained = [sum(not groups.is_frozen(p) for p in g["params"]) for g in o.param_groups]
    settings = type(o).__name__, plain, momentum, of_groups, trained, ranks.direction_ranks
    return zlib.crc32(repr(settings).encode())


def of_chunk(o: ZeroOrder) -> int:
    """A hash of CHUNK consecutive elements of the trained weights, drawn by the step's seed."""
    params = [p for group in o.param_groups for p in groups.not_frozen(group["params"])]
    total, crc = sum(p.numel() for p in params), 0
    first = step_seed(o.seed, o.steps, HASH_DOMAIN) % -(-total // CHUNK) * CHUNK
    last = min(first + CHUNK, total)
    at, store = 0, store_of(o.model)
    for p in params:
        if at < last and at + p.numel() > first:
            if store is not None:  # offloaded weights are updated late
                store.settle(store.regions.of[p])  # type: ignore[index]
            part = p.detach().view(-1)[max(first - at, 0) : last - at]
            crc = zlib.crc32(buffer_of(part), crc)
        at += p.numel()
    return crc


def of_start(o: ZeroOrder, ranks: Ranks) -> dict[str, str]:
    """What ranks compare once, before their first step: version, options, parameters, weights and
    data (`ZeroOrder.check`)."""
    flush(o.model)
    names = {} if o.model is None else {p: name for name, p in o.model.named_parameters()}
    layout = [
        (names.get(p), o.streams[p], tuple(p.shape), str(p.dtype))  # type: ignore[call-overload]
        for group in o.param_groups
        for p in groups.not_frozen(group["params"])
    ]
    of_groups = (p for group in o.param_groups for p in group["params"])
    weights = of_groups if o.model is None else o.model.parameters()
    return {
        "version": f"pseuzo {__version__}, rounding rule {ROUNDING_VERSION}",
        "parameters": f"{zlib.crc32(repr(layout).encode()):08x}",
        "settings": f"{of_settings(o, ranks):08x}",
        "step": str(o.steps),
        "weights": f"{of_weights(weights):08x}",
        "data": o.check,
    }


def of_weights(weights: Iterable[Tensor]) -> int:
    """A hash of all bytes of the weights. Those without memory of their own (meta) are left out."""
    crc = 0
    for part in (part for x in weights for part in parts_of(x)):
        if part.device.type != "meta":
            for some in part.detach().reshape(-1).split(READ):
                crc = zlib.crc32(buffer_of(some), crc)
    return crc
