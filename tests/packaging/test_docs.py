"""On the pages, links go to files and headings that exist, code imports names that exist, and
commands have options that exist."""

import ast
import importlib
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
MEASURED = ROOT / "bench/results"
BLOCK = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
# Files that runs write, and pages that name the files of other projects.
WRITTEN = {
    "checksums.json", "config.yaml", "curves.png", "found.json", "ledger.jsonl", "results.json",
    "rows.jsonl",
}  # fmt: skip
NAMES_OTHERS = ("adapters", "migrating")
EXTERNAL = re.compile(
    r"https://(arxiv\.org/abs/\d{4}\.\d{4,5}|jinja\.palletsprojects\.com/templates/)"
)


def anchors(page: Path) -> set[str]:
    """Return the anchors of the headings that GitHub and MkDocs both make."""
    headings = re.findall(r"^#+ (.+)$", BLOCK.sub("", page.read_text()), re.MULTILINE)
    words = [re.sub(r"[^\w\s-]", "", heading.lower()).strip() for heading in headings]
    github, mkdocs = ({re.sub(space, "-", w) for w in words} for space in (r"\s", r"[-\s]+"))
    return github & mkdocs


@pytest.fixture(scope="module")
def files() -> list[str]:
    """The paths of the files of the repository, with a slash before each."""
    folders = ("bench", "csrc", "docs", "examples", "pseuzo_kernels", "python", "tests", "tools")
    found = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    found += ROOT.glob("*")
    return [f"/{path.relative_to(ROOT)}" for path in found if path.suffix != ".pyc"]


@pytest.mark.parametrize("page", [*PAGES, *MEASURED.glob("*.md")], ids=lambda page: page.stem)
def test_links(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", BLOCK.sub("", page.read_text())):
        name, _, anchor = link.partition("#")
        if "://" in link:
            assert EXTERNAL.fullmatch(link), "is this the address?"
            continue
        path = (page.parent / name).resolve() if name else page
        assert path.is_relative_to(ROOT) and path.is_file(), link
        assert not anchor or anchor in anchors(path), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_paths_in_the_text_exist(page, files):
    text = BLOCK.sub("", page.read_text())
    words = [word for code in re.findall(r"`([^`\n]+)`", text) for word in code.split()]
    kinds = "py|cpp|h|inc|cu|md|yaml|csv|json|jsonl|sh|png|toml|txt"
    for word in words:
        first = word.split("/")[0]
        here = "/" in word and (ROOT / first).is_dir() and re.fullmatch(r"[\w./*-]+", word)
        named = re.fullmatch(rf"[\w.*-]+(/[\w.*-]+)*\.({kinds})", word)
        if here or (named and word not in WRITTEN and page.stem not in NAMES_OTHERS):
            path = re.escape(word.rstrip("/")).replace(r"\*", "[^/]*")
            assert any(re.search(f"/{path}$", file) for file in files), word


def commands(page: Path) -> list[list[str]]:
    """Return the calls of pseuzo on a page, as words."""
    text = page.read_text()
    code = [block for language, block in BLOCK.findall(text) if language == "sh"]
    code += re.findall(r"^ {4,}pseuzo (?:\\\n|.)*", text, re.MULTILINE)
    code += re.findall(r"`(pseuzo [^`]+)`", BLOCK.sub("", text))
    lines = "\n".join(code).replace("\\\n", " ").splitlines()
    return [line.split("#")[0].split() for line in lines if re.match(r" *pseuzo \w", line)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_and_their_options_exist(page):
    from pseuzo.cli.commands import main

    for _, name, *words in commands(page):
        command = main.get_command(None, name)
        assert command, f"pseuzo {name}"
        known = {flag for p in command.params for flag in (*p.opts, *p.secondary_opts)}
        given = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert given <= known | {"--help"}, (name, given - known)


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


def test_the_gallery_has_every_plot_and_the_command_and_hardware_of_its_rows():
    gallery = (ROOT / "docs/gallery.md").read_text()
    shown = dict(re.findall(r"\[!\[.+\]\((.+)\)\]\(.+\)\n\n((?:.+\n)+)", gallery))
    plots = [*MEASURED.glob("*.png"), *(ROOT / "docs/results").glob("*.png")]
    assert {(ROOT / "docs" / path).resolve() for path in shown} == set(plots)
    for path, caption in shown.items():
        command, hardware = re.findall(r"^`([^`]+)`", caption, re.M)[0], caption.split("; ")[-1]
        assert command.split()[0] in ("python", "pseuzo") or command.startswith("PSEUZO_CPU_ISA=")
        benchmark, _, device = Path(path).stem.partition("-")
        rows = MEASURED / f"{benchmark.replace('memory', 'methods')}.csv"
        if device and rows.exists() and benchmark != "predicted":
            assert command.split("=avx2 ")[-1] in rows.read_text(), path
            first = hardware.split()[0].lower()
            assert device.startswith(first) and ("avx2" in device) == ("AVX2" in hardware), path
