"""The lists of tensors that the public functions take: what they may hold, checked once.

A training loop passes the same list in each step. Checking a tensor takes longer than making 500
normals for it, so a list that passed is remembered, and the next call with the same tensors only
makes sure that none of them changed.
"""

import weakref
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from operator import attrgetter, is_, itemgetter
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from pseuzo_kernels.checks import check_apart, check_tensors, labels_of
from pseuzo_kernels.streams import Tensors

Params = Tensor | Iterable[Tensor] | Iterable[tuple[str, Tensor]]
MAX_TENSORS = 1 << 16  # of all lists that are remembered
_ptr, _size, _dtype = Tensor.data_ptr, Tensor.numel, attrgetter("dtype")


def named(op: str, params: Params) -> tuple[list[Tensor], tuple[str, ...] | None]:
    """The tensors of params, and their names if it has pairs as named_parameters() has."""
    if isinstance(params, Tensor):
        return [params], None
    items: list[Any] = list(params)
    if not items or not _is_pair(items[0]):
        return items, None
    for i, item in enumerate(items):
        if not _is_pair(item):
            raise TypeError(
                f"{op}: params must be tensors, or all of them pairs of a name and a tensor, got "
                f"{type(item).__name__} at {i}"
            )
    return list(map(itemgetter(1), items)), tuple(map(itemgetter(0), items))


def _is_pair(item: Any) -> bool:
    return isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str)


class Checked:
    """A list that passed the checks. It keeps no tensor alive. n: how many are not of out."""

    def __init__(self, xs: Sequence[Tensor], n: int):
        self.ptrs, self.refs = tuple(map(_ptr, xs)), tuple(map(weakref.ref, xs))
        self.tensors = Tensors.of(xs[:n], self.ptrs[:n], self.refs[:n])
        self.sizes, self.dtypes = tuple(map(_size, xs)), tuple(map(_dtype, xs))
        self.contiguous = all(map(Tensor.is_contiguous, xs))

    def still_holds(self, xs: Sequence[Tensor]) -> bool:
        """Whether xs are these tensors, in the same memory, sizes and dtypes."""
        return (
            all(map(is_, [ref() for ref in self.refs], xs))
            and tuple(map(_ptr, xs)) == self.ptrs
            and tuple(map(_size, xs)) == self.sizes
            and tuple(map(_dtype, xs)) == self.dtypes
            and all(map(Tensor.is_contiguous, xs))
        )


class CheckedLists:
    """Checks lists, and remembers the last ones that passed. Any thread may call it."""

    def __init__(self) -> None:
        self._known: OrderedDict[tuple, Checked] = OrderedDict()
        self._n_tensors = 0
        self._lock = Lock()

    def check(
        self,
        op: str,
        xs: Sequence[Tensor],
        name: str = "params",
        out: Sequence[Tensor] | None = None,
    ) -> Checked | None:
        """Raise unless xs are as check_tensors wants them, dense, and out is None or like them.

        out: one for each of xs, of its shape, dtype and device, which is x itself or shares no
        memory with any of xs. Returns what is known of xs and out; None while they are traced.
        """
        both = xs if out is None else [*xs, *out]
        if torch.compiler.is_compiling():
            _check(op, xs, name, out)
            return None
        key = len(xs), len(both), *map(id, both[:1]), *map(id, both[-1:])
        with self._lock:
            known = self._known.get(key)
        if known is None or len(known.ptrs) != len(both) or not known.still_holds(both):
            _check(op, xs, name, out)
            known = Checked(both, len(xs))
            if known.contiguous:
                self._keep(key, known)
        return known

    def _keep(self, key: tuple, known: Checked) -> None:
        with self._lock:
            replaced = self._known.pop(key, None)
            self._known[key] = known
            self._n_tensors += len(known.ptrs) - (len(replaced.ptrs) if replaced else 0)
            while self._n_tensors > MAX_TENSORS and len(self._known) > 1:
                self._n_tensors -= len(self._known.popitem(last=False)[1].ptrs)


def _check(op: str, xs: Sequence[Tensor], name: str, out: Sequence[Tensor] | None) -> None:
    check_tensors(op, xs, name, dense=True)
    if out is None:
        return
    if len(out) != len(xs):
        raise ValueError(
            f"{op}: out must be one tensor for each of {name} ({len(xs)}), got {len(out)}"
        )
    check_tensors(op, out, "out", dense=True)
    labels = labels_of(out, "out"), labels_of(xs, name)
    for y, x, y_label, label in zip(out, xs, *labels, strict=True):
        if y.shape != x.shape or y.dtype != x.dtype or y.device != x.device:
            raise ValueError(
                f"{op}: {y_label} must be like {label}, {tuple(x.shape)} {x.dtype} on {x.device}, "
                f"got {tuple(y.shape)} {y.dtype} on {y.device}"
            )
    if not torch.compiler.is_compiling():
        others = [y for y, x in zip(out, xs, strict=True) if y.data_ptr() != x.data_ptr()]
        sentence = (
            f"out must be {name} itself or share no memory with it, got another part of its memory"
        )
        check_apart(op, [*xs, *others], [*labels[1], *labels_of(others, "out")], sentence)
