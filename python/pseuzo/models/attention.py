"""Tells the attention of Transformers whether a batch has padding, so that it need not look.

Transformers reads an attention mask to see whether any row is padded, which waits for the device.
If none is, it lets torch attend causally without a mask. While a CUDA graph is recorded it does not
read the mask and always makes one, so that another kernel gives other bits. If it is told about the
padding, it does the same in both cases. Its registries of mask and attention functions are
documented for such uses.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pseuzo.models.packing import Packing

# .told: (the configuration of the model that runs, padded, how its rows are packed if they are)
_running = threading.local()
NOTHING = (None, False, None)


def listen_in_sdpa() -> None:
    """Register functions for SDPA that use what `padding_known` says: one that makes masks, and one
    that attends within packed rows.

    Outside that context, and for other models inside it, they call Transformers' own functions.
    Functions that somebody else registered are not replaced.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import (  # this import takes 2 s
        ALL_MASK_ATTENTION_FUNCTIONS,
        AttentionMaskInterface,
        sdpa_mask,
    )
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

    def sdpa_mask_of_known_padding(**kwargs: Any) -> Tensor | None:
        config, padded, packing = getattr(_running, "told", NOTHING)
        if config is None or kwargs.get("config") is not config:
            # The mask is for another model, perhaps one that runs inside ours.
            return sdpa_mask(**kwargs)
        may_skip, local_size = kwargs.get("allow_is_causal_skip", True), kwargs.get("local_size")
        if packing is not None:  # no row is longer than a window
            return None if may_skip else sdpa_mask(**kwargs)
        causal = kwargs["q_length"] == kwargs["kv_length"] and (
            local_size is None or kwargs["kv_length"] < local_size
        )
        if causal and not padded and may_skip:
            return None
        mask = sdpa_mask(**kwargs | {"allow_is_causal_skip": False})
        return seeing_itself(mask) if padded and mask is not None else mask

    def sdpa_of_packed_rows(
        module: Any, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        config, _, packing = getattr(_running, "told", NOTHING)
        if packing is None or getattr(module, "config", None) is not config:
            return sdpa_attention_forward(module, q, k, v, attention_mask, **kwargs)
        if attention_mask is not None:
            raise ValueError("packed rows attend causally, but the model made a mask of its own")
        return packing.attend(sdpa_attention_forward, module, q, k, v, **kwargs)

    if ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] is sdpa_mask:
        AttentionMaskInterface.register("sdpa", sdpa_mask_of_known_padding)
    if ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward:
        AttentionInterface.register("sdpa", sdpa_of_packed_rows)


def seeing_itself(mask: Tensor) -> Tensor:
    """Return the mask [..., queries, keys], True where a key is seen, in which a query that saw no
    key, as those of padding, sees its own.

    Some backends return NaN for a query that sees no key, and in the next layer the NaN reaches all
    other tokens, since zero times NaN is NaN.
    """
    queries, keys = (torch.arange(n, device=mask.device) for n in mask.shape[-2:])
    own = queries[:, None] + (len(keys) - len(queries)) == keys  # keys of a prefix come first
    return mask | (own & ~mask.any(-1, keepdim=True))


@contextmanager
def padding_known(config: Any, padded: bool, packing: Packing | None = None) -> Iterator[None]:
    """A context in which the masks of the model with this configuration are made without reading
    the attention mask: as if there were padding if `padded`, else as if there were none. packing:
    the one row that it runs on holds the tokens of these rows, each of which attends to itself."""
    before = getattr(_running, "told", NOTHING)
    _running.told = config, padded, packing
    try:
        yield
    finally:
        _running.told = before
