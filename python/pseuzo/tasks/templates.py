"""Jinja templates and expressions over a row of data.

A task file is data, and anyone may have written it: templates are sandboxed, what they may spend is
bounded (bounds.py), and no null or list becomes text (values.py).
"""

import functools
from collections.abc import Callable, Iterable, Mapping
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

from pseuzo.tasks import bounds, values

LONGEST = 65_536  # characters of a template
# The nodes of Jinja that a template may have, besides expressions.
STATEMENTS = (
    nodes.Template, nodes.Output, nodes.TemplateData, nodes.If, nodes.For, nodes.Assign,
    nodes.AssignBlock, nodes.With, nodes.Keyword, nodes.Pair, nodes.Operand,
)  # fmt: skip
# Filters that prompts cannot use: random, because a prompt must be the same each time; the others,
# because the time they take is out of proportion to their input.
NOT_OFFERED = ("random", "striptags", "urlize", "xmlattr", "pprint")


class _Rewritten(NodeTransformer):
    """Passes every value that the template makes, and every step of its loops, through the filters
    of _Environment."""

    def generic_visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> nodes.Node:
        known = isinstance(node, (*STATEMENTS, nodes.Expr))
        has_filter = isinstance(node, nodes.AssignBlock) and node.filter
        is_recursive = isinstance(node, nodes.For) and node.recursive
        if not known or has_filter or is_recursive:
            kind = type(node).__name__
            raise TemplateSyntaxError(f"{kind} of this kind is not for prompts", node.lineno)
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


def _filtered(node: Any, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.filters = {
            k: _bounded_filter(k, f) for k, f in self.filters.items() if k not in NOT_OFFERED
        }
        self.filters |= {
            "_guarded": values.guarded,
            "_steps": bounds.count_steps,
            "_looked_at": bounds.pay_for_look,
        }
        self.tests["none"] = values.is_null
        self.globals.pop("lipsum")
        self.policies["json.dumps_kwargs"] = {"sort_keys": True, "default": values.refuse_missing}

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        return super()._generate(_Rewritten().visit(source), *args, **kwargs)

    def call(self, context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
        name, text = getattr(function, "__name__", ""), getattr(function, "__self__", None)
        for value in (text, *args, *kwargs.values()):
            bounds.pay_for_look(value)
        if text is None and name in ("format", "format_map"):
            # The sandbox puts a function of its own in place of a text's method.
            text = function.__wrapped__.__self__
        if isinstance(text, str) and name in ("format", "format_map"):
            bounds.check_format(bounds.brace_specifications(text), text, args, kwargs)
        elif name in bounds.GROWING:
            bounds.check_growth(name, text, args, kwargs)
        return values.guarded(super().call(context, function, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            args = right if isinstance(right, tuple) else [right]
            bounds.check_format(bounds.percent_specifications(left), left, args, bounds.NOTHING)
        if operator == "*" and not (isinstance(left, Number) and isinstance(right, Number)):
            value, times = (right, left) if isinstance(left, Number) else (left, right)
            bounds.check_growth("*", value, [times])
        bits = [x.bit_length() for x in (left, right) if isinstance(x, int)]
        too_wide = operator == "*" and sum(bits) > 4096
        too_high = operator == "**" and max(bits, default=0) > 12
        if too_wide or too_high:
            raise TemplateError(f"{operator!r} of numbers that are too large")
        return values.guarded(super().call_binop(context, operator, left, right))


def _bounded_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    # A filter may be given the environment or the context before the value.
    first = 1 if hasattr(function, "jinja_pass_arg") else 0

    @functools.wraps(function)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        value, more = args[first], args[first + 1 :]
        for argument in (value, *more, *kwargs.values()):
            bounds.pay_for_look(argument)
        if name == "format":
            text = str(value)
            bounds.check_format(bounds.percent_specifications(text), text, more, kwargs)
        elif name == "tojson" and (more or kwargs):
            raise TemplateError("'tojson' takes no arguments in a prompt")
        elif name == "round":
            numbers = (*more, *kwargs.values())
            if any(isinstance(n, int) and abs(n) > 100 for n in numbers):
                raise TemplateError("'round' is for at most 100 digits")
        elif name in bounds.GROWING:
            bounds.check_growth(name, value, more, kwargs)
        return values.guarded(function(*args, **kwargs))

    return bounded


@pass_context  # without it, Jinja would compute constant parts of a template when compiling it
def _printed(context: Any, value: Any) -> str:
    if isinstance(value, Iterable) and not isinstance(value, str | Undefined):
        values.refuse_list()
    text = str(value)
    bounds.spend(1 + len(text) // bounds.CHARACTERS)
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
    """The function that fills in a row, and the columns that it needs."""
    if len(source) > LONGEST:
        raise TemplateSyntaxError(f"it has {len(source)} characters, of at most {LONGEST}", 1)
    function: Callable[..., Any]
    try:
        if expression:
            function = _ENVIRONMENT.compile_expression(source, undefined_to_none=False)
            needs = meta.find_undeclared_variables(_ENVIRONMENT.parse("{{ (" + source + ") }}"))
        else:
            function = _ENVIRONMENT.from_string(source).render
            needs = meta.find_undeclared_variables(_ENVIRONMENT.parse(source))
    except (RecursionError, MemoryError):
        raise TemplateSyntaxError("it is nested too deeply", 1) from None
    except (SyntaxError, ValueError, OverflowError) as error:
        # Jinja compiles a template to Python, which may refuse it.
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
    """The text that the template makes of a row; with expression, the value of the expression.

    ValueError, naming the field and the row's columns, if the row lacks what is asked for, if a
    null or a list would become text, or if it takes more work than is allowed."""
    function, needs = _compiled(source, expression)
    try:
        with bounds.work_for(source):
            columns = values.guarded({name: row[name] for name in needs if name in row})
            return values.plain(function(columns))
    except Exception as error:  # an expression on a row's values may raise anything
        missing = sorted(needs - row.keys())
        if isinstance(error, UndefinedError) and missing:
            raise ValueError(
                f"{field} asks for the column {missing[0]!r}, which the data does not have; "
                f"its columns: {', '.join(sorted(row))}"
            ) from None
        raise ValueError(
            f"{field} cannot be filled in from the row: {error or type(error).__name__}"
        ) from None
