"""Following a journal: a resumed run makes the steps again that the run has recorded already.

The weights of a checkpoint, or the base weights, and the records after it are the weights before
the first step that was not recorded. So a run that was killed loses the step in flight, whatever
the age of its checkpoint. The loop of the training makes the recorded steps, so that the order of
the data, schedules, callbacks and evaluations are those of a run that never stopped. Each of these
steps makes the update as it was recorded, to the bit, whatever measures it now. Passes are needed
only where an estimator's state comes from them: see `ZeroOrder.history`.
"""

import io
import os
import warnings
from base64 import b64decode, b64encode
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from pseuzo.optim.base import ZeroOrder
from pseuzo.optim.together import Together
from pseuzo.train.journal_file import (
    JournalError,
    Record,
    owner,
    read_header,
    read_record,
)


class Followed:
    """The records of the steps that a run makes again.

    content: whole records, one after another, the first of which is that of step `first`. history:
    that of the optimizer.
    """

    def __init__(self, content: bytes, first: int, history: int):
        self.content, self.first, self.history = content, first, history
        self._every, self._last = 0, 0
        self._starts: list[int] = []
        file = io.BytesIO(content)
        while file.tell() < len(content):
            self._starts.append(file.tell())
            read_record(file, first + len(self._starts) - 1)
        self.end = first + len(self._starts)  # the first step that is not recorded

    def holds(self, step: int) -> bool:
        return self.first <= step < self.end

    def at(self, step: int) -> Record | None:
        """The record of a step, if it is one of these."""
        if not self.holds(step):
            return None
        file = io.BytesIO(self.content)
        file.seek(self._starts[step - self.first])
        return read_record(file, step)

    def plan_states(self, every: int, last: int) -> None:
        """Have whole states of the optimizer at more steps than the first that is not recorded.

        every: after so many steps each, as for checkpoints; 0: never. last: also after so many.
        """
        self._every, self._last = every, last

    def skips_passes(self, step: int) -> bool:
        """Whether a step is made from its record alone, since no state will depend on its
        passes."""
        if not self.holds(step):
            return False
        if not self.history:
            return True
        due = [self.end]
        if self._every:
            due.append((step // self._every + 1) * self._every)
        if step < self._last:
            due.append(self._last)
        return step < min(due) - self.history


def share_records(optimizer: ZeroOrder, together: Together) -> Followed | None:
    """Let all ranks of a run make the steps again whose records rank 0 has read, and return
    these."""

    def of_root() -> list[Any] | None:
        found = optimizer.followed
        return found and [b64encode(found.content).decode(), found.first, found.history]

    found = together.of_root(of_root)
    if found is not None and not together.is_root:
        content, first, history = found
        optimizer.followed = Followed(b64decode(content), first, history)
    return optimizer.followed


@dataclass(frozen=True)
class Place:
    """Where the journal of a run goes on.

    run: that of the header. from_base: whether the optimizer has made no step since the journal
    began. end: the byte at which the next record begins. step: that of this record.
    """

    run: str
    from_base: bool
    end: int
    step: int
    followed: Followed | None


def find_place(
    path: Path,
    optimizer: ZeroOrder,
    layout: Mapping[str, Any],
    fingerprint: Callable[[], str],
    run: str | None,
    follow: bool,
) -> Place:
    """Find where the optimizer goes on in the file. JournalError if the file is not its own.

    layout: the header of a journal of this optimizer. fingerprint: returns that of its weights.
    run: its run; None: any. follow: whether it makes the recorded steps again.
    """
    step, history = optimizer.steps, optimizer.history
    follow = follow and history is not None
    with open(path, "rb") as file:
        header, end = read_header(file), file.tell()
        if any(header[key] != value for key, value in layout.items()):
            raise JournalError(
                f"{path} is the journal of another model or of other settings; choose a new file"
            )
        first = made = header["first_step"]
        if step == first:
            if not follow and read_record(file, first) is not None:
                raise JournalError(
                    f"{path} holds {owner(path)[1]} step(s) already, which a new run would "
                    "overwrite; choose a new file, delete this one, or resume its run from a "
                    "checkpoint"
                )
            if fingerprint() != header["base_sha256"]:
                raise JournalError(
                    f"{path} is the journal of a run from other weights; choose a new file"
                )
        runs = {header["run"], run or header["run"]}
        if step > first:
            runs.add(optimizer.journal_run)
        if len(runs) > 1:
            raise JournalError(
                f"{path} is the journal of another run: the optimizer did not write it, and has no "
                "state of one that did; choose a new file"
            )
        try:
            while made < step and read_record(file, made):
                made, end = made + 1, file.tell()
        except JournalError as error:
            raise JournalError(
                f"{error}, and the optimizer continues with step {step}; resume from a checkpoint "
                f"of step {made} or before, or without this journal"
            ) from None
        if made != step:
            ends = "ends before" if made < step else "begins with"
            raise JournalError(
                f"{path} {ends} step {made}, but the optimizer continues with step {step}"
            )
        followed = None
        if follow:
            records = _whole_records(file, end, step)
            if records:
                followed = Followed(records, step, history or 0)
                end, step = end + len(records), followed.end
    return Place(header["run"], optimizer.steps == first, end, step, followed)


def _whole_records(file: BinaryIO, start: int, step: int) -> bytes:
    """The bytes of the records from `start` on, up to the end of the file or to damage."""
    end = file.seek(start)
    try:
        while read_record(file, step):
            step, end = step + 1, file.tell()
    except JournalError as error:
        lost = file.seek(0, os.SEEK_END) - end
        warnings.warn(
            f"{error}: the run measures step {step} and all after it again, and the {lost} bytes "
            "from there on are cut off",
            stacklevel=2,
        )
    file.seek(start)
    return file.read(end - start)
