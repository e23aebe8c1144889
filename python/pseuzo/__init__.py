"""Zeroth-order fine-tuning of language models, at the speed and in the memory of inference.

A name is imported when it is first used. torch and Transformers take seconds to import, the command
line shows its help without them, and Ctrl-C during such an import would end in a traceback.
"""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

from pseuzo.extras import TRAIN_MODULES, how_to_install, missing_train_modules

if TYPE_CHECKING:
    from pseuzo.models.objective import CausalLMObjective
    from pseuzo.optim import (
        FZOO,
        Constant,
        Cycles,
        CyclicHyperbola,
        DeepZero,
        Evolution,
        ForwardGradient,
        Linear,
        MeZO,
        MeZOSVRG,
        NodePseuZO,
        PseuZO,
        Reciprocal,
        Schedule,
        SparseMeZO,
        ZOAdam,
        ZOBlocks,
        ZOConservative,
        ZOSign,
    )
    from pseuzo.perturb.module import perturbed
    from pseuzo.perturb.offload import device_bytes, offload
    from pseuzo.train.arguments import PseuZOTrainingArguments
    from pseuzo.train.journal import Journal
    from pseuzo.train.replay import replay
    from pseuzo.train.trainer import PseuZOTrainer
    from pseuzo_kernels import __version__ as __version__

_NAMES = {  # the public names by the module that defines them
    "models.objective": ("CausalLMObjective",),
    "optim": (
        *("Constant", "Cycles", "CyclicHyperbola", "Linear", "Reciprocal", "Schedule"),
        *(
            "DeepZero",
            "Evolution",
            "FZOO",
            "MeZO",
            "ForwardGradient",
            "MeZOSVRG",
            "NodePseuZO",
            "PseuZO",
            "SparseMeZO",
            "ZOAdam",
            "ZOBlocks",
            "ZOConservative",
            "ZOSign",
        ),
    ),
    "perturb": ("perturbed",),
    "perturb.offload": ("device_bytes", "offload"),
    "train.arguments": ("PseuZOTrainingArguments",),
    "train.journal": ("Journal",),
    "train.replay": ("replay",),
    "train.trainer": ("PseuZOTrainer",),
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names}
_PACKAGES = ("cli", "demo", "models", "optim", "perturb", "tasks", "train")

__all__ = [
    "FZOO",
    "CausalLMObjective",
    "Constant",
    "Cycles",
    "CyclicHyperbola",
    "DeepZero",
    "Evolution",
    "ForwardGradient",
    "Journal",
    "Linear",
    "MeZO",
    "MeZOSVRG",
    "NodePseuZO",
    "PseuZO",
    "PseuZOTrainer",
    "PseuZOTrainingArguments",
    "Reciprocal",
    "Schedule",
    "SparseMeZO",
    "ZOAdam",
    "ZOBlocks",
    "ZOConservative",
    "ZOSign",
    "device_bytes",
    "offload",
    "perturbed",
    "replay",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value = importlib.import_module("pseuzo_kernels").__version__
    elif name in _MODULE_OF:
        value = getattr(_import(_MODULE_OF[name], name), name)
    elif name in _PACKAGES:
        return _import(name, name)
    else:
        raise AttributeError(f"module 'pseuzo' has no attribute {name!r}")
    globals()[name] = value
    return value


def _import(module: str, what: str) -> ModuleType:
    try:
        return importlib.import_module(f"pseuzo.{module}")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in TRAIN_MODULES:
            raise
        raise ImportError(how_to_install(f"pseuzo.{what}", missing_train_modules())) from None


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
