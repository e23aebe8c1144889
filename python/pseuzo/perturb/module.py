"""Exact perturbed forward: a module runs as if its weights were x + eps * z(seed), and the weights are never written.

Small weights are copied, perturbed, in one launch for the whole pass. A large one is made in scratch when its module
runs and forgotten when it returns, so the memory is that of the largest module; those of a block (an attention, a layer
of a small model) are made together. An embedding is perturbed at the rows it looks up. Nothing has to be restored, so
nothing drifts, and an exception in the forward leaves the weights as they were.

A weight that the forward uses outside its module (a functional call on another module's weight, a view kept since long)
would be missed. The first passes of a model therefore run under a watch that sees every op: a real weight that reaches
one is replaced by a perturbed copy there and then, and from the next pass on such weights are copied for the whole
pass. The watch stands down after a pass in which it had nothing to do and in which nothing was used for the first time.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from pseuzo_kernels.checks import check_noise, check_tensors, signed64
from pseuzo_kernels.ops import RepeatedPerturb

SMALL = (
    1 << 16
)  # elements; the biases, norms and adapters of a model together are a small part of it
# The most elements that are made in one launch, if they are of one block, as a launch costs the host more than making
# a small weight costs a GPU: 32 MB of scratch in half precision, which stay in a GPU's cache (H100: 50 MB), and less
# of a model that is not much larger: a 16th of it, or 8 MB.
TOGETHER, SMALL_TOGETHER, PART = 1 << 24, 1 << 22, 16
ALIGN = 2048  # elements between tensors in scratch, so that each begins on an address the kernels can read widely


class _Place(NamedTuple):
    """Where a module has a weight."""

    module: nn.Module
    name: str
    param: nn.Parameter


class _Group:
    """Weights of one dtype and device, as the op takes them: what a pass does again and again is prepared once."""

    def __init__(self, owner: "PerturbedForward", params: list[nn.Parameter]):
        self.params = params
        self.reals = [owner.real[p] for p in params]
        self.device = params[0].device
        streams, scales = zip(*(owner.params[p] for p in params), strict=True)
        self._settings = *owner.seeds_on(self.device), list(streams), list(scales), owner.noise

    def copies(self, outs: list[Tensor]) -> "_Copies":
        return _Copies(self.params, outs, RepeatedPerturb(self.reals, *self._settings, outs))

    @classmethod
    def of(cls, owner: "PerturbedForward", params: Iterable[nn.Parameter]) -> list["_Group"]:
        kinds: dict[tuple, list[nn.Parameter]] = {}
        for p in dict.fromkeys(params):  # each once
            kinds.setdefault((p.dtype, p.device), []).append(p)
        return [cls(owner, part) for part in kinds.values()]


class _Copies(NamedTuple):
    """Memory for perturbed weights, and the launch that makes them there."""

    params: list[nn.Parameter]
    outs: list[Tensor]
    perturb: RepeatedPerturb

    def make(self) -> None:
        self.perturb()
        torch.autograd.graph.increment_version(
            self.outs
        )  # a backward that kept what was there before must fail


class _Block:
    """Weights that are made when one module runs. makes_rows: of an embedding, as they are looked up."""

    def __init__(self, owner: "PerturbedForward", places: list[_Place]):
        self.places, self.groups = places, _Group.of(owner, [place.param for place in places])
        self.makes_rows = len(places) == 1 and isinstance(places[0].module, nn.Embedding)


class _Made(NamedTuple):
    """The weights of a block in scratch."""

    copies: list[_Copies]
    places: list[tuple[_Place, Tensor]]


def _room(x: Tensor) -> int:
    """Elements that x takes in scratch."""
    return -(-x.numel() // ALIGN) * ALIGN


class _Scratch:
    """One buffer per nesting depth, grown to the largest block that ran there, and then reused by every block."""

    def __init__(self, params: Iterable[nn.Parameter], together: int) -> None:
        self._least: dict[tuple, int] = {}  # room for any block: growing would make graphs void
        for p in params:
            kind = p.dtype, p.device
            self._least[kind] = min(self._least.get(kind, 0) + _room(p), together)
        self._buffers: dict[tuple, Tensor] = {}
        self._made: WeakKeyDictionary[_Block, dict[int, _Made]] = WeakKeyDictionary()  # by depth
        self._addresses: set[int] = set()  # of the buffers
        self.replaced = 0  # buffers: graphs that were recorded of them are of no use any more

    def take(self, depth: int, block: _Block) -> _Made:
        made = self._made.get(block, {}).get(depth)
        if made is None:
            copies = [group.copies(self._cut(depth, group.reals)) for group in block.groups]
            of = {p: x for part in copies for p, x in zip(part.params, part.outs, strict=True)}
            made = _Made(copies, [(place, of[place.param]) for place in block.places])
            self._made.setdefault(block, {})[depth] = made
        return made

    @torch.inference_mode(False)  # what is kept must be of use outside of that mode, too
    def _cut(self, depth: int, like: list[Tensor]) -> list[Tensor]:
        key = (depth, like[0].dtype, like[0].device)
        sizes = [_room(x) for x in like]
        if key not in self._buffers or self._buffers[key].numel() < sum(sizes):
            self._made.clear()  # they hold the memory, which is freed before the larger one is made
            if self._buffers.pop(key, None) is not None:
                self.replaced += 1
                if (
                    key[2].type == "cuda"
                ):  # streams other than the one that it was made on may still read it
                    torch.cuda.synchronize(key[2])
            self._buffers[key] = torch.empty(
                max(sum(sizes), self._least[key[1:]]), dtype=key[1], device=key[2]
            )
            self._addresses = {
                buffer.untyped_storage().data_ptr() for buffer in self._buffers.values()
            }
        parts = self._buffers[key].split(sizes + [self._buffers[key].numel() - sum(sizes)])
        return [part[: x.numel()].view(x.shape) for part, x in zip(parts, like, strict=False)]

    def holds(self, x: object) -> bool:
        return isinstance(x, Tensor) and x.untyped_storage().data_ptr() in self._addresses


class _Hooks:
    """Hooks that are put on for a pass and taken off after it, which costs less than to register them anew."""

    def __init__(self) -> None:
        self._entries: list[
            tuple[nn.Module, str, int, object]
        ] = []  # and where they are in a module

    def before(self, module: nn.Module, hook: Callable) -> None:
        handle = module.register_forward_pre_hook(hook)
        self._entries.append((module, "_forward_pre_hooks", handle.id, hook))

    def after(self, module: nn.Module, hook: Callable) -> None:
        """Also after a forward that fails."""
        handle = module.register_forward_hook(hook, always_call=True)
        self._entries.append((module, "_forward_hooks", handle.id, hook))
        self._entries.append((module, "_forward_hooks_always_called", handle.id, True))

    def put_on(self) -> None:
        for module, where, key, value in self._entries:
            getattr(module, where)[key] = value

    def take_off(self) -> None:
        for module, where, key, _ in self._entries:
            getattr(module, where).pop(key, None)


class _RowsOfEmbedding(TorchFunctionMode):
    """While an embedding's forward runs: a lookup in `param` gives perturbed rows; other uses, a perturbed copy."""

    def __init__(self, owner: "PerturbedForward", param: Tensor):
        super().__init__()
        self.owner, self.param = owner, param

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.embedding and len(args) > 1 and args[1] is self.param:
            max_norm = args[3] if len(args) > 3 else kwargs.get("max_norm")
            # A lookup with max_norm writes to its weight; one of many tokens costs more than the table: a copy, below.
            if max_norm is None and args[0].numel() < self.param.shape[0]:
                return self.owner.rows(self.param, args[0])
        if func.__name__ != "__get__":  # asking for its dtype or shape is no use of it
            perturbed_one = lambda x: self.owner.copy_of(self.param) if x is self.param else x  # noqa: E731
            args, kwargs = tree_map_only(Tensor, perturbed_one, (args, kwargs))
        return func(*args, **kwargs)


