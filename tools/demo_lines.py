"""Makes the lines of the demo's task, and the cards of its model's pretraining.

The lines come from the standard library of the interpreter that runs this; `ast` and `tokenize` say
which line is code and which is docstring prose.

To keep the splits honest, source files instead of lines are divided into train, val and test, and a
val or test line that occurs anywhere in a training file is dropped.
"""

import ast
import io
import random
import re
import tokenize
import warnings
from collections.abc import Iterator
from pathlib import Path

TEMPLATE = "{text}\n# kind:"
LABEL_WORDS = {"code": " code", "prose": " prose"}
SIZES = {"train": 1000, "val": 400, "test": 1000}
FILE_SHARES = {"train": 0.60, "val": 0.12, "test": 0.28}
# These are left out: tests and tools, tables of data, third-party code, and files that name the
# machine on which they were built.
SKIPPED_FOLDERS = {
    "test", "tests", "idlelib", "idle_test", "site-packages", "lib2to3", "ensurepip", "encodings",
    "turtledemo", "pydoc_data", "__pycache__", "__phello__", "msilib",
}  # fmt: skip
SKIPPED_FILES = re.compile(r"(_sysconfigdata.*|this|antigravity|__phello__.*|.*_test|test_.*)\.py")
# This matches an assignment, the head of a block, or a call, within a docstring.
EXAMPLE = re.compile(r"^\w[\w.]* ?=|[:{]$|^[\w.]+\(")
MIN_CHARS, MAX_CHARS = 20, 90
LINES_PER_FILE = 20  # per label, so that no long file dominates a split

# path below the root -> (source, code lines, prose lines)
Library = dict[str, tuple[str, list[str], list[str]]]


def split_lines(source: str) -> tuple[list[str], list[str]]:
    """Return the stripped code lines and docstring lines of a Python source file.

    A code line holds tokens of the grammar and no comment, and touches no string of several lines.
    A docstring line holds at least four words and is not part of a doctest or an indented example.
    """
    # Not splitlines(): a form feed ends no line for ast and tokenize.
    rows = source.split("\n")
    code, banned = set(), set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        first, last = token.start[0], token.end[0]
        if token.type == tokenize.COMMENT or (token.type == tokenize.STRING and last > first):
            banned.update(range(first, last + 1))
        elif token.type in (tokenize.NAME, tokenize.OP, tokenize.NUMBER):
            code.add(first)

    docs = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if ast.get_docstring(node, clean=False) is None:
            continue
        text = node.body[0].value
        # A docstring of one line carries tokens of no grammar but itself.
        code.difference_update(range(text.lineno, text.end_lineno + 1))
        docs.extend(_docstring_prose(rows[text.lineno - 1 : text.end_lineno]))
    return [rows[i - 1].strip() for i in sorted(code - banned)], docs


def _docstring_prose(rows: list[str]) -> Iterator[str]:
    margin = min((len(r) - len(r.lstrip()) for r in rows[1:] if r.strip()), default=0)
    doctest = False
    for i, row in enumerate(rows):
        line = row.strip()
        if i == 0:
            line = re.sub(r"^[rRuUbB]*('''|\"\"\"|'|\")", "", line)
        if i == len(rows) - 1:
            line = re.sub(r"('''|\"\"\"|'|\")$", "", line)
        line = line.strip()
        # A doctest runs from >>> to the next blank line.
        doctest = line.startswith(">>>") or (doctest and bool(line))
        indent = len(row) - len(row.lstrip())
        example = (i > 0 and indent > margin + 4) or EXAMPLE.search(line)
        words = re.findall(r"[A-Za-z]{2,}", line)
        if not doctest and not example and len(words) >= 4:
            yield line


def read_library(root: Path) -> Library:
    """Read every usable file below `root`."""
    library = {}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED_FOLDERS & set(relative.parts) or SKIPPED_FILES.fullmatch(path.name):
            continue
        if any(part.startswith("config-") for part in relative.parts):
            continue
        try:
            source = path.read_text(encoding="utf-8")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                code, prose = split_lines(source)
        except (SyntaxError, UnicodeDecodeError, tokenize.TokenError):
            continue
        library[relative.as_posix()] = (source, code, prose)
    return library


def usable(line: str) -> bool:
    return MIN_CHARS <= len(line) <= MAX_CHARS


def make_splits(library: Library, seed: int) -> tuple[dict[str, list[dict[str, str]]], list[str]]:
    """Return the rows {"text", "label", "file"} of train, val and test, and the training files.

    Each split is half code, half prose, and no file and no line is in two of them.
    """
    rng = random.Random(seed)
    files = sorted(library)
    rng.shuffle(files)
    n_train, n_val = (round(len(files) * FILE_SHARES[s]) for s in ("train", "val"))
    parts = {
        "train": files[:n_train],
        "val": files[n_train : n_train + n_val],
        "test": files[n_train + n_val :],
    }
    # Lines are kept as in the file, and as docstring lines without their quotes.
    seen = {
        row.strip()
        for file in parts["train"]
        for rows in (library[file][0].splitlines(), *library[file][1:])
        for row in rows
    }
    splits = {}
    for name, members in parts.items():
        pools: dict[str, list[dict[str, str]]] = {label: [] for label in LABEL_WORDS}
        # All training lines are in `seen`, so they need only differ from each other.
        taken, elsewhere = set(), set() if name == "train" else seen
        for file in members:
            for label, lines in zip(LABEL_WORDS, library[file][1:], strict=True):
                fresh = [
                    t
                    for t in dict.fromkeys(lines)
                    if usable(t) and t not in taken and t not in elsewhere
                ]
                rng.shuffle(fresh)
                chosen = fresh[:LINES_PER_FILE]
                taken.update(chosen)
                pools[label] += [{"text": t, "label": label, "file": file} for t in chosen]
        seen |= taken
        half = SIZES[name] // 2
        short = {label: len(pool) for label, pool in pools.items() if len(pool) < half}
        if short:
            raise ValueError(f"make_splits: {name} needs {half} lines per label, got {short}")
        rows = [row for pool in pools.values() for row in rng.sample(pool, half)]
        rng.shuffle(rows)
        splits[name] = rows
    return splits, sorted(parts["train"])


def make_cards(
    library: Library,
    files: list[str],
    exclude: set[str],
    count: int,
    truth: float,
    seed: int,
) -> list[str]:
    """Return `count` pretraining documents: a line of `files`, in the prompt's format, and a word.

    The word is the line's own kind with probability `truth`, and a random one otherwise.
    """
    rng = random.Random(seed)
    pools = [
        sorted({t for file in files for t in library[file][k] if usable(t)} - exclude)
        for k in (1, 2)
    ]
    cards = []
    for _ in range(count):
        kind = rng.randrange(2)
        text = rng.choice(pools[kind])
        if rng.random() >= truth:
            kind = rng.randrange(2)
        word = list(LABEL_WORDS.values())[kind]
        cards.append(TEMPLATE.format(text=text) + word)
    return cards
