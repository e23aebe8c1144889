"""The running pass: its hooks put perturbed weights in the places of the model's own."""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from weakref import ref

from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only
from torch.utils.hooks import RemovableHandle

from pseuzo.interrupts import undoing
from pseuzo.perturb.contexts import leave, no_cached_casts
from pseuzo.perturb.layout import Blocks, Layout
from pseuzo.perturb.perturbation import Base
from pseuzo.perturb.scratch import Place, Scratch, bare, copied
from pseuzo.perturb.watch import Watch


class Hooks:
    """Hooks that a pass puts on and takes off; registering them each time would cost more."""

    def __init__(self) -> None:
        self._entries: list[tuple[ref[nn.Module], str, int, object]] = []

    def before(self, modules: Iterable[ref[nn.Module]], hook: Callable) -> None:
        key = _new_key()
        self._entries += [(module, "_forward_pre_hooks", key, hook) for module in modules]

    def after(self, modules: Iterable[ref[nn.Module]], hook: Callable) -> None:
        """Call hook after a forward, also after one that fails."""
        key = _new_key()
        for module in modules:
            self._entries.append((module, "_forward_hooks", key, hook))
            self._entries.append((module, "_forward_hooks_always_called", key, True))

    def put_on(self) -> None:
        for module_ref, hooks, key, value in self._entries:
            module = module_ref()
            if module is not None:
                getattr(module, hooks)[key] = value

    def take_off(self) -> None:
        for module_ref, hooks, key, _ in self._entries:
            module = module_ref()
            if module is not None:
                getattr(module, hooks).pop(key, None)


def _new_key() -> int:
    """A key that no hook of any module has."""
    return RemovableHandle(OrderedDict()).id


class _RowsOfEmbedding(TorchFunctionMode):
    """In an embedding, lookups in `param` give perturbed rows; other uses see a perturbed copy."""

    def __init__(
        self,
        param: nn.Parameter,
        rows: Callable[[nn.Parameter, Tensor], Tensor],
        copy_of: Callable[[nn.Parameter], Tensor],
    ) -> None:
        super().__init__()
        self._param, self._rows, self._copy_of = param, rows, copy_of

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.embedding and len(args) > 1 and args[1] is self._param:
            max_norm = args[3] if len(args) > 3 else kwargs.get("max_norm")
            # A lookup with max_norm writes to its weight, and rows of many tokens cost more than
            # the whole table. Both get a copy, below.
            if max_norm is None and args[0].numel() < self._param.shape[0]:
                return self._rows(self._param, args[0])
        if func.__name__ != "__get__":  # asking for its dtype or shape does not use it
            args, kwargs = tree_map_only(Tensor, self._perturbed, (args, kwargs))
        return func(*args, **kwargs)

    def _perturbed(self, x: Tensor) -> Tensor:
        return self._copy_of(self._param) if x is self._param else x


Originals = list[tuple[dict[str, nn.Parameter | None], str, nn.Parameter | None]]


def put_back(originals: Originals) -> None:
    """Put back what the places had. The first record of a place is put back last, so it wins."""
    for parameters, name, original in reversed(originals):
        parameters[name] = original


