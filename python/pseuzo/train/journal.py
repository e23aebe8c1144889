"""The journal of a run: per step, the seeds and coefficients of its update. Base weights + journal = trained weights.

    opt = PseuZO(model, ...)
    with Journal("run.pzj", opt):           # each opt.step(...) appends a record, about 200 bytes
        ...
    replay("run.pzj", base_model)           # bit for bit the weights of the run, on any device

Updates are defined to the bit (see pseuzo_kernels.reference), so the journal is the smallest checkpoint there is. With
noise "normal" that holds on one backend; others agree to a few ulp of the noise.

The file: a magic number, a JSON header, then records; each part carries its length, its CRC-32, and one of these two,
so that a wrong length is not taken for a torn tail. A record is in the file before the next step ends, so a crash of
the process loses at most the last one. It is on the disk, where it outlasts a loss of power, at sync(), which
PseuZOTrainer calls at every checkpoint, and between these as often as a hundredth of the time allows. A torn tail is
recognised, and cut off on reopening. What precedes damage can be replayed.

A journal belongs to one run: its header and the state of the optimizer carry the same identifier. No other run
shortens it or goes on with it, and it is locked while it is open.
"""

import hashlib
import json
import os
import secrets
import struct
import time
import warnings
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from pseuzo.files import lock, sync, unlock
from pseuzo.machine import Fetched, holds_codes, parts_of
from pseuzo.optim.base import ZeroOrder
from pseuzo_kernels.reference import ROUNDING_VERSION

MAGIC, VERSION = b"PSEUZOJ\n", 3
SYNC_SHARE = 0.01  # of the time, at most, is spent on waiting for the disk between checkpoints
STEPS_AT_ONCE = 64  # that a replay makes in a pass over the weights
_HEADER = ("version", "noise", "rounding", "groups", "params", "dtype", "frozen_sha256", "run", "first_step",
           "base_sha256")  # fmt: skip
_LENGTH, _CRC = (
    struct.Struct("<II"),
    struct.Struct("<I"),
)  # length and CRC-32 of a part; CRC-32 of these
_STEP = struct.Struct("<qqBIII")  # step, rounding seed, skipped, K, groups, unused weights
_GROUP = struct.Struct("<ddd?")  # lr, weight decay, noise scale, maximize


class JournalError(ValueError):
    """The file is not a journal, is damaged, is another run's, or belongs to other weights; the message says which."""


@dataclass
class Record:
    step: int
    rounding_seed: int
    skipped: bool
    groups: list[tuple[float, float, float, bool]]  # lr, weight decay, noise scale, maximize
    unused: list[int]  # positions in the header's list of parameters
    seeds: Tensor  # [K] int64
    coefs: Tensor  # [K] fp32, before lr

    def pack(self) -> bytes:
        head = _STEP.pack(
            self.step,
            self.rounding_seed,
            self.skipped,
            len(self.seeds),
            len(self.groups),
            len(self.unused),
        )
        groups = b"".join(_GROUP.pack(*g) for g in self.groups)
        unused = struct.pack(f"<{len(self.unused)}I", *self.unused)
        return head + groups + unused + self.seeds.numpy().tobytes() + self.coefs.numpy().tobytes()

    @classmethod
    def unpack(cls, payload: bytes) -> "Record":
        if len(payload) < _STEP.size:
            raise JournalError(
                f"a record has {len(payload)} bytes where {_STEP.size} or more belong"
            )
        step, rounding_seed, skipped, K, n_groups, n_unused = _STEP.unpack_from(payload)
        at = _STEP.size
        whole = at + n_groups * _GROUP.size + 4 * n_unused + 12 * K
        if len(payload) != whole:
            raise JournalError(
                f"the record of step {step} has {len(payload)} bytes where {whole} belong"
            )
        groups = [_GROUP.unpack_from(payload, at + i * _GROUP.size) for i in range(n_groups)]
        at += n_groups * _GROUP.size
        unused = list(struct.unpack_from(f"<{n_unused}I", payload, at))
        at += 4 * n_unused
        seeds = torch.frombuffer(bytearray(payload[at : at + 8 * K]), dtype=torch.int64)
        coefs = torch.frombuffer(bytearray(payload[at + 8 * K :]), dtype=torch.float32)
        return cls(step, rounding_seed, bool(skipped), groups, unused, seeds, coefs)


