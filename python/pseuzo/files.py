"""Locks, atomic writes and checks of files: a crash leaves the old content or the new one, and two
processes never write to one folder."""

import json
import math
import os
import secrets
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

from torch import Tensor, nn

from pseuzo.machine import parts_of
from pseuzo.sentences import one_line

if TYPE_CHECKING:
    import yaml

YAML_BYTES, YAML_DEPTH = 262_144, 32  # limits on a file that is read

MARKER = ".pseuzo"  # the file in an output folder that names the command which owns it


@contextmanager
def claim(folder: Path, command: str) -> Iterator[str]:
    """Make a folder for the files of `pseuzo command`, and lock it against other processes.

    The folder may be new, empty, or one that the same command made before. ValueError, before
    anything is written, if it holds other files or if another process has locked it.

    Yields the identifier of the folder, which is stored in it. Removes copies of a model that a
    killed process was saving.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file, not a folder")
    marker, mark = folder / MARKER, f"made by pseuzo {command}\n"
    others = folder.exists() and any(path != marker or path.is_dir() for path in folder.iterdir())
    # A process that was killed at its start leaves an empty marker.
    found = marker.read_text() if marker.is_file() else ""
    if (others or found) and not found.startswith(mark):
        raise ValueError(
            f"{folder} is not empty, and not the folder of a run of pseuzo {command}; choose "
            "another folder"
        )
    folder.mkdir(parents=True, exist_ok=True)
    with open(marker, "a") as file:
        if not lock(file):
            raise ValueError(
                f"{folder} is in use by another pseuzo process; wait for its end, or choose "
                "another folder"
            )
        written = marker.read_text().removeprefix(mark).split()
        if not written:  # the folder is new, or was made before folders had an identifier
            written = ["id", secrets.token_hex(8)]
            file.write(("" if file.tell() else mark) + " ".join(written) + "\n")
            file.flush()
        for scratch in filter(Path.is_dir, folder.glob(_scratch("*"))):
            with suppress(ValueError):  # it has other files, or another process is saving there
                with _saving(folder / scratch.name.removeprefix(".").removesuffix(SAVING)):
                    pass
        try:
            yield written[-1]
        finally:
            unlock(file)


def lock(file: IO | int) -> bool:
    """Lock an open file or folder against other processes that lock it, until unlock() or the end
    of this process, however it ends. Return False if another process holds the lock.

    Reading is not blocked. Where the system or the disk has no such locks, nothing is locked.
    """
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def unlock(file: IO | int) -> None:
    """Release the lock. Closing the file is not enough: a process that was forked meanwhile, such
    as a data loader, holds the file open as well."""
    if fcntl is not None:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_UN)


def sync(path: Path) -> None:
    """Return when a file, or the names in a folder, have reached the disk, where they survive a
    loss of power."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError:
        if not path.is_dir():  # some file systems cannot sync a folder
            raise
    finally:
        os.close(number)


def sync_tree(folder: Path) -> None:
    """Sync everything in a folder, then the folder itself."""
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


