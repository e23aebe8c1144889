"""Where perturbed weights are made: scratch that modules share, one after another, and copies that
last a whole pass.

To hold weights in another way, for example on the host until their module runs, replace `Scratch`.
A pass uses only this of it:

    take(depth, block) -> Made    memory for the weights of a block that runs inside `depth` others.
                                  Each of Made.copies has make(), which fills the memory. It stays
                                  valid until the block's module returns; the next block at this
                                  depth may get the same memory.
    holds(x) -> bool              whether x is in that memory; such outputs of a module are copied.
    replaced -> int               counts how often memory was freed: CUDA graphs that were recorded
                                  before must not run any more.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from pseuzo.perturb.contexts import outside_inference_mode
from pseuzo.perturb.perturbation import Launch, Perturbation

# Weights of up to this many elements are copied for a whole pass: biases, norms and adapters, which
# are a small part of a model.
SMALL = 1 << 16
# The most elements of one block that are made in one launch, as a launch costs the host more than
# making a small weight costs a GPU. This is 32 MB of scratch in half precision, which stays in a
# GPU's cache (H100: 50 MB). A model that is not much larger gets less: a 16th of its size, or 8 MB.
TOGETHER, SMALL_TOGETHER, PART = 1 << 24, 1 << 22, 16
ALIGN = 2048  # tensors in scratch begin at multiples of this, where the kernels can read widely


class Place(NamedTuple):
    """Where a module has a weight. A reference to the module itself would keep the model alive."""

    parameters: dict[str, Any]  # the module's own dict, in which a pass puts perturbed weights
    name: str
    param: nn.Parameter


class Copies(NamedTuple):
    """Memory for perturbed weights of one dtype and device, and the launch that fills it."""

    params: list[nn.Parameter]
    outs: list[Tensor]
    launch: Launch

    def make(self) -> None:
        self.launch()
        # A backward that kept what was in the memory before must fail.
        torch.autograd.graph.increment_version(self.outs)


def alike(params: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """The params, each once, in lists of one dtype and device."""
    kinds: dict[tuple, list[nn.Parameter]] = {}
    for p in dict.fromkeys(params):
        kinds.setdefault((p.dtype, p.device), []).append(p)
    return list(kinds.values())


class Block:
    """Weights that are made when one module runs.

    table: they are those of an embedding, whose rows are made as they are looked up.
    """

    def __init__(self, places: list[Place], table: bool = False) -> None:
        self.places, self.table = places, table
        self.makes_rows = table and len(places) == 1
        self.alike = alike(place.param for place in places)

    def bare(self) -> "Block":
        """A block of those places that have the weight itself now.

        Anything else there is perturbed already, because a module may run within itself, or the
        user put it there.
        """
        places = bare(self.places)
        return self if len(places) == len(self.places) else Block(places, self.table)


def bare(places: list[Place]) -> list[Place]:
    """The places that have the weight itself now."""
    return [place for place in places if place.parameters[place.name] is place.param]


def room(x: Tensor) -> int:
    """The elements that x takes in scratch."""
    return -(-x.numel() // ALIGN) * ALIGN


def most_together(params: Iterable[nn.Parameter]) -> int:
    """The most elements that are made in one launch, in a model with these weights."""
    return min(TOGETHER, max(sum(p.numel() for p in params) // PART, SMALL_TOGETHER))


def copied(output: object, holds: Callable[[object], bool]) -> object:
    """The output of a module with copies of the tensors that are in memory which is used again;
    None, which leaves an output as it is, if it has no such tensors. holds: see above."""
    if any(map(holds, (output,) if isinstance(output, Tensor) else tree_leaves(output))):
        return tree_map_only(Tensor, lambda x: x.clone() if holds(x) else x, output)
    return None


class Made(NamedTuple):
    """The weights of a block in memory."""

    copies: list[Copies]
    places: list[tuple[Place, Tensor]]


class Scratch:
    """One buffer for each nesting depth, which grows to the largest block that ran there."""

    def __init__(self, perturbation: Perturbation, together: int) -> None:
        self._perturbation = perturbation
        # The least size of a buffer has room for most blocks, because growing it voids graphs.
        self._least: dict[tuple, int] = {}
        for p in perturbation.params:
            if p.numel() > SMALL:
                kind = p.dtype, p.device
                self._least[kind] = min(self._least.get(kind, 0) + room(p), together)
        self._buffers: dict[tuple, Tensor] = {}
        self._made: WeakKeyDictionary[Block, dict[int, Made]] = WeakKeyDictionary()  # by depth
        self._addresses: set[int] = set()  # of the buffers
        self.replaced = 0

    @property
    def sizes(self) -> list[int]:
        """The elements of each buffer."""
        return [buffer.numel() for buffer in self._buffers.values()]

    def take(self, depth: int, block: Block) -> Made:
        made = self._made.get(block, {}).get(depth)
        if made is None:
            copies = []
            for params in block.alike:
                with outside_inference_mode():  # the buffers are used outside of that mode, too
                    outs = self._cut(depth, params)
                copies.append(Copies(params, outs, self._perturbation.launch(params, outs)))
            out_of = {p: x for part in copies for p, x in zip(part.params, part.outs, strict=True)}
            made = Made(copies, [(place, out_of[place.param]) for place in block.places])
            self._made.setdefault(block, {})[depth] = made
        return made

    def _cut(self, depth: int, params: list[nn.Parameter]) -> list[Tensor]:
        """Parts of the buffer in the shapes of params."""
        dtype, device = params[0].dtype, params[0].device
        key, sizes = (depth, dtype, device), [room(p) for p in params]
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < sum(sizes):
            if buffer is not None:
                self.replaced += 1
                # The memory is freed before the larger one is made.
                self._made.clear()
                del buffer, self._buffers[key]
                if device.type == "cuda":  # streams other than the one it was made on may read it
                    torch.cuda.synchronize(device)
            size = max(sum(sizes), self._least[dtype, device])
            buffer = torch.empty(size, dtype=dtype, device=device)
            addresses = {x.untyped_storage().data_ptr() for x in self._buffers.values()}
            self._addresses = addresses | {buffer.untyped_storage().data_ptr()}
            self._buffers[key] = buffer
        parts = buffer.split([*sizes, buffer.numel() - sum(sizes)])
        return [part[: p.numel()].view(p.shape) for part, p in zip(parts, params, strict=False)]

    def release(self) -> None:
        """Free the buffers, until they are needed again."""
        for buffer in self._buffers.values():
            if buffer.is_cuda:  # it may have been made on another stream than the one that uses it
                buffer.record_stream(torch.cuda.current_stream(buffer.device))
        self._made.clear()
        self._buffers.clear()
        self._addresses.clear()
        self.replaced += 1

    def holds(self, x: object) -> bool:
        return isinstance(x, Tensor) and x.untyped_storage().data_ptr() in self._addresses


class WholePassCopies:
    """Memory for the copies that last a whole pass, one for each weight that has needed one."""

    def __init__(self, perturbation: Perturbation) -> None:
        self._perturbation = perturbation
        self._memory: dict[nn.Parameter, Tensor] = {}
        self._by_storage: dict[int, nn.Parameter] = {}
        self._single: dict[nn.Parameter, Copies] = {}

    def __iter__(self) -> Iterator[nn.Parameter]:
        """The weights that have memory."""
        return iter(self._memory)

    def memory(self, param: nn.Parameter) -> Tensor:
        if param not in self._memory:
            with outside_inference_mode():  # the memory is used outside of that mode, too
                memory = torch.empty(param.shape, dtype=param.dtype, device=param.device)
            self._by_storage[memory.untyped_storage().data_ptr()] = param
            self._memory[param] = memory
        return self._memory[param]

    def copies_of(self, params: Iterable[nn.Parameter]) -> list[Copies]:
        """The copies of params; one launch makes those of one dtype and device."""
        copies = []
        for part in alike(params):
            outs = [self.memory(p) for p in part]
            copies.append(Copies(part, outs, self._perturbation.launch(part, outs)))
        return copies

    def single(self, param: nn.Parameter) -> Copies:
        """The copy of one weight by itself, which is made when a pass first uses the weight."""
        if param not in self._single:
            (self._single[param],) = self.copies_of([param])
        return self._single[param]

    def weight_at(self, storage: int) -> nn.Parameter | None:
        """The weight whose copy lies in this storage."""
        param = self._by_storage.get(storage)
        if param is None or param not in self._memory:
            return None
        return param if self._memory[param].untyped_storage().data_ptr() == storage else None

    def forget(self, param: nn.Parameter) -> None:
        """Free the memory of a copy, if there is one."""
        memory = self._memory.get(param)
        if memory is None:
            return
        self._single.pop(param, None)
        self._by_storage.pop(memory.untyped_storage().data_ptr(), None)
        if memory.is_cuda:  # it may have been made on another stream than the one that uses it now
            memory.record_stream(torch.cuda.current_stream(memory.device))
        self._memory.pop(param, None)
