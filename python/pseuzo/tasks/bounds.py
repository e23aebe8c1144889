"""Bounds on the work of a template for a row: the work is counted, and too much is an error.

Each row has WORK units of work. A step of a loop costs one unit or more, every value that is made
costs its size, and every value that a filter, a method, a test or a comparison looks at costs a
tenth of its size. So neither loops in loops nor values that double can take minutes or gigabytes,
and the count is the same on every machine. Work that one operation could ask for at a stroke
("x" * 10**9) is refused before it is done.
"""

import re
import string
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Number
from typing import Any

from jinja2 import TemplateError

WORK = 200_000  # units for a row and template: a second at most
CHARACTERS = 100  # characters of a text that cost one unit
GROWTH = 2 * 10**7  # characters or items that one operation may ask for
# Filters and methods whose result may be larger than their input by a factor that is an argument.
GROWING = frozenset({
    "batch", "center", "expandtabs", "indent", "join", "ljust", "replace", "rjust", "slice",
    "to_bytes", "translate", "wordwrap", "zfill",
})  # fmt: skip
NOTHING: Mapping[str, Any] = {}

# left: the units that the row may still spend; step: the cost of a step of a loop.
_work = threading.local()


@contextmanager
def work_for(source: str) -> Iterator[None]:
    """A context in which one row is filled into the template, with all its units to spend."""
    before = vars(_work).copy()
    _work.left, _work.step = WORK, 1 + len(source) // 1000
    try:
        yield
    finally:
        vars(_work).clear()
        vars(_work).update(before)


def spend(units: int) -> None:
    """Count these units. TemplateError if the row has spent all it has."""
    _work.left -= units
    if _work.left < 0:
        raise TemplateError(
            f"it takes more work than is allowed for a row ({WORK} steps, or "
            f"{WORK * CHARACTERS} characters)"
        )


def count_steps(values: Iterable[Any]) -> Iterator[Any]:
    """Yield the values, and count each as a step of a loop."""
    for value in values:
        spend(_work.step)
        yield value


def pay_for_look(value: Any) -> Any:
    """Count a tenth of the value's size, and return it."""
    spend(1 + size_of(value) // (10 * CHARACTERS if isinstance(value, str | bytes) else 10))
    return value


def size_of(value: Any, number: bool = False) -> int:
    """Return the characters and items of a value; with number, the absolute value of a number."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, dict):
        return sum(1 + size_of(k) + size_of(v) for k, v in value.items())
    if isinstance(value, range):
        return len(value)
    if isinstance(value, list | tuple):
        return sum(1 + size_of(v) for v in value)
    return abs(value) if number and isinstance(value, int) else 1


def check_growth(
    name: str, value: Any, args: Sequence[Any], kwargs: Mapping[str, Any] = NOTHING
) -> None:
    """Raise TemplateError if the operation could make too much of the value."""
    if name == "replace":  # the text that it searches for makes nothing longer
        args, kwargs = args[1:], {k: v for k, v in kwargs.items() if k != "old"}
    arguments = (*args, *kwargs.values())
    largest = max((size_of(argument, number=True) for argument in arguments), default=1)
    if (1 + size_of(value)) * largest > GROWTH:
        raise TemplateError(f"{name!r} would make more than {GROWTH} characters or items of a row")


def check_format(
    specifications: Iterable[str], text: str, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> None:
    """Raise TemplateError for wide formats. Widths and precisions must be written in the text; a
    format that takes one from an argument is refused."""
    if any(re.search(r"\d{5}|[*{]", specification) for specification in specifications):
        raise TemplateError("widths in a format must be numbers below 10000")
    arguments = (*args, *kwargs.values())
    check_growth("format", text, [a for a in arguments if not isinstance(a, Number)])


def percent_specifications(text: str) -> list[str]:
    return re.findall(r"%([^a-zA-Z]*)", text)


def brace_specifications(text: str) -> list[str]:
    return [specification or "" for _, _, specification, _ in string.Formatter().parse(text)]
