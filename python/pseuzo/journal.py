"""The journal of a run: per step, the seeds and coefficients of its update. Base weights + journal = trained weights.

    opt = PseuZO(model, ...)
    with Journal("run.pzj", opt):           # each opt.step(...) appends a record, about 200 bytes
        ...
    replay("run.pzj", base_model)           # bit for bit the weights of the run, on any device

Updates are defined to the bit (see pseuzo_kernels.reference), so the journal is the smallest checkpoint there is. With
noise "normal" that holds on one backend; others agree to a few ulp of the noise.

The file: a magic number, a JSON header, then records; each part carries its length, its CRC-32, and one of these two,
so that a wrong length is not taken for a torn tail. A record is in the file before the next step ends, so a crash loses
at most the last one; a torn tail is recognised, and cut off on reopening.
"""

import hashlib
import json
import os
import struct
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from pseuzo.files import lock, unlock
from pseuzo.machine import Fetched, parts_of
from pseuzo.optimizer import ZeroOrder
from pseuzo_kernels.reference import ROUNDING_VERSION

MAGIC, VERSION = b"PSEUZOJ\n", 2
STEPS_AT_ONCE = 64  # that a replay makes in a pass over the weights
_HEADER = ("version", "noise", "rounding", "groups", "params", "dtype", "frozen_sha256", "first_step", "base_sha256")
_LENGTH, _CRC = struct.Struct("<II"), struct.Struct("<I")  # length and CRC-32 of a part; CRC-32 of these
_STEP = struct.Struct("<qqBHHI")  # step, rounding seed, skipped, K, groups, unused weights
_GROUP = struct.Struct("<ddd?")  # lr, weight decay, noise scale, maximize


class JournalError(ValueError):
    """The file is not a journal, is damaged, or belongs to other weights; the message says which."""


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
            self.step, self.rounding_seed, self.skipped, len(self.seeds), len(self.groups), len(self.unused)
        )
        groups = b"".join(_GROUP.pack(*g) for g in self.groups)
        unused = struct.pack(f"<{len(self.unused)}I", *self.unused)
        return head + groups + unused + self.seeds.numpy().tobytes() + self.coefs.numpy().tobytes()

    @classmethod
    def unpack(cls, payload: bytes) -> "Record":
        if len(payload) < _STEP.size:
            raise JournalError(f"a record has {len(payload)} bytes where {_STEP.size} or more belong")
        step, rounding_seed, skipped, K, n_groups, n_unused = _STEP.unpack_from(payload)
        at = _STEP.size
        whole = at + n_groups * _GROUP.size + 4 * n_unused + 12 * K
        if len(payload) != whole:
            raise JournalError(f"the record of step {step} has {len(payload)} bytes where {whole} belong")
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
    return fingerprint({name: x for name, x in state.items() if isinstance(x, Tensor) and id(x) not in ids})


def _part(payload: bytes) -> bytes:
    head = _LENGTH.pack(len(payload), zlib.crc32(payload))
    return head + _CRC.pack(zlib.crc32(head)) + payload


def _read_part(file: BinaryIO) -> bytes | None:
    """The next part; None at the end of the file or at a torn tail, where the part is cut short."""
    at, head, check = file.tell(), file.read(_LENGTH.size), file.read(_CRC.size)
    if len(check) < _CRC.size:
        return None
    if zlib.crc32(head) != _CRC.unpack(check)[0]:
        raise JournalError(f"{file.name}: what begins at byte {at} is damaged (the checksum of its length is wrong)")
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
        raise JournalError(f"{file.name}: the header is cut short; the run ended before its first step")
    try:
        header = json.loads(payload)
    except ValueError:
        header = None
    if not isinstance(header, dict) or "version" not in header:
        raise JournalError(f"{file.name}: the header cannot be read; the file is damaged, or not pseuzo's")
    if header["version"] != VERSION:
        raise JournalError(f"{file.name} has version {header['version']}, this pseuzo reads version {VERSION}")
    if lacking := [key for key in _HEADER if key not in header]:
        raise JournalError(f"{file.name}: the header lacks {lacking[0]!r}; the file is damaged, or not pseuzo's")
    rule = header.get("rounding_version", 1)  # the first one was not written down
    sixteen_bits = any(entry["dtype"] != "float32" for entry in header["params"])
    if rule != ROUNDING_VERSION and header["rounding"] == "stochastic" and sixteen_bits:
        raise JournalError(
            f"{file.name} is of a run whose 16-bit weights were rounded stochastically by version {rule} of the rule, "
            f"this pseuzo has version {ROUNDING_VERSION}; replay or resume it with the pseuzo that wrote it"
        )
    return header | {"rounding_version": ROUNDING_VERSION}  # other weights have the same bits under both