class _Watch(TorchDispatchMode):
    """Sees every op of a pass and puts perturbed copies in the place of real weights."""

    def __init__(self, owner: "PerturbedForward"):
        super().__init__()
        self.owner = owner

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace != "pseuzo":
            args, kwargs = tree_map_only(Tensor, self.owner.substitute, (args, kwargs or {}))
        return func(*args, **(kwargs or {}))


class PerturbedForward:
    """The perturbed forward of one model; kept over steps with its scratch and what it learned of the model.

    params: the weights to perturb -> (stream, noise scale); others run as they are.
    """

    @torch.inference_mode(False)
    def __init__(
        self,
        model: nn.Module,
        params: Mapping[nn.Parameter, tuple[int, float]],
        noise: str = "hadamard",
    ):
        check_noise("perturbed", noise)
        self.noise = noise
        self.params = {p: place for p, place in params.items() if place[1] != 0}
        self._served = params  # what it was last found to serve for
        self.real = {
            p: p.detach() for p in self.params
        }  # as the ops take them: no autograd, the same memory
        self._memory = [(p.data_ptr(), p.dtype) for p in self.params]
        for device in {p.device for p in self.params}:
            check_tensors("perturbed", [p for p in self.params if p.device == device], "parameter")
        self.model = model
        self._places = {
            module: [
                _Place(module, name, p)
                for name, p in module._parameters.items()
                if p in self.params
            ]
            for module in model.modules()
        }
        self._by_storage: dict[int, list[nn.Parameter]] = {}
        for p in self.params:
            self._by_storage.setdefault(p.untyped_storage().data_ptr(), []).append(p)
        self._outside: set[nn.Parameter] = set()  # met by the watch: copied for the whole pass
        self._met = False  # the watch met a real weight in this pass
        self._settled: set[str] = (
            set()
        )  # the kinds of pass of which one went by in which it met none
        self._reached: dict[
            str, set[nn.Parameter]
        ] = {}  # the weights that passes of a kind used so far
        # by kind of pass: the modules that ran around every call of a module
        self._within: dict[str, dict[nn.Module, set[nn.Module]]] = {}
        self._calls: list[nn.Module] = []  # that run, while passes are watched
        self._kind = ""  # of the pass that runs
        self._together = min(
            TOGETHER, max(sum(p.numel() for p in self.params) // PART, SMALL_TOGETHER)
        )
        self._scratch = _Scratch((p for p in self.params if p.numel() > SMALL), self._together)
        self._copies: dict[nn.Parameter, Tensor] = {}  # of the pass that runs
        self._kept: dict[nn.Parameter, Tensor] = {}  # memory of the copies that last a whole pass
        self._kept_by_storage: dict[int, nn.Parameter] = {}
        self._alone: dict[
            nn.Parameter, _Copies
        ] = {}  # those that are made when they are first used in a pass
        # made by _plan: what is copied for a whole pass, where it is, and all else by the modules that have it
        self._whole_pass: list[_Copies] = []
        self._whole_places: list[tuple[_Place, Tensor]] = []
        self._owned: dict[nn.Module, list[_Place]] = {}
        self._planned_for = -1  # weights outside
        self._blocks: dict[str, dict[nn.Module, _Block]] = {}  # by kind, "" while it is watched
        self._running: dict[nn.Module, _Block] = {}  # of the pass that runs
        self._hooks: dict[
            str, tuple[dict[nn.Module, _Block], int, _Hooks]
        ] = {}  # by kind, and what they are for
        self._stack: list[
            tuple[nn.Module, list[tuple[_Place, Tensor]], TorchFunctionMode | None]
        ] = []
        self._strays: list[
            tuple[_Place, Tensor]
        ] = []  # weights of modules that ran outside of their block
        self._seeds: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self.active = False

    def matches(self, params: Mapping[nn.Parameter, tuple[int, float]], noise: str) -> bool:
        """Can this object serve for these? Not if a weight was moved, replaced or scaled anew since it was made."""
        if noise != self.noise or [(p.data_ptr(), p.dtype) for p in self.params] != self._memory:
            return False
        if params is not self._served:
            if {p: place for p, place in params.items() if place[1] != 0} != self.params:
                return False
            self._served = params
        return True

    def unused(self, kind: str) -> set[nn.Parameter]:
        """The weights that no pass of this kind has used so far: the change of the output says nothing about them."""
        return self.params.keys() - self._reached.get(kind, set())

    def used(self) -> dict[str, list[int]]:
        """The streams of the weights that each kind of pass has used so far: what unused() says, to be saved."""
        return {
            kind: sorted(self.params[p][0] for p in reached)
            for kind, reached in self._reached.items()
        }

    def note_used(self, used: Mapping[str, list[int]]) -> None:
        """Take over what used() gave, in place of what is known here. The watch begins anew."""
        of = {stream: p for p, (stream, _) in self.params.items()}
        self._reached = {
            kind: {of[i] for i in streams if i in of} for kind, streams in used.items()
        }
        self._settled.clear()
        self._blocks.clear()

    def _plan(self) -> None:
        """Which weights are copied for a whole pass, and which when a module runs."""
        whole = dict.fromkeys(
            p for p in self.params if p.numel() <= SMALL or p in self._outside
        )  # a set, in order
        groups = _Group.of(self, whole)
        self._whole_pass = [
            group.copies([self._memory_for(p) for p in group.params]) for group in groups
        ]
        everywhere = [place for places in self._places.values() for place in places]
        self._whole_places = [
            (place, self._kept[place.param]) for place in everywhere if place.param in whole
        ]
        self._owned = {}
        for place in everywhere:
            if place.param not in whole:
                self._owned.setdefault(place.module, []).append(place)
        self._blocks.clear()
        self._planned_for = len(self._outside)

    def _blocks_of(self, kind: str) -> dict[nn.Module, _Block]:
        """What is made when which module runs. While passes are watched each module is a block of its own; from then on
        it is known which run inside which, and a block is the largest one that may be made together."""
        settled = self.settled(kind)
        key = kind if settled else ""
        if key not in self._blocks:
            blocks = self._blocks[key] = {}
            if settled:
                self._gather(self.model, kind, blocks)
            else:
                blocks.update(
                    (module, _Block(self, places)) for module, places in self._owned.items()
                )
        return self._blocks[key]

    def _gather(self, module: nn.Module, kind: str, blocks: dict[nn.Module, _Block]) -> None:
        """The blocks of what is inside module. An embedding, of which rows are made, is always its own."""
        owners = [m for m in module.modules() if m in self._owned]
        tables = [m for m in owners if isinstance(m, nn.Embedding)]
        inside = [place for m in owners if m not in tables for place in self._owned[m]]
        within = self._within[kind]
        if (
            len(inside) > 1
            and module not in tables
            and sum(map(_room, {place.param for place in inside})) <= self._together
            and all(p in self._reached[kind] and module in within.get(m, ()) for m, _, p in inside)
        ):
            blocks[module] = _Block(self, inside)
            blocks.update({m: _Block(self, self._owned[m]) for m in tables})
            return
        if module in self._owned:
            blocks[module] = _Block(self, self._owned[module])
        for child in module.children():
            self._gather(child, kind, blocks)

    def rows(self, param: nn.Parameter, index: Tensor) -> Tensor:
        """Rows of the perturbed embedding, no others made."""
        self._reached[self._kind].add(param)
        stream, scale = self.params[param]
        return torch.ops.pseuzo.add_noise_rows(
            self.real[param], index.long(), *self.seeds_on(param.device), stream, scale, self.noise
        )

    def copy_of(self, param: nn.Parameter) -> Tensor:
        """The perturbed weight, for the rest of the pass."""
        if param not in self._copies:
            if param not in self._alone:
                self._alone[param] = _Group(self, [param]).copies([self._memory_for(param)])
            self._alone[param].make()
            self._copies[param] = self._kept[param]
        return self._copies[param]

    @torch.inference_mode(False)
    def _memory_for(self, param: nn.Parameter) -> Tensor:
        if param not in self._kept:
            self._kept[param] = torch.empty(param.shape, dtype=param.dtype, device=param.device)
            self._kept_by_storage[self._kept[param].untyped_storage().data_ptr()] = param
        return self._kept[param]

    def _forget(self, param: nn.Parameter) -> None:
        memory = self._kept.pop(param)
        self._alone.pop(param, None)
        self._kept_by_storage.pop(memory.untyped_storage().data_ptr())
        if memory.is_cuda:  # it may have been made on another stream than the one that uses it now
            memory.record_stream(torch.cuda.current_stream(memory.device))

    def substitute(self, x: Tensor) -> Tensor:
        """x, unless it is (a view of) a real weight to be perturbed: then the same view of the perturbed one."""
        if x.layout is not torch.strided or x.numel() == 0:
            return x
        storage = x.untyped_storage().data_ptr()
        for param in self._by_storage.get(storage, ()):
            offset = x.storage_offset() - self.real[param].storage_offset()
            if 0 <= offset < param.numel():
                self._outside.add(param)
                self._reached[self._kind].add(param)
                self._met = True
                return self.copy_of(param).as_strided(x.size(), x.stride(), offset)
        if storage in self._kept_by_storage:
            self._reached[self._kind].add(self._kept_by_storage[storage])
        return x

    def _swap(
        self,
        module: nn.Module,
        copies: list[tuple[_Place, Tensor]],
        mode: TorchFunctionMode | None = None,
    ) -> None:
        self._stack.append((module, _put(copies), mode))
        if mode is not None:
            mode.__enter__()

    def _unswap(self) -> None:
        _, before, mode = self._stack.pop()
        if mode is not None:
            mode.__exit__(None, None, None)
        _put(before)

    def _note_module(self, module: nn.Module, args: tuple) -> None:
        self._reached[self._kind].update(place.param for place in self._places.get(module, ()))

    def _begin_call(self, module: nn.Module, args: tuple) -> None:
        self._calls.append(module)
        around = self._within[self._kind].setdefault(module, set(self._calls))
        around.intersection_update(self._calls)
        self._note_module(module, args)

    def _end_call(self, module: nn.Module, args: tuple, output: object) -> None:
        if self._calls and self._calls[-1] is module:
            self._calls.pop()

    def _enter_module(self, module: nn.Module, args: tuple) -> None:
        block = self._running[module]
        bare = _bare(block.places)
        if len(bare) < len(block.places):
            block = _Block(self, bare)
        if block.makes_rows:
            self._swap(module, [], _RowsOfEmbedding(self, block.places[0].param))
            return
        made = self._scratch.take(len(self._stack), block)
        for copies in made.copies:
            copies.make()
        self._swap(module, made.places)

    def _enter_alone(self, module: nn.Module, args: tuple) -> None:
        """A module of a block. If it now runs outside of that, its weights are copied for the rest of this pass, and it
        is a block of its own in the passes to come."""
        bare = _bare(self._owned[module])
        if bare:
            self._strays += _put([(place, self.copy_of(place.param)) for place in bare])
            self._within[self._kind][module].clear()
            self._blocks.pop(self._kind, None)

    def _leave_module(self, module: nn.Module, args: tuple, output: object) -> object:
        """Scratch goes to the next module: an output that is a view of it, a weight's rows say, is copied first."""
        if self._stack and self._stack[-1][0] is module:
            self._unswap()
        if any(
            map(
                self._scratch.holds,
                (output,) if isinstance(output, Tensor) else tree_leaves(output),
            )
        ):
            return tree_map_only(
                Tensor, lambda x: x.clone() if self._scratch.holds(x) else x, output
            )
        return None

    def __call__(self, seed: int, eps: float, kind: str = "any") -> AbstractContextManager[None]:
        """Forwards of the model inside see x + eps * scale * z(seed). eps may be negative. kind: see passing."""
        self.aim(seed, eps)
        return self.passing(kind)

    @property
    def replaced(self) -> int:
        """How often memory that passes work in was replaced: graphs recorded before that must not run any more."""
        return self._scratch.replaced

    @torch.inference_mode(False)
    def seeds_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The seed and the eps of the passes, [1] each."""
        if device not in self._seeds:
            self._seeds[device] = (
                torch.empty(1, dtype=torch.int64, device=device), torch.empty(1, dtype=torch.float32, device=device)
            )  # fmt: skip
        return self._seeds[device]

    def aim(self, seed: int, eps: float) -> None:
        """Says what the passes from here on see. Written in place: a recorded pass reads it when it is replayed."""
        for seeds, coefs in map(self.seeds_on, {p.device for p in self.params}):
            seeds.fill_(signed64("perturbed", seed))
            coefs.fill_(eps)

    def settled(self, kind: str) -> bool:
        """Does a pass of this kind run without the watch?"""
        return kind in self._settled

    @contextmanager
    def passing(self, kind: str = "any") -> Iterator[None]:
        """A pass that sees what was aimed at.

        kind: a name for passes that take the same way through the model; what the watch learns is kept by kind. A way
        that is taken only later, as some data makes it, is not watched.
        """
        if self._planned_for != len(self._outside):
            self._plan()
        hooks, before = _Hooks(), []
        self.active = True
        try:
            self._kind, self._met = kind, False
            reached = self._reached.setdefault(kind, set())
            known = len(reached)
            for copies in self._whole_pass:
                copies.make()
                self._copies.update(zip(copies.params, copies.outs, strict=True))
            before = _put(self._whole_places)
            watched = not self.settled(kind)
            self._running = self._blocks_of(kind)
            blocks, reached_by, kept = self._hooks.get(kind, (None, 0, None))
            if blocks is self._running and reached_by == known and not watched:
                hooks = kept
                hooks.put_on()
            else:
                self._register(hooks, kind, watched)
                if not watched:
                    self._hooks[kind] = self._running, known, hooks
            with no_cached_casts(), _Watch(self) if watched else nullcontext():
                yield
            if (
                watched and not self._met and len(reached) == known > 0
            ):  # it met nothing, and nothing was new
                self._settled.add(kind)
        finally:
            hooks.take_off()
            while self._stack:  # what an interrupted module left
                self._unswap()
            _put(before)
            _put(self._strays)
            for p in {place.param for place, _ in self._strays}:  # memory that is not needed again
                self._forget(p)
            self._strays.clear()
            self._calls.clear()
            self._copies.clear()
            self.active = False

    def _register(self, hooks: _Hooks, kind: str, watched: bool) -> None:
        if watched:
            self._within.setdefault(kind, {})
            for module in self.model.modules():
                hooks.before(module, self._begin_call)
                hooks.after(module, self._end_call)
        else:
            for module, places in self._places.items():
                if any(place.param not in self._reached[kind] for place in places):
                    hooks.before(module, self._note_module)
        for module in self._owned.keys() - self._running.keys():
            hooks.before(module, self._enter_alone)
        for module in self._running:
            hooks.before(module, self._enter_module)
            hooks.after(module, self._leave_module)

    def __reduce__(self) -> tuple:  # for copy.deepcopy, too
        return type(None), ()  # a copy of the model has other weights: it makes its own


@contextmanager
def no_cached_casts() -> Iterator[None]:
    """Inside, autocast caches no casts of weights; casts from before are not used inside, nor those of inside later.

    Its cache holds the casts of fp32 weights until the outermost autocast block ends, whatever is written to them."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)  # an autocast block that is made inside takes this over
    torch.clear_autocast_cache()
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)
        torch.clear_autocast_cache()


