"""Streams: which tensor a noise belongs to. z(seed, stream) is one tensor's noise under a seed.

Two tensors with one stream have the same noise. A position in a list is a stream only as long as
all calls pass the same list; a name of a parameter is one in any order and any part of a model.
"""

import hashlib
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from threading import Lock
from typing import Any, NamedTuple

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

MAX_SEEDS = 256  # that a watch remembers
SEEDS_PER_CALL = 16  # of a call, that are looked up


class StreamWarning(UserWarning):
    """Two tensors had the same noise, because one stream was used for both."""


def stream_of_name(name: str) -> int:
    """The stream of a parameter: the first four bytes of the SHA-256 of its name, the low byte
    first.

    It is the same in every process and on every machine, whatever else is in the list. TypeError if
    name is no string.
    """
    if not isinstance(name, str):
        raise TypeError(
            f"stream_of_name: name must be a string, as named_parameters() gives it, got {name!r}"
        )
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")


def streams_of_names(op: str, names: Sequence[str]) -> list[int]:
    """One stream for each name. ValueError if two of them have the same stream."""
    streams = [stream_of_name(name) for name in names]
    if len(set(streams)) < len(streams):
        of: dict[int, str] = {}
        for name, stream in zip(names, streams, strict=True):
            if stream in of:
                raise ValueError(
                    f"{op}: the names {of[stream]!r} and {name!r} have the same stream, {stream}; "
                    "pass streams, one number for each tensor"
                )
            of[stream] = name
    return streams


class Tensors(NamedTuple):
    """The tensors of a call, as a watch remembers them: it keeps none of them alive."""

    ptrs: tuple[int, ...]
    refs: tuple[Callable[[], Tensor | None], ...]
    first: Callable[[], Tensor | None]  # tensor that has memory
    storage: StorageWeakRef | None  # its

    def outlived(self) -> bool:
        """Whether the memory still exists, but not the tensors, as those of p.data."""
        return self.first() is None and self.storage is not None and not self.storage.expired()

    @classmethod
    def of(
        cls,
        xs: Sequence[Tensor],
        ptrs: tuple[int, ...],
        refs: tuple[Callable[[], Tensor | None], ...],
    ) -> "Tensors":
        i = next((i for i, ptr in enumerate(ptrs) if ptr), None)
        if i is None:
            return cls(ptrs, refs, lambda: None, None)
        return cls(ptrs, refs, refs[i], StorageWeakRef(xs[i].untyped_storage()))


class _Known(NamedTuple):
    """A tensor of a call with one seed, and its stream."""

    stream: int
    ptr: int
    ref: Callable[[], Tensor | None]
    tensors: Tensors

    def is_alive(self) -> bool:
        return self.ref() is not None or self.tensors.outlived()

    def is_same(self, new: "_Known") -> bool:
        return self.ptr == new.ptr or self.ref() is new.ref()


class _Seen:
    """The calls with one seed."""

    def __init__(self, seed_ref: Callable[[], Tensor | None] | None):
        self.seed_ref = seed_ref
        self.latest: tuple[Sequence[int], Tensors] | None = None
        self.by_stream: dict[int, _Known] = {}  # the tensors of earlier calls
        self.by_ptr: dict[int, _Known] = {}

    def add(self, streams: Sequence[int], tensors: Tensors) -> "_Conflict | None":
        """Note a call, and return where it differs from earlier ones."""
        if self.latest is None:  # usually all calls with a seed are alike: that costs nothing
            self.latest = streams, tensors
            return None
        if self.latest[1].ptrs == tensors.ptrs and self.latest[0] == streams:
            return None
        for known in _known(*self.latest):
            self.by_stream[known.stream] = self.by_ptr[known.ptr] = known
        self.latest = streams, tensors
        found = None
        for i, new in enumerate(_known(streams, tensors)):
            before, other = self.by_ptr.get(new.ptr), self.by_stream.get(new.stream)
            if before and before.stream != new.stream and before.is_alive():
                return _Conflict(i, new.stream, before.stream, before.ref() is new.ref())
            if other and not other.is_same(new) and other.is_alive():
                found = found or _Conflict(i, new.stream)
        return found


