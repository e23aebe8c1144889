"""The journal of a run: the seeds and coefficients of every update.

    opt = PseuZO(model, ...)
    with Journal("run.pzj", opt):           # each opt.step(...) appends a record, about 200 bytes
        ...
    replay("run.pzj", base_model)           # bit for bit the weights of the run, on any device

Updates are defined to the bit (see pseuzo_kernels.reference), so the journal is the smallest
checkpoint there is. With noise "normal" that holds on one backend; others agree to a few ulp of the
noise.

A record is in the file before the next step ends, so a crash of the process loses at most the last
one. It is on the disk, where it outlasts a loss of power, at sync(), which PseuZOTrainer calls at
every checkpoint, and between checkpoints as often as a hundredth of the time allows. A torn tail is
recognised, and cut off on reopening. The records before a damaged one can be replayed.

A journal belongs to one run: its header and the state of the optimizer carry the same identifier.
No other run shortens or continues it, and it is locked while it is open.
"""

import json
import os
import secrets
import time
import warnings
from collections import deque
from collections.abc import Iterable
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pseuzo.files import sync, unlock
from pseuzo.machine import Fetched, holds_codes
from pseuzo.optim.base import ZeroOrder
from pseuzo.train.journal_file import (
    MAGIC,
    VERSION,
    JournalError,
    Record,
    fingerprint,
    framed,
    frozen_fingerprint,
    hold,
    is_at,
    owner,
    read_header,
    read_record,
)
from pseuzo_kernels.reference import ROUNDING_VERSION

SYNC_SHARE = 0.01  # the most of the time that may be spent waiting for the disk between checkpoints


