"""`pseuzo compare`: from settings to the cells of a comparison, and from its ledger to tables."""

import hashlib
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from pseuzo.cli.compare_settings import COMPARED, Request
from pseuzo.cli.folder import plain
from pseuzo.compare.comparison import Cell, Comparison
from pseuzo.compare.ledger import LEDGER, Ledger, code_version, read_lines
from pseuzo.compare.report import markdown, summarise
from pseuzo.files import claim, write_atomically, write_json


def compare(
    request: Request,
    output: Path,
    *,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Make the runs that the ledger in output lacks, and the report. Return its summary.

    A run that fails is a line of the ledger, too, and does not stop the others. ValueError for a
    folder of something else, and for a ledger of other code.
    """
    with claim(output, "compare"):
        ledger = Ledger(output / LEDGER, code_version(), request.accept_code)
        if ledger.torn:
            progress(f"{ledger.path}: the last line was not written whole and is dropped")
        cells = [cell for task in request.tasks for cell in _cells(request, task)]
        comparison = Comparison(cells, request.seeds, ledger, progress)
        comparison.plan({"references": {task: of.reference for task, of in request.tasks.items()}})
        from pseuzo.cli.worker import Workers

        with closing(Workers(output, {cell.settings["device"] for cell in cells})) as workers:
            comparison.run(workers)
        return report(output)


def report(output: Path) -> dict[str, Any]:
    """Make table.md, compare.json and the plots from the ledger in output; return the summary."""
    from pseuzo.compare.plots import draw

    path = output / LEDGER
    if not path.exists():
        raise ValueError(f"there is no {path}, which pseuzo compare writes")
    lines, _ = read_lines(path)
    summary = summarise(lines)
    write_json(output / "compare.json", summary)
    plots = draw(lines, summary, output)
    images = "".join(f"![{plot.stem}]({plot.name})\n\n" for plot in plots)
    write_atomically(output / "table.md", f"{markdown(summary)}\n{images}")
    return summary


def _cells(request: Request, task: str) -> list[Cell]:
    from pseuzo.machine import usable_device

    of = request.tasks[task]
    common = of.settings | {
        "device": str(usable_device(of.settings["device"])),
        "data_seed": of.settings["data_seed"] or 0,
    }
    rows, trial = _rows_hash(common), request.trial_forwards
    if trial is None:
        trial = max(1, round(request.trial_share * of.forwards))
    cells = []
    for title, own in of.methods.items():
        settings = {
            name: value
            for name, value in plain(common | own).items()
            if value is not None and name not in COMPARED - {"method"}
        }
        cells.append(Cell(task, title, settings, of.forwards, request.trials, trial, rows))
    return cells


def _rows_hash(c: Mapping[str, Any]) -> str:
    """Return a hash of all rows of a task, as they are read. Where they were read is left out."""
    from pseuzo.tasks import load_task

    sizes = {split: c[f"{split}_size"] for split in ("train", "dev", "test")}
    rows = load_task(c["task"]).load(c["data"], **sizes, seed=c["data_seed"])
    hashed = hashlib.sha256()
    for split, examples in rows.items():
        hashed.update(f"{split} {len(examples)}\n".encode())
        for example in examples:
            hashed.update(f"{replace(example, place='')!r}\n".encode())
    return hashed.hexdigest()[:16]
