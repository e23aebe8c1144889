"""Tells Transformers how a model of GroupwiseLinear layers is saved and loaded.

Importing this module registers it. The config.json of such a model has

    "quantization_config": {"quant_method": "pseuzo-groupwise", "bits": 4, "group_size": 64}

and its weights have `codes` and `scales` in place of each `weight`.
"""

from typing import Any

from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from pseuzo.models.groupwise import BITS, GroupwiseLinear, check_group_size, replace_linears

METHOD = "pseuzo-groupwise"


@register_quantization_config(METHOD)
class GroupwiseConfig(QuantizationConfigMixin):
    """ValueError if the group size or the number of bits cannot be had."""

    def __init__(self, group_size: int, bits: int = BITS, quant_method: str = METHOD):
        check_group_size("quantise", group_size)
        if bits != BITS:
            raise ValueError(f"quantise: bits must be {BITS}, got {bits}")
        self.quant_method: Any = quant_method
        self.group_size, self.bits = group_size, bits


@register_quantizer(METHOD)
class GroupwiseQuantizer(HfQuantizer):
    """Makes the layers of a model before Transformers loads their codes and scales."""

    quantization_config: GroupwiseConfig
    requires_calibration = True  # Transformers loads such a model, but makes none
    is_trainable = True

    def is_serializable(self) -> bool:
        return True

    def _process_model_before_weight_loading(self, model: nn.Module, **unused: Any) -> nn.Module:
        replace_linears(model, self.quantization_config.group_size)
        return model

    def _process_model_after_weight_loading(self, model: Any, **unused: Any) -> nn.Module:
        """Let Transformers treat the model as any other: its layers are modules of their own, whose
        scales can be trained, and its config says how it is saved. ValueError if the weights are of
        another group size, which older versions do not notice."""
        for name, layer in model.named_modules():
            if isinstance(layer, GroupwiseLinear) and layer.scales.shape[1] != layer.groups:
                raise ValueError(
                    f"{name}.scales has {layer.scales.shape[1]} scales a row, mismatched with the "
                    f"{layer.groups} of group_size {layer.group_size} in the config"
                )
        del model.hf_quantizer, model.quantization_method
        model.is_quantized = False
        return model