class Journal:
    """Appends a record for every step of the optimizer, from now on until close().

    A new file begins with the weights as they are now: keep those (the base model). An existing
    file is continued if it belongs to this optimizer: if the optimizer wrote it, or loaded the
    state of one that did. Records of steps that the optimizer has not made, as after going back to
    a checkpoint, and a torn or damaged tail after its steps are cut off, but never all records: it
    raises JournalError if the optimizer has made no step and the file has any, or began with other
    weights, and if the file belongs to another run, or another journal uses it. The same holds for
    a state that the optimizer loads while the journal is open: its next step cuts the file, or
    raises with nothing changed.

    A step also raises JournalError, with nothing changed, if anything but the optimizer wrote,
    moved or converted a weight of the model since the last step, as a replay would not give these
    weights. Loading a state into the optimizer says that the weights were loaded as well. Writes
    that torch does not count are not noticed: those through .data or NumPy, and those to quantised
    weights, or to parameters that were made in inference mode.

    run: an identifier for the header of a new file, by default a random one. Raises ValueError for
    an optimizer that has an open journal, over bare fp32 parameters, whose weights also carry the
    rounding of their perturbations (give it `model=`), or with an exact_gradient group, whose
    updates are no sum of seeds.
    """

    def __init__(self, path: str | os.PathLike, optimizer: ZeroOrder, *, run: str | None = None):
        self.path, self.optimizer, self.run = Path(path), optimizer, run
        _check(optimizer)
        self._position = {p: i for i, (_, p) in enumerate(_trained(optimizer))}
        self._layout = _layout(optimizer)
        self._pending: deque[tuple[Record, Fetched]] = deque()
        # On a GPU a record waits for the next step, when its numbers have arrived.
        self._late = int(optimizer.device.type == "cuda")
        watched = optimizer.model.parameters() if optimizer.model is not None else self._position
        self._weights = _Watch(p for p in watched if not p.is_inference() and not holds_codes(p))
        self._file = hold(self.path)
        try:
            # How long the file is, and the step of the next record in it. They change together.
            self._written = os.fstat(self._file.fileno()).st_size, optimizer.steps
            if self._written[0]:
                self._continue()
            else:
                self._begin()
            self._sync()
            sync(self.path.parent)
            self.check_weights()
            self.note_weights()
        except BaseException:
            unlock(self._file)
            self._file.close()
            raise
        optimizer.journal, optimizer.journal_run = self, self.run

    def _begin(self) -> None:
        """Write the header of a new file."""
        self.run = self.run or secrets.token_hex(8)
        step = self.optimizer.steps
        header = self._layout | {
            "run": self.run,
            "first_step": step,
            "base_sha256": self._fingerprint(),
        }
        self._append(MAGIC + framed(json.dumps(header).encode()), step)
        self.optimizer.recorded_weights = None  # the marks are another journal's

    def _continue(self) -> None:
        """Cut off what the file holds of steps that the optimizer has not made.

        Raises JournalError if it is not this optimizer's file.
        """
        step, optimizer = self.optimizer.steps, self.optimizer
        with open(self.path, "rb") as file:
            header, end = read_header(file), file.tell()
            if any(header[key] != value for key, value in self._layout.items()):
                raise JournalError(
                    f"{self.path} is the journal of another model or of other settings; choose a "
                    "new file"
                )
            first = made = header["first_step"]
            if step == first:
                if read_record(file, first) is not None:
                    raise JournalError(
                        f"{self.path} holds {owner(self.path)[1]} step(s) already, which a run "
                        "from its beginning would overwrite; choose a new file, delete this one, "
                        "or resume its run from a checkpoint"
                    )
                if self._fingerprint() != header["base_sha256"]:
                    raise JournalError(
                        f"{self.path} is the journal of a run from other weights; choose a new file"
                    )
            runs = {header["run"], self.run or header["run"]}
            if step > first:
                runs.add(optimizer.journal_run)
            if len(runs) > 1:
                raise JournalError(
                    f"{self.path} is the journal of another run: the optimizer did not write it, "
                    "and has no state of one that did; choose a new file"
                )
            try:
                while made < step and read_record(file, made):
                    made, end = made + 1, file.tell()
            except JournalError as error:
                raise JournalError(
                    f"{error}, and the optimizer goes on with step {step}; resume from a "
                    f"checkpoint of step {made} or before, or without this journal"
                ) from None
        if made != step:
            ends = "ends before" if made < step else "begins with"
            raise JournalError(
                f"{self.path} {ends} step {made}, the optimizer goes on with step {step}"
            )
        if step > first:
            self.check_weights()
        else:
            optimizer.recorded_weights = None  # the fingerprint says more than the marks
        # An interrupt between these lines leaves journal_run as it was, or the steps unequal, so
        # that the next prepare() does all of it again.
        self._file.truncate(end)
        self._written, self.run = (end, step), header["run"]
        optimizer.journal_run = self.run

    def _fingerprint(self) -> str:
        params = zip(self._layout["params"], self._position, strict=True)
        return fingerprint({entry["name"]: p for entry, p in params})

    def note_weights(self) -> None:
        """Remember the weights as the optimizer wrote them, for the check before its next step."""
        self.optimizer.recorded_weights = self._weights.marks()

    def check_weights(self) -> None:
        """Raise JournalError if anything but the optimizer wrote the weights.

        Together with note_weights, this takes 0.1 ms for 400 weights.
        """
        if how := self._weights.changed(self.optimizer.recorded_weights):
            raise JournalError(
                f"{self.path}: weights were {how} since the last step by something else than the "
                "optimizer, so that a replay would not give them; load a checkpoint (weights and "
                "optimizer), or close() this journal and begin a new one, of the weights as they "
                "are"
            )

    @property
    def _next(self) -> int:
        """The first step that is not recorded yet."""
        return self._pending[-1][0].step + 1 if self._pending else self._written[1]

    def prepare(self) -> None:
        """Raise if the optimizer's next update cannot be recorded, before it touches a weight."""
        optimizer = self.optimizer
        if _changed(optimizer, self._layout):
            raise RuntimeError(
                "Journal: the optimizer's groups, noise or rounding were changed since it was "
                "opened; close it and open a new one"
            )
        self._write_pending(self._late)  # there are more where the disk was full
        if optimizer.steps != self._next or optimizer.journal_run != self.run:
            self._write_pending()  # a state was loaded
            self._continue()
        self.check_weights()

    def record(
        self,
        step: int,
        rounding_seed: int,
        unused: Iterable[Tensor],
        seeds: Tensor,
        coefs: Tensor,
        found_inf: Tensor,
    ) -> None:
        """Record an update that the optimizer has made.

        On a GPU the numbers are fetched without waiting, and written at the next step, sync() or
        close(). A record that could not be written is kept, and no step is made before it is in the
        file. An interrupted call may be made again: it records the step once.
        """
        if step >= self._next:
            groups = [
                (g["lr"], g["weight_decay"], g["noise_scale"], g["maximize"])
                for g in self.optimizer.param_groups
            ]
            positions = sorted(self._position[p] for p in unused)
            record = Record(step, rounding_seed, False, groups, positions, seeds, coefs)
            self._pending.append((record, Fetched(seeds, coefs, found_inf)))
        self.note_weights()
        self._write_pending(self._late)
        if time.monotonic() >= self._sync_at:
            self._sync()

    def _write_pending(self, late: int = 0) -> None:
        """Write the records that are not in the file yet, except the newest `late` ones."""
        while len(self._pending) > late:
            record, fetched = self._pending[0]
            if record.step >= self._written[1]:  # else an interrupt came between the next two lines
                record.seeds, record.coefs, found_inf = fetched.get()
                record.skipped = bool(found_inf)
                self._append(framed(record.pack()), record.step + 1)
            self._pending.popleft()

    def _append(self, part: bytes, step: int) -> None:
        """Write all of a part, or nothing if that fails. step: that of the record after it."""
        end, rest = self._written[0], memoryview(part)
        try:
            self._file.seek(end)  # an interrupted call may have written some of it
            while rest:
                rest = rest[self._file.write(rest) :]
        except BaseException:
            self._file.truncate(end)
            raise
        self._written = end + len(part), step

    def _sync(self) -> None:
        began = time.monotonic()
        os.fsync(self._file.fileno())
        ended = time.monotonic()
        self._sync_at = ended + (ended - began) / SYNC_SHARE

    def sync(self) -> None:
        """Return when the records of all steps so far are on the disk, even after a loss of power.

        Warns if the file was removed or renamed since it was opened.
        """
        self._write_pending()
        self._sync()
        if not is_at(self._file, self.path):
            warnings.warn(
                f"{self.path} is not there any more: the run goes on recording in the file that "
                "was removed or renamed",
                stacklevel=2,
            )

    def close(self) -> None:
        """Write what is left to the disk, and leave the optimizer."""
        if self._file.closed:
            return
        try:
            self.sync()
        finally:
            if self.optimizer.journal is self:
                self.optimizer.journal = None
            self._weights.forget()
            unlock(self._file)
            self._file.close()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class _Watch:
    """Notices writes to weights: by their addresses, and by torch's counts of writes."""

    def __init__(self, weights: Iterable[Tensor]):
        self._weights = list(weights)
        self._places: list[int] = []
        self._storages: list[torch.UntypedStorage] = []  # kept, so that no other gets their places

    def _versions(self) -> list[int]:
        return list(map(attrgetter("_version"), self._weights))

    def marks(self) -> tuple[list[int], list[int]]:
        """What changes when the weights do."""
        return self._places, self._versions()

    def changed(self, marks: tuple[list[int], list[int]] | None) -> str | None:
        """How the weights changed since marks() gave these (None: there are none), or None."""
        places = list(map(Tensor.data_ptr, self._weights))
        if marks not in (None, (places, self._versions())):
            return "written" if places == marks[0] else "moved or converted, as by model.to(...),"
        if places != self._places:
            self._places = places
            self._storages = [p.untyped_storage() for p in self._weights]
        return None

    def forget(self) -> None:
        self._storages.clear()


