"""The optimizer's own part of a state_dict, and the size of its last update."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from pseuzo_kernels.reference import ROUNDING_VERSION

KEY = "zero_order"  # the key of torch's state under which ours is
# The values of settings that older versions did not save.
EARLIER = {"rounding_version": 1, "journal": None, "weighting": "sum", "rank": 0, "squares": None}


def read_state(
    op: str, state_dict: Mapping[str, Any], expected: Iterable[str], sixteen_bits: bool
) -> dict[str, Any]:
    """Our part of a state_dict. Raises ValueError if another kind of optimizer made it.

    sixteen_bits: whether any trained weight is bf16 or fp16.
    """
    own = state_dict.get("state", {}).get(KEY)
    own = own and EARLIER | own
    if missing := set(expected) - set(own or ()):
        kind = op.partition(".")[0]
        lacks = ", ".join(sorted(missing))
        raise ValueError(f"{op}: not a state of {kind}, it lacks {lacks}")
    if own["rank"]:
        raise ValueError(
            f"{op}: the state is of rank {own['rank']}, but only rank 0 keeps a window; load the "
            "state of rank 0 on all ranks"
        )
    version = own["rounding_version"]
    if version != ROUNDING_VERSION and own["rounding"] == "stochastic" and sixteen_bits:
        raise ValueError(
            f"{op}: the state is from a run whose 16-bit weights were rounded stochastically by "
            f"version {version} of the rule, but this pseuzo has version {ROUNDING_VERSION}; "
            "resume it with the pseuzo that wrote it"
        )
    return own


@torch.no_grad()
def update_rms(coefs: Tensor, moved: list[tuple[list[Tensor], float]]) -> dict[str, Tensor]:
    """See ZeroOrder.update_rms. moved: parameters with lr * noise_scale, by group."""
    size = coefs.square().sum().sqrt()
    ratios = {}
    for dtype in {p.dtype for params, _ in moved for p in params}:
        rates = [(p, rate) for params, rate in moved for p in params if p.dtype is dtype]
        n = sum(p.numel() for p, _ in rates)
        rate = math.sqrt(sum(p.numel() * rate**2 for p, rate in rates) / max(n, 1))
        norms = [torch.linalg.vector_norm(p, dtype=torch.float32) for p, _ in rates]
        squares = torch.stack([norm.to(size.device) for norm in norms]).square()
        rms = squares.sum().div(max(n, 1)).sqrt()
        ulp = torch.exp2(rms.log2().floor()) * torch.finfo(dtype).eps
        ratios[str(dtype).removeprefix("torch.")] = rate * size / ulp
    return ratios
