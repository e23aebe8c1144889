"""Linear layers whose weights are 4-bit codes times scales, and a model made of them.

    quantise(model, group_size=64)

Every run of `group_size` weights of a row shares one scale. The codes stay as they are, and the
scales are ordinary parameters in fp32: zeroth-order passes perturb them, journals record them, and
a model is saved with both (`pseuzo.models.groupwise_config`). Training the scales alone is the way
of QZO (Shang et al., "Fine-tuning Quantized Neural Networks with Zeroth-order Optimization", 2025).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pseuzo.models.split import output_head

BITS = 4
LARGEST = 7  # codes are -7 .. 7, stored with 8 added
_OFFSET = 8


class GroupwiseLinear(nn.Module):
    """y = x W^T + b with W[o, i] = code[o, i] * scales[o, i // group_size].

    codes: [out, n * group_size / 2] uint8, two codes to a byte, for n = ceil(in / group_size)
    groups in a row: byte j of a group holds code j, plus 8, in its low half, and code
    j + group_size / 2 in its high half. The last group of a row is filled up with zeros. scales:
    [out, n] fp32. So a weight takes 4 + 32 / group_size bits, if group_size divides in_features.

    W is made in each forward, in fp32, and rounded once to the dtype of x; nothing keeps it.
    Gradients flow to the scales and to the bias.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        group_size: int,
        bias: nn.Parameter | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        check_group_size("GroupwiseLinear", group_size)
        self.in_features, self.out_features = in_features, out_features
        self.group_size = group_size
        self.groups = -(-in_features // group_size)  # in a row
        codes = torch.empty(
            out_features, self.groups * group_size // 2, dtype=torch.uint8, device=device
        )
        scales = torch.empty(out_features, self.groups, dtype=torch.float32, device=device)
        self.codes: Tensor
        self.bias: nn.Parameter | None
        self.register_buffer("codes", codes)
        # In the order of a Linear, so that each parameter keeps its stream of noise.
        self.scales = nn.Parameter(scales)
        self.register_parameter("bias", bias)

    @torch.no_grad()
    def quantise(self, weight: Tensor) -> None:
        """Set the codes and scales to those of a weight [out, in]: scale = max |w| / 7 of a group,
        code = w / scale, rounded to the nearest. ValueError if a weight is not finite."""
        missing = self.groups * self.group_size - self.in_features
        w = F.pad(weight.float(), (0, missing)).unflatten(1, (-1, self.group_size))
        scales = w.abs().amax(-1) / LARGEST
        if not scales.isfinite().all():
            raise ValueError("GroupwiseLinear: weights must be finite, and some are inf or NaN")
        # All weights of a group may be 0, or so small that the scale is 0 or loses bits.
        nearest = w / scales.clamp(min=torch.finfo(torch.float32).tiny)[..., None]
        codes = nearest.round().clamp(-LARGEST, LARGEST).add(_OFFSET).to(torch.uint8)
        low, high = codes.chunk(2, dim=-1)
        self.codes.copy_((low | high << BITS).flatten(1))
        self.scales.copy_(scales)

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """[out, in]: the weight that the codes and scales stand for, rounded once to dtype."""
        pairs = self.codes.unflatten(1, (self.scales.shape[1], -1))
        codes = torch.cat([pairs & 15, pairs >> BITS], dim=-1).to(torch.int8) - _OFFSET
        return (codes * self.scales[..., None]).to(dtype).flatten(1)[:, : self.in_features]

    @property
    def weight(self) -> Tensor:
        """A new tensor at each access, for models that read the weight of a layer themselves."""
        return self.dequantised(self.scales.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dequantised(x.dtype), self.bias)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"group_size={self.group_size}, bias={self.bias is not None}"
        )


def check_group_size(op: str, group_size: int) -> None:
    """Raise ValueError unless group_size is even and positive: two codes share a byte."""
    if not isinstance(group_size, int) or group_size < 2 or group_size % 2:
        raise ValueError(f"{op}: group_size must be an even whole number from 2, got {group_size}")


def layers_in_groups(model: nn.Module) -> dict[str, GroupwiseLinear]:
    """The layers of a model that `quantise` made, by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, GroupwiseLinear)}


def quantise(model: Any, group_size: int = 64) -> None:
    """Replace the Linear layers of a Transformers model by GroupwiseLinear ones, in place.

    These are the layers of its base model; embeddings, norms, the output head and a pooler stay as
    they are. Weights are rounded to the nearest code. The config of the model then says how it is
    quantised, so that it is saved and loaded as such. One layer at a time is held twice.

    ValueError, with nothing changed, if the group size is not even, if there is no such layer, or
    if a weight is not finite.
    """
    from pseuzo.models.groupwise_config import GroupwiseConfig

    config, kind = GroupwiseConfig(group_size), type(model).__name__
    found = _linears(model)
    if not found:
        raise ValueError(f"quantise: {kind} has no Linear layers before its head to quantise")
    if wrong := [at[0][1] for m, at in found.items() if not m.weight.isfinite().all()]:
        raise ValueError(
            f"quantise: weights must be finite, and some of {kind} are not, the first in a layer "
            f"{wrong[0]}"
        )
    while found:
        linear, places = found.popitem()
        layer = _like(linear, group_size)
        layer.quantise(_weight_of(linear))
        _put(layer, places)
    model.config.quantization_config = config


def replace_linears(model: nn.Module, group_size: int) -> None:
    """Make the layers that `quantise` makes, without values, for a model to be loaded."""
    for linear, places in _linears(model).items():
        _put(_like(linear, group_size), places)


Places = list[tuple[nn.Module, str]]


def _linears(model: Any) -> dict[Any, Places]:
    """The layers to quantise, each with the modules that have it and its names there."""
    from transformers.pytorch_utils import Conv1D

    base = getattr(model, "base_model", model)
    pooler: nn.Module | None = getattr(base, "pooler", None)
    behind = {output_head(model), *(pooler.modules() if pooler is not None else ())}
    found: dict[Any, Places] = {}
    for parent in base.modules():
        for name, module in parent.named_children():
            # A subclass may do more than multiply by its weight.
            if type(module) in (nn.Linear, Conv1D) and module not in behind:
                found.setdefault(module, []).append((parent, name))
    return found


def _put(layer: GroupwiseLinear, places: Places) -> None:
    for parent, name in places:
        setattr(parent, name, layer)


def _weight_of(linear: Any) -> Tensor:
    """[out, in]: the weight of a Linear, or of a Conv1D, which has it transposed."""
    return linear.weight if isinstance(linear, nn.Linear) else linear.weight.T


def _like(linear: Any, group_size: int) -> GroupwiseLinear:
    """A layer for the weight of this one, and with its bias, on its device."""
    out_features, in_features = _weight_of(linear).shape
    layer = GroupwiseLinear(
        in_features, out_features, group_size, linear.bias, device=linear.weight.device
    )
    return layer.train(linear.training)