def write_atomically(path: Path, text: str) -> None:
    """Replace a file as a whole: a reader finds the old text or the new one, also after a loss of
    power."""
    scratch = path.with_name(path.name + ".new")
    scratch.write_text(text)
    sync(scratch)
    os.replace(scratch, path)
    sync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write to_json(value) atomically."""
    write_atomically(path, to_json(value, indent=1) + "\n")


def to_json(value: Any, indent: int | None = None) -> str:
    """Return JSON text. Numbers that are not finite become null, since JSON cannot express them."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: Path, *keys: str) -> dict[str, Any]:
    """Read a JSON object that has these keys. ValueError if the file does not hold one."""
    try:
        value = json.loads(path.read_text())
        for key in keys:
            value[key]
    except (OSError, ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise ValueError(
            f"{path} cannot be used ({type(error).__name__}: {error}); delete it, or choose "
            "another folder"
        ) from None
    return value


def read_yaml(path: Path) -> dict[str, Any]:
    """Read settings that pseuzo wrote. ValueError if the file is not a YAML mapping."""
    try:
        value = parse_yaml(path)
    except ValueError as error:
        raise ValueError(f"{path} is not YAML: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold `option: value` lines, got {type(value).__name__}")
    return value


def parse_yaml(
    path: Path, loader: "type[yaml.SafeLoader] | type[yaml.BaseLoader] | None" = None
) -> Any:
    """Read a YAML file that anybody may have written.

    ValueError, with the line, if it is not YAML, or if it could take memory or time without bound:
    if it has more than YAML_BYTES, more than YAML_DEPTH levels, or aliases, which a few lines can
    multiply to billions of values.
    """
    import yaml  # an optimizer and its journal do not need it

    base: Any = loader or yaml.SafeLoader

    class Bounded(base):
        depth = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            refused = (
                "aliases (*name) are not read; write the value again"
                if self.check_event(yaml.AliasEvent)
                else ""
            )
            if refused or self.depth == YAML_DEPTH:
                refused = refused or f"there are more than {YAML_DEPTH} levels"
                raise yaml.composer.ComposerError(None, None, refused, self.peek_event().start_mark)
            self.depth += 1
            try:
                return super().compose_node(parent, index)
            finally:
                self.depth -= 1

    with open(path, "rb") as file:
        content = file.read(YAML_BYTES + 1)
    if len(content) > YAML_BYTES:
        raise ValueError(f"it is larger than {YAML_BYTES} bytes")
    try:
        return yaml.load(content, Bounded)
    except yaml.MarkedYAMLError as error:
        where = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ValueError(f"{where}{error.problem}") from None
    except Exception as error:  # constructors raise it for February 30, `!!int ""` or `!!bool 5`
        raise ValueError((str(error).splitlines() or [type(error).__name__])[0]) from None


def differing(
    before: dict[str, Any], now: dict[str, Any], besides: Collection[str] = ()
) -> tuple[str, Any, Any] | None:
    """Return the first setting that differs, with both values; None if none differs except those
    named in `besides`."""
    for key in sorted((before.keys() | now.keys()) - set(besides)):
        if before.get(key) != now.get(key):
            return key, before.get(key), now.get(key)
    return None


def save_model(model: nn.Module, tokenizer: Any, target: Path) -> None:
    """Save a folder that Transformers (or peft, for an adapter) loads: safetensors, the config and,
    if there is one, the tokenizer.

    The folder is complete whenever it exists. ValueError if another process is saving to it.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with _saving(target) as scratch:
        new = scratch / "new"
        write_model(model, tokenizer, new)
        sync_tree(new)
        if target.exists():
            target.rename(scratch / "old")
        new.rename(target)
        sync(target.parent)


def write_model(
    model: Any, tokenizer: Any, folder: Path, state_dict: dict[str, Any] | None = None
) -> None:
    """Write the files of save_model. state_dict: the weights to write, by default the model's."""
    model.save_pretrained(folder, state_dict=state_dict)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def check_saving(
    save: Callable[[Path, dict[str, Any] | None], None],
    model: nn.Module,
    folder: Path,
    extra: int = 0,
) -> None:
    """Raise now what would otherwise be raised by the first save.

    This runs save(scratch folder, state_dict) within folder, which writes everything except the
    bytes of the weights, and checks that the disk has room for those and for `extra` bytes more.

    The state_dict has one element of each weight that could be refused, at its place in memory, so
    that weights that share memory still do; it is None for adapters, which are small. ValueError,
    in one sentence, if the config or the tokenizer cannot be written, if safetensors refuses the
    weights, if the folder cannot be written to, or if the disk is too full.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = model.state_dict()
    adapter = hasattr(model, "peft_type")
    saved = [p for p in model.parameters() if p.requires_grad] if adapter else weights.values()
    # Tied weights count once.
    sizes = {_address(p): p.nbytes for x in saved if isinstance(x, Tensor) for p in parts_of(x)}
    needed, free = sum(sizes.values()) + extra, shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(
            f"a checkpoint of this run takes {needed / 1e9:.1f} GB, and the disk of {folder} has "
            f"{free / 1e9:.1f} GB left: make room, or choose a folder on another disk"
        )
    try:
        with _saving(folder / "check") as scratch:
            save(scratch / "new", None if adapter else _one_element_each(model, weights))
    except Exception as error:  # each of the libraries involved raises its own
        raise ValueError(
            f"a checkpoint of this model could not be saved, so no step is made: {one_line(error)}"
        ) from error


def _address(x: Tensor) -> int:
    """Return the address of the memory that holds x. A tensor that wraps several others gets a
    number of its own."""
    try:
        return x.untyped_storage().data_ptr() or id(x)
    except (RuntimeError, NotImplementedError):
        return id(x)


def _one_element_each(model: nn.Module, weights: dict[str, Any]) -> dict[str, Any]:
    """Return the first element of each weight that safetensors could refuse. In a Transformers
    model these are the weights that share memory: Transformers makes the others fit itself, and may
    need them whole to do so."""
    if hasattr(model, "save_pretrained"):
        at = {name: _address(x) for name, x in weights.items() if isinstance(x, Tensor)}
        shared = Counter(at.values())
        weights = {name: weights[name] for name, address in at.items() if shared[address] > 1}
    return {
        name: x.as_strided((1,), (1,))
        if isinstance(x, Tensor) and x.is_contiguous() and x.numel()
        else x
        for name, x in weights.items()
    }


SAVING = ".saving"


def _scratch(name: str) -> str:
    """Name the folder beside the folder `name` in which its next content is made."""
    return f".{name}{SAVING}"


@contextmanager
def _saving(target: Path) -> Iterator[Path]:
    """Yield an empty scratch folder, locked by this process, in which the next target is made, and
    remove it at the end. A scratch folder of a killed process is reused. ValueError if another
    process holds the folder, or if it contains other files."""
    scratch = target.with_name(_scratch(target.name))
    scratch.mkdir(exist_ok=True)
    number = os.open(scratch, os.O_RDONLY)
    try:
        if not lock(number):
            raise ValueError(
                f"{target} is being saved by another process; wait for its end, or choose another "
                "folder"
            )
        if other := next((f for f in scratch.iterdir() if f.name not in ("new", "old")), None):
            raise ValueError(
                f"{other} is in the way: pseuzo saves models in {scratch} and did not write that"
            )
        try:
            _clear(scratch, target)
            yield scratch
        finally:
            _clear(scratch, target)
            scratch.rmdir()
            unlock(number)
    finally:
        os.close(number)


def _clear(scratch: Path, target: Path) -> None:
    """Remove what _saving left. If it had moved the old folder away already, the new one, which is
    complete, becomes the target."""
    if (scratch / "old").exists() and not target.exists():
        (scratch / "new").rename(target)
    for left in scratch.iterdir():
        shutil.rmtree(left)
