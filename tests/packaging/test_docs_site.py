"""What the site makes of text that is written for readers of the source: formulas, arguments."""

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

TOOLS = Path(__file__).parents[2] / "tools"


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def arguments(monkeypatch):
    """The extension's module. Its base classes are not needed."""
    monkeypatch.setitem(sys.modules, "griffe", SimpleNamespace(Extension=object, Object=object))
    return load("docs_arguments")


def test_arguments_become_a_list(arguments):
    text = """x <- x - lr * g.

    code: stays
        as it is

A step does this. window: K. two_sided,
sums: of both (no scaling). ValueError if K is 0. Source: a paper.

Nothing is named here: it is text."""
    before, code, step, items, others, last = arguments.with_lists(text).split("\n\n")
    assert before == "x <- x - lr * g." and code == "    code: stays\n        as it is"
    assert step == "A step does this."
    assert items == "- **window**: K.\n- **two_sided, sums**: of both (no scaling)."
    assert others == "ValueError if K is 0. Source: a paper."
    assert last == "Nothing is named here: it is text."


def test_angles_are_text_and_comments_are_left_out():
    markdown = pytest.importorskip("markdown")
    hook = load("docs_files")
    page = "c = <dL/dx, z>, <b>x <- y</b>\n\n<!-- table: a, from b -->\n\n[e](../examples/e.yaml)\n"
    text = hook.on_page_markdown(page, None, None, None)
    html = markdown.markdown(text, extensions=[hook.TextAngles(), "tables"])
    first, link = html.split("\n")
    assert first == "<p>c = &lt;dL/dx, z&gt;, &lt;b&gt;x &lt;- y&lt;/b&gt;</p>"
    assert link == '<p><a href="repository/examples/e.yaml">e</a></p>'