class RunningPass:
    """Runs the passes of one model, one after another.

    A pass records everything before it changes it, so that undo() takes all of it back, however far
    the pass or an earlier undo() came before it was interrupted.
    """

    def __init__(self, layout: Layout, scratch: Scratch) -> None:
        self._layout, self._scratch, self._learned = layout, scratch, layout.learned
        self.active = False
        self._kind = ""
        self._blocks: Blocks = {}
        self._copies: dict[nn.Parameter, Tensor] = {}  # made in this pass, for its rest
        self._hooks = Hooks()
        self._watch: Watch | None = None
        self._originals: Originals = []  # what each place had before this pass wrote to it
        # The modules that run on perturbed weights: where their originals begin, and their mode.
        self._inside: list[tuple[ref[nn.Module], int, TorchFunctionMode | None]] = []
        self._strays: list[Place] = []  # of modules that ran outside of their block, with copies
        self._calls: list[ref[nn.Module]] = []  # the modules that run, while passes are watched
        # The hooks of settled passes by kind, after the blocks and the number of reached weights
        # for which they were made.
        self._hooks_of: dict[str, tuple[Blocks, int, Hooks]] = {}

    @contextmanager
    def run(self, kind: str, base: Base | None = None) -> Iterator[None]:
        """Run a pass of this kind, after undoing what an interrupted pass may have left."""
        self.undo()
        with undoing(self.undo), no_cached_casts():
            self._layout.perturbation.base = base
            known = self._begin(kind)
            yield
            reached = self._learned.reached[kind]
            if self._watch is not None and not self._watch.met and len(reached) == known > 0:
                self._learned.settled.add(kind)

    def _begin(self, kind: str) -> int:
        """Begin a pass. Return how many weights passes of this kind are known to use."""
        layout, learned = self._layout, self._learned
        plan = layout.plan()
        self.active, self._kind = True, kind
        known = len(learned.reached.setdefault(kind, set()))
        for copies in plan.copies:
            copies.make()
            self._copies.update(zip(copies.params, copies.outs, strict=True))
        self._originals += [
            (place.parameters, place.name, place.parameters[place.name]) for place, _ in plan.places
        ]
        for (parameters, name, _), x in plan.places:
            parameters[name] = x
        self._blocks = layout.blocks_of(kind)
        self._hooks = self._hooks_for(kind, known)
        self._hooks.put_on()
        if kind not in learned.settled:
            self._watch = Watch(
                layout.perturbation,
                self._copy_of,
                layout.whole_pass.weight_at,
                learned.reached[kind],
                learned.outside,
            )
            self._watch.__enter__()
        return known

    def undo(self) -> None:
        """Undo all that the pass changed. Idempotent, at any time."""
        put_back(self._originals)
        put_back([(place.parameters, place.name, place.param) for place in self._strays])
        self._hooks.take_off()
        for _, _, mode in reversed(self._inside):
            if mode is not None:
                leave(mode)
        if self._watch is not None:
            leave(self._watch)
        for place in self._strays:  # later passes do not need their memory
            self._layout.whole_pass.forget(place.param)
        for records in (self._originals, self._strays, self._inside, self._calls, self._copies):
            records.clear()
        self._watch, self._hooks = None, Hooks()
        self._layout.perturbation.base = None
        self.active = False

    def rows(self, param: nn.Parameter, index: Tensor) -> Tensor:
        """Rows of the perturbed embedding. No others are made."""
        self._learned.reached[self._kind].add(param)
        return self._layout.perturbation.rows(param, index)

    def _copy_of(self, param: nn.Parameter) -> Tensor:
        """The perturbed weight, for the rest of the pass."""
        if param not in self._copies:
            copies = self._layout.whole_pass.single(param)
            copies.make()
            (self._copies[param],) = copies.outs
        return self._copies[param]

    def _hooks_for(self, kind: str, known: int) -> Hooks:
        settled = kind in self._learned.settled
        blocks, reached, hooks = self._hooks_of.get(kind, (None, 0, None))
        if settled and hooks is not None and blocks is self._blocks and reached == known:
            return hooks
        hooks = self._make_hooks(kind, settled)
        if settled:
            self._hooks_of[kind] = self._blocks, known, hooks
        return hooks

    def _make_hooks(self, kind: str, settled: bool) -> Hooks:
        layout, hooks = self._layout, Hooks()
        if settled:
            reached = layout.learned.reached[kind]
            unsure = [
                module
                for module, places in layout.places.items()
                if any(place.param not in reached for place in places)
            ]
            hooks.before(unsure, self._note_module)
        else:
            everything = layout.modules()
            hooks.before(everything, self._begin_call)
            hooks.after(everything, self._end_call)
        hooks.before(layout.plan().owned.keys() - self._blocks.keys(), self._enter_alone)
        hooks.before(self._blocks, self._enter_module)
        hooks.after(self._blocks, self._leave_module)
        return hooks

    def _note_module(self, module: nn.Module, args: tuple) -> None:
        places = self._layout.places.get(ref(module), ())
        self._learned.reached[self._kind].update(place.param for place in places)

    def _begin_call(self, module: nn.Module, args: tuple) -> None:
        self._calls.append(ref(module))
        within = self._learned.within.setdefault(self._kind, {})
        within.setdefault(ref(module), set(self._calls)).intersection_update(self._calls)
        self._note_module(module, args)

    def _end_call(self, module: nn.Module, args: tuple, output: object) -> None:
        if self._calls and self._calls[-1] == ref(module):
            self._calls.pop()

    def _enter_module(self, module: nn.Module, args: tuple) -> None:
        block = self._blocks[ref(module)].bare()
        first = len(self._originals)
        if block.makes_rows:
            mode = _RowsOfEmbedding(block.places[0].param, self.rows, self._copy_of)
            self._inside.append((ref(module), first, mode))
            mode.__enter__()
            return
        made = self._scratch.take(len(self._inside), block)
        for copies in made.copies:
            copies.make()
        self._inside.append((ref(module), first, None))
        self._originals += block.places  # these are bare, so their originals are the weights
        for (parameters, name, _), x in made.places:
            parameters[name] = x

    def _enter_alone(self, module: nn.Module, args: tuple) -> None:
        """Copy the weights of a module that runs outside of its block, for the rest of this pass.

        The module is a block of its own in later passes.
        """
        places = bare(self._layout.plan().owned[ref(module)])
        if places:
            self._strays += places
            copies = [self._copy_of(place.param) for place in places]
            for (parameters, name, _), x in zip(places, copies, strict=True):
                parameters[name] = x
            self._layout.runs_alone(ref(module), self._kind)

    def _leave_module(self, module: nn.Module, args: tuple, output: object) -> object:
        """Put the weights back, and copy outputs that are views of scratch, as it is reused."""
        if self._inside and self._inside[-1][0] == ref(module):
            _, first, mode = self._inside[-1]
            if mode is not None:
                leave(mode)
            put_back(self._originals[first:])
            del self._originals[first:]
            self._inside.pop()
        return copied(output, self._scratch.holds)
