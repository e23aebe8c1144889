"""Zeroth-order fine-tuning of language models: PseuZO and MeZO at the speed and in the memory of inference."""

from pseuzo.journal import Journal, replay
from pseuzo.objective import CausalLMObjective
from pseuzo.optimizer import MeZO, PseuZO
from pseuzo.perturbed import perturbed
from pseuzo.schedule import Constant, CyclicHyperbola, Linear, Schedule

__all__ = [
    "CausalLMObjective", "Constant", "CyclicHyperbola", "Journal", "Linear", "MeZO", "PseuZO", "Schedule", "perturbed",
    "replay",
]  # fmt: skip
