"""Rows of data by split: from the hub, from local JSONL or Parquet files, from save_to_disk."""

import json
import re
from pathlib import Path
from typing import Any

ALIASES = {"val": "validation", "valid": "validation", "dev": "validation"}
SUFFIXES = (".jsonl", ".json", ".parquet")
NOT_ROWS = ("dataset_info.json", "dataset_infos.json")  # the hub has them beside the rows
JSON_BYTES = 1 << 30  # the limit of a JSON file, since it is read as a whole
ALL = "all"  # the one split of data that is not split yet

Rows = Any  # a list of dicts, or a datasets.Dataset


def canonical(split: str) -> str:
    return ALIASES.get(split.lower(), split.lower())


class Source:
    """splits: the names of the splits that exist, or None if only loading one can tell."""

    splits: tuple[str, ...] | None

    def rows(self, split: str) -> Rows:
        raise NotImplementedError

    def place(self, split: str, i: int) -> str:
        """Say where rows(split)[i] is, in messages."""
        return f"row {i} (from 0) of " + ("the data" if split == ALL else f"the split {split!r}")


class Hub(Source):
    """A data set of the public hub: its path, and config, data_dir and revision if it has them."""

    splits = None

    def __init__(self, path: str, config: str | None = None, **more: str):
        self.path, self.config, self.more = path, config, more

    def rows(self, split: str) -> Rows:
        from datasets import load_dataset

        try:
            return load_dataset(self.path, self.config, split=split, **self.more)
        except (OSError, ValueError, RuntimeError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            name = self.path + (f" ({self.config})" if self.config else "")
            raise ValueError(
                f"the split {split!r} of the hub's data set {name} cannot be loaded: {reason}; "
                "without a network, give a local copy in the same columns (a folder, .jsonl or "
                ".parquet)"
            ) from error


class Local(Source):
    """A file; a folder with a file, several files or a folder for each split; or a folder that
    save_to_disk made."""

    def __init__(self, path: Path):
        self.path = path
        self._found: dict[str, Any] = {}
        # The line and file of each row in JSON.
        self._places: dict[str, list[tuple[str, Path]]] = {}
        if not path.exists():
            raise ValueError(f"there is no file or folder {path}")
        if path.is_file():
            if path.suffix not in SUFFIXES:
                raise ValueError(
                    f"{path} cannot be read as data; give a .jsonl or .parquet file, or a folder"
                )
            self._found = {ALL: [path]}
        elif (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            from datasets import load_from_disk

            data = load_from_disk(str(path))
            data = data if isinstance(data, dict) else {ALL: data}
            self._found = {canonical(split): rows for split, rows in data.items()}
        else:
            self._found = self._files(path)
        self.splits = tuple(self._found)

    @staticmethod
    def _files(folder: Path) -> dict[str, list[Path]]:
        """Find the files of each split by the usual names: train.jsonl;
        train-00000-of-00002.parquet, ...; train/*.parquet; data/train-*.parquet."""
        inside = sorted((*folder.glob("*"), *folder.glob("*/*")))
        inside = [path for path in inside if path.suffix in SUFFIXES and path.is_file()]
        files = [path for path in inside if path.name not in NOT_ROWS]
        found: dict[str, list[Path]] = {}
        for file in files:
            names = [file.stem] if file.parent == folder else [file.parent.name, file.stem]
            split = next(filter(None, map(_split_in, names)), names[0])
            found.setdefault(canonical(split), []).append(file)
        if not found:
            present = ", ".join(path.name for path in sorted(folder.iterdir())[:8]) or "nothing"
            raise ValueError(
                f"{folder} holds no data; wanted are files like train.jsonl, validation.parquet, "
                f"test.jsonl or data/train-00000-of-00001.parquet; found: {present}"
            )
        for split, some in found.items():
            if len(folders := sorted({str(file.parent) for file in some})) > 1:
                raise ValueError(
                    f"the split {split!r} is in several folders, {', '.join(folders)}; "
                    "give one of them"
                )
        if len(files) == 1 and not {"train", "validation", "test"} & found.keys():
            return {ALL: files}
        return found

    def rows(self, split: str) -> Rows:
        found = self._found[split]
        if not isinstance(found, list):
            return found
        kinds = {path.suffix for path in found}
        if kinds == {".parquet"}:
            from datasets import Dataset

            try:
                return Dataset.from_parquet([str(path) for path in found])
            except Exception as error:  # pyarrow and datasets raise errors of their own
                lines = str(error.__cause__ or error).strip().splitlines()
                reason = lines[0] if lines else type(error).__name__
                raise ValueError(f"{found[0]} cannot be read as Parquet: {reason}") from error
        if ".parquet" in kinds:
            raise ValueError(
                f"the split {split!r} in {self.path} is there as Parquet and as JSON; "
                "remove one of them"
            )
        numbered = [(line, path, row) for path in found for line, row in read_json(path)]
        self._places[split] = [(line, path) for line, path, _ in numbered]
        return [row for *_, row in numbered]

    def place(self, split: str, i: int) -> str:
        if split not in self._places:
            return f"{super().place(split, i)} in {self.path}"
        line, path = self._places[split][i]
        return f"{line} of {path}"


def _split_in(name: str) -> str | None:
    """Return the split that a file or folder is named after."""
    match = re.match(r"(train|validation|valid|val|dev|test)(?![a-z])", name, re.IGNORECASE)
    return match[1] if match else None


def read_json(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Read a file of one JSON object per line, or of one JSON list, as ("line 1", row), ...

    ValueError names the line that is no object, and refuses files of more than JSON_BYTES."""
    if (size := path.stat().st_size) > JSON_BYTES:
        raise ValueError(
            f"{path} has {size} bytes, and JSON is read whole, up to {JSON_BYTES}; "
            "save it as Parquet"
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
        if text.lstrip().startswith("["):
            rows = [(f"row {i}", row) for i, row in enumerate(_parsed(text), 1)]
        else:  # not splitlines: a string in JSON may hold other line separators as they are
            lines = enumerate(text.split("\n"), 1)
            rows = [(f"line {i}", line) for i, line in lines if line.strip()]
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from None
    out = []
    for where, row in rows:
        try:
            row = _parsed(row) if isinstance(row, str) else row
        except ValueError as error:
            raise ValueError(f"{where} of {path} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{where} of {path} is not a JSON object with named columns")
        out.append((where, row))
    return out


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def take(rows: Rows, index: list[int]) -> list[dict[str, Any]]:
    """Return the rows of these numbers, in this order, without reading the others."""
    if isinstance(rows, list):
        return [rows[i] for i in index]
    return rows.select(index).to_list()
