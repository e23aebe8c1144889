"""Frozen weights stay in the file that they were loaded from, and cost no memory of their own.

A private map of a file is pages of the system's cache, which can be dropped and read again, until
something writes there. Transformers leaves the weights of safetensors in such maps where it neither
converts nor moves them. What it has copied nevertheless, `map_frozen` puts back.
"""

import json
import math
import re
import struct
from bisect import bisect
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


class Saved(NamedTuple):
    """A tensor in a file of safetensors: its bytes are begin to end - 1 of the file."""

    file: Path
    dtype: torch.dtype | None  # None: one that no weight in training has
    shape: tuple[int, ...]
    begin: int
    end: int


def saved_weights(folder: str | Path) -> dict[str, Saved]:
    """What the safetensors of a model's folder hold, by name; nothing if there are none there.
    ValueError if a file cannot be understood."""
    folder = Path(folder).expanduser()
    found: dict[str, Saved] = {}
    try:
        index, names = folder / INDEX, [SINGLE] if (folder / SINGLE).is_file() else []
        if index.is_file():
            names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        for file in (folder / name for name in names):
            found.update(_header(file))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise ValueError(
            f"offload: the safetensors in {folder} cannot be read ({error}); give the folder "
            "that the model was loaded from"
        ) from None
    return found


def _header(file: Path) -> Iterator[tuple[str, Saved]]:
    """The entries of a file: eight bytes say how long its header is, which is JSON."""
    with file.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        if length > file.stat().st_size:
            raise ValueError(f"{file.name} is cut off")
        entries = json.loads(opened.read(length))
    for name, entry in entries.items():
        if name != "__metadata__":
            begin, end = (8 + length + offset for offset in entry["data_offsets"])
            dtype = DTYPES.get(entry["dtype"])
            yield name, Saved(file, dtype, tuple(entry["shape"]), begin, end)


class FileMaps:
    """The parts of this process's memory that are private maps of files, as Linux lists them."""

    def __init__(self) -> None:
        try:
            lines = Path("/proc/self/maps").read_text().splitlines()
        except OSError:  # another system: no weight counts as mapped
            lines = []
        rows = [line.split(maxsplit=5) for line in lines]
        spans = [row[0].split("-") for row in rows if row[1].endswith("p") and row[4] != "0"]
        self._spans = sorted((int(begin, 16), int(end, 16)) for begin, end in spans)

    def hold(self, x: Tensor) -> bool:
        """Whether the memory of x begins in one of them."""
        i = bisect(self._spans, (x.data_ptr(), math.inf)) - 1
        return i >= 0 and x.data_ptr() < self._spans[i][1]


def map_frozen(model: nn.Module, folder: str | Path) -> list[str]:
    """Make the frozen weights of a model on the CPU views of private maps of the files in folder,
    the one that it was loaded from. Returns the names of those that stay in memory of their own.

    A weight stays as it is if it requires grad, or if the files have nothing of its name, shape,
    dtype and bits; so the model computes what it did. Names are those without an adapter of peft. A
    weight with several names, such as a tied one, is looked up by each. The files must not change
    while the model is used. ValueError if they cannot be read.
    """
    maps, by_weight = FileMaps(), dict[nn.Parameter, list[str]]()
    base = _base_of(model)
    for name, p in base.named_parameters(remove_duplicate=False):
        if not (p.requires_grad or p.device.type != "cpu" or not p.numel() or maps.hold(p)):
            name = re.sub(r"\.(base_layer|original_module)\.", ".", name)
            by_weight.setdefault(p, []).append(name)
    saved = saved_weights(folder) if by_weight else {}
    inside, stay, opened = f"{getattr(base, 'base_model_prefix', '')}.", [], dict[Path, Any]()
    for p, names in by_weight.items():
        known = [k for name in names for k in (name, name.removeprefix(inside), inside + name)]
        entry = next((saved[name] for name in known if name in saved), None)
        view = _view(p, entry, opened) if entry is not None else None
        if view is None:
            stay.append(names[0])
        else:
            with torch.no_grad():
                p.set_(view)  # type: ignore[call-overload]
    return stay


def folder_of(model: nn.Module) -> Path | None:
    """The local folder that Transformers loaded a model from, or the base of its adapter."""
    name = getattr(getattr(_base_of(model), "config", None), "name_or_path", None)
    return Path(name) if name and Path(name).is_dir() else None


def _base_of(model: Any) -> Any:
    """The model that an adapter of peft was made for; a model without one as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _view(p: Tensor, entry: Saved, opened: dict[Path, Any]) -> Tensor | None:
    """The map of a weight in its file; None if that is not the same tensor, to the bit."""
    like = entry.dtype is p.dtype and entry.shape == tuple(p.shape) and p.is_contiguous()
    if not like or entry.begin % p.element_size() or entry.end - entry.begin != p.nbytes:
        return None
    if entry.file not in opened:
        size = entry.file.stat().st_size
        opened[entry.file] = torch.UntypedStorage.from_file(str(entry.file), False, size)
    # A storage of its own for each weight: what shares a storage, others take for tied weights.
    part = opened[entry.file][entry.begin : entry.end]
    view = torch.empty(0, dtype=p.dtype).set_(part, 0, p.shape)  # type: ignore[call-overload]
    bits = [x.detach().reshape(-1).view(torch.uint8) for x in (view, p)]
    return view if torch.equal(*bits) else None
