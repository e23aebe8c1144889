"""Jinja templates and expressions over a row of data, sandboxed: a task file is data, whoever wrote it."""

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from jinja2 import StrictUndefined, TemplateError, UndefinedError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment


def _not_none(value: Any) -> Any:
    if value is None:  # else the prompt would read "None"
        raise TemplateError("a value it prints is missing (null) in this row")
    return value


_ENVIRONMENT = ImmutableSandboxedEnvironment(
    undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False, finalize=_not_none
)


@lru_cache(maxsize=256)
def _compiled(source: str, expression: bool) -> tuple[Callable[..., Any], frozenset[str]]:
    """The function of a row, and the columns that it needs."""
    if expression:
        function = _ENVIRONMENT.compile_expression(source, undefined_to_none=False)
        needs = meta.find_undeclared_variables(_ENVIRONMENT.parse("{{ (" + source + ") }}"))
    else:
        function = _ENVIRONMENT.from_string(source).render
        needs = meta.find_undeclared_variables(_ENVIRONMENT.parse(source))
    return function, frozenset(needs)


def check(source: str, field: str, expression: bool = False) -> None:
    """ValueError, naming the field, if source is no template (or expression) of Jinja."""
    try:
        _compiled(source, expression)
    except TemplateError as error:
        kind = "Jinja expression" if expression else "Jinja template"
        raise ValueError(f"{field} is not a {kind}: {error}") from None


def fill(source: str, row: Mapping[str, Any], field: str, expression: bool = False) -> Any:
    """The text that the template gives for a row; with expression, the value of the expression.

    ValueError, naming the field and the row's columns, if the row lacks what is asked for."""
    function, needs = _compiled(source, expression)
    try:
        value = function(dict(row))
        if isinstance(value, StrictUndefined):
            str(value)  # raises what is undefined
        return value
    except Exception as error:  # whatever an expression on a row's values may raise
        missing = sorted(needs - row.keys())
        if isinstance(error, UndefinedError) and missing:
            raise ValueError(
                f"{field} asks for the column {missing[0]!r}, which the data does not have; "
                f"its columns: {', '.join(sorted(row))}"
            ) from None
        raise ValueError(f"{field} cannot be filled in from the row: {error}") from None
