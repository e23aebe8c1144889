"""The journal of a run: the seeds and coefficients of every update.

    opt = PseuZO(model, ...)
    with Journal("run.pzj", opt):           # each opt.step(...) appends a record, about 200 bytes
        ...
    replay("run.pzj", base_model)           # bit for bit the weights of the run, on any device

Updates are defined to the bit (see pseuzo_kernels.reference), so the journal is the smallest
possible checkpoint. With noise "normal" this holds on one backend; others agree to a few ulp of the
noise.

A record is in the file before the next step ends, so a crash of the process loses at most one. It
reaches the disk, where it survives a loss of power, at sync(). PseuZOTrainer calls that at every
checkpoint; between checkpoints the journal does so as often as a hundredth of the time allows. A
torn tail is recognised, and cut off when the file is opened again. The records before a damaged one
can be replayed.

A journal belongs to one run: its header and the state of the optimizer hold the same identifier. No
other run can shorten or continue it, and it is locked while it is open.
"""

import json
import os
import secrets
import time
import warnings
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pseuzo.files import sync, unlock
from pseuzo.machine import Fetched, holds_codes
from pseuzo.optim.base import ZeroOrder
from pseuzo.train.following import find_place
from pseuzo.train.journal_file import (
    MAGIC,
    VERSION,
    JournalError,
    Record,
    fingerprint,
    framed,
    frozen_fingerprint,
    has_header,
    hold,
    is_at,
    mask_header,
)
from pseuzo.train.journal_watch import Watch
from pseuzo_kernels.reference import ROUNDING_VERSION

SYNC_SHARE = 0.01  # the largest share of the time to wait for the disk between checkpoints


