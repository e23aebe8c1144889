"""What passes learn about a model, and the watch that finds weights used outside their module."""

from collections.abc import Callable, Mapping
from weakref import ref

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from pseuzo.perturb.perturbation import Perturbation

Modules = dict[ref[nn.Module], set[ref[nn.Module]]]


class Learned:
    """What passes learned about a model, by kind of pass."""

    def __init__(self) -> None:
        self.reached: dict[str, set[nn.Parameter]] = {}  # the weights that passes used so far
        self.within: dict[str, Modules] = {}  # the modules that ran around every call of a module
        # Kinds of pass that a watched pass learned nothing new about; they run without the watch.
        self.settled: set[str] = set()
        self.outside: set[nn.Parameter] = set()  # weights used outside their module

    def used(self, streams: Mapping[nn.Parameter, int]) -> dict[str, list[int]]:
        """The streams of the weights that each kind of pass has used."""
        return {kind: sorted(streams[p] for p in reached) for kind, reached in self.reached.items()}

    def note_used(self, used: Mapping[str, list[int]], streams: Mapping[nn.Parameter, int]) -> None:
        """Replace what is known by what used() returned, and restart the watch."""
        self.settled.clear()
        param_of = {stream: p for p, stream in streams.items()}
        self.reached = {
            kind: {param_of[i] for i in numbers if i in param_of} for kind, numbers in used.items()
        }


class Watch(TorchDispatchMode):
    """Sees every op of a pass and gives it perturbed copies in place of (views of) real weights.

    copy_of: weight -> its copy. weight_at: storage -> the weight whose copy lies in it. reached and
    outside: sets to which weights are added. met: whether a real weight reached an op.
    """

    def __init__(
        self,
        perturbation: Perturbation,
        copy_of: Callable[[nn.Parameter], Tensor],
        weight_at: Callable[[int], nn.Parameter | None],
        reached: set[nn.Parameter],
        outside: set[nn.Parameter],
    ) -> None:
        super().__init__()
        self._perturbation = perturbation
        self._copy_of, self._weight_at = copy_of, weight_at
        self._reached, self._outside = reached, outside
        self.met = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace != "pseuzo":
            args, kwargs = tree_map_only(Tensor, self._substitute, (args, kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _substitute(self, x: Tensor) -> Tensor:
        if x.layout is not torch.strided or x.numel() == 0:
            return x
        storage = x.untyped_storage().data_ptr()
        for param in self._perturbation.by_storage.get(storage, ()):
            offset = x.storage_offset() - self._perturbation.real[param].storage_offset()
            if 0 <= offset < param.numel():
                self.met = True
                self._outside.add(param)
                self._reached.add(param)
                return self._copy_of(param).as_strided(x.size(), x.stride(), offset)
        copied = self._weight_at(storage)
        if copied is not None:
            self._reached.add(copied)
        return x
