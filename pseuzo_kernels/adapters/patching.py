"""Methods of a trainer's class, or of one trainer, replaced and put back."""

import inspect
from collections.abc import Callable, Hashable, Mapping
from types import MethodType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from pseuzo_kernels.adapters.weights import Pairs, SeededWeights
from pseuzo_kernels.checks import check_noise, check_rounding

_MISSING = object()
_replaced: WeakKeyDictionary[Any, dict[str, Any]] = WeakKeyDictionary()


class Peer(NamedTuple):
    """A kind of trainer: the methods that an adapter needs, and the version it was read from."""

    adapter: str
    version: str
    methods: tuple[str, ...]


def replace(target: Any, peer: Peer, functions: Mapping[str, Callable]) -> Any:
    """Put functions in the place of target's methods, and return target, a class or an object.

    TypeError if target lacks a method of peer's; ValueError if it is patched already.
    """
    for name in peer.methods:
        if not callable(getattr(target, name, None)):
            kind = target.__name__ if inspect.isclass(target) else type(target).__name__
            raise TypeError(
                f"{peer.adapter}.patch: {kind} has no method {name}; this adapter replaces methods "
                f"of {peer.version}, which has {', '.join(peer.methods)}"
            )
    if target in _replaced:
        raise ValueError(f"{peer.adapter}.patch: {target!r} is patched already; unpatch it first")
    own = vars(target)
    _replaced[target] = {name: own.get(name, _MISSING) for name in functions}
    for name, function in functions.items():
        setattr(target, name, function if inspect.isclass(target) else MethodType(function, target))
    return target


def unpatch(target: Any) -> Any:
    """Put back the methods that a patch of this class or object replaced, and return it.

    ValueError if it was not patched.
    """
    originals = _replaced.pop(target, None)
    if originals is None:
        raise ValueError(f"unpatch: {target!r} is not patched")
    for name, original in originals.items():
        if original is _MISSING:
            delattr(target, name)
        else:
            setattr(target, name, original)
    return target


class WeightsOf:
    """The SeededWeights of each trainer of a patched class, made again when its weights change."""

    def __init__(self, noise: str, rounding: str, exact: bool):
        check_noise("patch", noise)
        check_rounding("patch", rounding)
        self._options: dict[str, Any] = dict(noise=noise, rounding=rounding, exact=exact)
        self._known: WeakKeyDictionary[Hashable, SeededWeights] = WeakKeyDictionary()

    def __call__(self, owner: Hashable, named_parameters: Pairs) -> SeededWeights:
        pairs = list(named_parameters)
        known = self._known.get(owner)
        if known is None or not known.holds(pairs):
            known = self._known[owner] = SeededWeights(pairs, **self._options)
        return known
