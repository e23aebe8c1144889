"""Passes at the weights themselves that carry their derivative along z(seed), by forward-mode
automatic differentiation.

A pass replaces every weight that takes noise by a dual tensor: the weight, in its own memory, and
z, made for this pass in the weight's dtype. So the tangents take as much memory as the trained
weights, and activations take twice their own. Fused attention kernels have no forward-mode
derivative, so torch's own attention runs its plain kernels within a pass.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from weakref import ref

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.backends import cuda
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pseuzo.interrupts import undoing
from pseuzo.perturb.contexts import leave, no_cached_casts
from pseuzo.perturb.layout import Layout
from pseuzo.perturb.running import Hooks, Originals, put_back
from pseuzo_kernels import noise

FUSED = (  # torch's fused attention kernels: whether one is allowed, and how to change that
    (cuda.flash_sdp_enabled, cuda.enable_flash_sdp),
    (cuda.mem_efficient_sdp_enabled, cuda.enable_mem_efficient_sdp),
    (cuda.cudnn_sdp_enabled, cuda.enable_cudnn_sdp),
)
PLAIN = cuda.math_sdp_enabled, cuda.enable_math_sdp


class _Reaches(TorchDispatchMode):
    """Notes which weights reach an op, with note(storage, offset in elements)."""

    def __init__(self, note: Callable[[int, int], None]) -> None:
        super().__init__()
        self._note = note

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, Tensor) and x.layout is torch.strided and x.numel():
                try:
                    storage = x.untyped_storage().data_ptr()
                except RuntimeError:  # a tangent of 0 has no storage
                    continue
                self._note(storage, x.storage_offset())
        return func(*args, **(kwargs or {}))


class _FrozenLayers(TorchFunctionMode):
    """Skips a matrix product in linear layers whose weights have no tangent. Torch would make zeros
    for the tangent and multiply with them."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.linear and not kwargs and not any(map(_has_tangent, args[1:])):
            x, tangent = forward_ad.unpack_dual(args[0])
            if tangent is not None:
                return forward_ad.make_dual(func(x, *args[1:]), func(tangent, args[1]))
        return func(*args, **(kwargs or {}))


def _has_tangent(x: Tensor | None) -> bool:
    return x is not None and forward_ad.unpack_dual(x).tangent is not None


class TangentPass:
    """Runs the passes of one model with dual weights, one after another.

    As in RunningPass, everything is recorded before it is changed, so that undo() may run at any
    time, also twice.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._kind = ""
        self._originals: Originals = []
        self._hooks = Hooks()
        self._watch: _Reaches | None = None
        self._frozen: _FrozenLayers | None = None
        self._level_is_open = False
        self._kernels: list[tuple[Callable[[bool], None], bool]] = []  # and whether they were on

    @contextmanager
    def run(self, seed: int, kind: str) -> Iterator[None]:
        """Run a pass whose outputs have a tangent, their derivative along noise_scale * z(seed).

        kind: see ModulePasses.passing. Passes of a kind are watched until one meets no new weight.
        """
        self.undo()
        learned = self._layout.learned
        with undoing(self.undo), no_cached_casts():
            reached = learned.reached.setdefault(kind, set())
            known = len(reached)
            self._begin(seed, kind)
            yield
            if len(reached) == known > 0:
                learned.settled.add(kind)

    def _begin(self, seed: int, kind: str) -> None:
        layout, self._kind = self._layout, kind
        reached = layout.learned.reached[kind]
        self._kernels = [(enable, enabled()) for enabled, enable in (*FUSED, PLAIN)]
        for _, enable in FUSED:
            enable(False)
        cuda.enable_math_sdp(True)
        self._open_level()
        places = [place for there in layout.places.values() for place in there]
        duals = self._duals(seed)
        self._originals += [(parameters, name, parameters[name]) for parameters, name, _ in places]
        for parameters, name, param in places:
            if parameters[name] is param:  # otherwise the user put something else there
                parameters[name] = duals[param]
        unsure = [m for m, there in layout.places.items() if {p.param for p in there} - reached]
        self._hooks.before(unsure, self._note_module)
        self._hooks.put_on()
        if kind not in layout.learned.settled:
            self._watch = _Reaches(self._note)
            self._watch.__enter__()
        self._frozen = _FrozenLayers()
        self._frozen.__enter__()

    def _open_level(self) -> None:
        self._level_is_open = True
        try:
            forward_ad.enter_dual_level()
        except RuntimeError as error:  # the caller has a level open
            self._level_is_open = False
            raise RuntimeError(
                "a step by forward-mode derivatives cannot be made inside another one "
                "(torch.autograd.forward_ad, torch.func.jvp)"
            ) from error

    def _duals(self, seed: int) -> dict[nn.Parameter, Tensor]:
        perturbation, duals = self._layout.perturbation, {}
        for p, (stream, scale) in perturbation.params.items():
            law = perturbation.noise
            z = noise(p.shape, seed, stream, noise=law, dtype=p.dtype, device=p.device)
            duals[p] = forward_ad.make_dual(perturbation.real[p], z.mul_(scale))
        return duals

    def _note(self, storage: int, offset: int) -> None:
        perturbation = self._layout.perturbation
        for p in perturbation.by_storage.get(storage, ()):
            if 0 <= offset - perturbation.real[p].storage_offset() < p.numel():
                self._layout.learned.reached[self._kind].add(p)

    def _note_module(self, module: nn.Module, args: tuple) -> None:
        places = self._layout.places.get(ref(module), ())
        self._layout.learned.reached[self._kind].update(place.param for place in places)

    def undo(self) -> None:
        """Undo all that the pass changed. Idempotent, at any time."""
        put_back(self._originals)
        self._hooks.take_off()
        for mode in (self._frozen, self._watch):
            if mode is not None:
                leave(mode)
        if self._level_is_open:
            try:
                forward_ad.exit_dual_level()
            except RuntimeError:  # an interrupt came before the level was open, or after its end
                pass
        self._level_is_open = False
        for enable, was_on in self._kernels:
            enable(was_on)
        self._kernels, self._hooks = [], Hooks()
        self._watch = self._frozen = None
        self._originals.clear()
