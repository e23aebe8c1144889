"""The kernels inside other zeroth-order trainers, with torch alone.

`SeededWeights` has what such a trainer does with noise: it moves named weights along the noise of a
seed, and updates them by the noise of many. A module for each kind of trainer puts it in the place
of the trainer's own methods, and `unpatch` puts these back:

    mezo     MeZO's trainer, and QZO's and PseuZO's, which have its methods
    lozo     LOZO's trainer, with noise of low rank
    zo2      ZO2's optimizers
    zo_llm   ZO-LLM's trainer
    es       workers of evolution strategies, and a population update for any loop

The noise is then that of this library, so a seed gives another run than before, of the same method.
"""

from pseuzo_kernels.adapters import es, lozo, mezo, zo2, zo_llm
from pseuzo_kernels.adapters.patching import unpatch
from pseuzo_kernels.adapters.weights import SeededWeights

__all__ = ["SeededWeights", "es", "lozo", "mezo", "unpatch", "zo2", "zo_llm"]
