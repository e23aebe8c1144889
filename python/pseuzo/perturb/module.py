"""Exact perturbed passes: a module runs as if its weights were x + scale * z(seed).

The weights are never written. Small weights are copied, perturbed, in one launch for the whole
pass. A large one is made in scratch when its module runs and forgotten when the module returns, so
the memory needed is that of the largest module. The weights of a block (an attention, a layer of a
small model) are made together. An embedding is perturbed at the rows that it looks up. Nothing has
to be restored, so nothing drifts, and an exception in the forward leaves the weights as they were.

A weight that the forward uses outside its module (a functional call on another module's weight, a
view that was kept) would be missed. The first passes of a model therefore run under a watch that
sees every op: a real weight that reaches one is replaced by a perturbed copy there and then, and
from the next pass on such weights are copied for the whole pass. The watch turns itself off after a
pass that replaced nothing and saw no new weight.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from pseuzo.perturb.layout import Layout
from pseuzo.perturb.masks import Masks
from pseuzo.perturb.offloaded import OffloadedPasses, sessions_of
from pseuzo.perturb.perturbation import Base, Perturbation
from pseuzo.perturb.running import RunningPass
from pseuzo.perturb.scratch import Scratch, WholePassCopies
from pseuzo.perturb.tangent import TangentPass


class ModulePasses:
    """Perturbed passes of one model, kept from step to step with what they learned of the model.

    params: the weights to perturb -> (stream, noise scale); others run as they are. masks: which of
    their elements take noise; None: all. Passes last as long as their model, so all their
    references to its modules are weak.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Mapping[nn.Parameter, tuple[int, float]],
        noise: str,
        masks: Masks | None = None,
    ) -> None:
        self._perturbation = Perturbation(params, noise, masks)
        self.whole_pass = WholePassCopies(self._perturbation)
        self._layout = Layout(model, self._perturbation, self.whole_pass)
        self.scratch = Scratch(self._perturbation, self._layout.most_together)
        self._learned = self._layout.learned
        self._pass = RunningPass(self._layout, self.scratch)
        self._tangents = TangentPass(self._layout)

    def matches(
        self,
        params: Mapping[nn.Parameter, tuple[int, float]],
        noise: str,
        masks: Masks | None = None,
    ) -> bool:
        """Whether these passes are right for params, noise and masks; see Perturbation.matches."""
        return self._perturbation.matches(params, noise, masks)

    @property
    def params(self) -> dict[nn.Parameter, tuple[int, float]]:
        """The weights that are perturbed -> (stream, noise scale)."""
        return self._perturbation.params

    @property
    def active(self) -> bool:
        """Does a pass run?"""
        return self._pass.active

    @property
    def replaced(self) -> int:
        """How often scratch was replaced. Graphs recorded before that must not run any more."""
        return self.scratch.replaced

    def at(self, seed: int, scale: float, kind: str = "any") -> AbstractContextManager[None]:
        """A context in which forwards of the model see x + scale * noise_scale * z(seed).

        kind: see passing().
        """
        self.aim(seed, scale)
        return self.passing(kind)

    def aim(self, seed: int, scale: float | Tensor) -> None:
        """Set what passes see from here on.

        A recorded pass is replayed without Python and reads what aim() wrote before: call aim()
        outside of the function that is recorded.
        """
        self._perturbation.aim(seed, scale)

    def passing(self, kind: str = "any", base: Base | None = None) -> AbstractContextManager[None]:
        """A context in which forwards of the model see what aim() set.

        kind: a name for passes that take the same way through the model. What the watch learns is
        kept by kind. If other data takes another way after the watch has turned itself off, that
        way is not watched. base: see Perturbation.
        """
        return self._pass.run(kind, base)

    def along(self, seed: int, kind: str = "any") -> AbstractContextManager[None]:
        """A context in which the outputs of the model's forwards have a tangent: their derivative
        at x along noise_scale * z(seed).

        Read it inside, with torch.autograd.forward_ad.unpack_dual. kind: see passing().
        """
        return self._tangents.run(seed, kind)

    def together(self, calls: Sequence[Callable[[], Any]]) -> list[Any]:
        """Return the results of calls, each of which makes one pass."""
        return [call() for call in calls]

    def rows(self, param: nn.Parameter, index: Tensor) -> Tensor:
        """Rows of a weight as the running pass sees them. No others are made."""
        return self._pass.rows(param, index)

    def settled(self, kind: str) -> bool:
        """Does a pass of this kind run without the watch?"""
        return kind in self._learned.settled

    def unused(self, kind: str) -> Set[Tensor]:
        """The weights that no pass of this kind has used, so outputs do not depend on them."""
        return self.params.keys() - self._learned.reached.get(kind, set())

    def used(self) -> dict[str, list[int]]:
        """The streams of the weights that each kind of pass has used, for a state to save."""
        return self._learned.used(self._perturbation.streams)

    def release(self) -> None:
        """Free the scratch, until the next pass."""
        self.scratch.release()

    def note_used(self, used: Mapping[str, list[int]]) -> None:
        """Replace what is known by what used() returned, and restart the watch."""
        self._layout.note_used(used)


