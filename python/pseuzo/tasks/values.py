"""Values inside a template: nulls and lists that refuse to become text.

A null is NULL, and a list, tuple or dict is one that refuses to become text. So a null or a list
cannot become words of a prompt, whichever way it is printed, joined, formatted or filtered, while
tests (`x is none`, `x or ""`, `{% if x %}`) work as usual.
"""

from collections.abc import ItemsView, Iterator, KeysView, Mapping, ValuesView
from numbers import Number
from typing import Any

from jinja2 import TemplateError, Undefined

from pseuzo.tasks.bounds import CHARACTERS, spend

DEEPEST = 64  # levels of lists in lists


def refuse_missing(*_: Any) -> Any:
    raise TemplateError(
        "a value it prints is missing (null) in this row; {{ x or 'unknown' }} prints a word for a "
        "missing x"
    )


def refuse_list(*_: Any) -> Any:
    raise TemplateError(
        "it prints a list or mapping where a text is wanted; {{ x | join(', ') }} makes one of a "
        "list x"
    )


class _Null:
    """A null: false, and equal to none. It cannot become text or a number (the filter `int` would
    make it 0)."""

    __module__ = "builtins"  # Jinja's messages then show it as 'null object'
    __str__ = __repr__ = __format__ = __int__ = __float__ = refuse_missing

    def __bool__(self) -> bool:
        return False

    def __eq__(self, other: object) -> bool:
        return other is None or other is self

    def __hash__(self) -> int:
        return hash(None)


_Null.__name__ = "null"
NULL = _Null()


def _without_text(kind: type) -> type:
    """A kind of list whose values do not become text; messages show it under its own name."""
    refusing = dict.fromkeys(("__str__", "__repr__", "__format__"), refuse_list)
    return type(kind.__name__, (kind,), {"__module__": "builtins", **refusing})


_List, _Tuple, _Dict, _Bytes = map(_without_text, (list, tuple, dict, bytes))


def is_null(value: Any) -> bool:
    """Return whether the value is None, or a missing number of any library: NaN is not equal to
    itself, and pandas has two values of its own."""
    if value is None or value is NULL:
        return True
    if isinstance(value, Number):
        return bool(value != value)
    return type(value).__name__ in ("NAType", "NaTType")


def guarded(value: Any, depth: int = 0) -> Any:
    """Count the work for the value, and return it with nulls and lists that cannot become text."""
    if isinstance(value, str):
        spend(1 + len(value) // CHARACTERS)
        return value
    spend(1)
    if depth > DEEPEST:
        raise TemplateError(f"a value is nested more than {DEEPEST} levels deep")
    if isinstance(value, Mapping):
        return _Dict((guarded(k, depth + 1), guarded(v, depth + 1)) for k, v in value.items())
    if isinstance(value, tuple):
        items = [guarded(v, depth + 1) for v in value]
        return value._make(items) if hasattr(value, "_make") else _Tuple(items)
    if isinstance(value, list | Iterator | KeysView | ValuesView | ItemsView):
        return _List(guarded(v, depth + 1) for v in value)
    if isinstance(value, bytes):
        return _Bytes(value)
    return NULL if is_null(value) else value


def plain(value: Any) -> Any:
    """Return the value of an expression for use outside a template. TemplateError if it holds a
    null."""
    if value is NULL:
        raise TemplateError("a value it gives is missing (null) in this row")
    if isinstance(value, Undefined):
        return str(value)  # raises an error that says what is undefined
    if isinstance(value, dict):
        return {plain(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value
