"""How a forward pass sees x + eps z: exactly, through the module, or in place, for bare parameters."""

from pseuzo.perturb.module import perturbed

__all__ = ["perturbed"]
