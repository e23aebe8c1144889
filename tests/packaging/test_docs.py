"""On the pages, links go to files and headings that exist, and code imports names that exist."""

import ast
import importlib
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Return the anchors of the headings, as GitHub and MkDocs make them."""
    headings = re.findall(r"^#+ (.+)$", BLOCK.sub("", page.read_text()), re.MULTILINE)
    words = (re.sub(r"[^\w\s-]", "", heading.lower()) for heading in headings)
    return {re.sub(r"\s+", "-", heading.strip()) for heading in words}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", BLOCK.sub("", page.read_text())):
        name, _, anchor = link.partition("#")
        if link.startswith("https://"):
            continue
        path = (page.parent / name).resolve() if name else page
        assert path.is_relative_to(ROOT) and path.is_file(), link
        assert not anchor or anchor in anchors(path), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_code_parses_and_its_imports_exist(page):
    for language, code in BLOCK.findall(page.read_text()):
        if language != "python":
            continue
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("pseuzo"):
                module = importlib.import_module(node.module)
                for name in (alias.name for alias in node.names):
                    assert hasattr(module, name) or find_spec(f"{node.module}.{name}"), name


def test_every_page_is_in_the_navigation():
    in_nav = re.findall(r": ([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(in_nav) == sorted(page.name for page in PAGES if page.parent == ROOT / "docs")


def test_every_public_name_is_on_a_page_of_the_api():
    pages = "".join(page.read_text() for page in PAGES if page.stem.startswith("api-"))
    shown = set(re.findall(r"^::: [\w.]+?(\w+)$", pages, re.MULTILINE))
    for members in re.findall(r"members: \[(.*)\]", pages):
        shown.update(members.split(", "))
    for package in ("pseuzo", "pseuzo_kernels"):
        public = set(importlib.import_module(package).__all__)
        # Two tuples of names, and a module with the same functions again.
        assert public - {"NOISES", "ROUNDINGS", "reference"} <= shown, package


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130
