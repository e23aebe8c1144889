"""The arguments that choose elements: masks, and where a shard is in its tensor."""

import sys
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pseuzo_kernels.checks import (
    MAX_ELEMENTS,
    labels_of,
    per_tensor,
    refuse_freed,
    signed64,
)


class SmallMask(NamedTuple):
    """Elements with |x| <= limit take noise, as in Sparse MeZO (Liu et al. 2024). limit: a float or
    one per tensor, not negative."""

    limit: float | Sequence[float]


class RandomMask(NamedTuple):
    """A share of all elements takes noise, drawn from seed: of a tensor, the same ones in each call
    with the same seed and stream. share: a float in 0 .. 1, or one per tensor, in steps of 2^-16;
    seed: an int, or int64 [1] on the device of the tensors."""

    share: float | Sequence[float]
    seed: int | Tensor


class Part(NamedTuple):
    """Where the elements of a shard are in the whole tensor, both flattened.

    Element i of the shard is element offset + i // width * stride + i % width of the whole tensor,
    or offset + i if width is 0. So a block of columns, first to last - 1, of a matrix with n
    columns is Part(first, last - first, n), and rows from r on are Part(r * n).
    """

    offset: int = 0
    width: int = 0  # elements of a row of the shard
    stride: int = 0  # elements between the beginnings of two rows, in the whole tensor


Mask = SmallMask | RandomMask | Tensor | Sequence[Tensor] | None
Offset = int | Part | Sequence[int | Part] | None


class Selected(NamedTuple):
    """The last arguments of the ops with masks: none of them for all elements."""

    limits: list[float]
    mask_seed: Tensor | None
    takes: list[Tensor]


EVERYTHING = Selected([], None, [])


def selected(op: str, mask: Mask, xs: Sequence[Tensor], in_place_noise: bool = False) -> Selected:
    """The masks of xs. in_place_noise: the call moves x itself by noise that is to be undone."""
    if mask is None:
        return EVERYTHING
    if isinstance(mask, SmallMask):
        if in_place_noise:
            raise ValueError(
                f"{op}: a SmallMask depends on x, which this call changes, so that undoing it "
                "would find other elements; use perturb(..., out=), or a mask of tensors, such as "
                "[x.abs() <= limit for x in params]"
            )
        return Selected(per_tensor(op, "the limit of mask", mask.limit, len(xs)), None, [])
    if isinstance(mask, RandomMask):
        shares = per_tensor(op, "the share of mask", mask.share, len(xs))
        if max(shares, default=0) > 1:
            raise ValueError(f"{op}: the share of mask must be in 0 .. 1, got {max(shares)}")
        return Selected(shares, _mask_seed(op, mask.seed, xs[0].device if xs else None), [])
    if not isinstance(mask, Tensor | Sequence):
        raise TypeError(
            f"{op}: mask must be a bool tensor for each of params, a SmallMask, a RandomMask or "
            f"None, got {type(mask).__name__}"
        )
    given = [mask] if isinstance(mask, Tensor) else list(mask)
    if len(given) != len(xs):
        raise ValueError(
            f"{op}: mask must be one tensor for each of params ({len(xs)}), got {len(given)}"
        )
    names = labels_of(xs, "mask")
    takes = [_given(op, *three) for three in zip(names, given, xs, strict=True)]
    return Selected([], None, takes)


def _given(op: str, name: str, mask: Any, x: Tensor) -> Tensor:
    mask = local(mask)
    if not isinstance(mask, Tensor) or mask.dtype is not torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"{op}: {name} must be a bool tensor, got {got}")
    if mask.shape != x.shape or mask.device != x.device:
        raise ValueError(
            f"{op}: {name} must be like its tensor, {tuple(x.shape)} on {x.device}, got "
            f"{tuple(mask.shape)} on {mask.device}"
        )
    if not torch.compiler.is_compiling():
        if mask.numel() and not mask.is_meta and not mask.data_ptr():
            refuse_freed(op, name)
    return mask.contiguous()


def _mask_seed(op: str, seed: Any, device: torch.device | None) -> Tensor:
    if not isinstance(seed, Tensor):
        return torch.full((1,), signed64(op, seed), dtype=torch.int64, device=device)
    if seed.dtype is not torch.int64 or seed.numel() != 1 or seed.device != device:
        raise ValueError(
            f"{op}: the seed of mask must be an int, or int64 [1] on {device}, got {seed.dtype} "
            f"{tuple(seed.shape)} on {seed.device}"
        )
    return seed.detach().reshape(1)


