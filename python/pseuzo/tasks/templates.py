"""Jinja templates and expressions over a row of data. A task file is data, whoever wrote it: templates are sandboxed,
and what they may spend is bounded.

Bounds: each row has WORK units of work. A step of a loop costs one unit or more, every value that is made costs its
size, and every value that a filter, a method, a test or a comparison looks at costs a tenth of it, so that neither
loops in loops nor values that double can take minutes or gigabytes; the count is the same on every machine. Work that
one operation could ask for at a stroke ("x" * 10**9) is refused before it is done.

Nulls and lists: inside a template a null is NULL, and a list, tuple or dict is one that refuses to become text. So a
null or a list cannot become words of a prompt whichever way it is printed, joined, formatted or filtered, while tests
(`x is none`, `x or ""`, `{% if x %}`) work as usual.
"""

import functools
import re
import string
import threading
from collections.abc import (
    Callable,
    ItemsView,
    Iterable,
    Iterator,
    KeysView,
    Mapping,
    Sequence,
    ValuesView,
)
from contextlib import contextmanager
from numbers import Number
from typing import Any

from jinja2 import (
    StrictUndefined,
    TemplateError,
    TemplateSyntaxError,
    Undefined,
    UndefinedError,
    meta,
    nodes,
    pass_context,
)
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

LONGEST = 65_536  # characters of a template
WORK = 200_000  # units a row and template: a second at most
CHARACTERS = 100  # of a text, for one unit
DEEPEST = 64  # levels of lists in lists
GROWTH = 2 * 10**7  # characters or items that one operation may ask for

STATEMENTS = (  # nodes of Jinja that a template may have, besides expressions
    nodes.Template, nodes.Output, nodes.TemplateData, nodes.If, nodes.For, nodes.Assign, nodes.AssignBlock, nodes.With,
    nodes.Keyword, nodes.Pair, nodes.Operand,
)  # fmt: skip
# random: a prompt is to be the same each time; the others take time that is not in proportion to their input
NOT_OFFERED = ("random", "striptags", "urlize", "xmlattr", "pprint")
# filters and methods whose result may be larger than what goes in, by a factor that is an argument
GROWING = {
    "batch", "center", "expandtabs", "indent", "join", "ljust", "replace", "rjust", "slice", "to_bytes", "translate",
    "wordwrap", "zfill",
}  # fmt: skip

NOTHING: Mapping[str, Any] = {}

_work = (
    threading.local()
)  # left: units of the row that is being filled in; step: what a step of a loop costs


def _spend(units: int) -> None:
    _work.left -= units
    if _work.left < 0:
        raise TemplateError(
            f"it takes more work than is allowed for a row ({WORK} steps, or {WORK * CHARACTERS} characters)"
        )


@contextmanager
def _work_for(source: str) -> Iterator[None]:
    before = vars(_work).copy()
    _work.left, _work.step = WORK, 1 + len(source) // 1000
    try:
        yield
    finally:
        vars(_work).clear()
        vars(_work).update(before)


def _missing(*_: Any) -> Any:
    raise TemplateError(
        "a value it prints is missing (null) in this row; {{ x or 'unknown' }} prints a word for a missing x"
    )


def _is_list(*_: Any) -> Any:
    raise TemplateError(
        "it prints a list or mapping where a text is wanted; {{ x | join(', ') }} makes one of a list x"
    )


class _Null:
    """False, equal to none; no text, and no number (the filter `int` would make 0 of it)."""

    __module__ = "builtins"  # as Jinja's messages show it: 'null object'
    __str__ = __repr__ = __format__ = __int__ = __float__ = _missing

    def __bool__(self) -> bool:
        return False

    def __eq__(self, other: object) -> bool:
        return other is None or other is self

    def __hash__(self) -> int:
        return hash(None)


_Null.__name__ = "null"
NULL = _Null()


def _without_text(kind: type) -> type:
    """A kind of list whose values do not become text, shown in messages as what it is."""
    refusing = dict.fromkeys(("__str__", "__repr__", "__format__"), _is_list)
    return type(kind.__name__, (kind,), {"__module__": "builtins", **refusing})


_List, _Tuple, _Dict, _Bytes = map(_without_text, (list, tuple, dict, bytes))


def _is_null(value: Any) -> bool:
    """None, or a missing number of any library: NaN is not equal to itself; pandas has two words of its own."""
    if value is None or value is NULL:
        return True
    if isinstance(value, Number):
        return bool(value != value)
    return type(value).__name__ in ("NAType", "NaTType")


