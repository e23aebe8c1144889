"""The code keeps the rules of the house, on sizes, line lengths, imports and private names.

Each rule is a function that yields its offenders as "path:line: what". EXCUSED lists what a rule
lets pass, with the reason.
"""

import ast
import io
import tokenize
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pseuzo
import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ("python", "pseuzo_kernels", "csrc", "tools", "bench")
SUFFIXES = (".py", ".sh", ".cpp", ".cu", ".h", ".inc")
LINED = (*SOURCES, "tests", "examples")  # the folders whose lines are short
LONGEST_LINE = 100
LONGEST_FILE, LONGEST_CLASS, LONGEST_TEST_FILE, LONGEST_TRAINER = 400, 250, 450, 249

# These are the strata of python/pseuzo, by height. Each imports only from lower ones or from
# itself. "ground" holds the modules beside the folders, such as files.py.
STRATA = dict(ground=0, perturb=1, optim=2, models=3, tasks=4, train=5, demo=5, compare=6, cli=7)
# These strata must not print, since others build on them.
SILENT = ("ground", "perturb", "optim", "models", "tasks")
# These private names of other modules are used nevertheless, each for its reason.
EXCUSED = {
    "_C": "the compiled extension, which may be missing",
    "_exit": "os._exit is a documented function",
    "_make": "a documented method of named tuples",
    "_parameters": "torch offers no other way to put a tensor in a parameter's place",
    "_modules": "nn.Module.modules() takes several times as long",
    "_weight_conversions": "Transformers offers no other way to keep one out of a checkpoint",
    "_get_current_dispatch_mode_stack": "torch offers no other way to see its modes",
    "_get_current_function_mode_stack": "torch offers no other way to see its modes",
    "_pop_mode": "torch offers no other way to carry its modes into another thread",
    "_push_mode": "torch offers no other way to carry its modes into another thread",
    "_cuda_endAllocateToPool": "torch offers no other way to end a failed capture in its allocator",
}


@cache
def files_of(*folders: str, suffixes: tuple[str, ...] = SUFFIXES) -> list[Path]:
    found = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    found = sorted(path for path in found if path.suffix in suffixes)
    assert found, f"no files in {folders}"
    return found


@cache
def lines_of(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def library() -> Iterator[tuple[Path, str, ast.Module]]:
    """Yield for each module of python/pseuzo its path, its stratum ("" for the package) and its
    tree."""
    package = ROOT / "python" / "pseuzo"
    for path in files_of("python", suffixes=(".py",)):
        first, *rest = path.relative_to(package).parts
        if rest:
            yield path, first, tree_of(path)
        else:
            yield path, "" if first.startswith("__") else "ground", tree_of(path)


def at(path: Path, line: int, what: object) -> str:
    return f"{path.relative_to(ROOT)}:{line}: {what}"


def too_long(paths: list[Path], most: int) -> Iterator[str]:
    for path in paths:
        if (n := len(lines_of(path))) > most:
            yield at(path, n, f"{n} lines, of at most {most}")


def source_files_are_short() -> Iterator[str]:
    yield from too_long(files_of(*SOURCES), LONGEST_FILE)


def files_of_tests_are_short() -> Iterator[str]:
    yield from too_long(files_of("tests"), LONGEST_TEST_FILE)


def the_trainer_is_short() -> Iterator[str]:
    yield from too_long([ROOT / "python/pseuzo/train/trainer.py"], LONGEST_TRAINER)


def classes_are_short() -> Iterator[str]:
    for path in files_of(*SOURCES, "tests", suffixes=(".py",)):
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.ClassDef):
                n = node.end_lineno - node.lineno + 1
                if n > LONGEST_CLASS:
                    yield at(path, node.lineno, f"{node.name} has {n} lines")


def lines_are_short() -> Iterator[str]:
    for path in files_of(*LINED):
        for i, line in enumerate(lines_of(path), 1):
            if len(line) > LONGEST_LINE:
                yield at(path, i, f"{len(line)} characters")


def names_of_tests_are_unique() -> Iterator[str]:
    counts = Counter(path.name for path in files_of("tests") if path.name.startswith("test_"))
    yield from (f"{name}: {n} files" for name, n in counts.items() if n > 1)


def is_table(node: ast.AST | None) -> bool:
    """Return whether node is a literal list, tuple, set or dict, or a call on one like
    frozenset({...})."""
    if isinstance(node, ast.Call) and len(node.args) == 1 and not node.keywords:
        node = node.args[0]
    return isinstance(node, ast.List | ast.Tuple | ast.Set | ast.Dict)


