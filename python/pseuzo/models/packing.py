"""Runs a padded batch of a causal model without its padding.

All layers but attention treat each token by itself, so they run on the tokens of all rows behind
each other, as one row [1, S]. Attention puts its queries, keys and values back into rows [R, T]
that are padded on the right, where no token sees the padding after it: a causal mask is enough,
and torch has it built in. So the products of a batch cost as much as it has tokens.

It is for CPUs. To find the tokens, the attention mask is read, and a GPU would have to be waited
for; shapes would also change from batch to batch, which CUDA graphs do not allow.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LEAST_PADDING = 0.1  # the share of padding from which a batch is run without it
LEAST_WIDTH = 256  # of the hidden states; products of less take no longer with the padding


@dataclass(frozen=True)
class Packing:
    """Where the tokens of a batch are: kept [R, T], True for tokens; places [S], for each token its
    place in the rows when they are padded on the right, flattened."""

    kept: Tensor
    places: Tensor

    @classmethod
    def of(cls, mask: Tensor) -> "Packing":
        """Find the tokens of a batch with this attention mask [R, T]."""
        kept = mask != 0
        ranks = (kept.cumsum(1) - 1)[kept]
        rows = torch.arange(len(kept), device=kept.device)[:, None].expand_as(kept)[kept]
        return cls(kept, rows * kept.shape[1] + ranks)

    @property
    def tokens(self) -> int:
        return len(self.places)

    @property
    def pays(self) -> bool:
        """Return whether there is so much padding that a pass without it is faster."""
        return self.tokens < (1 - LEAST_PADDING) * self.kept.numel()

    def inputs(self, plan: Mapping[str, Tensor], names: list[str]) -> dict[str, Tensor]:
        """Return the model's inputs [1, S] of a plan. names: those that have an entry per token."""
        packed = {name: plan[name][self.kept][None] for name in names}
        packed["attention_mask"] = torch.ones_like(packed["input_ids"])
        packed["position_ids"] = (self.places % self.kept.shape[1])[None]
        return packed

    def at(self, states: Tensor, positions: Tensor) -> Tensor:
        """Return the entries of states [1, S, D] at positions [R, P] of the padded rows; those at
        padding and at -1 are arbitrary."""
        index = (self.kept.flatten().cumsum(0) - 1).clamp(min=0).view(self.kept.shape)
        return states[0][index.gather(1, positions.clamp(min=0))]

    def spread(self, x: Tensor) -> Tensor:
        """Return queries, keys or values [1, H, S, d] as rows [R, H, T, d]."""
        (rows, length), (_, heads, _, width) = self.kept.shape, x.shape
        out = x.new_zeros(rows * length, heads, width)
        out = out.index_copy(0, self.places, x[0].transpose(0, 1))
        return out.view(rows, length, heads, width).transpose(1, 2)

    def attend(
        self, attention: Callable, module: Any, q: Tensor, k: Tensor, v: Tensor, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """Return what Transformers' attention function gives for tokens behind each other, [1, S,
        H, d]."""
        out, _ = attention(module, self.spread(q), self.spread(k), self.spread(v), None, **kwargs)
        return out.flatten(0, 1)[self.places][None], None