def fingerprint(params: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, shapes, dtypes and bytes."""
    digest = hashlib.sha256()
    for name, p in params.items():
        digest.update(f"{name} {tuple(p.shape)} {p.dtype}\n".encode())
        for part in parts_of(p.detach()):
            digest.update(part.cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _frozen(model: nn.Module, trained: Iterable[Tensor]) -> str:
    """fingerprint of the model's weights and buffers that are not trained: the outputs depend on them as well."""
    ids, state = {id(p) for p in trained}, model.state_dict(keep_vars=True)
    return fingerprint(
        {name: x for name, x in state.items() if isinstance(x, Tensor) and id(x) not in ids}
    )


def _part(payload: bytes) -> bytes:
    head = _LENGTH.pack(len(payload), zlib.crc32(payload))
    return head + _CRC.pack(zlib.crc32(head)) + payload


def _read_part(file: BinaryIO) -> bytes | None:
    """The next part; None at the end of the file or at a torn tail, where the part is cut short."""
    at, head, check = file.tell(), file.read(_LENGTH.size), file.read(_CRC.size)
    if len(check) < _CRC.size:
        return None
    if zlib.crc32(head) != _CRC.unpack(check)[0]:
        raise JournalError(
            f"{file.name}: what begins at byte {at} is damaged (the checksum of its length is wrong)"
        )
    length, crc = _LENGTH.unpack(head)
    payload = file.read(length)
    if len(payload) < length:
        return None
    if zlib.crc32(payload) != crc:
        raise JournalError(
            f"{file.name}: the record that ends at byte {file.tell()} is damaged (its checksum is wrong)"
        )
    return payload


def _read_header(file: BinaryIO) -> dict[str, Any]:
    if file.read(len(MAGIC)) != MAGIC:
        raise JournalError(f"{file.name} is not a journal of pseuzo")
    payload = _read_part(file)
    if payload is None:
        raise JournalError(
            f"{file.name}: the header is cut short; the run ended before its first step, so delete it"
        )
    try:
        header = json.loads(payload)
    except ValueError:
        header = None
    if not isinstance(header, dict) or "version" not in header:
        raise JournalError(
            f"{file.name}: the header cannot be read; the file is damaged, or not pseuzo's"
        )
    if header["version"] != VERSION:
        raise JournalError(
            f"{file.name} has version {header['version']}, this pseuzo reads version {VERSION}"
        )
    if lacking := [key for key in _HEADER if key not in header]:
        raise JournalError(
            f"{file.name}: the header lacks {lacking[0]!r}; the file is damaged, or not pseuzo's"
        )
    rule = header.get("rounding_version", 1)  # the first one was not written down
    sixteen_bits = any(entry["dtype"] != "float32" for entry in header["params"])
    if rule != ROUNDING_VERSION and header["rounding"] == "stochastic" and sixteen_bits:
        raise JournalError(
            f"{file.name} is of a run whose 16-bit weights were rounded stochastically by version {rule} of the rule, "
            f"this pseuzo has version {ROUNDING_VERSION}; replay or resume it with the pseuzo that wrote it"
        )
    return header | {
        "rounding_version": ROUNDING_VERSION
    }  # other weights have the same bits under both


def _next_record(file: BinaryIO, step: int) -> Record | None:
    """The record of this step; None at the end of the file or at a torn tail. JournalError if another one is there."""
    payload = _read_part(file)
    if payload is None:
        return None
    record = Record.unpack(payload)
    if record.step != step:
        raise JournalError(
            f"{file.name}: where the record of step {step} belongs, there is that of {record.step}"
        )
    return record


def read_journal(
    path: str | os.PathLike, *, until: int | None = None, salvage: bool = False
) -> tuple[dict[str, Any], Iterator[Record]]:
    """The header, and an iterator over the records, until before that step. Raises JournalError, OSError.

    A torn last record is left out, with a warning. Damage is an error when the iterator comes to it; with salvage it is
    left out like a torn record, with all that follows, and a warning says what was lost.
    """
    with open(path, "rb") as file:
        header, start = _read_header(file), file.tell()

    def records() -> Iterator[Record]:
        step, lost = (
            header["first_step"],
            "the last record is cut short, as by a crash; it is left out",
        )
        with open(path, "rb") as file:
            end = file.seek(start)
            while until is None or step < until:
                try:
                    record = _next_record(file, step)
                except JournalError as error:
                    if not salvage:
                        some = f"; what precedes step {step} can be replayed: --until {step}, or --salvage"
                        raise JournalError(
                            f"{error}{some if step > header['first_step'] else ''}"
                        ) from None
                    record, lost = (
                        None,
                        f"damaged from byte {end} on: step {step} and all after it are lost",
                    )
                if record is None:
                    if n := file.seek(0, os.SEEK_END) - end:
                        warnings.warn(f"{path}: {lost} ({n} bytes)", stacklevel=2)
                    return
                yield record
                step, end = step + 1, file.tell()

    return header, records()


def owner(path: str | os.PathLike) -> tuple[str | None, int]:
    """The identifier of the run that writes a journal, and the number of whole records in it; None, 0 where there is no
    file, or an empty one. Raises JournalError if the file is no journal."""
    if not os.path.exists(path) or not os.path.getsize(path):
        return None, 0
    with open(path, "rb") as file:
        header = _read_header(file)
        step = header["first_step"]
        try:
            while _next_record(file, step):
                step += 1
        except JournalError:  # damage: it ends the whole ones
            pass
    return header["run"], step - header["first_step"]


def hold(path: str | os.PathLike) -> BinaryIO:
    """Open the file of a journal, or make it, and keep others out of it until unlock. JournalError if it is in use."""
    for _ in range(10):
        file = open(path, "ab", buffering=0)
        if not lock(file):
            file.close()
            raise JournalError(
                f"{path} is in use by another run; choose a new file, or wait for its end (in Python: close() the "
                "other journal first)"
            )
        if _is_at(file, path):
            return file
        unlock(file)  # it was removed or renamed before it was locked
        file.close()
    raise JournalError(
        f"{path} is another file whenever it is looked at; choose one on another disk"
    )


def _is_at(file: BinaryIO, path: str | os.PathLike) -> bool:
    """Is the open file still the one of that name?"""
    try:
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


@contextmanager
def held(path: str | os.PathLike) -> Iterator[None]:
    """hold for a while."""
    file = hold(path)
    try:
        yield
    finally:
        unlock(file)
        file.close()


class Journal:
    """Appends a record for every step of optimizer, from now on until close().

    A new file begins with the weights as they are now: keep those (the base model). An existing one is continued if it
    belongs to this optimizer: if it wrote the file, or loaded the state of one that did. Records of steps that the
    optimizer has not made, as after going back to a checkpoint, and a torn or damaged tail after its steps are cut off.
    But never all records: raises JournalError if the optimizer has made no step and the file has any, or began with
    other weights, and if the file is another run's, or in use by another journal. The same holds for a state that the
    optimizer loads while the journal is open: its next step cuts the file, or raises with nothing changed.

    A step also raises JournalError, with nothing changed, if a weight of the model was written, moved or converted
    since the last one by anything else than the optimizer, as a replay would not give these weights. Loading a state
    into the optimizer says that the weights were loaded as well. What torch does not count is not noticed: writes
    through .data or NumPy, and those to quantised weights, or to parameters that were made in inference mode.

    run: an identifier for the header of a new file, by default a random one. ValueError for an optimizer that has an
    open journal, over bare fp32 parameters, whose weights also carry the rounding of their perturbations (give it
    `model=`), or with an exact_gradient group, whose updates are no sum of seeds.
    """

    def __init__(self, path: str | os.PathLike, optimizer: ZeroOrder, *, run: str | None = None):
        self.path, self.optimizer = Path(path), optimizer
        if optimizer.journal is not None:
            raise ValueError(
                f"Journal: the optimizer writes {optimizer.journal.path} already; close() that one first"
            )
        trained = [
            (g, p) for g, group in enumerate(optimizer.param_groups) for p in group["params"]
        ]
        if optimizer.model is None and any(p.dtype is torch.float32 for _, p in trained):
            raise ValueError(
                "Journal: bare fp32 parameters are perturbed in place; give the optimizer model="
            )
        if any(group["exact_gradient"] for group in optimizer.param_groups):
            raise ValueError(
                "Journal: updates by exact_gradient are no seeds; leave out that or the journal"
            )
        names = (
            {p: n for n, p in optimizer.model.named_parameters()}
            if optimizer.model is not None
            else {}
        )
        self._position = {p: i for i, (_, p) in enumerate(trained)}
        layout = {
            "version": VERSION, "noise": optimizer.noise, "rounding": optimizer.rounding,
            "rounding_version": ROUNDING_VERSION, "groups": len(optimizer.param_groups),
            "params": [
                {"name": names.get(p, f"parameter {i}"), "group": g, "stream": optimizer.streams[p],
                 "shape": list(p.shape), "dtype": str(p.dtype).removeprefix("torch.")}
                for i, (g, p) in enumerate(trained)
            ],
            # of the model at large: adapters may be kept in another dtype than the weights they adapt
            "dtype": str(next(iter(names), trained[0][1]).dtype).removeprefix("torch."),
            "frozen_sha256": None if optimizer.model is None else _frozen(optimizer.model, self._position),
        }  # fmt: skip
        self._layout = layout
        self._pending: deque[tuple[Record, Fetched]] = deque()
        self._late = int(optimizer.device.type == "cuda")  # records that may wait for the next step
        self._next, self.run = optimizer.steps, run
        watched = optimizer.model.parameters() if optimizer.model is not None else self._position
        self._watched = [p for p in watched if not p.is_inference() and not holds_codes(p)]
        self._places: list[int] = []  # of these in memory
        self._storages: list[
            torch.UntypedStorage
        ] = []  # kept so that no other tensor gets their addresses
        self._file = hold(self.path)
        try:
            self._end = os.fstat(self._file.fileno()).st_size
            if self._end:
                self._go_on()
            else:
                self.run = run or secrets.token_hex(8)
                header = layout | {
                    "run": self.run,
                    "first_step": self._next,
                    "base_sha256": self._fingerprint(),
                }
                self._append(MAGIC + _part(json.dumps(header).encode()))
                optimizer.recorded_weights = None  # these are another journal's
            self._sync()
            sync(self.path.parent)
            self.check_weights()
            self.note_weights()
        except BaseException:
            unlock(self._file)
            self._file.close()
            raise
        optimizer.journal, optimizer.journal_run = self, self.run

    def _fingerprint(self) -> str:
        params = zip(self._layout["params"], self._position, strict=True)
        return fingerprint({entry["name"]: p for entry, p in params})

    def _go_on(self) -> None:
        """Go on where the optimizer does: cut off what the file holds of later steps. Raises JournalError if it is not
        this optimizer's file."""
        step = self.optimizer.steps
        with open(self.path, "rb") as file:
            header, end = _read_header(file), file.tell()
            if any(header[key] != value for key, value in self._layout.items()):
                raise JournalError(
                    f"{self.path} is the journal of another model or of other settings; choose a new file"
                )
            made = header["first_step"]
            if step == made:
                if _next_record(file, made) is not None:
                    raise JournalError(
                        f"{self.path} holds {owner(self.path)[1]} step(s) already, which a run from its beginning "
                        "would overwrite; choose a new file, delete this one, or resume its run from a checkpoint"
                    )
                if self._fingerprint() != header["base_sha256"]:
                    raise JournalError(
                        f"{self.path} is the journal of a run from other weights; choose a new file"
                    )
                self.optimizer.recorded_weights = None  # the fingerprint says more
            runs = {header["run"], self.run or header["run"]} | (
                {self.optimizer.journal_run} if step > made else set()
            )
            if len(runs) > 1:
                raise JournalError(
                    f"{self.path} is the journal of another run: the optimizer did not write it, and has no state of "
                    "one that did; choose a new file"
                )
            try:
                while made < step and _next_record(file, made):
                    made, end = made + 1, file.tell()
            except JournalError as error:
                raise JournalError(
                    f"{error}, and the optimizer goes on with step {step}; resume from a checkpoint of step {made} or "
                    "before, or without this journal"
                ) from None
        if made != step:
            ends = "ends before" if made < step else "begins with"
            raise JournalError(
                f"{self.path} {ends} step {made}, the optimizer goes on with step {step}"
            )
        if step > header["first_step"]:
            self.check_weights()
        self._file.truncate(end)
        self._next, self._end, self.run = step, end, header["run"]
        self.optimizer.journal_run = self.run

    def _versions(self) -> list[int]:
        """How often torch counted a write to each of the weights."""
        return list(map(attrgetter("_version"), self._watched))

    def note_weights(self) -> None:
        """Called after the optimizer wrote its weights: nobody else may, until its next step."""
        self.optimizer.recorded_weights = self._places, self._versions()

    def check_weights(self) -> None:
        """JournalError if somebody else did. Together with note_weights, 0.1 ms for 400 weights."""
        places, recorded = (
            list(map(Tensor.data_ptr, self._watched)),
            self.optimizer.recorded_weights,
        )
        if recorded not in (None, (places, self._versions())):
            how = "written" if places == recorded[0] else "moved or converted, as by model.to(...),"
            raise JournalError(
                f"{self.path}: weights were {how} since the last step by something else than the optimizer, so that a "
                "replay would not give them; load a checkpoint (weights and optimizer), or close() this journal and "
                "begin a new one, of the weights as they are"
            )
        if places != self._places:
            self._places, self._storages = places, [p.untyped_storage() for p in self._watched]

    def prepare(self) -> None:
        """Called by the optimizer before it writes an update: raises if that could not be recorded."""
        optimizer = self.optimizer
        now = {
            "noise": optimizer.noise,
            "rounding": optimizer.rounding,
            "groups": len(optimizer.param_groups),
        }
        exact = any(group["exact_gradient"] for group in optimizer.param_groups)
        if exact or any(self._layout[key] != value for key, value in now.items()):
            raise RuntimeError(
                "Journal: the optimizer's groups, noise or rounding were changed since it was opened; close it and "
                "open a new one"
            )
        self._write_pending(self._late)  # of a step before, where the disk was full
        if optimizer.steps != self._next or optimizer.journal_run != self.run:  # a state was loaded
            self._write_pending()
            self._go_on()
        self.check_weights()

    def record(
        self,
        step: int,
        rounding_seed: int,
        unused: set,
        seeds: Tensor,
        coefs: Tensor,
        found_inf: Tensor,
    ) -> None:
        """Called by the optimizer after an update. On a GPU the numbers are fetched without waiting, and written when
        the next step calls, or sync() or close(). What could not be written is kept, and no step is made before it is.
        """
        if step < self._next:  # called again, as the first call was interrupted
            self.note_weights()
            return
        groups = [
            (g["lr"], g["weight_decay"], g["noise_scale"], g["maximize"])
            for g in self.optimizer.param_groups
        ]
        positions = sorted(self._position[p] for p in unused)
        record = Record(step, rounding_seed, False, groups, positions, seeds, coefs)
        self._pending.append((record, Fetched(seeds, coefs, found_inf)))
        self._next = step + 1
        self.note_weights()
        self._write_pending(self._late)
        if time.monotonic() >= self._sync_at:
            self._sync()

    def _write_pending(self, late: int = 0) -> None:
        """Write the records that are not in the file yet, but the newest `late` ones."""
        while len(self._pending) > late:
            record, fetched = self._pending[0]
            record.seeds, record.coefs, found_inf = (
                fetched.get()
            )  # on a GPU of the step before: long here
            record.skipped = bool(found_inf)
            self._append(_part(record.pack()))
            self._pending.popleft()

    def _append(self, part: bytes) -> None:
        """Write all of it, or none if that fails."""
        try:
            rest = memoryview(part)
            while rest:
                rest = rest[self._file.write(rest) :]
        except BaseException:
            self._file.truncate(self._end)
            raise
        self._end += len(part)

    def _sync(self) -> None:
        began = time.monotonic()
        os.fsync(self._file.fileno())
        ended = time.monotonic()
        self._sync_at = ended + (ended - began) / SYNC_SHARE

    def sync(self) -> None:
        """Return when the records of all steps so far are on the disk, where they outlast a loss of power. Warns if the
        file was removed or renamed since it was opened."""
        self._write_pending()
        self._sync()
        if not _is_at(self._file, self.path):
            warnings.warn(
                f"{self.path} is not there any more: the run goes on recording in the file that was removed or renamed",
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
            self._storages.clear()
            unlock(self._file)
            self._file.close()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


@torch.no_grad()
def replay(
    path: str | os.PathLike,
    model: nn.Module | Mapping[str, Tensor],
    *,
    until: int | None = None,
    salvage: bool = False,
    progress: Any = None,
) -> int:
    """Apply a journal to the base weights, in place; returns the number of the step that would be next.

    model: a module or {name: tensor}, holding the weights the run began with (same bits, any device). until: stop
    before that step; the file may be damaged from there on. salvage: stop where the file is damaged, with a warning
    that says what is lost. progress: called with every record, for a bar. Raises JournalError, with the weights
    untouched, if they are not the base, or if a record is damaged or missing.
    """  # fmt: skip
    header, records = read_journal(path, until=until, salvage=salvage)
    have = dict(model.named_parameters()) if isinstance(model, nn.Module) else dict(model)
    missing = [entry["name"] for entry in header["params"] if entry["name"] not in have]
    if missing:
        raise JournalError(
            f"the base model lacks {missing[0]!r} and {len(missing) - 1} more weights of the journal's"
        )
    trained = [have[entry["name"]] for entry in header["params"]]
    params = [p.detach() for p in trained]
    for entry, p in zip(header["params"], params, strict=True):
        dtype = str(p.dtype).removeprefix("torch.")
        if list(p.shape) != entry["shape"] or dtype != entry["dtype"]:
            raise JournalError(
                f"{entry['name']} is {list(p.shape)} {dtype} in the base model, the run's is "
                f"{entry['shape']} {entry['dtype']}"
            )
    named = {entry["name"]: p for entry, p in zip(header["params"], params, strict=True)}
    if fingerprint(named) != header["base_sha256"]:
        raise JournalError("the base model's weights are not those that the run began with")
    frozen = header["frozen_sha256"]  # None: of bare parameters
    if frozen is not None and isinstance(model, nn.Module) and _frozen(model, trained) != frozen:
        raise JournalError(
            "the base model's weights that the run did not train are not those of the run"
        )
    wanted = list(records)  # all of it is read before anything is written
    for record in wanted:
        if len(record.groups) != header["groups"]:
            raise JournalError(
                f"{path}: the record of step {record.step} has {len(record.groups)} groups"
            )
    for first in range(0, len(wanted), STEPS_AT_ONCE):
        records = wanted[first : first + STEPS_AT_ONCE]
        _apply(records, header, params)
        for record in records if progress is not None else ():
            progress(record)
    return wanted[-1].step + 1 if wanted else header["first_step"]


def _apply(records: list[Record], header: dict[str, Any], params: list[Tensor]) -> None:
    """Updates in a row, as ZeroOrder._update makes them, in one pass over the weights of a group."""
    unused = [set(record.unused) for record in records]
    for number in range(header["groups"]):
        for device in {p.device for p in params}:
            mine = [
                i
                for i, e in enumerate(header["params"])
                if e["group"] == number and params[i].device == device
            ]
            if not mine:
                continue
            seeds, coefs, keeps, scales = [], [], [], []
            for record, left_alone in zip(records, unused, strict=True):
                lr, weight_decay, noise_scale, maximize = record.groups[number]
                seeds.append(record.seeds)
                coefs.append(record.coefs * (lr if maximize else -lr))
                keeps += [1.0 - lr * weight_decay] * len(mine)
                scales += [0.0 if record.skipped or i in left_alone else noise_scale for i in mine]
            torch.ops.pseuzo.add_noise_steps_(
                [params[i] for i in mine], torch.cat(seeds).to(device), torch.cat(coefs).to(device),
                [len(record.seeds) for record in records], [header["params"][i]["stream"] for i in mine], keeps, scales,
                header["noise"], header["rounding"] == "stochastic", [record.rounding_seed for record in records],
            )  # fmt: skip
