"""Exact perturbed passes: a module runs as if its weights were x + scale * z(seed), and the weights are never written.

Small weights are copied, perturbed, in one launch for the whole pass. A large one is made in scratch when its module
runs and forgotten when it returns, so the memory is that of the largest module; those of a block (an attention, a layer
of a small model) are made together. An embedding is perturbed at the rows it looks up. Nothing has to be restored, so
nothing drifts, and an exception in the forward leaves the weights as they were.

A weight that the forward uses outside its module (a functional call on another module's weight, a view that was kept)
would be missed. The first passes of a model therefore run under a watch that sees every op: a real weight that reaches
one is replaced by a perturbed copy there and then, and from the next pass on such weights are copied for the whole
pass. The watch turns itself off after a pass that replaced nothing and saw no new weight.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple
from weakref import WeakKeyDictionary, ref

from torch import Tensor, nn

from pseuzo.perturb import scratch
from pseuzo.perturb.perturbation import Perturbation
from pseuzo.perturb.running import RunningPass
from pseuzo.perturb.scratch import Block, Copies, Place, Scratch, WholePassCopies
from pseuzo.perturb.watch import Learned

Blocks = dict[ref[nn.Module], Block]


class Plan(NamedTuple):
    """Which weights are copied for a whole pass, and which are made when a module runs."""

    copies: list[Copies]
    places: list[tuple[Place, Tensor]]  # of the copies
    owned: dict[ref[nn.Module], list[Place]]  # all other weights, by the modules that have them
    outside: int  # how many weights were known to be used outside their module


class ModulePasses:
    """Perturbed passes of one model. They are kept over steps with their scratch and what they learned of the model.

    params: the weights to perturb -> (stream, noise scale); others run as they are. The model owns its passes, so these
    have weak references to its modules alone.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Mapping[nn.Parameter, tuple[int, float]],
        noise: str = "hadamard",
    ) -> None:
        self.perturbation = Perturbation(params, noise)
        self.learned = Learned()
        self._model = ref(model)
        self._embeddings = {ref(m) for m in model.modules() if isinstance(m, nn.Embedding)}
        self.places: dict[ref[nn.Module], list[Place]] = {}
        for module in model.modules():
            parameters = module._parameters
            places = [
                Place(parameters, name, p) for name, p in parameters.items() if p in self.params
            ]
            if places:
                self.places[ref(module)] = places
        self._together = scratch.most_together(self.params)
        self.scratch = Scratch(self.perturbation, self._together)
        self.whole_pass = WholePassCopies(self.perturbation)
        self._plan: Plan | None = None
        self._blocks: dict[str, Blocks] = {}  # by kind of pass, "" while it is watched
        self._pass = RunningPass(self)

    @property
    def params(self) -> dict[nn.Parameter, tuple[int, float]]:
        """The weights that are perturbed -> (stream, noise scale)."""
        return self.perturbation.params

    @property
    def active(self) -> bool:
        """Does a pass run?"""
        return self._pass.active

    @property
    def replaced(self) -> int:
        """How often memory that passes use was replaced. Graphs recorded before that must not run any more."""
        return self.scratch.replaced

    def at(self, seed: int, scale: float, kind: str = "any") -> AbstractContextManager[None]:
        """A context in which forwards of the model see x + scale * noise scale * z(seed). kind: see passing."""
        self.aim(seed, scale)
        return self.passing(kind)

    def aim(self, seed: int, scale: float) -> None:
        """Set what the passes from here on see. A recorded pass reads it when it is replayed, so call this outside."""
        self.perturbation.aim(seed, scale)

    def passing(self, kind: str = "any") -> AbstractContextManager[None]:
        """A context in which forwards of the model see what aim() set.

        kind: a name for passes that take the same way through the model; what the watch learns is kept by kind. A way
        that is taken only later, as some data makes it, is not watched.
        """
        return self._pass.run(kind)

    def rows(self, param: nn.Parameter, index: Tensor) -> Tensor:
        """Rows of a weight as the pass that runs sees them. No others are made."""
        return self._pass.rows(param, index)

    def settled(self, kind: str) -> bool:
        """Does a pass of this kind run without the watch?"""
        return kind in self.learned.settled

    def unused(self, kind: str) -> set[nn.Parameter]:
        """The weights that no pass of this kind has used so far: a change of the output says nothing about them."""
        return self.params.keys() - self.learned.reached.get(kind, set())

    def used(self) -> dict[str, list[int]]:
        """The streams of the weights that each kind of pass has used so far: what unused() says, to be saved."""
        return self.learned.used(self._streams())

    def note_used(self, used: Mapping[str, list[int]]) -> None:
        """Replace what is known by what used() gave. The watch begins anew."""
        self.learned.note_used(used, self._streams())
        self._blocks.clear()

    def _streams(self) -> dict[nn.Parameter, int]:
        return {p: stream for p, (stream, _) in self.params.items()}

    def modules(self) -> list[ref[nn.Module]]:
        """The modules of the model, as it is now."""
        model = self._model()
        return [] if model is None else [ref(module) for module in model.modules()]

    def plan(self) -> Plan:
        """The plan, made anew if the watch has found another weight that is used outside its module."""
        outside = self.learned.outside
        if self._plan is None or self._plan.outside != len(outside):
            count = len(outside)
            whole = {p: None for p in self.params if p.numel() <= scratch.SMALL or p in outside}
            copies = self.whole_pass.together(whole)
            places, owned = [], {}
            for module, there in self.places.items():
                for place in there:
                    if place.param in whole:
                        places.append((place, self.whole_pass.memory(place.param)))
                    else:
                        owned.setdefault(module, []).append(place)
            self._blocks.clear()
            self._plan = Plan(copies, places, owned, count)
        return self._plan

    def blocks_of(self, kind: str) -> Blocks:
        """What is made when which module runs. While passes are watched each module is a block of its own; from then on
        it is known which run inside which, and a block is the largest one that may be made together."""
        settled = self.settled(kind)
        key = kind if settled else ""
        if key not in self._blocks:
            blocks: Blocks = {}
            if settled:
                self._gather(self._model(), kind, blocks)
            else:
                blocks.update({module: self._own_block(module) for module in self.plan().owned})
            self._blocks[key] = blocks
        return self._blocks[key]

    def runs_alone(self, module: ref[nn.Module], kind: str) -> None:
        """Note that module ran outside of its block in a settled pass: in passes to come it is one of its own."""
        self.learned.within[kind][module].clear()
        self._blocks.pop(kind, None)

    def _own_block(self, module: ref[nn.Module]) -> Block:
        return Block(self.plan().owned[module], table=module in self._embeddings)

    def _gather(self, module: nn.Module, kind: str, blocks: Blocks) -> None:
        """Add the blocks of what is inside module. An embedding, of which rows are made, is always its own."""
        owned, reached = self.plan().owned, self.learned.reached[kind]
        within = self.learned.within[kind]
        owners = [r for r in map(ref, module.modules()) if r in owned]
        tables = [r for r in owners if r in self._embeddings]
        rest = [r for r in owners if r not in self._embeddings]
        inside = [place for r in rest for place in owned[r]]
        if (
            len(inside) > 1
            and ref(module) not in tables
            and sum(map(scratch.room, {place.param for place in inside})) <= self._together
            and all(place.param in reached for place in inside)
            and all(ref(module) in within.get(r, ()) for r in rest)
        ):
            blocks[ref(module)] = Block(inside)
            blocks.update({r: self._own_block(r) for r in tables})
            return
        if ref(module) in owned:
            blocks[ref(module)] = self._own_block(ref(module))
        for child in module.children():
            self._gather(child, kind, blocks)


