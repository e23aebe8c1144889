"""Templates over rows are sandboxed and bounded, and write no null or list as text."""

from decimal import Decimal

import numpy as np
import pandas as pd
import pytest
from pseuzo.tasks import Task
from task_examples import GOOD

NULLS = {
    "a": "x",
    "b": None,
    "xs": ["p", None],
    "ys": ["p", "q"],
    "d": {"k": None, "t": "v"},
    "nan": float("nan"),
}


def test_templates_are_sandboxed(tmp_path):
    task = Task(
        **(GOOD | {"name": "evil", "prompt": "{{ ''.__class__.__mro__[1].__subclasses__() }}"})
    )
    with pytest.raises(
        ValueError, match="prompt cannot be filled in from the row: access to attribute '__class__'"
    ):
        task.example({"sentence": "x", "label": 0})
    task = Task(**(GOOD | {"name": "evil", "prompt": "{{ words.append(1) }}"}))
    with pytest.raises(ValueError, match="prompt cannot be filled in"):
        task.example({"words": ["x"], "label": 0})


# These are the ways in which a null could get into a text.
REACH = [
    "{{ b }}",
    "{{ a ~ b }}",
    "{{ b ~ a }}",
    "{{ xs | join(' ') }}",
    "{{ ' '.join(xs) }}",
    "{{ b | string }}",
    "{{ b | upper }}",
    "{{ b | trim }}",
    "{{ b | title }}",
    "{{ b | e }}",
    "{{ '%s' | format(b) }}",
    "{{ '%s' % b }}",
    "{{ '%(k)s' % d }}",
    "{{ '{}'.format(b) }}",
    "{{ '{k}'.format_map(d) }}",
    "{{ d.k }}",
    "{{ d['k'] ~ '' }}",
    "{{ d.get('nothing') ~ '' }}",
    "{{ none ~ a }}",
    "{{ (none if a else a) ~ '' }}",
    "{{ b | replace('N', 'n') }}",
    "{{ xs | map('upper') | join }}",
    "{{ xs[1:] | join }}",
    "{{ d | tojson }}",
    "{{ xs | tojson }}",
    "{{ [b] | first }}",
    "{{ b | int }}",
    "{{ b | float }}",
    "{{ nan }}",
    "{{ nan ~ '' }}",
    "{{ '%f' % nan }}",
    "{{ nan | int }}",
    "{{ nan | round }}",
    "{{ b | default('x') }}",
    "{% for x in xs %}{{ x }}{% endfor %}",
    "{{ b | length }}",
    "{% set c %}{{ b }}{% endset %}{{ c }}",
    "{{ d.values() | join }}",
    "{{ d | dictsort | map('last') | join }}",
    "{{ (a, b) | join }}",
    "{{ {'k': b}['k'] ~ '' }}",
    "{{ b + a }}",
    "{{ b.c }}",
    "{{ 'N' ~ (b | lower) }}",
]


@pytest.mark.parametrize("prompt", REACH)
def test_nulls_never_become_text(prompt):
    task = Task(name="n", kind="generation", prompt=prompt, answers="a")
    with pytest.raises(
        ValueError,
        match=r"task n, row 0 \(from 0\): prompt cannot be filled in from the row: .*null",
    ):
        task.examples([NULLS])


@pytest.mark.parametrize(
    "null", [None, float("nan"), np.float32("nan"), Decimal("nan"), pd.NA, pd.NaT]
)
def test_every_kind_of_null(null):
    task = Task(name="n", kind="generation", prompt="{{ a ~ '' }}", answers="b")
    for row in ({"a": null, "b": "x"}, {"a": "x", "b": null}, {"a": "x", "b": ["y", null]}):
        with pytest.raises(
            ValueError,
            match=r"(prompt|answers) cannot be filled in from the row: a value .* \(null\)",
        ):
            task.example(row)
    # A null is not a label, even if a label looks like one.
    for labels in ({0: "None", "None": "x"}, {"nan": "a", "<NA>": "b", "NaT": "c"}):
        label = Task(name="n", kind="classification", prompt="x", label="a", labels=labels)
        with pytest.raises(
            ValueError, match=r"label cannot be filled in from the row: a value it gives is missing"
        ):
            label.example({"a": null})


