"""The folder of a run: whose it is, what is in it, and whether a run may go on in it.

It holds config.yaml (every setting, as resolved), results.json (figures and history), curves.png,
model/ (what Transformers or peft loads), checkpoint-N/ (likewise, and to resume from);
noise_on.json and lr.json where those were searched for; start/, a mode's first weights, where there
is a journal; and .pseuzo, which says that the folder is ours.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

from pseuzo.files import MARKER, claim, differing, read_json, read_yaml
from pseuzo.train.checkpoints import last_checkpoint
from pseuzo.train.journal_file import JournalError, held, owner
from pseuzo.train.noise_on import PLACEMENT_FILE

EMBEDDED = "demo"  # the name of the embedded model, and of the task on its text
LR_FILE = "lr.json"
ROWS = ("data_seed", "train_size", "dev_size", "test_size")  # decide which rows are drawn
DECISIONS = (LR_FILE, PLACEMENT_FILE, "start")  # what a run writes before it begins
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
    "output",
}


def _remove(*paths: Path) -> None:
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


@contextmanager
def start_folder(output: Path, resume: str | None) -> Iterator[tuple[str | None, str]]:
    """Make the folder of a run, and keep it to ourselves: new or empty, or that of a run to resume.
    Gives resume, or None where there is nothing to go on with yet; and the identifier of the run.
    """
    config = output / "config.yaml"
    if resume not in (None, "auto") and not (config.exists() and Path(resume).is_dir()):
        raise ValueError(f"--resume {resume}: that is no checkpoint of a run in {output}")
    with claim(output, "train") as run_id:
        begun = config.exists()
        if begun and not resume:
            raise ValueError(
                f"{output} is not empty; choose another folder, or --resume to go on with the run "
                "in it"
            )
        if not begun:
            if resume:
                print(f"{output} holds no run to resume: beginning a new one", flush=True)
            # They are of a try that did not get to its first step. A search for lr continues with
            # the trials that were made.
            _remove(*(output / name for name in DECISIONS if not (resume and name == LR_FILE)))
        yield resume if begun else None, run_id


def to_make(output: Path, journal: str | None) -> list[Path]:
    """What a new run will make before its first step. Its journal is made here, empty: nobody else
    may take it for theirs meanwhile."""
    made = [output / name for name in ("config.yaml", *DECISIONS) if not (output / name).exists()]
    if journal:
        try:
            open(journal, "xb").close()
            made.append(Path(journal))
        except FileExistsError:
            pass
    return made


def undo(output: Path, made: list[Path], journal: Path | None, run_id: str) -> None:
    """Leave nothing of a new run that failed before its first step, so that nothing is in the way
    of the next try."""
    _remove(*(path for path in made if path != journal))
    if journal in made:
        with suppress(JournalError), held(journal):  # another run may have taken it in the meantime
            if owner(journal) in ((None, 0), (run_id, 0)):
                journal.unlink()
    if list(output.iterdir()) == [output / MARKER]:
        _remove(output / MARKER)


def _same_run(c: dict[str, Any], output: Path) -> None:
    """ValueError if the settings are not those of the run in output."""
    config, now = read_yaml(output / "config.yaml"), plain(c)
    # The file may have been moved, which _own_journal looks at.
    if config.get("journal") and now["journal"]:
        now["journal"] = config["journal"]
    if found := differing(config, now, besides=MAY_CHANGE):
        key, before, now = found
        raise ValueError(
            f"the run in {output} has {key} {before}, not {now}: it goes on with its own settings "
            f"(pseuzo train --config {output / 'config.yaml'} --output {output} --resume), or "
            "begin a new one"
        )


def _own_journal(c: dict[str, Any], output: Path, run_id: str) -> None:
    """ValueError if c["journal"] is not the journal of the run in output, to be resumed from
    c["resume"]. Where that is None, the run begins anew: then the steps that it recorded are kept
    under another name."""
    path, before = c["journal"], read_yaml(output / "config.yaml").get("journal")
    run, steps = owner(path)
    if run is None and path == before and not c["resume"]:
        return
    if run != run_id:
        raise ValueError(
            f"the run in {output} records its steps in {before}, and {path} "
            f"{'is not there, or empty' if run is None else 'is the journal of another run'}: put "
            "its file back, or name it with --journal; to go on without a journal, take the line "
            f"`journal:` out of {output}/config.yaml"
        )
    if steps and not c["resume"]:
        aside = next(name for n in count(1) if not os.path.exists(name := f"{path}.{n}"))
        with held(path):
            os.rename(path, aside)
        print(
            f"the {steps} step(s) in {path} can be replayed from {aside}, which is kept", flush=True
        )


def resumed(c: dict[str, Any], output: Path, run_id: str) -> dict[str, Any]:
    """The settings of the run that goes on in output: with the rate that it found, and the
    checkpoint to begin from."""
    if c["lr"] == "auto" and (output / LR_FILE).exists():
        c = c | found_lr(read_json(output / LR_FILE, "chosen"))
    _same_run(c, output)
    if c["resume"] == "auto":
        c = c | {"resume": last_checkpoint(output)}
        # It was killed before its first checkpoint: it begins anew, and makes the same steps.
        if c["resume"] is None:
            print(f"{output} has no whole checkpoint: beginning anew", flush=True)
    if c["journal"]:
        _own_journal(c, output, run_id)
    return c


def found_lr(found: dict[str, Any]) -> dict[str, Any]:
    """The settings that a search for lr chose; nothing is scaled any more."""
    return found["chosen"] | {"scale_lr": False, "scale_eps": False}


def rows_of_run(model: str, task: str, data: Any) -> tuple[Path, dict[str, int]] | None:
    """The run in whose folder the model is, with the settings that decided which rows it was
    trained on, and whether they were asked as in a chat; None if there is none, or if it was of
    another task or other data."""
    folder = Path(model).expanduser()
    if model == EMBEDDED or not folder.is_dir():
        return None
    run = folder.resolve().parent
    if not (run / MARKER).is_file() or not (run / "config.yaml").is_file():
        return None
    config = read_yaml(run / "config.yaml")
    names = {"task": str(task), "data": None if data is None else str(data)}
    for key, name in names.items():  # by name: either path may be relative, to another directory
        other = config.get(key)
        if not isinstance(other, str | None) or Path(other or "").name != Path(name or "").name:
            return None
    kinds = dict.fromkeys(ROWS, int) | {"chat": bool}
    return run, {key: config[key] for key, kind in kinds.items() if type(config.get(key)) is kind}


def plain(c: dict[str, Any]) -> dict[str, Any]:
    """The settings as YAML takes them, and as --config takes them again."""
    c = {k: v for k, v in c.items() if k not in ("resume", "scale_lr", "scale_eps")} | {
        key: None
        for key in ("lr", "eps")
        if c.get(f"scale_{key}")  # what they are is in noise_on.json
    }
    return {
        k: str(v) if isinstance(v, os.PathLike) else list(v) if isinstance(v, tuple) else v
        for k, v in c.items()
    }
