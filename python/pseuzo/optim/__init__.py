"""Zeroth-order optimizers, one estimator a file, and the schedules of their momentum."""

from pseuzo.optim.adam import ZOAdam
from pseuzo.optim.blocks import ZOBlocks
from pseuzo.optim.conservative import ZOConservative
from pseuzo.optim.deepzero import DeepZero
from pseuzo.optim.forward_gradient import ForwardGradient
from pseuzo.optim.mezo import MeZO
from pseuzo.optim.nodes import NodePseuZO
from pseuzo.optim.population import FZOO, Evolution
from pseuzo.optim.pseuzo import PseuZO
from pseuzo.optim.schedule import (
    Constant,
    Cycles,
    CyclicHyperbola,
    Linear,
    Reciprocal,
    Schedule,
)
from pseuzo.optim.sign import ZOSign
from pseuzo.optim.sparse import SparseMeZO
from pseuzo.optim.svrg import MeZOSVRG

__all__ = [
    "FZOO",
    "Constant",
    "Cycles",
    "CyclicHyperbola",
    "DeepZero",
    "Evolution",
    "ForwardGradient",
    "Linear",
    "MeZO",
    "MeZOSVRG",
    "NodePseuZO",
    "PseuZO",
    "Reciprocal",
    "Schedule",
    "SparseMeZO",
    "ZOAdam",
    "ZOBlocks",
    "ZOConservative",
    "ZOSign",
]
