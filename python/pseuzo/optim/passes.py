"""The passes of a step: how they see perturbed weights, and how CUDA graphs replay them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from pseuzo.interrupts import cleanly
from pseuzo.optim import groups
from pseuzo.optim.ranks import check_known
from pseuzo.perturb.contexts import frozen_mode, no_cached_casts, outside_inference_mode
from pseuzo.perturb.graphs import Graphs, check_device
from pseuzo.perturb.in_place import InPlace, Shift
from pseuzo.perturb.interface import Perturbing
from pseuzo.perturb.module import ModulePasses, passes_of, take_up
from pseuzo.perturb.offloaded import OffloadedPasses, sessions_of
from pseuzo.perturb.perturbation import Base
from pseuzo.sentences import first_line

if TYPE_CHECKING:
    from pseuzo.optim.base import ZeroOrder


@contextmanager
def without_autograd() -> Iterator[None]:
    """Disable autograd without entering inference mode: a step's tensors are used outside it."""
    with outside_inference_mode(), torch.no_grad():
        yield


class Passes:
    """Runs passes of an optimizer's model at x and at x + scale * z(seed).

    With a model, passes never write the weights. Without one, parameters stay shifted between the
    passes of a step, until `restore` or an update. capture: record the passes as CUDA graphs.
    """

    def __init__(self, optimizer: ZeroOrder, capture: bool):
        _check_offloaded(optimizer, capture)
        if capture:
            check_device(type(optimizer).__name__, optimizer.device)
        self._optimizer = optimizer
        # Those of the model, from its first step on.
        self._of_module: ModulePasses | OffloadedPasses | None = None
        self._in_place = InPlace(optimizer.noise, self._before_writing, self._after_writing)
        self._known: dict[str, list[int]] = {}  # from a loaded state: kind of pass -> streams
        # The parameters that take noise, after the groups from which they were found.
        self._places: tuple[list, dict[Any, tuple[int, float]]] = [], {}
        self._graphs = Graphs(optimizer.device) if capture else None
        self._recorded_of: tuple | None = None  # the memory that the graphs read and write
        self._base: Base | None = None  # what passes see in place of the weights, and their kind
        self._kind = ""
        self._only: Set[Tensor] | None = None  # the weights that are perturbed, if not all
        self._block = 0  # the number of that block of weights
        self._of_blocks: dict[int, ModulePasses | OffloadedPasses] = {}

    @property
    def captures(self) -> bool:
        """Whether passes are recorded as CUDA graphs."""
        return self._graphs is not None

    @property
    def _perturbing(self) -> Perturbing:
        return self._in_place if self._of_module is None else self._of_module

    def run(self, kind: str, key: tuple, call: Callable[[], Any]) -> Any:
        """Return call(), which makes the passes of a step, run without autograd and dropout.

        kind: the name of this kind of perturbed pass. key: tells the passes of this kind apart;
        CUDA graphs are recorded by kind and key.
        """
        optimizer, self._kind = self._optimizer, kind
        op = f"{type(optimizer).__name__}.step"
        check_known(op, optimizer.ranks)
        trained = groups.trained(op, optimizer.param_groups)  # refuses before anything is written
        groups.check_trains(op, optimizer.param_groups)
        _check_offloaded(optimizer, self._graphs is not None)
        if optimizer.model is None:
            shifted = [(group["noise_scale"], self._limited(params)) for group, params in trained]
            self._in_place.serve(shifted, optimizer.streams, optimizer.masks)
        else:
            if self._only is not None and self._block in self._of_blocks:
                take_up(optimizer.model, self._of_blocks[self._block])
            settings = optimizer.noise, optimizer.masks
            passes = passes_of(optimizer.model, self._find_places(), *settings)
            if passes is not self._of_blocks.get(self._block):
                passes.note_used(self.used())  # new passes begin with what this optimizer knows
                self._of_blocks[self._block], self._recorded_of = passes, None
            self._of_module = passes
        graphs: AbstractContextManager[None] = nullcontext()
        if self._graphs is not None:
            memory = (self._of_module, self._perturbing.replaced)
            if memory != self._recorded_of:  # the passes no longer use the memory of the graphs
                self._recorded_of = memory
                self._graphs.clear()
            graphs = self._graphs.step((kind, *key), self._perturbing.settled(kind))
        with without_autograd(), frozen_mode(optimizer.model), no_cached_casts(), graphs:
            return call()

    def based_on(self, base: Base, call: Callable[[], Any]) -> Any:
        """Return call(), whose passes see base[x] in place of each weight x that takes noise.

        This needs the model, and works without CUDA graphs only. The weights are never written.
        """
        self._base = base
        return cleanly(call, self._on_weights)

    def _on_weights(self) -> None:
        self._base = None

    def limit(self, block: int, only: Iterable[Tensor]) -> None:
        """Perturb `only` these weights from here on. block: the number of this set of weights."""
        self._block, self._only = block, set(only)

    def release(self) -> None:
        """Free the scratch of the passes, until the next one."""
        if self._of_module is not None:
            self._of_module.release()

    def _limited(self, params: list[Tensor]) -> list[Tensor]:
        return params if self._only is None else [p for p in params if p in self._only]

    def clean(self, call: Callable[[], Any]) -> Any:
        """Return call() at x."""
        if self._base is not None:
            return self.perturbed(0, 0.0, self._kind, call)
        return self._replayed("clean", call)

    def perturbed(
        self, seed: int, scale: float | Tensor, kind: str, call: Callable[[], Any]
    ) -> Any:
        """Return call() at x + scale * z(seed)."""
        perturbing = self._perturbing
        perturbing.aim(seed, scale)  # outside of the call, which may be replayed without Python

        def perturbed_call() -> Any:
            with perturbing.passing(kind, self._base):
                return call()

        return self._replayed(kind, perturbed_call)

    def together(self, calls: Sequence[Callable[[], Any]]) -> list[Any]:
        """Return the results of calls, each of which makes one pass by `clean` or `perturbed`.

        This is for all the passes of a step: those of an offloaded model then run layer by layer,
        so that each layer is uploaded once. No call may need the result of another.
        """
        return self._perturbing.together(calls)

    def derivative(self, seed: int, kind: str, call: Callable[[], Any]) -> tuple[Tensor, Tensor]:
        """Return call() at x, and its derivative along z(seed), by forward-mode differentiation.

        This needs the model, and works without CUDA graphs only.
        """
        op, passes = f"{type(self._optimizer).__name__}.step", self._of_module
        assert passes is not None  # the optimizer refuses bare parameters
        with passes.along(seed, kind):
            try:
                found = call()
            except NotImplementedError as error:
                raise NotImplementedError(
                    f"{op}: an op of the model has no forward-mode derivative "
                    f"({first_line(error)}); load the model with "
                    'attn_implementation="sdpa" or "eager", or use MeZO, which needs none'
                ) from error
            if not isinstance(found, Tensor):
                kind = type(found).__name__
                raise TypeError(f"{op}: the closure must return a tensor, got {kind}")
            value, tangent = forward_ad.unpack_dual(found)
        if tangent is None:
            raise ValueError(
                f"{op}: the loss does not depend on a trained weight of the model by ops that can "
                "be differentiated (the closure must run that very model); use MeZO for such a loss"
            )
        return value, tangent

    def _replayed(self, name: str, call: Callable[[], Any]) -> Any:
        """Return call(), or replay the graph that was recorded for the pass of this name."""
        return call() if self._graphs is None else self._graphs.run(name, call)

    def restore(self) -> None:
        """Undo what passes left in the weights or the model, if anything. Idempotent."""
        self._on_weights()
        with without_autograd():
            self._in_place.restore()

    def pending(self) -> tuple[Shift, Mapping[Tensor, Tensor]] | None:
        """Return what an update must take back: see InPlace.pending."""
        return self._in_place.pending()

    def forget(self) -> None:
        """Note that an update took back what was pending. Idempotent."""
        self._in_place.forget()

    def unused(self, op: str, kind: str) -> Set[Tensor]:
        """The weights that an update must skip: those that no pass of this kind has used, which
        would get nothing but noise, and those that `limit` leaves out.

        RuntimeError if such passes used no trained weight of the model.
        """
        outside = set() if self._only is None else set(self._optimizer.streams) - self._only
        if self._of_module is None:
            return outside
        unused = self._of_module.unused(kind)
        # A block may hold, say, experts that no row of the batch is routed to.
        certain = self._only is None or self._optimizer.steps == 0
        if unused and certain and unused == self._of_module.params.keys():
            raise RuntimeError(
                f"{op}: the pass used no weight of the model that is trained; run that very model "
                "in it (not a copy, and not a scripted or exported one), or give the optimizer its "
                "parameters"
            )
        return unused | outside

    def used(self) -> dict[str, list[int]]:
        """Return the streams of the weights that each kind of pass has used, for state_dict."""
        if self._of_module is None:
            return self._known
        every = [passes.used() for passes in self._of_blocks.values()]
        if self._only is not None:  # some blocks may not have run since the state was loaded
            every.append(self._known)
        kinds = dict.fromkeys(kind for used in every for kind in used)
        return {k: sorted({s for used in every for s in used.get(k, ())}) for k in kinds}

    def also_used(self, kind: str, streams: Iterable[int]) -> None:
        """Note that passes of this kind, on other ranks, have used these weights in this step."""
        used = self.used()
        if self._of_module is not None and (new := set(streams) - set(used.get(kind, ()))):
            self._of_module.note_used(used | {kind: sorted(new | set(used.get(kind, ())))})

    def load(self, used: Mapping[str, list[int]]) -> None:
        """Forget the passes, and start from `used`, which `used()` returned for the saved state."""
        self._known = {kind: list(streams) for kind, streams in used.items()}
        self._of_module, self._only = None, None
        self._of_blocks.clear()
        noise = self._optimizer.noise
        self._in_place = InPlace(noise, self._before_writing, self._after_writing)

    def note_used(self, kind: str, streams: Set[int]) -> None:
        """Note that passes of this kind have used these weights, in a step that is not measured."""
        known = self.used()
        if self._optimizer.model is not None and not streams <= set(known.get(kind, ())):
            self.load(known | {kind: sorted({*streams, *known.get(kind, ())})})

    def _find_places(self) -> dict[nn.Parameter, tuple[int, float]]:
        """The stream and noise scale of each parameter that may take noise.

        The same dict is returned until one of them changes.
        """
        found = [
            (group["noise_scale"], self._limited(groups.not_frozen(group["params"])))
            for group in self._optimizer.param_groups
            if not group["exact_gradient"]
        ]
        found_from = [(scale, list(map(id, params))) for scale, params in found]
        if self._places[0] != found_from:
            streams = self._optimizer.streams
            places = {p: (streams[p], scale) for scale, params in found for p in params}
            self._places = found_from, places
        return self._places[1]

    def _before_writing(self) -> None:
        if self._optimizer.journal is not None:
            self._optimizer.journal.check_weights()

    def _after_writing(self) -> None:
        if self._optimizer.journal is not None:
            self._optimizer.journal.note_weights()


def _check_offloaded(optimizer: ZeroOrder, capture: bool) -> None:
    """Raise ValueError if the model is offloaded, and the optimizer needs its weights to stay on
    the device."""
    if sessions_of(optimizer.model) is None:
        return
    needs = None if optimizer.offloads else "its passes or updates"
    if any(group["exact_gradient"] for group in optimizer.param_groups):
        needs = "exact_gradient"
    if capture:
        needs = "capture"
    if needs is not None:
        raise ValueError(
            f"{type(optimizer).__name__}: {needs} need the weights on the device, and this model "
            "is offloaded; leave that off, or train by MeZO or PseuZO without it"
        )