def _records(file: BinaryIO) -> Iterator[tuple[Record, int]]:
    """Records with the position of their end."""
    while (payload := _read_part(file)) is not None:
        yield Record.unpack(payload), file.tell()


def read_journal(path: str | os.PathLike) -> tuple[dict[str, Any], Iterator[Record]]:
    """The header, and an iterator over the records. A torn last record is left out. Raises JournalError, OSError."""
    with open(path, "rb") as file:
        header, start = _read_header(file), file.tell()

    def records() -> Iterator[Record]:
        with open(path, "rb") as file:
            end = file.seek(start)
            for record, after in _records(file):
                end = after
                yield record
            if end < file.seek(0, os.SEEK_END):
                warnings.warn(f"{path}: the last record is cut short, as by a crash; it is left out", stacklevel=2)

    return header, records()


class Journal:
    """Appends a record for every step of optimizer, from now on until close().

    A new file begins with the weights as they are now: keep those (the base model). An existing one is gone on with if
    it is this optimizer's: records of steps that the optimizer has not made, as after going back to a checkpoint, and a
    torn tail are cut off. But never all records: raises JournalError if the optimizer has made no step and the file has
    any, or began with other weights, and if the file is another's, or in use by another journal. The same holds for a
    state that the optimizer loads while the journal is open: its next step cuts the file, or raises with nothing
    changed. ValueError for an optimizer that has an open journal, over bare fp32 parameters, whose weights also carry
    the rounding of their perturbations (give it `model=`), or with an exact_gradient group, whose updates are no sum of
    seeds.
    """

    def __init__(self, path: str | os.PathLike, optimizer: ZeroOrder):
        self.path, self.optimizer = Path(path), optimizer
        if optimizer.journal is not None:
            raise ValueError(f"Journal: the optimizer writes {optimizer.journal.path} already; close() that one first")
        trained = [(g, p) for g, group in enumerate(optimizer.param_groups) for p in group["params"]]
        if optimizer.model is None and any(p.dtype is torch.float32 for _, p in trained):
            raise ValueError("Journal: bare fp32 parameters are perturbed in place; give the optimizer model=")
        if any(group["exact_gradient"] for group in optimizer.param_groups):
            raise ValueError("Journal: updates by exact_gradient are no seeds; leave out that or the journal")
        names = {p: n for n, p in optimizer.model.named_parameters()} if optimizer.model is not None else {}
        self._position = {p: i for i, (_, p) in enumerate(trained)}
        layout = {
            "version": VERSION, "noise": optimizer.noise, "rounding": optimizer.rounding,
            "rounding_version": ROUNDING_VERSION, "groups": len(optimizer.param_groups),
            "params": [
                {"name": names.get(p, f"parameter {i}"), "group": g, "stream": optimizer._streams[p],
                 "shape": list(p.shape), "dtype": str(p.dtype).removeprefix("torch.")}
                for i, (g, p) in enumerate(trained)
            ],
            # of the model at large: adapters may be kept in another dtype than the weights they adapt
            "dtype": str(next(iter(names), trained[0][1]).dtype).removeprefix("torch."),
            "frozen_sha256": None if optimizer.model is None else _frozen(optimizer.model, self._position),
        }  # fmt: skip
        self._layout = layout
        self._pending: tuple[Record, Fetched] | None = None
        self._next = optimizer._step
        self._file = open(self.path, "ab")
        try:
            if not lock(self._file):
                raise JournalError(
                    f"{self.path} is in use by another run; choose a new file, or close() the other journal first"
                )
            if os.fstat(self._file.fileno()).st_size:
                self._go_on()
            else:
                header = layout | {"first_step": self._next, "base_sha256": self._fingerprint()}
                self._file.write(MAGIC + _part(json.dumps(header).encode()))
                self._file.flush()
        except BaseException:
            self._file.close()
            raise
        optimizer.journal = self

    def _fingerprint(self) -> str:
        params = zip(self._layout["params"], self._position, strict=True)
        return fingerprint({entry["name"]: p for entry, p in params})

    def _go_on(self) -> None:
        """Go on where the optimizer does: cut off what the file holds of later steps. Raises JournalError if it is not
        this optimizer's file."""
        step = self.optimizer._step
        with open(self.path, "rb") as file:
            header, end = _read_header(file), file.tell()
            if any(header[key] != value for key, value in self._layout.items()):
                raise JournalError(
                    f"{self.path} is the journal of another model or of other settings; choose a new file"
                )
            made = header["first_step"]
            if step == made:
                if n := sum(1 for _ in _records(file)):
                    raise JournalError(
                        f"{self.path} holds {n} step(s) already, which a run from its beginning would overwrite; "
                        "choose a new file, delete this one, or resume its run from a checkpoint"
                    )
                if self._fingerprint() != header["base_sha256"]:
                    raise JournalError(f"{self.path} is the journal of a run from other weights; choose a new file")
                file.seek(end)  # a torn first record may follow
            for record, after in _records(file):
                if record.step >= step:
                    break
                made, end = record.step + 1, after
        if made != step:
            ends = "ends before" if made < step else "begins with"
            raise JournalError(f"{self.path} {ends} step {made}, the optimizer goes on with step {step}")
        self._file.truncate(end)
        self._next = step

    def prepare(self) -> None:
        """Called by the optimizer before it writes an update: raises if that could not be recorded."""
        optimizer = self.optimizer
        now = {"noise": optimizer.noise, "rounding": optimizer.rounding, "groups": len(optimizer.param_groups)}
        exact = any(group["exact_gradient"] for group in optimizer.param_groups)
        if exact or any(self._layout[key] != value for key, value in now.items()):
            raise RuntimeError(
                "Journal: the optimizer's groups, noise or rounding were changed since it was opened; close it and "
                "open a new one"
            )
        if optimizer._step != self._next:  # a state was loaded
            self._write_pending()
            self._go_on()

    def record(
        self, step: int, rounding_seed: int, unused: set, seeds: Tensor, coefs: Tensor, found_inf: Tensor
    ) -> None:
        """Called by the optimizer after an update. On a GPU the numbers are fetched without waiting, and written when
        the next step calls, or close()."""
        self._next = step + 1
        self._write_pending()
        groups = [(g["lr"], g["weight_decay"], g["noise_scale"], g["maximize"]) for g in self.optimizer.param_groups]
        positions = sorted(self._position[p] for p in unused)
        record = Record(step, rounding_seed, False, groups, positions, seeds, coefs)
        self._pending = record, Fetched(seeds, coefs, found_inf)
        if not coefs.is_cuda:
            self._write_pending()

    def _write_pending(self) -> None:
        if self._pending is None:
            return
        record, fetched = self._pending
        record.seeds, record.coefs, found_inf = fetched.get()  # of the step before: long here
        record.skipped = bool(found_inf)
        self._pending = None
        self._file.write(_part(record.pack()))
        self._file.flush()

    def close(self) -> None:
        """Write what is left to the disk, and leave the optimizer."""
        if self._file.closed:
            return
        try:
            self._write_pending()
            os.fsync(self._file.fileno())
        finally:
            if self.optimizer.journal is self:
                self.optimizer.journal = None
            unlock(self._file)
            self._file.close()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


