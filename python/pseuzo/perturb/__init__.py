"""How forwards see x + scale * z: exactly through a module, or in place for bare parameters."""

from pseuzo.perturb.module import perturbed

__all__ = ["perturbed"]