# An entry lasts as long as its model. Copies of a model have other weights and get their own.
_passes: WeakKeyDictionary[nn.Module, ModulePasses | OffloadedPasses] = WeakKeyDictionary()


def passes_of(
    model: nn.Module,
    params: Mapping[nn.Parameter, tuple[int, float]],
    noise: str,
    masks: Masks | None = None,
) -> ModulePasses | OffloadedPasses:
    """The passes of a model, made anew if the weights, scales, noise or masks have changed."""
    passes = _passes.get(model)
    if passes is not None and passes.active:
        raise RuntimeError(
            "perturbed: the model is perturbed already; contexts of one model do not nest"
        )
    if passes is None or not passes.matches(params, noise, masks):
        if (sessions := sessions_of(model)) is not None:
            passes = _passes[model] = OffloadedPasses(sessions, params, noise, masks)
        else:
            passes = _passes[model] = ModulePasses(model, params, noise, masks)
    return passes


def known_passes(model: nn.Module) -> ModulePasses | OffloadedPasses | None:
    """The passes that a model has at present."""
    return _passes.get(model)


def take_up(model: nn.Module, passes: ModulePasses | OffloadedPasses) -> None:
    """Make these the passes of the model again, in case it has others by now."""
    if (now := _passes.get(model)) is None or not now.active:  # otherwise passes_of will refuse
        _passes[model] = passes


def forget_passes(model: nn.Module) -> None:
    """Drop the passes of a model and their scratch."""
    _passes.pop(model, None)


def rows_of(model: nn.Module, weight: Tensor, index: Tensor) -> Tensor:
    """Rows of a weight as forwards of the model see them now, perturbed in a perturbed pass.

    No other rows are made. Gradients, if recorded, flow to the weight only if it is not perturbed.
    """
    if (sessions := sessions_of(model)) is not None:
        return sessions.rows(weight, index)  # type: ignore[arg-type]  # weights are parameters
    passes = _passes.get(model)
    if passes is not None and passes.active and weight in passes.params:
        return passes.rows(weight, index)  # type: ignore[arg-type]  # it is one of the params
    return weight.index_select(0, index)


@contextmanager
def perturbed(
    model: nn.Module, seed: int, eps: float, *, sign: int = 1, noise: str = "hadamard"
) -> Iterator[None]:
    """Inside, forwards of model see x + sign * eps * z(seed) in place of every weight x that
    requires grad.

    The weights themselves are not touched, whatever happens inside. Read or save them outside,
    because inside the model holds perturbed copies of its small weights. The stream of a weight is
    its position in model.parameters(). Gradients do not flow to the weights inside. sign is 1 or
    -1.
    """
    if not math.isfinite(eps):
        raise ValueError(f"perturbed: eps must be finite, got {eps}")
    if sign not in (1, -1):
        raise ValueError(f"perturbed: sign must be 1 or -1, got {sign}")
    params = {p: (i, 1.0) for i, p in enumerate(model.parameters()) if p.requires_grad}
    with passes_of(model, params, noise).at(seed, sign * eps):
        yield
