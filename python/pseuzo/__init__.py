"""Zeroth-order fine-tuning of language models: PseuZO and MeZO at the speed and in the memory of inference.

Names are imported when they are first asked for: torch and Transformers take seconds, which the command line has no
need of to show its help, and in which Ctrl-C would end in a traceback.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pseuzo.journal import Journal, replay
    from pseuzo.objective import CausalLMObjective
    from pseuzo.optimizer import MeZO, PseuZO
    from pseuzo.perturbed import perturbed
    from pseuzo.schedule import Constant, CyclicHyperbola, Linear, Schedule
    from pseuzo.trainer import PseuZOTrainer, PseuZOTrainingArguments

_MODULES = {
    "journal": ("Journal", "replay"),
    "objective": ("CausalLMObjective",),
    "optimizer": ("MeZO", "PseuZO"),
    "perturbed": ("perturbed",),
    "schedule": ("Constant", "CyclicHyperbola", "Linear", "Schedule"),
    "trainer": ("PseuZOTrainer", "PseuZOTrainingArguments"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "CausalLMObjective", "Constant", "CyclicHyperbola", "Journal", "Linear", "MeZO", "PseuZO", "PseuZOTrainer",
    "PseuZOTrainingArguments", "Schedule", "perturbed", "replay",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        value = getattr(importlib.import_module(f"pseuzo.{_MODULE_OF[name]}"), name)
        globals()[name] = value
        return value
    if name in _MODULES:
        return importlib.import_module(f"pseuzo.{name}")
    raise AttributeError(f"module 'pseuzo' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """pseuzo.perturbed is the function. An import of the module of that name, which anyone may be first to do, sets the
    attribute to the module."""

    def __setattr__(self, name: str, value: Any) -> None:
        is_module = name == "perturbed" and isinstance(value, ModuleType)
        super().__setattr__(name, value.perturbed if is_module else value)


sys.modules[__name__].__class__ = _Package
