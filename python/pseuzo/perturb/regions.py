"""Which weights of a model are uploaded together when it is larger than the device.

A decoder layer is one region. So is each other part that holds many weights, such as an embedding
or an output head. All small weights outside of the layers are one region more, which stays on the
device: the residents.
"""

from collections import deque
from collections.abc import Callable, Collection, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pseuzo.machine import holds_codes
from pseuzo.perturb.scratch import SMALL

ALIGN = 4096  # bytes; tensors in a buffer begin at multiples of this


class Region:
    """Weights that are uploaded together, and the updates that they still lack.

    number: its position in the model. by_layer: whether it is one of the decoder layers.
    """

    def __init__(
        self, name: str, number: int, params: Iterable[nn.Parameter], by_layer: bool
    ) -> None:
        self.name, self.number, self.by_layer = name, number, by_layer
        self.params = list(params)
        self.pending: deque[Callable[[], Any]] = deque()
        self.uploaded: Any = None  # the CUDA event at the end of its last upload

    def n_bytes(self, params: Collection[Tensor] | None = None) -> int:
        """Bytes of a buffer for its weights, or for those that are among params."""
        return sum(room(p) for p in self.params if params is None or p in params)


def room(p: Tensor) -> int:
    """The bytes that p takes in a buffer."""
    return -(-p.numel() * p.element_size() // ALIGN) * ALIGN


def views(buffer: Tensor, params: Iterable[nn.Parameter]) -> dict[nn.Parameter, Tensor]:
    """Parts of a buffer of bytes in the shapes and dtypes of params, one after another."""
    parts, begin = {}, 0
    for p in params:
        part = buffer[begin : begin + p.numel() * p.element_size()]
        parts[p] = part.view(p.dtype).view(p.shape)
        begin += room(p)
    return parts


class Outline(NamedTuple):
    """The modules of a model that offloading knows.

    layers: the decoder layers, by name. path: the modules that contain them, from the model
    inwards. parts: the other modules directly in those of path, by name.
    """

    layers: dict[str, nn.Module]
    path: list[nn.Module]
    parts: dict[str, nn.Module]


def outline(model: nn.Module) -> Outline:
    """The outline of a model. ValueError if its layers cannot be found."""
    name, layers = find_layers(model)
    outer = [name[:i] for i, c in enumerate(name) if c == "."]
    path = {"": model} | {prefix: model.get_submodule(prefix) for prefix in outer}
    parts = {}
    for prefix, module in path.items():
        for child_name, child in module.named_children():
            full = f"{prefix}.{child_name}".lstrip(".")
            if full not in path and full != name:
                parts[full] = child
    return Outline(
        {f"{name}.{i}": layer for i, layer in enumerate(layers)}, list(path.values()), parts
    )


class Regions:
    """The regions of a model.

    all: those that are uploaded in turn, in the order of the model. residents: that of the small
    weights. of: weight -> its region.
    """

    def __init__(self, model: nn.Module) -> None:
        if any(map(holds_codes, model.parameters())):
            raise ValueError(
                "offload: the model is quantised, so its weights cannot be uploaded in parts; load "
                "it in fp32, bf16 or fp16"
            )
        found = outline(model)
        self.of: dict[nn.Parameter, Region] = {}
        self.all: list[Region] = []
        small = [p for module in found.path for p in module.parameters(recurse=False)]
        for name, module in found.parts.items():
            params = [p for p in dict.fromkeys(module.parameters()) if p not in self.of]
            if sum(p.numel() for p in params) > SMALL:
                self._add(name, params, by_layer=False)
            else:
                small += params
        for name, module in found.layers.items():
            params = [p for p in dict.fromkeys(module.parameters()) if p not in self.of]
            self._add(name, params, by_layer=True)
        small = [p for p in dict.fromkeys(small) if p not in self.of]
        self.residents = Region("residents", -1, small, by_layer=False)
        self.of.update(dict.fromkeys(small, self.residents))

    def _add(self, name: str, params: list[nn.Parameter], by_layer: bool) -> None:
        region = Region(name, len(self.all), params, by_layer)
        self.all.append(region)
        self.of.update(dict.fromkeys(params, region))

    def largest(self, params: Collection[Tensor] | None = None) -> int:
        """Bytes of a buffer for any region, or for those of its weights that are among params."""
        return max(region.n_bytes(params) for region in self.all)


def find_layers(model: nn.Module) -> tuple[str, list[nn.Module]]:
    """The name of the list of decoder layers, and the layers: of the lists of two or more modules
    of one class, the one with the most weights. ValueError if there is none."""
    most, found = 0, None
    for name, module in model.named_modules():
        layers = list(module) if isinstance(module, nn.ModuleList | nn.Sequential) else []
        if len(layers) < 2 or len({type(layer) for layer in layers}) > 1 or not name:
            continue
        size = sum(p.numel() for p in dict.fromkeys(module.parameters()))
        if size > most:
            most, found = size, (name, layers)
    if found is None:
        raise ValueError(
            f"offload: the layers of {type(model).__name__} cannot be found: they must be a "
            "ModuleList of two or more modules of one class, as in Transformers' decoders; leave "
            "offload off"
        )
    return found


def device_bytes(
    model: nn.Module,
    *,
    passes: int = 2,
    buffers: int = 2,
    trained: Collection[Tensor] | None = None,
) -> int:
    """The bytes of device memory that a step of an offloaded model takes for weights.

    buffers * R + S + r + passes * s, where R is the largest region (a layer, an embedding or a
    head), S the largest part of a region that takes noise, r the small weights outside of the
    layers, and s those of them that take noise. passes: those of a step that are perturbed.
    trained: the weights that take noise; None: those that require grad. Activations come on top.
    The model may be on the meta device. ValueError if its layers cannot be found.
    """
    regions = Regions(model)
    if trained is None:
        trained = {p for p in model.parameters() if p.requires_grad}
    small = regions.residents
    return (
        buffers * regions.largest()
        + regions.largest(trained)
        + small.n_bytes()
        + passes * small.n_bytes(trained)
    )


class DeviceMemory:
    """The device memory that offloading takes, counted, and never more than was promised.

    promised: in bytes; None: as much as there is. taken: bytes so far. uploaded: bytes that were
    copied from the host so far.
    """

    def __init__(self, device: torch.device, promised: int | None = None) -> None:
        self.device = torch.empty(0, device=device).device  # with its index
        self.promised = promised
        self.taken = self.uploaded = 0

    def take(self, n_bytes: int) -> Tensor:
        """A buffer of n_bytes, uint8. RuntimeError if it is more than was promised."""
        if self.promised is not None and self.taken + n_bytes > self.promised:
            raise RuntimeError(
                f"offload: {self.taken + n_bytes} bytes of buffers are needed on {self.device}, "
                f"and {self.promised} were promised"
            )
        self.taken += n_bytes
        return torch.empty(n_bytes, dtype=torch.uint8, device=self.device)

    def give_back(self, buffer: Tensor) -> None:
        """Count a buffer that is freed."""
        self.taken -= buffer.numel()

    def upload(self, parts: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Copy weights to their parts of a buffer."""
        for x, part in parts:
            part.copy_(x, non_blocking=True)
            self.uploaded += x.numel() * x.element_size()
