"""Zeroth-order optimizers, one estimator a file, and the schedules of their momentum."""

from pseuzo.optim.mezo import MeZO
from pseuzo.optim.pseuzo import PseuZO
from pseuzo.optim.schedule import Constant, CyclicHyperbola, Linear, Schedule

__all__ = ["Constant", "CyclicHyperbola", "Linear", "MeZO", "PseuZO", "Schedule"]
