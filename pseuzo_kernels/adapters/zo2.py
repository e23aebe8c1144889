"""ZO2's optimizers: MeZOSGD, with the model on one device, and MeZO2SGD, with blocks that come and
go.

zo_perturb_parameters and zo_update get a part of the model. Its weights have the noise of their
names in the whole model, so no state of a generator has to be kept for each block.
"""

from typing import Any
from weakref import WeakKeyDictionary

from pseuzo_kernels.adapters.patching import Peer, WeightsOf, replace
from pseuzo_kernels.adapters.weights import SeededWeights, decayed

ZO2 = Peer(
    "zo2",
    "liangyuwang/zo2 at 4bca25c (zo2/optimizer/mezo_sgd)",
    ("zo_perturb_parameters", "zo_update", "inner_zo_forward"),
)
WITHOUT_DECAY = ("bias", "layer_norm", "layernorm", "ln")


def patch(
    optimizer: Any, *, noise: str = "normal", rounding: str = "nearest", exact: bool = False
) -> Any:
    """Replace how an optimizer of ZO2, or all of a class, perturbs and updates; returns it.

    Patch MeZOSGD for all of ZO2's. noise, rounding, exact: as in `SeededWeights`. What stays:
    zo_random_seed, scaling_factor times zo_eps, lr, the rules of weight_decay, and that MeZO2SGD
    updates a block one step later, with the seed of the step before. With debug_mode, where all
    noise is 1, the original methods run.
    """
    weights = WeightsOf(noise, rounding, exact)
    own_perturb = getattr(optimizer, "zo_perturb_parameters", None)
    own_update = getattr(optimizer, "zo_update", None)
    seeds_of: WeakKeyDictionary[Any, list[int]] = WeakKeyDictionary()

    def seeds(self) -> list[int]:
        """The seed of the step before, if there was one, and that of this step."""
        known = seeds_of.setdefault(self, [])
        if known[-1:] != [self.zo_random_seed]:
            known.append(self.zo_random_seed)
            del known[:-2]
        return known

    def part(self, module) -> SeededWeights:
        name = next((name for name, part in self.model.named_modules() if part is module), None)
        if name is None:
            raise ValueError(
                f"zo2: {type(module).__name__} is not a part of the optimizer's model, so its "
                "weights have no name in it; pass one of model.modules()"
            )
        trained = ((n, x) for n, x in module.named_parameters(prefix=name) if x.requires_grad)
        return weights(module, trained)

    def original(self, method, *args, **kwargs):
        return method(*args, **kwargs) if self is optimizer else method(self, *args, **kwargs)

    def zo_perturb_parameters(self, module, scaling_factor=1):
        if self.debug_mode:
            return original(self, own_perturb, module, scaling_factor)
        part(self, module).perturb(seeds(self)[-1], scaling_factor * self.zo_eps)

    def zo_update(self, module, weight_decay=None):
        if self.debug_mode:
            return original(self, own_update, module, weight_decay)
        moved = part(self, module)
        delayed = hasattr(self, "rstate_queue")
        decay = weight_decay
        if decay is None:
            names = [n for n, x in module.named_parameters() if x.requires_grad]
            decay = decayed(names, self.weight_decay, WITHOUT_DECAY)
        seed = seeds(self)[0 if delayed else -1]
        moved.update(seed, self.projected_grad, lr=self.lr, weight_decay=decay)
        return module if delayed else None

    functions = dict(zo_perturb_parameters=zo_perturb_parameters, zo_update=zo_update)
    return replace(optimizer, ZO2, functions)