@pytest.mark.parametrize(
    "prompt, text",
    [
        ("{{ b or 'no b' }}", "no b"),
        ("{{ b | default('no b', true) }}", "no b"),
        ("{% if b %}b{% else %}no b{% endif %}", "no b"),
        ("{% if b is none %}no b{% endif %}", "no b"),
        ("{{ b is none }} {{ a is none }} {{ nan is none }}", "True False True"),
        ("{{ b == none }} {{ a != none }} {{ none in xs }}", "True True True"),
        ("{{ xs | select | join }}", "p"),
        ("{{ xs | reject('none') | join }}", "p"),
        ("{% for x in xs if x %}{{ x }}{% endfor %}", "p"),
        ("{{ ys | join(', ') }}", "p, q"),
        ("{{ ys | map('upper') | join }}", "PQ"),
        ("{{ ys[-1] }} {{ ys | length }}", "q 2"),
        ("{% for x in ys %}{{ loop.index }}{{ x }}{% endfor %}", "1p2q"),
        ("{{ ys | tojson }}", '["p", "q"]'),
        ("{{ d.items() | map('first') | join(' ') }}", "k t"),
        ("{% for k, v in d.items() %}{{ k }}{% endfor %}", "kt"),
        (
            "{{ '{:,}'.format(1234567) }} {{ '%5.1f' % 2.25 }} {{ 'ab' * 2 }}",
            "1,234,567   2.2 abab",
        ),
        ("{{ '%s-%s' % (a, 1) }} {{ 1.26 | round(1) }} {{ 7 // 2 }}", "x-1 1.3 3"),
        ("{{ a | center(5) }}|", "  x  |"),
        (
            "{% set ns = namespace(t='') %}"
            "{% for x in ys %}{% set ns.t = ns.t ~ x %}{% endfor %}{{ ns.t }}",
            "pq",
        ),
        ("{{ ys | groupby(0) | map(attribute='grouper') | join('-') }}", "p-q"),
        ("None null nan", "None null nan"),
    ],
)
def test_what_templates_do_with_nulls_and_lists(prompt, text):
    assert (
        Task(name="n", kind="generation", prompt=prompt, answers="a").example(NULLS).prompt == text
    )


@pytest.mark.parametrize(
    "prompt",
    [
        "{{ ys }}",
        "{{ d }}",
        "{{ ys ~ '' }}",
        "{{ ys | string }}",
        "{{ ys | upper }}",
        "{{ '%s' % ys }}",
        "{{ ys[:1] ~ '' }}",
        "{{ '{}'.format(ys) }}",
        "{{ [ys] | join }}",
        "{{ [1, 2] }}",
        "{{ {'a': 1} ~ '' }}",
        "{{ (1, 2) }}",
        "{{ range(3) }}",
        "{{ ys | map('upper') }}",
        "{{ d.values() }}",
        "{% set c %}{{ ys }}{% endset %}{{ c }}",
    ],
)
def test_lists_where_a_text_is_wanted(prompt, tmp_path):
    with pytest.raises(
        ValueError,
        match="prompt cannot be filled in from the row: it prints a list or mapping where",
    ):
        Task(name="n", kind="generation", prompt=prompt, answers="a").example(NULLS)


