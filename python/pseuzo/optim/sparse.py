"""Sparse-MeZO: only a part of the weights takes noise, the small ones or random ones.

Source: Liu et al., "Sparse MeZO: less parameters for better performance in zeroth-order LLM
fine-tuning" (2024), Algorithm 1; its masks are made in each pass from the weights, as here.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pseuzo.optim.mezo import MeZO
from pseuzo.optim.seeds import mask_seed
from pseuzo.optim.update import CHUNK
from pseuzo.perturb.masks import Masks

MASKS = ("small", "random")


class SparseMeZO(MeZO):
    """x <- x - lr c m * z, c = (L(x + eps m * z) - L(x - eps m * z)) / (2 eps), m a mask of 0, 1.

    sparsity: the share of each tensor's weights that the mask leaves out, 0 <= sparsity < 1; the
    paper takes 0.75. Weights that it leaves out take no noise, no update and no decay: they stay as
    they are, to the bit.
    mask "small": m_i = 1 where |x_i| <= h. The threshold h of a tensor is the (1 - sparsity)
    quantile of its |x| when the optimizer is made, and stays, as in the paper; it is part of the
    state. Every pass makes the mask anew, from x. So a weight that grows beyond h is left out from
    then on, and the update sees the mask that the perturbations of its step saw. If the threshold
    of a tensor is 0 (as for LoRA's B, which starts as 0), or all its |x| are equal, no weights can
    be called small, and all of the tensor takes noise.
    mask "random": m is drawn from the run's seed, with a chance of 1 - sparsity for each weight
    (to 2^-16), and stays; renew_mask: each step draws its own.
    No mask is ever stored. "small" needs the model where parameters are fp32, because bare ones are
    perturbed by writing them, which changes which are small. Other arguments: see MeZO; there is no
    momentum, because past steps had other masks. ValueError if the masks leave no weight to train.
    """

    offloads = False
    own_settings = (*MeZO.own_settings, "sparsity", "mask", "renew_mask")

    def __init__(
        self,
        params: nn.Module | Iterable,
        lr: float = 1e-6,
        eps: float = 1e-3,
        *,
        sparsity: float = 0.75,
        mask: str = "small",
        renew_mask: bool = False,
        **options: Any,
    ):
        if not 0 <= sparsity < 1:
            raise ValueError(f"SparseMeZO: sparsity must be at least 0 and below 1, got {sparsity}")
        if mask not in MASKS:
            raise ValueError(f"SparseMeZO: mask must be one of {', '.join(MASKS)}, got {mask!r}")
        if renew_mask and mask != "random":
            raise ValueError("SparseMeZO: renew_mask is for random masks; give mask='random'")
        self.sparsity, self.mask, self.renew_mask = float(sparsity), mask, renew_mask
        self._limits: dict[Tensor, float] = {}
        super().__init__(params, lr, eps, momentum=0.0, **options)
        if not any(self._takes_any(p, limit) for p, limit in self._limits.items()):
            raise ValueError(
                f"SparseMeZO: sparsity {self.sparsity:g} leaves no weight to train; give a lower "
                "one"
            )

    @property
    def masks(self) -> Masks:  # type: ignore[override]  # those of the present step
        if self.mask == "small":
            return Masks(self._limits)
        return Masks(self._limits, mask_seed(self.seed, self.steps, self.renew_mask))

    def add_param_group(self, param_group: dict) -> None:
        super().add_param_group(param_group)
        params = self.param_groups[-1]["params"]
        try:
            if self.mask == "small" and self.model is None:
                if any(p.dtype is torch.float32 for p in params):
                    raise ValueError(
                        "SparseMeZO: bare fp32 parameters are perturbed by writing them, which "
                        "changes which are small; give the module (or model=), or mask='random'"
                    )
            self._limits |= {p: self._limit(p) for p in params}
        except Exception:
            self.param_groups.pop()
            raise

    def _limit(self, p: Tensor) -> float:
        return 1 - self.sparsity if self.mask == "random" else threshold(p, 1 - self.sparsity)

    def _takes_any(self, p: Tensor, limit: float) -> bool:
        return p.numel() > 0 and (limit >= 2**-16 if self.mask == "random" else limit >= 0)

    def own_state(self) -> dict[str, Any]:
        limits = {self._streams[p]: limit for p, limit in self._limits.items()}
        settings = {"sparsity": self.sparsity, "mask": self.mask, "renew_mask": self.renew_mask}
        return super().own_state() | {"masks": settings | {"limits": limits}}

    def load_own_state(self, own: Mapping[str, Any]) -> None:
        super().load_own_state(own)
        masks = own["masks"]
        self.sparsity, self.mask = masks["sparsity"], masks["mask"]
        self.renew_mask = masks["renew_mask"]
        # This must be a new dict, because existing launches hold the limits of the old one.
        self._limits = {p: masks["limits"][stream] for p, stream in self._streams.items()}


@torch.no_grad()
def threshold(p: Tensor, share: float) -> float:
    """The largest |x| among the smallest `share` of p; -1 if that share rounds to no element.

    Infinity where this would not separate any weights: it is 0, or all |x| are equal.
    """
    k = round(share * p.numel())
    if k == 0:
        return -1.0
    # Only the |x| with the same upper bits as the k-th are copied and sorted: all would take long.
    parts = p.detach().view(-1).split(CHUNK)
    counts = torch.stack([torch.bincount(_upper_bits(x), minlength=1 << 15) for x in parts]).sum(0)
    below = counts.cumsum(0)
    at = int((below >= k).nonzero()[0])
    sizes = torch.cat([x[_upper_bits(x) == at].abs() for x in parts])
    limit = float(sizes.kthvalue(k - int(below[at] - counts[at])).values)
    if math.isnan(limit):
        raise ValueError("SparseMeZO: a weight is NaN, so that no threshold can be found")
    alike = len(sizes) == p.numel() and bool((sizes == limit).all())
    return math.inf if limit == 0 or alike else limit


def _upper_bits(x: Tensor) -> Tensor:
    """The upper 16 bits of |x|, as integers that have the order of the |x|."""
    sizes = x.abs()
    return sizes.view(torch.int32) >> 16 if x.dtype is torch.float32 else sizes.view(torch.int16)