def _bare(places: list[_Place]) -> list[_Place]:
    """Those where the weight itself is now. What else is there is perturbed already, as a module may run within itself,
    or was put there by the user."""
    return [place for place in places if place.module._parameters[place.name] is place.param]


def _put(weights: list[tuple[_Place, Tensor]]) -> list[tuple[_Place, Tensor]]:
    """Puts tensors in the places of weights; returns what was there."""
    before = [(place, place.module._parameters[place.name]) for place, _ in weights]
    for (module, name, _), x in weights:
        module._parameters[name] = x
    return before


def rows_of(model: nn.Module, weight: Tensor, index: Tensor) -> Tensor:
    """Rows of a weight of model as its forwards see them now: perturbed in a perturbed pass, and no others made.

    Where gradients are recorded they flow to a weight that is not perturbed."""
    forward = model.__dict__.get("_pseuzo_forward")
    if forward is not None and forward.active and weight in forward.params:
        return forward.rows(weight, index)
    return weight.index_select(0, index)


@contextmanager
def frozen_mode(model: nn.Module | None) -> Iterator[None]:
    """Dropout off and batch statistics frozen inside; every module's own mode is put back."""
    modules = [] if model is None else [model]
    seen = set(modules)
    for module in modules:  # model.modules() takes several times as long
        for child in module._modules.values():
            if child is not None and child not in seen:
                seen.add(child)
                modules.append(child)
    training = [m for m in modules if m.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def forward_of(
    model: nn.Module, params: Mapping[nn.Parameter, tuple[int, float]], noise: str
) -> PerturbedForward:
    """The model's PerturbedForward, made anew if it does not serve for these. It lives as long as the model."""
    forward = model.__dict__.get("_pseuzo_forward")
    if forward is not None and forward.active:
        raise RuntimeError(
            "perturbed: the model is perturbed already; contexts of one model do not nest"
        )
    if forward is None or not forward.matches(params, noise):
        forward = model.__dict__["_pseuzo_forward"] = PerturbedForward(model, params, noise)
    return forward


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
    with forward_of(model, params, noise)(seed, sign * eps):
        yield