# These templates would take minutes or gigabytes, or end in a traceback of the compiler.
HOSTILE = {
    "loops in loops": "{% for a in range(99999) %}"
    "{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "loops that skip": "{% for a in range(9999) %}"
    "{% for b in range(9999) if false %}{% endfor %}{% endfor %}",
    "a long text in a loop": "{% for a in range(99999) %}" + "x" * 60000 + "{% endfor %}",
    "a search in a loop": "{% for a in range(99999) %}{% if big in big %}{% endif %}{% endfor %}",
    "texts that double": "{% set x = 'ab' %}" + "{% set x = x ~ x %}" * 60 + "{{ x }}",
    "lists that double": "{% set x = [1] %}" + "{% set x = [x, x] %}" * 60 + "{{ x == x }}",
    "mappings that double": "{% set x = {1: 1} %}"
    + "{% set x = {1: x, 2: x} %}" * 60
    + "{{ x | tojson }}",
    "captures that double": "{% set x = 'ab' %}"
    + "{% set x %}{{ x }}{{ x }}{% endset %}" * 60
    + "{{ x }}",
    "lists that double in a loop": "{% set n = namespace(x=[1]) %}{% for i in range(60) %}"
    "{% set n.x = [n.x, n.x] %}{% endfor %}",
    "longest words in a loop": "{% for a in range(99999) %}{{ big | wordcount }}{% endfor %}",
    "counts in a loop": "{% for a in range(99999) %}{{ big.count('z') }}{% endfor %}",
    "a test in a loop": "{% for a in range(99999) %}{% if 'y' is in big %}{% endif %}{% endfor %}",
    "long lists in a loop": "{% set x = range(9999) | list %}"
    "{% for a in x %}{{ x == x | list }}{% endfor %}",
    "numbers that double": "{% set x = 3 %}" + "{% set x = x * x %}" * 60 + "{{ x }}",
    "a power": "{{ 10 ** 10 ** 10 }}",
    "a product": "{{ 'x' * 10 ** 9 }}",
    "a list's product": "{{ 10 ** 9 * [1] }}",
    "a width": "{{ 'x' | center(10 ** 9) }}",
    "a width of a method": "{{ 'x'.rjust(10 ** 9) }}",
    "tabs": "{{ 'a\tb'.expandtabs(10 ** 9) }}",
    "an indent": "{{ 'x' | indent(10 ** 9, true) }}",
    "a format": "{{ '%999999999d' % 1 }}",
    "a format's argument": "{{ '%*d' % (999999999, 1) }}",
    "a filter's format": "{{ '%.999999999f' | format(1.5) }}",
    "a method's format": "{{ '{:999999999}'.format(1) }}",
    "a nested format": "{{ '{:{}}'.format(1, 999999999) }}",
    "bytes": "{{ (5).to_bytes(10 ** 9, 'big') }}",
    "a replacement": "{{ big | replace('', big) }}",
    "a join": "{{ range(99999) | join(big) }}",
    "a translation": "{{ big.translate({122: big}) }}",
    "batches": "{{ [1] | batch(10 ** 9, 0) | list }}",
    "slices": "{{ [1] | slice(10 ** 9) | list }}",
    "digits": "{{ 1.5 | round(10 ** 9) }}",
    "a width by name": "{{ ['x'] | map('center', 10 ** 9) | list }}",
    "a macro": "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
    "recursion": "{% for x in [[1]] recursive %}{{ loop([[1]]) }}{% endfor %}",
    "parentheses": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "brackets": "{{ " + "[" * 300 + "]" * 300 + " }}",
    "terms": "{{ " + "1 + " * 5000 + "1 }}",
    "conditions": "{% if " + " or ".join(["x"] * 9999) + " %}{% endif %}",
    "a long template": "x" * 70000,
    "a long number": "{{ " + "9" * 5000 + " }}",
    "an include": "{% include 'x' %}",
    "random text": "{{ lipsum(1000) }}",
    "a random choice": "{{ [1, 2] | random }}",
}


@pytest.mark.slow
@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_templates(what):
    row = {"big": "z" * 100_000, "x": 0, "a": "b"}
    with pytest.raises(
        ValueError,
        match=r"^task h: prompt is not a Jinja template|^prompt (cannot be filled|asks for)",
    ):
        Task(name="h", kind="generation", prompt=HOSTILE[what] + "x", answers="a").example(row)


def test_work_is_for_each_row_and_template():
    """Long prompts and loops of usual sizes are far below the limits."""
    words = [f"word{i}" for i in range(2000)]
    prompt = (
        "{% for w in words %}{{ loop.index }}: {{ w | upper }}, {% endfor %}"
        "{{ text | replace('a', 'bb') }}"
    )
    task = Task(name="w", kind="generation", prompt=prompt, answers="text")
    (one, two) = task.examples([{"words": words, "text": "a" * 50_000}] * 2)
    assert (
        one.prompt
        == two.prompt
        == "".join(f"{i}: {w.upper()}, " for i, w in enumerate(words, 1)) + "b" * 100_000
    )
