"""Writing results so that a crash leaves the old or the new, never half, and two processes do not mix theirs."""

import json
import math
import os
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

import yaml
from torch import nn

MARKER = ".pseuzo"  # in every folder that a command fills: which one


@contextmanager
def claim(folder: Path, command: str) -> Iterator[None]:
    """Make a folder for the files of `pseuzo command`, ours alone in here: a new or empty one, or its own of an earlier
    time. ValueError, and nothing is touched, where other files are, or where another process is at work."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file, not a folder")
    marker, mark = folder / MARKER, f"made by pseuzo {command}\n"
    if folder.exists() and any(folder.iterdir()) and not (marker.is_file() and marker.read_text() == mark):
        raise ValueError(
            f"{folder} is not empty, and not the folder of a run of pseuzo {command}; choose another folder"
        )
    folder.mkdir(parents=True, exist_ok=True)
    with open(marker, "a") as file:
        if not lock(file):
            raise ValueError(
                f"{folder} is in use by another pseuzo process; wait for its end, or choose another folder"
            )
        if not file.tell():
            file.write(mark)
            file.flush()
        try:
            yield
        finally:
            unlock(file)


def lock(file: IO) -> bool:
    """Keep others who lock it out of an open file, until unlock or the end of the process, whatever that is. False if
    one of them has it. Readers are let in; systems and disks without such locks go without."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def unlock(file: IO) -> None:
    """Closing would not do: processes that were forked meanwhile, as data loaders are, hold the file open as well."""
    if fcntl is not None:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_UN)


def write_atomically(path: Path, text: str) -> None:
    """Either the old file or the whole new one is there, whenever it is looked at."""
    scratch = path.with_name(path.name + ".new")
    scratch.write_text(text)
    os.replace(scratch, path)


def write_json(path: Path, value: Any) -> None:
    """As write_atomically; numbers that are not finite become null, which JSON has no other word for."""
    write_atomically(path, json.dumps(_finite(value), indent=1, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: Path, *keys: str) -> dict[str, Any]:
    """A JSON object with these keys. ValueError if the file is none."""
    try:
        value = json.loads(path.read_text())
        for key in keys:
            value[key]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} cannot be used ({type(error).__name__}: {error}); delete it, or choose another folder"
        ) from None
    return value


def read_yaml(path: Path) -> dict[str, Any]:
    """The settings in a file that we wrote. ValueError if somebody else did."""
    try:
        value = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold `option: value` lines, got {type(value).__name__}")
    return value


def differing(
    before: dict[str, Any], now: dict[str, Any], besides: Collection[str] = ()
) -> tuple[str, Any, Any] | None:
    """The first setting that is not the same in both, with both values; None if all but `besides` are."""
    for key in sorted((before.keys() | now.keys()) - set(besides)):
        if before.get(key) != now.get(key):
            return key, before.get(key), now.get(key)
    return None


def save_model(model: nn.Module, tokenizer: Any, target: Path) -> None:
    """A folder that Transformers (or peft, for an adapter) loads: safetensors, config, tokenizer if there is one.

    Complete or not there.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        new = Path(scratch) / "new"
        model.save_pretrained(new)
        if tokenizer is not None:
            tokenizer.save_pretrained(new)
        if target.exists():
            target.rename(Path(scratch) / "old")
        new.rename(target)