def _guarded(value: Any, depth: int = 0) -> Any:
    """The value with nulls and lists that cannot become text, paid for."""
    if isinstance(value, str):
        _spend(1 + len(value) // CHARACTERS)
        return value
    _spend(1)
    if depth > DEEPEST:
        raise TemplateError(f"a value is nested more than {DEEPEST} levels deep")
    if isinstance(value, Mapping):
        return _Dict((_guarded(k, depth + 1), _guarded(v, depth + 1)) for k, v in value.items())
    if isinstance(value, tuple):
        items = [_guarded(v, depth + 1) for v in value]
        return value._make(items) if hasattr(value, "_make") else _Tuple(items)
    if isinstance(value, list | Iterator | KeysView | ValuesView | ItemsView):
        return _List(_guarded(v, depth + 1) for v in value)
    if isinstance(value, bytes):
        return _Bytes(value)
    return NULL if _is_null(value) else value


def _plain(value: Any) -> Any:
    """The value of an expression, as others take it. TemplateError if a null is in it."""
    if value is NULL:
        raise TemplateError("a value it gives is missing (null) in this row")
    if isinstance(value, Undefined):
        return str(value)  # raises what is undefined
    if isinstance(value, dict):
        return {_plain(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value


def _steps(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        _spend(_work.step)
        yield value


def _looked_at(value: Any) -> Any:
    _spend(1 + _size(value) // (10 * CHARACTERS if isinstance(value, str | bytes) else 10))
    return value


def _size(value: Any, number: bool = False) -> int:
    """Characters and items of a value; of an argument that is a number, the number."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, dict):
        return sum(1 + _size(k) + _size(v) for k, v in value.items())
    if isinstance(value, list | tuple | range):
        return len(value) if isinstance(value, range) else sum(1 + _size(v) for v in value)
    return abs(value) if number and isinstance(value, int) else 1


def _check_growth(
    name: str, value: Any, args: Sequence[Any], kwargs: Mapping[str, Any] = NOTHING
) -> None:
    if name == "replace":  # what is looked for does not make it longer
        args, kwargs = args[1:], {k: v for k, v in kwargs.items() if k != "old"}
    largest = max(
        (_size(argument, number=True) for argument in (*args, *kwargs.values())), default=1
    )
    if (1 + _size(value)) * largest > GROWTH:
        raise TemplateError(f"{name!r} would make more than {GROWTH} characters or items of a row")


def _check_format(
    specifications: Iterable[str], text: str, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> None:
    """Widths and precisions are parts of the text; what would take them from an argument is refused."""
    if any(re.search(r"\d{5}|[*{]", specification) for specification in specifications):
        raise TemplateError("widths in a format must be numbers below 10000")
    arguments = [
        argument for argument in (*args, *kwargs.values()) if not isinstance(argument, Number)
    ]
    _check_growth("format", text, arguments)


def _percent(text: str) -> list[str]:
    return re.findall(r"%([^a-zA-Z]*)", text)


def _braces(text: str) -> list[str]:
    return [specification or "" for _, _, specification, _ in string.Formatter().parse(text)]


class _Rewritten(NodeTransformer):
    """The template with every value that it makes, and every step of its loops, going through the filters below."""

    def generic_visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> nodes.Node:
        known = isinstance(node, (*STATEMENTS, nodes.Expr))
        if (isinstance(node, nodes.AssignBlock) and node.filter) or (
            isinstance(node, nodes.For) and node.recursive
        ):
            known = False
        if not known:
            raise TemplateSyntaxError(
                f"{type(node).__name__} of this kind is not for prompts", node.lineno
            )
        node = super().generic_visit(node, *args, **kwargs)
        if isinstance(node, nodes.For):
            node.iter = _filtered(node.iter, "_steps")
        elif isinstance(node, nodes.Compare | nodes.Operand):
            node.expr = _filtered(node.expr, "_looked_at")
        elif isinstance(node, nodes.Test):
            node.node = _filtered(node.node, "_looked_at")
            node.args = [_filtered(argument, "_looked_at") for argument in node.args]
        made = isinstance(node, nodes.Concat | nodes.List | nodes.Dict)
        made = made or (isinstance(node, nodes.Tuple) and node.ctx == "load")
        made = made or (isinstance(node, nodes.Const) and node.value is None)
        made = made or (isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice))
        return _filtered(node, "_guarded") if made else node


def _filtered(node: nodes.Expr, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.filters = {
            k: _bounded_filter(k, f) for k, f in self.filters.items() if k not in NOT_OFFERED
        }
        self.filters |= {"_guarded": _guarded, "_steps": _steps, "_looked_at": _looked_at}
        self.tests["none"] = _is_null
        self.globals.pop("lipsum")
        self.policies["json.dumps_kwargs"] = {"sort_keys": True, "default": _missing}

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        return super()._generate(_Rewritten().visit(source), *args, **kwargs)

    def call(self, context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
        name, text = getattr(function, "__name__", ""), getattr(function, "__self__", None)
        for value in (text, *args, *kwargs.values()):
            _looked_at(value)
        if text is None and name in (
            "format",
            "format_map",
        ):  # the sandbox's own function in place of a text's method
            text = getattr(function, "__wrapped__", None).__self__
        if isinstance(text, str) and name in ("format", "format_map"):
            _check_format(_braces(text), text, args, kwargs)
        elif name in GROWING:
            _check_growth(name, text, args, kwargs)
        return _guarded(super().call(context, function, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            _check_format(
                _percent(left), left, right if isinstance(right, tuple) else [right], NOTHING
            )
        numbers = isinstance(left, Number) and isinstance(right, Number)
        if operator == "*" and not numbers:
            values, times = (right, left) if isinstance(left, Number) else (left, right)
            _check_growth("*", values, [times])
        bits = [x.bit_length() for x in (left, right) if isinstance(x, int)]
        if (operator == "*" and sum(bits) > 4096) or (
            operator == "**" and max(bits, default=0) > 12
        ):
            raise TemplateError(f"{operator!r} of numbers that are too large")
        return _guarded(super().call_binop(context, operator, left, right))


def _bounded_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    first = (
        1 if hasattr(function, "jinja_pass_arg") else 0
    )  # after the environment or context that it is given

    @functools.wraps(function)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        value, more = args[first], args[first + 1 :]
        for looked_at in (value, *more, *kwargs.values()):
            _looked_at(looked_at)
        if name == "format":
            _check_format(_percent(str(value)), str(value), more, kwargs)
        elif name == "tojson" and (more or kwargs):
            raise TemplateError("'tojson' takes no arguments in a prompt")
        elif name == "round" and any(
            isinstance(n, int) and abs(n) > 100 for n in (*more, *kwargs.values())
        ):
            raise TemplateError("'round' is for at most 100 digits")
        elif name in GROWING:
            _check_growth(name, value, more, kwargs)
        return _guarded(function(*args, **kwargs))

    return bounded


@pass_context  # else Jinja would compute constant parts of a template when it compiles it
def _printed(context: Any, value: Any) -> str:
    if isinstance(value, Iterable) and not isinstance(value, str | Undefined):
        _is_list()
    text = str(value)
    _spend(1 + len(text) // CHARACTERS)
    return text


_ENVIRONMENT = _Environment(
    undefined=StrictUndefined,
    keep_trailing_newline=True,
    autoescape=False,
    finalize=_printed,
    optimized=False,
)


@functools.lru_cache(maxsize=256)
def _compiled(source: str, expression: bool) -> tuple[Callable[..., Any], frozenset[str]]:
    """The function of a row, and the columns that it needs."""
    if len(source) > LONGEST:
        raise TemplateSyntaxError(f"it has {len(source)} characters, of at most {LONGEST}", 1)
    try:
        if expression:
            function = _ENVIRONMENT.compile_expression(source, undefined_to_none=False)
            needs = meta.find_undeclared_variables(_ENVIRONMENT.parse("{{ (" + source + ") }}"))
        else:
            function = _ENVIRONMENT.from_string(source).render
            needs = meta.find_undeclared_variables(_ENVIRONMENT.parse(source))
    except (RecursionError, MemoryError):
        raise TemplateSyntaxError("it is nested too deeply", 1) from None
    except (
        SyntaxError,
        ValueError,
        OverflowError,
    ) as error:  # of the Python that it is compiled to
        raise TemplateSyntaxError(str(error), 1) from None
    return function, frozenset(needs)


def check(source: str, field: str, expression: bool = False) -> None:
    """ValueError, naming the field, if source is no template (or expression) of Jinja."""
    try:
        _compiled(source, expression)
    except TemplateError as error:
        kind = "Jinja expression" if expression else "Jinja template"
        raise ValueError(f"{field} is not a {kind}: {error.message}") from None


def fill(source: str, row: Mapping[str, Any], field: str, expression: bool = False) -> Any:
    """The text that the template gives for a row; with expression, the value of the expression.

    ValueError, naming the field and the row's columns, if the row lacks what is asked for, if a null or a list would
    become text, or if it takes more work than is allowed."""
    function, needs = _compiled(source, expression)
    try:
        with _work_for(source):
            columns = _guarded({name: row[name] for name in needs if name in row})
            return _plain(function(columns))
    except Exception as error:  # whatever an expression on a row's values may raise
        missing = sorted(needs - row.keys())
        if isinstance(error, UndefinedError) and missing:
            raise ValueError(
                f"{field} asks for the column {missing[0]!r}, which the data does not have; "
                f"its columns: {', '.join(sorted(row))}"
            ) from None
        raise ValueError(
            f"{field} cannot be filled in from the row: {error or type(error).__name__}"
        ) from None
