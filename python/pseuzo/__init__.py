"""Zeroth-order fine-tuning of language models: PseuZO and MeZO at the speed and in the memory of inference."""

from pseuzo.journal import Journal, replay
from pseuzo.objective import CausalLMObjective
from pseuzo.optimizer import MeZO, PseuZO
from pseuzo.perturbed import perturbed
from pseuzo.schedule import Constant, CyclicHyperbola, Linear, Schedule

__all__ = [
    "CausalLMObjective", "Constant", "CyclicHyperbola", "Journal", "Linear", "MeZO", "PseuZO", "PseuZOTrainer",
    "PseuZOTrainingArguments", "Schedule", "perturbed", "replay",
]  # fmt: skip


def __getattr__(name: str) -> object:
    if name in ("PseuZOTrainer", "PseuZOTrainingArguments"):  # Transformers' Trainer takes seconds to import
        from pseuzo import trainer

        return getattr(trainer, name)
    raise AttributeError(f"module 'pseuzo' has no attribute {name!r}")
