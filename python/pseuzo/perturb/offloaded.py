"""Passes of a model whose weights are on the host, and the sessions in which they run."""

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from threading import Thread, current_thread, local
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from pseuzo.interrupts import undoing
from pseuzo.perturb.contexts import leave, no_cached_casts
from pseuzo.perturb.lock_step import Lane, LockStep
from pseuzo.perturb.masks import Masks
from pseuzo.perturb.perturbation import Base
from pseuzo.perturb.regions import Region, views
from pseuzo.perturb.session import Aim, Session
from pseuzo.perturb.store import Store
from pseuzo.perturb.watch import Learned
from pseuzo_kernels.checks import check_noise


class Sessions:
    """The sessions of an offloaded model: one for each thread, with scratch that they share."""

    def __init__(self, store: Store) -> None:
        self.store, self._thread = store, local()  # .session: that of the thread
        self._lock_step = LockStep()
        self._memory: dict[int, Tensor] = {}
        self._owner: dict[str, Thread] = {}  # whose forward or step has the buffers now

    def __deepcopy__(self, memo: dict) -> "Sessions":
        return self  # a copy of the model has other weights, which no session knows

    @property
    def now(self) -> Session | None:
        """The session of this thread."""
        return getattr(self._thread, "session", None)

    @contextmanager
    def open(self, number: int = 0, lane: Lane | None = None) -> Iterator[Session]:
        """A session of this thread: the one that it has, or a new one."""
        if self.now is not None and self.now.by_hook:
            self.close()  # an interrupt left it open: nothing runs inside a part of the model
        if self.now is not None:
            yield self.now
            return
        with undoing(self.close):
            yield self.start(number, lane)
            if lane is None:
                self.store.end()

    def start(self, number: int = 0, lane: Lane | None = None, by_hook: bool = False) -> Session:
        """Start a session of this thread, which close() ends."""
        if lane is None:
            self._begin()
        session = self._thread.session = Session(self.store, number, lane, by_hook)
        session.__enter__()
        return session

    def close(self) -> None:
        """End the session of this thread, if there is one. Idempotent."""
        if self.now is not None:
            leave(self.now)
            self._thread.session = None
            self._end()

    def rows(self, p: nn.Parameter, index: Tensor) -> Tensor:
        """Rows of a weight as the session of this thread sees them, at x if there is none."""
        return self.store.rows(p, index) if self.now is None else self.now.rows(p, index)

    def together(self, calls: Sequence[Callable[[], Any]]) -> list[Any]:
        """Return the results of calls, which run in lock step, so that each region is uploaded once
        for all of them."""

        def in_lane(number: int, call: Callable[[], Any], lane: Lane) -> Any:
            with self.open(number, lane):
                return call()

        if len(calls) < 2 or self.now is not None:
            return [call() for call in calls]
        self._begin()
        lanes = [partial(in_lane, number, call) for number, call in enumerate(calls)]
        with undoing(self._end):
            results = self._lock_step.run(lanes, self.store.serve, self.store.device)
        self.store.end()
        return results

    def _begin(self) -> None:
        """Begin a round of the store. RuntimeError while another thread is in one."""
        owner = self._owner.setdefault("thread", current_thread())
        if owner is not current_thread() and owner.is_alive():
            raise RuntimeError(
                "offload: the model runs in another thread at this time, and its buffers are for "
                "one; let the threads take turns"
            )
        self._owner["thread"] = current_thread()
        self.store.begin()

    def _end(self) -> None:
        """Let other threads begin a round, if this one has."""
        if self._owner.get("thread") is current_thread():
            self._owner.pop("thread", None)

    def holds(self, x: object) -> bool:
        """Whether x is in a buffer, or in scratch."""
        if not isinstance(x, Tensor):
            return False
        address = x.untyped_storage().data_ptr()
        buffers = [*self.store.memory_of_buffers, *self._memory.values()]
        return any(buffer.data_ptr() == address for buffer in buffers)

    def memory(self, number: int, n_bytes: int) -> Tensor:
        """The scratch of this number, with room for n_bytes: -1 for regions, or the number of a
        session for its residents."""
        buffer = self._memory.get(number)
        if buffer is None or buffer.numel() < n_bytes:
            if buffer is not None:
                self.store.memory.give_back(self._memory.pop(number))
            buffer = self._memory[number] = self.store.memory.take(n_bytes)
        return buffer


