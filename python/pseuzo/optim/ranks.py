"""The ranks of a process group as an optimizer sees them, and the messages between them.

Two axes, freely combined: the rows of the global batch are divided over R parts, and the passes of
a step over D directions. Rank row * D + direction has part `row` of the batch and the passes
p = direction, direction + D, ... of a step.

`size`, which step and estimate take, is what the loss of this rank is a mean over: rows, or tokens
with a loss. The loss of the step is sum_r size_r loss_r / sum_r size_r over the parts of the batch.
By default it is the number of per-example losses, or 1. With size 0 this rank has no rows: its
passes run on what it gives them, and what they find is ignored.

Every message is a fixed header and a body of bytes, both sent from one rank to another without
waiting in between, so a receiver needs to know no sizes. Nothing is pickled.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, distributed, nn

from pseuzo.interrupts import uninterrupted
from pseuzo.machine import refuse_replicas, world_size

if TYPE_CHECKING:
    from pseuzo.optim.base import ZeroOrder

HEADER = struct.Struct("<IIQ")  # the format of messages, the kind of this one, bytes of the body
FORMAT = 0x70727A31


class RanksDiffer(RuntimeError):
    """The ranks of a run disagree on their settings, step, data or weights; nothing was changed."""


class RankFailed(RuntimeError):
    """Another rank could not measure its part of a step; the weights were not changed."""


class Ranks:
    """The place of this process in the process group, and what its ranks have sent each other.

    direction_ranks: D, which divides the number of ranks; each part of the batch is on D ranks,
    which share the passes of a step. Messages are tensors on the CPU where the group has a backend
    for it (gloo), otherwise on the present GPU (NCCL). sent and received count their bytes, headers
    included.
    """

    def __init__(self, direction_ranks: int = 1) -> None:
        self.size, self.rank = distributed.get_world_size(), distributed.get_rank()
        check_directions("Ranks", self.size, direction_ranks)
        self.direction_ranks = direction_ranks
        self.rows = self.size // direction_ranks  # R, into how many parts a batch is divided
        self.row, self.direction = divmod(self.rank, direction_ranks)
        on_cpu = "cpu:" in distributed.get_backend_config()
        self._device = torch.device("cpu" if on_cpu else "cuda")
        self.sent = self.received = 0

    @property
    def is_root(self) -> bool:
        """Whether this is rank 0, which merges what the others measure and keeps the state."""
        return self.rank == 0

    def send(self, to: Sequence[int], kind: int, body: bytes) -> None:
        """Send a message to other ranks, and wait until the last byte has left."""
        uninterrupted(self._send, to, kind, body)

    def receive(self, rank: int) -> tuple[int, bytes]:
        """Wait for a message of another rank; return its kind and its body.

        RuntimeError if it is not there, or does not answer before the group's time-out.
        """
        (found,) = self.receive_all([rank])
        if isinstance(found, RuntimeError):
            raise found
        return found

    def receive_all(self, ranks: Sequence[int]) -> list[tuple[int, bytes] | RuntimeError]:
        """Wait for a message of each of these ranks; return their kinds and bodies, or the error of
        a rank that is not there or does not answer.

        All are asked at once, so that many ranks far away take as long as one.
        """
        return uninterrupted(self._receive_all, ranks)

    def _send(self, to: Sequence[int], kind: int, body: bytes) -> None:
        header = HEADER.pack(FORMAT, kind, len(body))
        parts = [self._tensor(part) for part in (header, body) if part]
        work = [distributed.isend(part, rank) for rank in to for part in parts]
        for one in work:
            if one is not None:
                one.wait()
        self.sent += len(to) * (len(header) + len(body))

    def _receive_all(self, ranks: Sequence[int]) -> list[tuple[int, bytes] | RuntimeError]:
        headers = [(rank, self._asked(rank, HEADER.size)) for rank in ranks]
        found: list[tuple[int, Callable[[], bytes]] | RuntimeError] = []
        for rank, header in headers:  # a body is asked for while other headers are on their way
            try:
                kind, length = _read_header(rank, header())
                found.append((kind, self._asked(rank, length)))
            except RuntimeError as error:
                found.append(error)
        messages: list[tuple[int, bytes] | RuntimeError] = []
        for one in found:
            try:
                messages.append(one if isinstance(one, RuntimeError) else (one[0], one[1]()))
            except RuntimeError as error:
                messages.append(error)
        return messages

    def _asked(self, rank: int, length: int) -> Callable[[], bytes]:
        """Ask a rank for its next bytes. Returns a function that waits for them, and returns them
        or raises RuntimeError."""
        if not length:
            return bytes
        part = torch.empty(length, dtype=torch.uint8, device=self._device)
        try:
            work = distributed.irecv(part, rank)
        except RuntimeError as error:
            return partial(_raised, error)

        def wait() -> bytes:
            if work is not None:
                work.wait()
            self.received += length
            return part.cpu().numpy().tobytes()

        return wait

    def _tensor(self, part: bytes) -> Tensor:
        return torch.frombuffer(bytearray(part), dtype=torch.uint8).to(self._device)


def _read_header(rank: int, header: bytes) -> tuple[int, int]:
    """The kind of a message, and the bytes of its body."""
    found, kind, length = HEADER.unpack(header)
    if found != FORMAT:
        raise RanksDiffer(
            f"rank {rank} sends messages of another format: run the same version of pseuzo on all "
            "ranks"
        )
    return kind, length


def _raised(error: RuntimeError) -> bytes:
    raise error


def check_directions(name: str, size: int, direction_ranks: int) -> None:
    if direction_ranks < 1 or size % direction_ranks:
        raise ValueError(
            f"{name}: direction_ranks must divide the number of ranks, {size}, got "
            f"{direction_ranks}"
        )


def present_ranks(name: str, direction_ranks: int) -> Ranks | None:
    """Return the ranks of the default process group; None where there is one process.

    ValueError, which begins with name, if direction_ranks does not divide their number.
    """
    size = world_size()
    check_directions(name, size, direction_ranks)
    return Ranks(direction_ranks) if size > 1 else None


def check_known(op: str, ranks: Ranks | None) -> None:
    """Raise ValueError if there are several ranks that the optimizer does not know."""
    size = world_size()
    if ranks is None and size > 1:
        raise ValueError(
            f"{op}: this is one of {size} ranks, but the optimizer was made before the process "
            "group, and would step by its own data alone; make it after init_process_group"
        )


def check_supported(o: ZeroOrder, ranks: Ranks) -> None:
    """Raise ValueError if the optimizer, its groups or its model need one process."""
    name, many = type(o).__name__, f"this is one of {ranks.size} ranks"
    if not o.in_ranks or o.parts > 1:
        refuse_replicas(name if not o.in_ranks else f"{name} with split_batch", ranks.size)
    if o.passes.captures:
        raise ValueError(f"{name}: capture is for one process, but {many}; leave capture off")
    if any(group["exact_gradient"] for group in o.param_groups):
        raise ValueError(
            f"{name}: exact_gradient groups are for one process, but {many}: gradients would have "
            "to be summed over the ranks; leave exact_gradient off"
        )
    if isinstance(o.model, nn.parallel.DistributedDataParallel):
        raise ValueError(
            f"{name}: give it the model itself and not DistributedDataParallel, which allocates "
            "gradients and waits for the other ranks in each pass"
        )
    bare = o.model is None and ranks.direction_ranks > 1
    if bare and any(p.dtype is torch.float32 for p in o.streams):
        raise ValueError(
            f"{name}: bare fp32 parameters are perturbed by writing them, and passes on other "
            "ranks would round them otherwise; give the module (or model=), or direction_ranks=1"
        )
