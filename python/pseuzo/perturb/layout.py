"""Where a model has its weights, and which perturbed weights are made together."""

from collections.abc import Mapping
from typing import NamedTuple
from weakref import ref

from torch import Tensor, nn

from pseuzo.perturb import scratch
from pseuzo.perturb.perturbation import Perturbation
from pseuzo.perturb.scratch import Block, Copies, Place, WholePassCopies
from pseuzo.perturb.watch import Learned

Blocks = dict[ref[nn.Module], Block]


class Plan(NamedTuple):
    """Which weights are copied for a whole pass, and which are made when a module runs."""

    copies: list[Copies]
    places: list[tuple[Place, Tensor]]  # of the copies
    owned: dict[ref[nn.Module], list[Place]]  # all other weights, by the modules that have them
    outside: int  # how many weights were known to be used outside their module


class Layout:
    """The weights of a model, by the modules that have them. The plan is renewed when passes learn
    more.

    The model owns its passes, so the references to its modules are weak.
    """

    def __init__(
        self, model: nn.Module, perturbation: Perturbation, whole_pass: WholePassCopies
    ) -> None:
        self.perturbation, self.whole_pass = perturbation, whole_pass
        self.learned = Learned()
        self.most_together = scratch.most_together(perturbation.params)
        self._model = ref(model)
        self._embeddings = {ref(m) for m in model.modules() if isinstance(m, nn.Embedding)}
        self.places: dict[ref[nn.Module], list[Place]] = {}
        for module in model.modules():
            places = [
                Place(module._parameters, name, p)
                for name, p in module._parameters.items()
                if p in perturbation.params
            ]
            if places:
                self.places[ref(module)] = places
        self._plan: Plan | None = None
        self._blocks: dict[str, Blocks] = {}  # by kind of pass, "" while it is watched

    def note_used(self, used: Mapping[str, list[int]]) -> None:
        """Replace what is known about the weights that passes used, and restart the watch."""
        self.learned.note_used(used, self.perturbation.streams)
        self._blocks.clear()

    def modules(self) -> list[ref[nn.Module]]:
        """The modules of the model, as it is now."""
        model = self._model()
        return [] if model is None else [ref(module) for module in model.modules()]

    def plan(self) -> Plan:
        """The plan, made anew if the watch has found another weight used outside its module."""
        outside = self.learned.outside
        if self._plan is None or self._plan.outside != len(outside):
            count = len(outside)
            whole = {
                p: None
                for p in self.perturbation.params
                if p.numel() <= scratch.SMALL or p in outside
            }
            copies = self.whole_pass.copies_of(whole)
            places: list[tuple[Place, Tensor]] = []
            owned: dict[ref[nn.Module], list[Place]] = {}
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
        """The weights that are made when a module runs, by module.

        While passes are watched, each module is a block of its own. Settled passes know which
        modules run inside which, so a block may hold as much as one launch can make.
        """
        settled = kind in self.learned.settled
        key = kind if settled else ""
        if key not in self._blocks:
            blocks: Blocks = {}
            if settled:
                model = self._model()
                assert model is not None  # the model runs this pass
                self._gather(model, kind, blocks)
            else:
                blocks.update({module: self._own_block(module) for module in self.plan().owned})
            self._blocks[key] = blocks
        return self._blocks[key]

    def runs_alone(self, module: ref[nn.Module], kind: str) -> None:
        """Make module a block of its own, because it ran outside of its block in a settled pass."""
        self.learned.within[kind][module].clear()
        self._blocks.pop(kind, None)

    def _own_block(self, module: ref[nn.Module]) -> Block:
        return Block(self.plan().owned[module], table=module in self._embeddings)

    def _gather(self, module: nn.Module, kind: str, blocks: Blocks) -> None:
        """Add the blocks of module and its submodules. An embedding is always its own block."""
        owned, reached = self.plan().owned, self.learned.reached[kind]
        within = self.learned.within.get(kind, {})  # passes of no module have none
        owners = [r for r in map(ref, module.modules()) if r in owned]
        tables = [r for r in owners if r in self._embeddings]
        rest = [r for r in owners if r not in self._embeddings]
        inside = [place for r in rest for place in owned[r]]
        if (
            len(inside) > 1
            and ref(module) not in tables
            and sum(map(scratch.room, {place.param for place in inside})) <= self.most_together
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
