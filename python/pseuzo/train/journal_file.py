"""The file of a journal: its records and their bytes, how they are read, and which run owns it.

The file is a magic number, a JSON header, then one record per step. Each part carries its length
and its CRC-32, and the CRC-32 of these two, so that a wrong length is not taken for a torn tail.
"""

import hashlib
import json
import os
import struct
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from pseuzo.files import lock, unlock
from pseuzo.machine import parts_of
from pseuzo_kernels.reference import ROUNDING_VERSION

# A journal with masks has a version of its own, so that no earlier pseuzo replays it without them.
MAGIC, VERSION, MASKED_VERSION = b"PSEUZOJ\n", 3, 4
HEADER_KEYS = (
    "version",
    "noise",
    "rounding",
    "groups",
    "params",
    "dtype",
    "frozen_sha256",
    "run",
    "first_step",
    "base_sha256",
)
_LENGTH_AND_CRC = struct.Struct("<II")  # the length and the CRC-32 of a part
_CRC = struct.Struct("<I")  # the CRC-32 of these two numbers
_STEP = struct.Struct("<qqBIII")  # step, rounding seed, skipped, K, groups, unused weights
_GROUP = struct.Struct("<ddd?")  # lr, weight decay, noise scale, maximize


class JournalError(ValueError):
    """The file is not a journal, is damaged, or belongs to another run or to other weights."""


class NoHeader(JournalError):
    """The file ends before its header does: the run that began it made no step."""


@dataclass
class Record:
    """What a step did: seeds and coefficients, and the options of the groups at that step."""

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
            raise JournalError(f"a record has {len(payload)} bytes, but needs {_STEP.size} or more")
        step, rounding_seed, skipped, K, n_groups, n_unused = _STEP.unpack_from(payload)
        at = _STEP.size
        whole = at + n_groups * _GROUP.size + 4 * n_unused + 12 * K
        if len(payload) != whole:
            raise JournalError(
                f"the record of step {step} has {len(payload)} bytes, but needs {whole}"
            )
        groups = [_GROUP.unpack_from(payload, at + i * _GROUP.size) for i in range(n_groups)]
        at += n_groups * _GROUP.size
        unused = list(struct.unpack_from(f"<{n_unused}I", payload, at))
        at += 4 * n_unused
        seeds = torch.frombuffer(bytearray(payload[at : at + 8 * K]), dtype=torch.int64)
        coefs = torch.frombuffer(bytearray(payload[at + 8 * K :]), dtype=torch.float32)
        return cls(step, rounding_seed, bool(skipped), groups, unused, seeds, coefs)


