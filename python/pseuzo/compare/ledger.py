"""The ledger of a comparison: a file of JSON lines, one per run, from which everything is made.

A line is appended as a whole and reaches the disk before the next run begins, so a killed
comparison loses the run that was going on, and no other. Lines are never changed.
"""

import hashlib
import importlib
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

from pseuzo.files import sync, to_json

LEDGER = "ledger.jsonl"
PACKAGES = ("pseuzo", "pseuzo_kernels")


def digest(value: Any) -> str:
    """Return a hash (64 bits, hex) of a value that JSON can express. The order of keys in a mapping
    does not count."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def code_version() -> dict[str, str]:
    """Return the version of the packages, and a digest of all their Python sources."""
    hashed = hashlib.sha256()
    for name in PACKAGES:
        file = importlib.import_module(name).__file__
        assert file is not None, f"{name} is a package with an __init__.py"
        root = Path(file).parent
        for path in sorted(root.rglob("*.py")):
            hashed.update(f"{name}/{path.relative_to(root).as_posix()}\n".encode())
            hashed.update(path.read_bytes())
    version = importlib.import_module(PACKAGES[-1]).__version__
    return {"version": version, "digest": hashed.hexdigest()[:16]}


def read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the lines of a ledger, and the bytes that they take. What follows them is a last line
    that was not written whole, if there is anything. ValueError for any other line that is not one
    of a ledger."""
    if not path.exists():
        return [], 0
    lines: list[dict[str, Any]] = []
    size, content = 0, path.read_bytes()
    *whole, _ = content.split(b"\n")
    for number, text in enumerate(whole, 1):
        try:
            line = json.loads(text)
            line["kind"], line["hash"]
        except (ValueError, KeyError, TypeError) as error:
            if number == len(whole) and size + len(text) + 1 == len(content):
                break  # a loss of power can leave the end of the file without its content
            raise ValueError(
                f"{path}, line {number} is not a line of a ledger ({type(error).__name__}); put "
                "the file back as it was, or choose another folder"
            ) from None
        lines.append(line)
        size += len(text) + 1
    return lines, size


class Ledger:
    """The lines so far, and the file that they are in.

    code: code_version() of this process. ValueError if a line is of other code, unless accept.
    torn: whether the last line of the file was not written whole; it was removed.
    """

    def __init__(self, path: Path, code: dict[str, str], accept: bool = False):
        self.path, self.code = path, code
        self.lines, size = read_lines(path)
        other = Counter(
            line["code"]["digest"] for line in self.lines if line.get("code", code) != code
        )
        if other and not accept:
            raise ValueError(
                f"{path} has {sum(other.values())} line(s) of another version of the code; choose "
                "another --output, or give --accept-code, which the report then says"
            )
        self.torn = path.exists() and path.stat().st_size > size
        if self.torn:
            os.truncate(path, size)
            sync(path)
        self._by_hash = {line["hash"]: line for line in self.lines}

    def get(self, key: str) -> dict[str, Any] | None:
        """Return the last line with this hash."""
        return self._by_hash.get(key)

    def append(self, line: dict[str, Any]) -> None:
        """Append a line, with the code's version, and return when it is on the disk."""
        line = line | {"code": self.code}
        text = (to_json(line) + "\n").encode()
        new = not self.path.exists()
        with open(self.path, "ab", buffering=0) as file:
            file.write(text)
            os.fsync(file.fileno())
        if new:
            sync(self.path.parent)
        line = json.loads(text)  # as a later process reads it
        self.lines.append(line)
        self._by_hash[line["hash"]] = line