def places_of(op: str, offset: Offset, xs: Sequence[Tensor]) -> list[int]:
    """Offset, width and stride of each of xs; none if they are whole tensors."""
    if offset is None:
        return []
    one = isinstance(offset, int | Part) or not isinstance(offset, Sequence)
    given = [offset] * len(xs) if one else list(offset)  # type: ignore[arg-type]
    if len(given) != len(xs):
        raise ValueError(
            f"{op}: offset must be one number or Part, or one per tensor ({len(xs)}), got "
            f"{len(given)}"
        )
    places: list[int] = []
    for i, (part, x) in enumerate(zip(given, xs, strict=True)):
        if not isinstance(part, Part):
            part = Part(_position(op, part))
        offset, width, stride = (_position(op, number) for number in part)
        n = x.numel()
        if width and (n % width or stride < width):
            raise ValueError(
                f"{op}: offset[{i}] needs whole rows, of a width up to the stride, got {part} for "
                f"a shard of {n} elements"
            )
        last = offset + (max(n // width - 1, 0) * stride + width if width else n)
        if last > MAX_ELEMENTS:
            raise ValueError(
                f"{op}: offset[{i}] ends at element {last}, beyond the 2^36 that the 32-bit "
                "counter reaches; split the tensor"
            )
        places += [offset, width, stride]
    return places


def _position(op: str, value: Any) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__") or value < 0:
        raise ValueError(
            f"{op}: offset must be a number of elements, not negative, or a Part, got {value!r}"
        )
    return value if isinstance(value, int) else value.__index__()


def dtensors(xs: Iterable[Any]) -> list[bool]:
    """Which of xs are DTensors; empty if none is."""
    module = sys.modules.get("torch.distributed.tensor")
    if module is None:  # nobody has made one
        return []
    found = [isinstance(x, module.DTensor) for x in xs]
    return found if any(found) else []


def local(x: Any) -> Any:
    """The local part of a DTensor; anything else as it is."""
    return x.to_local() if dtensors([x]) else x


def part_of(x: Any) -> Part:
    """Where the local part of a DTensor is in the whole tensor.

    x may be sharded along any dimension by Shard, also by several mesh dimensions, and replicated,
    as long as its local part is rows of a matrix: sharded along one dimension, or along two of
    which one is the tensor's first. ValueError for other placements, such as Partial.
    """
    from torch.distributed.tensor import Replicate, Shard

    if not dtensors([x]):
        raise TypeError(f"part_of: x must be a DTensor, got {type(x).__name__}")
    mesh, sizes, starts = x.device_mesh, list(x.shape), [0] * x.dim()
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        raise ValueError("part_of: this process is not in the mesh of x")
    for rank, n, placement in zip(coordinate, mesh.shape, x.placements, strict=True):
        if type(placement) is Shard:
            dim = placement.dim % x.dim()
            each = -(-sizes[dim] // n)  # as torch.chunk divides
            start = min(rank * each, sizes[dim])
            starts[dim] += start
            sizes[dim] = min(each, sizes[dim] - start)
        elif not isinstance(placement, Replicate):
            raise ValueError(
                f"part_of: x must be placed by Shard or Replicate, got {placement!r}; pass its "
                "local part, and offset"
            )
    sharded = [dim for dim in range(x.dim()) if sizes[dim] != x.shape[dim]]
    inner = [1] * (x.dim() + 1)  # elements of the whole tensor below each dimension
    for dim in reversed(range(x.dim())):
        inner[dim] = inner[dim + 1] * x.shape[dim]
    offset = sum(start * inner[dim + 1] for dim, start in enumerate(starts))
    if not sharded or sharded == [0]:
        return Part(offset)
    last = sharded[-1]
    if len(sharded) > 2 or (len(sharded) == 2 and sharded[0] != 0):
        raise ValueError(
            f"part_of: the local part of x, sharded along dimensions {sharded}, is not rows of a "
            "matrix; pass it in pieces, with the offset of each"
        )
    return Part(offset, sizes[last] * inner[last + 1], inner[last])