def fingerprint(params: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of the names, shapes, dtypes and bytes of tensors."""
    digest = hashlib.sha256()
    for name, p in params.items():
        digest.update(f"{name} {tuple(p.shape)} {p.dtype}\n".encode())
        for part in parts_of(p.detach()):
            digest.update(part.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def frozen_fingerprint(model: nn.Module, trained: Iterable[Tensor]) -> str:
    """Return the fingerprint of the weights and buffers that are not trained, since outputs depend
    on them too."""
    ids, state = {id(p) for p in trained}, model.state_dict(keep_vars=True)
    return fingerprint(
        {name: x for name, x in state.items() if isinstance(x, Tensor) and id(x) not in ids}
    )


def framed(payload: bytes) -> bytes:
    """Make a part of the file: the length and checksums of the payload, then the payload."""
    head = _LENGTH_AND_CRC.pack(len(payload), zlib.crc32(payload))
    return head + _CRC.pack(zlib.crc32(head)) + payload


def _read_part(file: BinaryIO) -> bytes | None:
    """Read the payload of the next part; None at the end of the file, or if the part is cut
    short."""
    at, head, check = file.tell(), file.read(_LENGTH_AND_CRC.size), file.read(_CRC.size)
    if len(check) < _CRC.size:
        return None
    if zlib.crc32(head) != _CRC.unpack(check)[0]:
        raise JournalError(
            f"{file.name}: the part at byte {at} is damaged (the checksum of its length is wrong)"
        )
    length, crc = _LENGTH_AND_CRC.unpack(head)
    payload = file.read(length)
    if len(payload) < length:
        return None
    if zlib.crc32(payload) != crc:
        raise JournalError(
            f"{file.name}: the record that ends at byte {file.tell()} is damaged (its checksum is "
            "wrong)"
        )
    return payload


def mask_header(optimizer: Any) -> dict[str, Any]:
    """The part of the header that says which elements took noise; {} where all did.

    limits: one per parameter. seed: of the run, for random masks. renewed: they are other ones in
    each step.
    """
    masks = optimizer.masks
    if masks is None:
        return {}
    limits = [masks.limits[p] for group in optimizer.param_groups for p in group["params"]]
    random = masks.seed is not None
    about = {"seed": optimizer.seed if random else None, "renewed": optimizer.renew_mask}
    return {"version": MASKED_VERSION, "masks": {"limits": limits, **about}}


def read_header(file: BinaryIO) -> dict[str, Any]:
    """Read the header of a journal. JournalError if this version cannot replay it."""
    begins = file.read(len(MAGIC))
    if not MAGIC.startswith(begins):
        raise JournalError(f"{file.name} is not a journal of pseuzo")
    payload = _read_part(file)
    if payload is None:
        raise NoHeader(
            f"{file.name}: the header is cut short; the run ended before its first step, so delete "
            "it"
        )
    try:
        header = json.loads(payload)
    except ValueError:
        header = None
    if not isinstance(header, dict) or "version" not in header:
        raise JournalError(
            f"{file.name}: the header cannot be read; the file is damaged, or not pseuzo's"
        )
    if header["version"] not in (VERSION, MASKED_VERSION):
        raise JournalError(
            f"{file.name} has version {header['version']}, but this pseuzo reads versions "
            f"{VERSION} and {MASKED_VERSION}"
        )
    if lacking := [key for key in HEADER_KEYS if key not in header]:
        raise JournalError(
            f"{file.name}: the header lacks {lacking[0]!r}; the file is damaged, or not pseuzo's"
        )
    rule = header.get("rounding_version", 1)  # the first version did not write its number
    sixteen_bits = any(entry["dtype"] != "float32" for entry in header["params"])
    if rule != ROUNDING_VERSION and header["rounding"] == "stochastic" and sixteen_bits:
        raise JournalError(
            f"{file.name} belongs to a run whose 16-bit weights were rounded stochastically by "
            f"version {rule} of the rule, but this pseuzo has version {ROUNDING_VERSION}; replay "
            "or resume it with the pseuzo that wrote it"
        )
    # All other weights have the same bits under every version of the rule.
    return header | {"rounding_version": ROUNDING_VERSION}


def read_record(file: BinaryIO, step: int) -> Record | None:
    """Read the record of this step; None at the end of the file, or if the record is cut short.

    JournalError if the next record belongs to another step.
    """
    payload = _read_part(file)
    if payload is None:
        return None
    record = Record.unpack(payload)
    if record.step != step:
        raise JournalError(
            f"{file.name}: the record of step {step} is expected, but that of {record.step} found"
        )
    return record


def read_journal(
    path: str | os.PathLike, *, until: int | None = None, salvage: bool = False
) -> tuple[dict[str, Any], Iterator[Record]]:
    """Return the header, and an iterator over the records of the steps before `until`.

    A torn last record is left out, with a warning. Damage raises JournalError when the iterator
    reaches it; with salvage, the damaged record and all that follow are left out, and a warning
    says what was lost. Also raises OSError.
    """
    with open(path, "rb") as file:
        header, start = read_header(file), file.tell()

    def records() -> Iterator[Record]:
        step = header["first_step"]
        lost = "the last record is cut short, as by a crash; it is left out"
        with open(path, "rb") as file:
            end = file.seek(start)
            while until is None or step < until:
                try:
                    record = read_record(file, step)
                except JournalError as error:
                    if not salvage:
                        raise JournalError(f"{error}{_usable(step, header)}") from None
                    record = None
                    lost = f"damaged from byte {end} on: step {step} and all after it are lost"
                if record is None:
                    if n := file.seek(0, os.SEEK_END) - end:
                        warnings.warn(f"{path}: {lost} ({n} bytes)", stacklevel=2)
                    return
                yield record
                step, end = step + 1, file.tell()

    return header, records()


def _usable(step: int, header: Mapping[str, Any]) -> str:
    if step == header["first_step"]:
        return ""
    return f"; what precedes step {step} can be replayed: --until {step}, or --salvage"


def owner(path: str | os.PathLike) -> tuple[str | None, int]:
    """Return the run that owns a journal, and the number of whole records in it.

    None, 0 if there is no file, an empty one, or one that ends before its header does. Raises
    JournalError if the file is not a journal.
    """
    if not os.path.exists(path):
        return None, 0
    with open(path, "rb") as file:
        try:
            header = read_header(file)
        except NoHeader:
            return None, 0
        step = header["first_step"]
        try:
            while read_record(file, step):
                step += 1
        except JournalError:
            pass  # the records before the damage are whole
    return header["run"], step - header["first_step"]


def has_header(path: str | os.PathLike) -> bool:
    """Return whether a file has the whole header of a journal; False if it ends before. Raises
    JournalError if the file is not a journal."""
    with open(path, "rb") as file:
        try:
            read_header(file)
        except NoHeader:
            return False
    return True


def hold(path: str | os.PathLike) -> BinaryIO:
    """Open or make the file of a journal, and lock it until unlock(file).

    Raises JournalError if it is in use.
    """
    for _ in range(10):
        file = open(path, "r+b", buffering=0, opener=_make)
        if not lock(file):
            file.close()
            raise JournalError(
                f"{path} is in use by another run; choose a new file, or wait for its end (in "
                "Python: close() the other journal first)"
            )
        if is_at(file, path):
            return file
        unlock(file)  # the file was removed or renamed before it was locked
        file.close()
    raise JournalError(f"{path} is replaced whenever it is opened; choose a file on another disk")


def _make(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CREAT, 0o666)


def is_at(file: BinaryIO, path: str | os.PathLike) -> bool:
    """Return whether an open file is still the one of that name."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


@contextmanager
def held(path: str | os.PathLike) -> Iterator[None]:
    """Lock the file of a journal for the length of a `with` block; see hold."""
    file = hold(path)
    try:
        yield
    finally:
        unlock(file)
        file.close()