def _trained(optimizer: ZeroOrder) -> list[tuple[int, nn.Parameter]]:
    """The parameters of the optimizer, each with the number of its group."""
    return [(i, p) for i, group in enumerate(optimizer.param_groups) for p in group["params"]]


def _check(optimizer: ZeroOrder) -> None:
    """ValueError if the updates of the optimizer cannot be recorded."""
    if optimizer.journal is not None:
        raise ValueError(
            f"Journal: the optimizer writes {optimizer.journal.path} already; close() that one "
            "first"
        )
    if optimizer.model is None and any(p.dtype is torch.float32 for _, p in _trained(optimizer)):
        raise ValueError(
            "Journal: bare fp32 parameters are perturbed in place; give the optimizer model="
        )
    if not optimizer.recordable:
        raise ValueError(
            f"Journal: the updates of {type(optimizer).__name__} are no sums of seeds; leave the "
            "journal out"
        )
    if any(group["exact_gradient"] for group in optimizer.param_groups):
        raise ValueError(
            "Journal: updates by exact_gradient are no seeds; leave out that or the journal"
        )


def _changed(optimizer: ZeroOrder, layout: dict[str, Any]) -> bool:
    """Whether the optimizer can no longer be recorded in a journal of this layout."""
    now = {
        "noise": optimizer.noise,
        "rounding": optimizer.rounding,
        "groups": len(optimizer.param_groups),
    }
    exact = any(group["exact_gradient"] for group in optimizer.param_groups)
    return exact or any(layout[key] != value for key, value in now.items())


def _layout(optimizer: ZeroOrder) -> dict[str, Any]:
    """The part of the header that says which model and settings a journal is for."""
    model, trained = optimizer.model, _trained(optimizer)
    names = {p: n for n, p in model.named_parameters()} if model is not None else {}
    params = [
        {
            "name": names.get(p, f"parameter {i}"),
            "group": number,
            "stream": optimizer.streams[p],
            "shape": list(p.shape),
            "dtype": str(p.dtype).removeprefix("torch."),
        }
        for i, (number, p) in enumerate(trained)
    ]
    # The dtype of the model at large: adapters may have another than the weights they adapt.
    dtype = next(iter(names), trained[0][1]).dtype
    frozen = None if model is None else frozen_fingerprint(model, [p for _, p in trained])
    return {
        "version": VERSION,
        "noise": optimizer.noise,
        "rounding": optimizer.rounding,
        "rounding_version": ROUNDING_VERSION,
        "groups": len(optimizer.param_groups),
        "params": params,
        "dtype": str(dtype).removeprefix("torch."),
        "frozen_sha256": frozen,
    }