class Journal:
    """Appends a record for every step of the optimizer, from now on until close().

    A new file starts from the present weights, so keep those: they are the base model. An existing
    file is continued if this optimizer wrote it, or loaded the state of one that did. The journal
    then cuts off a torn or damaged tail, and records of steps that the optimizer has not made, as
    after a return to a checkpoint. It never cuts off all records: JournalError is raised if the
    optimizer has made no step but the file has records or started from other weights, if the file
    belongs to another run, or if another journal has it open. If the optimizer loads a state while
    the journal is open, its next step does the same, or raises with nothing changed.

    follow=True: the records of steps that the optimizer has not made are kept, and its next steps
    make these updates again (see pseuzo.train.following), also from the base weights, where the
    optimizer has made no step. Steps that need no passes then do not call their closures, and
    return None. Records from a damaged one on are cut off, with a warning, and those steps are
    measured again. Without effect where the optimizer's `history` is None.

    A step also raises JournalError, with nothing changed, if anything but the optimizer wrote,
    moved or converted a weight of the model since the last step, because a replay would not give
    these weights. When the optimizer loads a state, the weights are taken to be loaded with it.
    Writes through .data or NumPy are not noticed, nor are those to quantised weights or to
    parameters that were made in inference mode, since torch does not count them.

    run: an identifier for the header of a new file, by default a random one. Raises ValueError for
    an optimizer that has an open journal, that has bare fp32 parameters (they also contain the
    rounding of their perturbations; give it `model=`), or whose updates are not sums of seeds.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        optimizer: ZeroOrder,
        *,
        run: str | None = None,
        follow: bool = False,
    ):
        self.path, self.optimizer, self.run = Path(path), optimizer, run
        _check(optimizer)
        self._position: dict[Tensor, int] = {p: i for i, (_, p) in enumerate(_trained(optimizer))}
        self._layout = _layout(optimizer)
        self._pending: deque[tuple[Record, Fetched]] = deque()
        # On a GPU a record is written in the next step, when its numbers have arrived.
        self._late = int(optimizer.device.type == "cuda")
        watched = optimizer.model.parameters() if optimizer.model is not None else self._position
        self._weights = Watch(p for p in watched if not p.is_inference() and not holds_codes(p))
        self._file = hold(self.path)
        try:
            # The length of the file, and the step of its next record. They change together.
            self._written = os.fstat(self._file.fileno()).st_size, optimizer.steps
            if follow and not has_header(self.path):  # a kill as the run began
                self._file.truncate(0)
                self._written = 0, optimizer.steps
            if self._written[0]:
                self._continue(follow)
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
        self.optimizer.recorded_weights = None  # these marks belong to another journal

    def _continue(self, follow: bool = False) -> None:
        """Cut off what cannot be followed: torn and damaged records and, unless follow, the records
        of steps that the optimizer has not made.

        Raises JournalError if the file does not belong to this optimizer.
        """
        optimizer = self.optimizer
        found = find_place(self.path, optimizer, self._layout, self._fingerprint, self.run, follow)
        if found.from_base:
            optimizer.recorded_weights = None  # the fingerprint checks more than the marks do
        else:
            self.check_weights()
        # An interrupt between these lines leaves the old journal_run, or unequal steps, so the next
        # prepare() repeats all of it.
        self._file.truncate(found.end)
        self._written, self.run = (found.end, found.step), found.run
        optimizer.followed, optimizer.journal_run = found.followed, self.run

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
                f"{self.path}: weights were {how} since the last step by something other than the "
                "optimizer, so a replay would not give them; load a checkpoint (weights and "
                "optimizer), or close() this journal and start a new one from the present weights"
            )

    @property
    def _next(self) -> int:
        """Return the first step that is not recorded yet."""
        return self._pending[-1][0].step + 1 if self._pending else self._written[1]

    def prepare(self) -> None:
        """Raise if the next update cannot be recorded. Called before it touches the weights."""
        optimizer = self.optimizer
        if _changed(optimizer, self._layout):
            raise RuntimeError(
                "Journal: the optimizer's groups, noise or rounding were changed since it was "
                "opened; close it and open a new one"
            )
        self._write_pending(self._late)  # after a full disk, more records than usual are pending
        follows = optimizer.followed is not None and optimizer.followed.holds(optimizer.steps)
        if optimizer.journal_run != self.run or not (follows or optimizer.steps == self._next):
            self._write_pending()  # the optimizer has loaded a state
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
        close(). A record that could not be written stays pending, and no step is made before it is
        in the file. An interrupted call can be repeated: the step is recorded once.
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
            if record.step >= self._written[1]:  # else an interrupt came before the popleft() below
                record.seeds, record.coefs, found_inf = fetched.get()
                record.skipped = bool(found_inf)
                self._append(framed(record.pack()), record.step + 1)
            self._pending.popleft()

    def _append(self, part: bytes, step: int) -> None:
        """Write all of a part, or nothing if that fails. step: the step of the record after it."""
        end, rest = self._written[0], memoryview(part)
        try:
            self._file.seek(end)  # an interrupted call may have written a piece beyond the end
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
        """Return when the records of all steps so far would survive a loss of power.

        Warns if the file was removed or renamed since it was opened.
        """
        self._write_pending()
        self._sync()
        if not is_at(self._file, self.path):
            warnings.warn(
                f"{self.path} is not there any more: the run still records in the file that was "
                "removed or renamed",
                stacklevel=2,
            )

    def close(self) -> None:
        """Write the pending records to the disk, and detach from the optimizer."""
        if self._file.closed:
            return
        try:
            self.sync()
        finally:
            if self.optimizer.journal is self:
                self.optimizer.journal = self.optimizer.followed = None
            self._weights.forget()
            unlock(self._file)
            self._file.close()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _trained(optimizer: ZeroOrder) -> list[tuple[int, nn.Parameter]]:
    """List the parameters of the optimizer, each with the number of its group."""
    return [(i, p) for i, group in enumerate(optimizer.param_groups) for p in group["params"]]


def _check(optimizer: ZeroOrder) -> None:
    """Raise ValueError if the updates of the optimizer cannot be recorded."""
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
            f"Journal: the updates of {type(optimizer).__name__} are not sums of seeds; leave the "
            "journal out"
        )
    if any(group["exact_gradient"] for group in optimizer.param_groups):
        raise ValueError(
            "Journal: updates by exact_gradient are not sums of seeds; leave out one of the two"
        )


def _changed(optimizer: ZeroOrder, layout: dict[str, Any]) -> bool:
    """Return whether the optimizer can no longer be recorded in a journal of this layout."""
    now = {
        "noise": optimizer.noise,
        "rounding": optimizer.rounding,
        "groups": len(optimizer.param_groups),
    }
    exact = any(group["exact_gradient"] for group in optimizer.param_groups)
    return exact or any(layout.get(k) != v for k, v in (now | mask_header(optimizer)).items())


def _layout(optimizer: ZeroOrder) -> dict[str, Any]:
    """Return the part of the header that says which model and settings a journal is for."""
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
    # The dtype of the first weight: adapters may have another dtype than the weights they adapt.
    dtype = next(iter(names), trained[0][1]).dtype
    frozen = None if model is None else frozen_fingerprint(model, [p for _, p in trained])
    return {
        "version": VERSION,
        **mask_header(optimizer),
        "noise": optimizer.noise,
        "rounding": optimizer.rounding,
        "rounding_version": ROUNDING_VERSION,
        "groups": len(optimizer.param_groups),
        "params": params,
        "dtype": str(dtype).removeprefix("torch."),
        "frozen_sha256": frozen,
    }