class OffloadedPasses:
    """Perturbed passes of an offloaded model; the interface is that of ModulePasses."""

    replaced = 0  # CUDA graphs, which this counts for, are refused

    def __init__(
        self,
        sessions: Sessions,
        params: Mapping[nn.Parameter, tuple[int, float]],
        noise: str,
        masks: Masks | None = None,
    ) -> None:
        check_noise("perturbed", noise)
        _refuse_masks(masks)
        self._sessions, self.noise, self._given = sessions, noise, params
        self.params: Mapping[nn.Parameter, tuple[int, float]] = {
            p: place for p, place in params.items() if place[1] != 0
        }
        regions = sessions.store.regions
        self._trained = {r: [p for p in r.params if p in self.params] for r in regions.all}
        small = regions.residents
        self._trained[small] = [p for p in small.params if p in self.params]
        self._largest = regions.largest(self.params)
        self._views: dict[tuple[Region, int], tuple[Tensor, dict[nn.Parameter, Tensor]]] = {}
        self._learned = Learned()
        self._streams = {p: stream for p, (stream, _) in self.params.items()}
        self._aimed = local()  # .at: what aim() set in this thread

    def matches(
        self,
        params: Mapping[nn.Parameter, tuple[int, float]],
        noise: str,
        masks: Masks | None = None,
    ) -> bool:
        """Whether these passes are right for params and noise. ValueError if there are masks."""
        _refuse_masks(masks)
        if params is not self._given:
            if {p: place for p, place in params.items() if place[1] != 0} != self.params:
                return False
            self._given = params
        return noise == self.noise

    @property
    def active(self) -> bool:
        """Does a pass run in this thread?"""
        session = self._sessions.now
        return session is not None and session.aimed is not None

    def together(self, calls: Sequence[Callable[[], Any]]) -> list[Any]:
        """Return the results of calls, each of which makes one pass; see Sessions."""
        return self._sessions.together(calls)

    def at(self, seed: int, scale: float, kind: str = "any") -> AbstractContextManager[None]:
        self.aim(seed, scale)
        return self.passing(kind)

    def aim(self, seed: int, scale: float | Tensor) -> None:
        self._aimed.at = seed, scale

    @contextmanager
    def passing(self, kind: str = "any", base: Base | None = None) -> Iterator[None]:
        if base is not None:
            raise ValueError(
                "offload: passes from other weights than the model's need them on the "
                "device; use a method that does not, such as mezo"
            )
        seed, scale = self._aimed.at
        aim = Aim(self, seed, scale, self._learned.reached.setdefault(kind, set()))
        with self._sessions.open() as session, no_cached_casts():
            with undoing(partial(session.aim, None)):
                session.aim(aim)
                yield

    def along(self, seed: int, kind: str = "any") -> AbstractContextManager[None]:
        raise ValueError(
            "offload: forward-mode derivatives need the weights on the device; use mezo or pseuzo"
        )

    def rows(self, param: nn.Parameter, index: Tensor) -> Tensor:
        return self._sessions.rows(param, index)

    def scratch(self, region: Region, number: int) -> dict[nn.Parameter, Tensor]:
        """Memory for the perturbed weights of a region, the same tensors each time."""
        params = self._trained[region]
        if region is not self._sessions.store.regions.residents:
            number, n_bytes = -1, self._largest
        else:
            n_bytes = region.n_bytes(self.params)
        memory = self._sessions.memory(number, n_bytes)
        known, parts = self._views.get((region, number), (None, {}))
        if known is not memory:
            parts = views(memory, params)
            self._views[region, number] = memory, parts
        return parts

    def settled(self, kind: str) -> bool:
        return False

    def unused(self, kind: str) -> Set[Tensor]:
        return self.params.keys() - self._learned.reached.get(kind, set())

    def used(self) -> dict[str, list[int]]:
        return self._learned.used(self._streams)

    def note_used(self, used: Mapping[str, list[int]]) -> None:
        self._learned.note_used(used, self._streams)

    def release(self) -> None:
        """Scratch is kept: it is as large as one region."""


def _refuse_masks(masks: Masks | None) -> None:
    if masks is not None:
        raise ValueError(
            "offload: masks of the noise, as of sparse-mezo, need the weights on the device; use "
            "mezo or pseuzo"
        )


# An entry lasts as long as its model.
_sessions: WeakKeyDictionary[nn.Module, Sessions] = WeakKeyDictionary()


def sessions_of(model: nn.Module | None) -> Sessions | None:
    """The sessions of an offloaded model; None for any other model."""
    return None if model is None else _sessions.get(model)


def store_of(model: nn.Module | None) -> Store | None:
    """Where an offloaded model has its weights; None for any other model."""
    sessions = sessions_of(model)
    return None if sessions is None else sessions.store


def device_of(model: nn.Module, part: nn.Module | None = None) -> torch.device:
    """The device that a model computes on: that of its first weight, or of the first weight of a
    part of it, or the one that it is offloaded to."""
    if (store := store_of(model)) is not None:
        return store.device
    return next((part or model).parameters()).device


def set_sessions(model: nn.Module, sessions: Sessions) -> None:
    _sessions[model] = sessions