class _Conflict(NamedTuple):
    position: int  # of a tensor in its list
    stream: int
    before: int | None = None  # its stream in an earlier call; None: another tensor had its stream
    certain: bool = False  # it is the same tensor, and not just in the same memory


def _known(streams: Sequence[int], tensors: Tensors) -> Iterator[_Known]:
    for stream, ptr, ref in zip(streams, tensors.ptrs, tensors.refs, strict=True):
        if ptr:
            yield _Known(stream, ptr, ref, tensors)


class StreamWatch:
    """Finds calls that give two tensors the same noise, or one tensor two noises under one seed.

    It sees streams that the library chose, by position or by name; whoever passes numbers may want
    the same noise twice. It remembers the last seeds, and no tensor. Any thread may call it.
    """

    def __init__(self) -> None:
        self._seen: OrderedDict[Any, _Seen] = OrderedDict()
        self._lock = Lock()

    def note(
        self,
        op: str,
        seeds: Any,
        streams: Sequence[int],
        tensors: Tensors,
        names: Sequence[str] | None,
        repeats: bool = False,
    ) -> None:
        """Note a call of `op`. names: those that made the streams; None: they are positions.

        repeats: the call makes noise of an earlier one again, to undo it or to move along it. Then
        ValueError if a tensor had another stream in that. A StreamWarning if a stream was that of
        another tensor, which still exists.
        """
        for seed, ref in _numbers(seeds):
            with self._lock:
                seen = self._seen.get(seed)
                if seen is None or (ref is not None and seen.seed_ref is not ref):
                    seen = self._seen[seed] = _Seen(ref)
                    while len(self._seen) > MAX_SEEDS:
                        self._seen.popitem(last=False)
                found = seen.add(streams, tensors)
            if found is None:
                continue
            said = f"seed {seed}" if isinstance(seed, int) else "the same tensor of seeds"
            if found.before is not None:
                text = (
                    f"{op}: params[{found.position}] had stream {found.before} when {said} was "
                    f"used before, and has {found.stream} now, so its noise is another one (the "
                    f"default stream is the position in the list); pass the same list, {_ADVICE}"
                )
                if repeats and found.certain:
                    raise ValueError(text)
            elif names is None:
                text = (
                    f"{op}: {said} was used before with other tensors, and tensors at the same "
                    "position of a list have the same noise, because the default stream of a "
                    f"tensor is its position; pass all tensors in one list, {_ADVICE}"
                )
            else:
                text = (
                    f"{op}: {said} was used before for another tensor named "
                    f"{names[found.position]!r}, and both have the same noise; pass names that are "
                    "unique in the model, as module.named_parameters(prefix=...) gives them, or "
                    "streams, one number for each tensor"
                )
            warnings.warn(text, StreamWarning, stacklevel=4)
            return


_ADVICE = (
    'or pairs as named_parameters() of the whole model has them, with streams="names", or streams, '
    "one number for each tensor of the model"
)


def _numbers(seeds: Any) -> Iterator[tuple[Any, Callable[[], Tensor | None] | None]]:
    """Some seeds of a call as keys. A tensor on a GPU is one key, since reading it would wait."""
    if isinstance(seeds, int):
        yield seeds, None
    elif isinstance(seeds, Tensor) and seeds.device.type != "cpu":
        version = 0 if seeds.is_inference() else seeds._version
        yield (id(seeds), version), weakref.ref(seeds)
    elif isinstance(seeds, Tensor):
        yield from ((seed, None) for seed in seeds.reshape(-1)[:SEEDS_PER_CALL].tolist())
    else:
        first = seeds[:SEEDS_PER_CALL] if isinstance(seeds, Sequence) else [seeds]
        yield from ((int(seed), None) for seed in first)