def lines_that_close_a_table(tree: ast.Module) -> set[int]:
    """Return the lines that end the assignment of a table, a loop's header over one, or a
    decorator."""
    lines = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign) and is_table(node.value):
            lines.add(node.end_lineno)
        if isinstance(node, ast.For) and is_table(node.iter):
            lines.add(node.iter.end_lineno)
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            lines.update(decorator.end_lineno for decorator in node.decorator_list)
    return lines


def formatting_is_skipped_for_tables_alone() -> Iterator[str]:
    for path in files_of(*SOURCES, "tests", suffixes=(".py",)):
        text = "\n".join(lines_of(path)) + "\n"
        allowed = lines_that_close_a_table(tree_of(path))
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            line = token.start[0]
            if token.type == tokenize.COMMENT and "fmt: skip" in token.string:
                if line not in allowed:
                    yield at(path, line, lines_of(path)[line - 1].strip())


def ops_are_called_by_their_functions() -> Iterator[str]:
    for path, _, tree in library():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.ops.pseuzo":
                yield at(path, node.lineno, ast.unparse(node))


def is_own(value: ast.expr) -> bool:
    """Return whether value is self, cls, super(), type(self), or a private name of the module."""
    if isinstance(value, ast.Name):
        return value.id in ("self", "cls") or value.id.startswith("_")
    return ast.unparse(value) in ("super()", "type(self)")


def private_names_of_others() -> Iterator[tuple[Path, int, str]]:
    """Yield the places where a module takes a private name from something else, with the name."""
    for path, _, tree in library():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and not is_own(node.value):
                names = [node.attr]
            elif isinstance(node, ast.ImportFrom):
                names = [alias.name for alias in node.names]
            else:
                continue
            yield from ((path, node.lineno, name) for name in names if is_private(name))


def is_private(name: str) -> bool:
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__"))


def private_names_are_used_at_home() -> Iterator[str]:
    for path, line, name in private_names_of_others():
        if name not in EXCUSED:
            yield at(path, line, name)


def excuses_are_needed() -> Iterator[str]:
    yield from EXCUSED.keys() - {name for *_, name in private_names_of_others()}


def dicts_of_others_are_left_alone() -> Iterator[str]:
    for path, _, tree in library():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr == "__dict__":
                if not is_own(node.value):
                    yield at(path, node.lineno, ast.unparse(node))


def what_others_build_on_does_not_print() -> Iterator[str]:
    modules = [(path, tree) for path, stratum, tree in library() if stratum in SILENT]
    kernels = files_of("pseuzo_kernels", suffixes=(".py",))
    commands = {ROOT / "pseuzo_kernels/bench/__main__.py"}  # nobody imports it
    modules += [(path, tree_of(path)) for path in kernels if path not in commands]
    for path, tree in modules:
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "print":
                yield at(path, node.lineno, ast.unparse(node)[:80])


def imported(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield the line and the dotted name of each import, including those within functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def stratum_of(name: str) -> str:
    """Return the stratum of a dotted name, even if the package itself offers the name."""
    first = name.split(".")[1]
    if first in STRATA:
        return first
    if (ROOT / "python" / "pseuzo" / f"{first}.py").exists():
        return "ground"
    return stratum_of(getattr(pseuzo, first).__module__)


def imports_turn_one_way() -> Iterator[str]:
    for path, stratum, tree in library():
        for line, name in imported(tree):
            if stratum and name.startswith("pseuzo."):
                other = stratum_of(name)
                if other != stratum and STRATA[other] >= STRATA[stratum]:
                    yield at(path, line, f"{stratum} imports {name}")
    for path in files_of("pseuzo_kernels", suffixes=(".py",)):
        for line, name in imported(tree_of(path)):
            if name.split(".")[0] == "pseuzo":
                yield at(path, line, f"pseuzo_kernels imports {name}")


RULES = (
    source_files_are_short,
    classes_are_short,
    the_trainer_is_short,
    files_of_tests_are_short,
    names_of_tests_are_unique,
    lines_are_short,
    formatting_is_skipped_for_tables_alone,
    ops_are_called_by_their_functions,
    private_names_are_used_at_home,
    excuses_are_needed,
    dicts_of_others_are_left_alone,
    what_others_build_on_does_not_print,
    imports_turn_one_way,
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_house(rule):
    offenders = list(rule())
    assert not offenders, "\n" + "\n".join(offenders)
