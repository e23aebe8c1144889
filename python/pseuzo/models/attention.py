"""Tells the attention of Transformers whether a batch has padding, so that it need not look.

Transformers reads an attention mask to see whether any row is padded, which waits for the device.
If none is, it lets torch attend causally without a mask. While a CUDA graph is recorded it does not
read the mask and always makes one, so that another kernel gives other bits. If it is told about the
padding, it does the same in both cases. Its registry of mask functions is documented for such uses.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_running = threading.local()  # .told: (the configuration of the model that runs, padded)


def listen_in_sdpa_masks() -> None:
    """Register a mask function for SDPA that uses what `padding_known` says.

    Outside that context, and for other models inside it, it calls Transformers' own function. A
    function that somebody else registered is not replaced.
    """
    from transformers.masking_utils import (  # this import takes 2 s
        ALL_MASK_ATTENTION_FUNCTIONS,
        AttentionMaskInterface,
        sdpa_mask,
    )

    def sdpa_mask_of_known_padding(**kwargs: Any) -> Tensor | None:
        config, padded = getattr(_running, "told", (None, None))
        if config is None or kwargs.get("config") is not config:
            # The mask is for another model, perhaps one that runs inside ours.
            return sdpa_mask(**kwargs)
        local_size = kwargs.get("local_size")
        causal = kwargs["q_length"] == kwargs["kv_length"] and (
            local_size is None or kwargs["kv_length"] < local_size
        )
        if causal and not padded and kwargs.get("allow_is_causal_skip", True):
            return None
        mask = sdpa_mask(**kwargs | {"allow_is_causal_skip": False})
        return seeing_itself(mask) if padded and mask is not None else mask

    if ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] is sdpa_mask:
        AttentionMaskInterface.register("sdpa", sdpa_mask_of_known_padding)


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
def padding_known(config: Any, padded: bool) -> Iterator[None]:
    """A context in which the masks of the model with this configuration are made without reading
    the attention mask: as if there were padding if `padded`, else as if there were none."""
    before = getattr(_running, "told", (None, None))
    _running.told = config, padded
    try:
        yield
    finally:
        _running.told = before
