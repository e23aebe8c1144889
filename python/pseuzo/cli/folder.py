"""The folder of a run: its owner, its content, and whether a run may be resumed in it.

It holds config.yaml (every setting, as resolved), results.json (figures and history), curves.png,
model/ (which Transformers or peft loads), checkpoint-N/ (likewise, and to resume from);
found.json if passes decided on lr, eps or the placement of the noise; start/, the first weights of
a mode, if there is a journal; and .pseuzo, which marks the folder as one of pseuzo's.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

from pseuzo.cli.options import setting_name
from pseuzo.files import MARKER, claim, differing, read_yaml
from pseuzo.train.checkpoints import last_checkpoint
from pseuzo.train.journal_file import JournalError, held, owner
from pseuzo.train.noise_on import FOUND_FILE
from pseuzo.train.options import OPTIONS

EMBEDDED = "demo"  # the name of the embedded model, and of the task on its text
ROWS = ("data_seed", "train_size", "dev_size", "test_size")  # the settings that choose the rows
DECISIONS = (FOUND_FILE, "start")  # what a run writes before its first step
MAY_CHANGE = {
    "steps",
    "eval_every",
    "save_every",
    "log_every",
    "eval_batch_size",
    "test_size",
    "quiet",
    "report_to",
    "device",
    "offload",
    "output",
    "direction_ranks",
    "ddp_timeout",
}


def _remove(*paths: Path) -> None:
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


@contextmanager
def start_folder(output: Path, resume: str | None) -> Iterator[tuple[str | None, str]]:
    """Make and lock the folder of a run, which must be new, empty, or that of a run to resume.

    Yields resume, or None if there is no run to resume yet, and the identifier of the run.
    """
    config = output / "config.yaml"
    if resume not in (None, "auto") and not (config.exists() and Path(resume).is_dir()):
        raise ValueError(f"--resume {resume}: that is no checkpoint of a run in {output}")
    with claim(output, "train") as run_id:
        begun = config.exists()
        if begun and not resume:
            raise ValueError(
                f"{output} is not empty; choose another folder, or resume the run in it with "
                "--resume"
            )
        if not begun:
            if resume:
                print(f"{output} holds no run to resume: starting a new one", flush=True)
            # A try that did not reach its first step left these. What it found holds for the next.
            _remove(*(output / name for name in DECISIONS if not (resume and name == FOUND_FILE)))
        yield resume if begun else None, run_id


def to_make(output: Path, journal: str | None) -> list[Path]:
    """Return the paths that a new run will make before its first step. The journal is made here,
    empty, so that no other run can take its name meanwhile."""
    made = [output / name for name in ("config.yaml", *DECISIONS) if not (output / name).exists()]
    if journal:
        try:
            open(journal, "xb").close()
            made.append(Path(journal))
        except FileExistsError:
            pass
    return made


def undo(output: Path, made: list[Path], journal: Path | None, run_id: str) -> None:
    """Remove what a new run made before it failed, so that the next try finds an empty folder."""
    _remove(*(path for path in made if path != journal))
    if journal in made:
        with suppress(JournalError), held(journal):  # another run may have taken it in the meantime
            if owner(journal) in ((None, 0), (run_id, 0)):
                journal.unlink()
    if list(output.iterdir()) == [output / MARKER]:
        _remove(output / MARKER)


def _same_run(c: dict[str, Any], output: Path) -> None:
    """Raise ValueError if the settings are not those of the run in output."""
    config, now = read_yaml(output / "config.yaml"), plain(c)
    # An option that is newer than the run had its default.
    usual = {setting_name(o): o.default for o in OPTIONS.values()}
    config = {name: usual[name] for name in now.keys() & usual.keys()} | config
    # The journal may have been moved, which _own_journal checks.
    if config.get("journal") and now["journal"]:
        now["journal"] = config["journal"]
    if found := differing(config, now, besides=MAY_CHANGE):
        key, before, now = found
        raise ValueError(
            f"the run in {output} has {key} {before}, not {now}: resume it with its own settings "
            f"(pseuzo train --config {output / 'config.yaml'} --output {output} --resume), or "
            "start a new run"
        )


def _own_journal(c: dict[str, Any], output: Path, run_id: str) -> None:
    """Raise ValueError if c["journal"] is not the journal of the run in output."""
    path, before = c["journal"], read_yaml(output / "config.yaml").get("journal")
    run = owner(path)[0]
    if run is None and path == before and not c["resume"]:
        return
    if run != run_id:
        raise ValueError(
            f"the run in {output} records its steps in {before}, and {path} "
            f"{'is not there, or empty' if run is None else 'is the journal of another run'}: put "
            "its file back, or name it with --journal; to continue without a journal, take the "
            f"line `journal:` out of {output}/config.yaml"
        )


def set_aside(path: str) -> None:
    """Keep the steps of a journal under another name, as the run starts again and cannot follow
    them."""
    if steps := owner(path)[1]:
        aside = next(name for n in count(1) if not os.path.exists(name := f"{path}.{n}"))
        with held(path):
            os.rename(path, aside)
        print(
            f"the {steps} step(s) in {path} can be replayed from {aside}, which is kept", flush=True
        )


def resumed(c: dict[str, Any], output: Path, run_id: str) -> dict[str, Any]:
    """Return the settings of the run that is resumed in output, and its checkpoint."""
    _same_run(c, output)
    if c["resume"] == "auto":
        c = c | {"resume": last_checkpoint(output)}
        # A run that was killed before its first checkpoint starts again with the same steps, of
        # which it has those of its journal already.
        if c["resume"] is None:
            print(f"{output} has no whole checkpoint: starting again", flush=True)
        else:
            print(f"continuing from {c['resume']}", flush=True)
    if c["journal"]:
        _own_journal(c, output, run_id)
    return c


def rows_of_run(model: str, task: str, data: Any) -> tuple[Path, dict[str, int]] | None:
    """Return the run in whose folder the model is, with the settings that chose its rows and those
    of the chat template. None if there is no such run, or if it had another task or other data."""
    folder = Path(model).expanduser()
    if model == EMBEDDED or not folder.is_dir():
        return None
    run = folder.resolve().parent
    if not (run / MARKER).is_file() or not (run / "config.yaml").is_file():
        return None
    config = read_yaml(run / "config.yaml")
    names = {"task": str(task), "data": None if data is None else str(data)}
    for key, name in names.items():  # either path may be relative to another directory
        other = config.get(key)
        if not isinstance(other, str | None) or Path(other or "").name != Path(name or "").name:
            return None
    kinds = dict.fromkeys(ROWS, int) | {"chat": bool}
    return run, {key: config[key] for key, kind in kinds.items() if type(config.get(key)) is kind}


def plain(c: dict[str, Any]) -> dict[str, Any]:
    """Return the settings as YAML can hold them and --config reads them."""
    c = {k: v for k, v in c.items() if k not in ("resume", "scale_lr", "scale_eps")} | {
        key: None
        for key in ("lr", "eps")
        if c.get(f"scale_{key}")  # their values are in found.json
    }
    return {
        k: str(v) if isinstance(v, os.PathLike) else list(v) if isinstance(v, tuple) else v
        for k, v in c.items()
    }