# Entries last as long as the model. A copy of a model has other weights and gets its own.
_passes: WeakKeyDictionary[nn.Module, ModulePasses] = WeakKeyDictionary()


def passes_of(
    model: nn.Module, params: Mapping[nn.Parameter, tuple[int, float]], noise: str
) -> ModulePasses:
    """The passes of a model, made anew if the ones it has are of other weights, scales or noise."""
    passes = _passes.get(model)
    if passes is not None and passes.active:
        raise RuntimeError(
            "perturbed: the model is perturbed already; contexts of one model do not nest"
        )
    if passes is None or not passes.perturbation.matches(params, noise):
        passes = _passes[model] = ModulePasses(model, params, noise)
    return passes


def known_passes(model: nn.Module) -> ModulePasses | None:
    """The passes that a model has at present."""
    return _passes.get(model)


def forget_passes(model: nn.Module) -> None:
    """Drop the passes of a model and their scratch."""
    _passes.pop(model, None)


def rows_of(model: nn.Module, weight: Tensor, index: Tensor) -> Tensor:
    """Rows of a weight as forwards of the model see them now: perturbed in a perturbed pass, and no others are made.

    Where gradients are recorded they flow to a weight that is not perturbed."""
    passes = _passes.get(model)
    if passes is not None and passes.active and weight in passes.params:
        return passes.rows(weight, index)
    return weight.index_select(0, index)


@contextmanager
def perturbed(
    model: nn.Module, seed: int, eps: float, *, sign: int = 1, noise: str = "hadamard"
) -> Iterator[None]:
    """Inside, forwards of model see x + sign * eps * z(seed) in place of every weight x that requires grad.

    The weights themselves are not touched, whatever happens inside; but read or save them outside, as inside the small
    ones of the model are perturbed copies. The stream of a weight is its position in model.parameters(). Gradients do
    not flow to the weights inside. sign is 1 or -1.
    """
    if not math.isfinite(eps):
        raise ValueError(f"perturbed: eps must be finite, got {eps}")
    if sign not in (1, -1):
        raise ValueError(f"perturbed: sign must be 1 or -1, got {sign}")
    params = {p: (i, 1.0) for i, p in enumerate(model.parameters()) if p.requires_grad}
    with passes_of(model, params, noise).at(seed, sign * eps):
        yield
