"""Zeroth-order optimizers, one estimator a file, and the schedules of their momentum."""

from pseuzo.optim.mezo import MeZO
from pseuzo.optim.pseuzo import PseuZO
from pseuzo.optim.schedule import (
    Constant,
    Cycles,
    CyclicHyperbola,
    Linear,
    Reciprocal,
    Schedule,
)

__all__ = [
    "Constant",
    "Cycles",
    "CyclicHyperbola",
    "Linear",
    "MeZO",
    "PseuZO",
    "Reciprocal",
    "Schedule",
]