@torch.no_grad()
def replay(
    path: str | os.PathLike, model: nn.Module | Mapping[str, Tensor], *, until: int | None = None, progress: Any = None
) -> int:
    """Apply a journal to the base weights, in place; returns the number of the step that would be next.

    model: a module or {name: tensor}, holding the weights the run began with (same bits, any device). until: stop
    before that step. progress: called with every record, for a bar. Raises JournalError, with the weights untouched, if
    they are not the base, or if a record is damaged or missing.
    """
    header, records = read_journal(path)
    have = dict(model.named_parameters()) if isinstance(model, nn.Module) else dict(model)
    missing = [entry["name"] for entry in header["params"] if entry["name"] not in have]
    if missing:
        raise JournalError(f"the base model lacks {missing[0]!r} and {len(missing) - 1} more weights of the journal's")
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
        raise JournalError("the base model's weights that the run did not train are not those of the run")
    step = header["first_step"]
    checked = list(records)  # all of it is read before anything is written
    for record in checked:
        if record.step != step:
            raise JournalError(f"{path}: after step {step - 1} comes step {record.step}")
        if len(record.groups) != header["groups"]:
            raise JournalError(f"{path}: the record of step {step} has {len(record.groups)} groups")
        step += 1
    wanted = [record for record in checked if until is None or record.step < until]
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
            mine = [i for i, e in enumerate(header["params"]) if e["group"] == number and params[i].device == device]
            if not mine:
                continue
            seeds, coefs, keeps, scales = [], [], [], []
            for record, left_alone in zip(records, unused, strict=True):
                lr, weight_decay, noise_scale, maximize = record.groups[number]
                seeds.append(record.seeds)
                coefs.append(record.coefs * (lr if maximize else -lr))
                keeps += [1.0 if record.skipped else 1.0 - lr * weight_decay] * len(mine)
                scales += [0.0 if i in left_alone else noise_scale for i in mine]
            torch.ops.pseuzo.add_noise_steps_(
                [params[i] for i in mine], torch.cat(seeds).to(device), torch.cat(coefs).to(device),
                [len(record.seeds) for record in records], [header["params"][i]["stream"] for i in mine], keeps, scales,
                header["noise"], header["rounding"] == "stochastic", [record.rounding_seed for record in records],
            )  # fmt: skip
