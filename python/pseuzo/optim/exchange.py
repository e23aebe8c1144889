"""A step of several ranks: what they measure is merged on rank 0, whose coefficients all apply.

The root (rank 0) alone computes coefficients, because another device, or another instruction set,
may round a mean or a power otherwise. Noise, updates and roundings have the same bits everywhere,
so ranks that apply the same coefficients keep the same weights. Every message to the root says what
must agree, and a rank that differs is named before anything is written.

A round is `gather`, from all ranks to the root, and `share`, from the root to all; most steps have
one. A rank's message has 48 + sum_i (8 + 8 dims_i + bytes_i) bytes for its tensors i, the root's
24 + the same sum over its own; 8 more go each way for a parameter that a pass used for the first
time.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pseuzo.optim import fingerprints
from pseuzo.optim.passes import without_autograd
from pseuzo.optim.ranks import RankFailed, Ranks, check_supported
from pseuzo.optim.rounds import FAILED, SENDS, START, STEP, Rounds
from pseuzo.optim.skips import NOT_FINITE
from pseuzo.optim.update import Direction
from pseuzo.optim.wire import packed, read_text, text, unpacked

if TYPE_CHECKING:
    from pseuzo.optim.base import ZeroOrder
    from pseuzo.optim.estimator import Measured

# What comes before the tensors. Of a rank: step; hashes of the settings, of some weights and of the
# kind of pass; how many streams of parameters follow; size, NaN if not given. Of the root: how many
# streams follow. Of outputs for another rank: step.
STATE, NEWS, STEP_OF = struct.Struct("<qIIIId"), struct.Struct("<Q"), struct.Struct("<q")
ALIKE = ("step", "settings", "weights", "kind of pass")


@dataclass(frozen=True)
class Part:
    """What one rank measured. size: of its part of the batch; None if it was not given."""

    direction: int
    size: float | None
    tensors: list[Tensor]


@dataclass(frozen=True)
class Agreed:
    """A step that all ranks will make alike: the loss of the global batch, and the update."""

    loss: Tensor
    direction: Direction


class Exchange(Rounds):
    """The steps of one optimizer with those of the other ranks."""

    def __init__(self, optimizer: ZeroOrder, ranks: Ranks) -> None:
        super().__init__(optimizer, ranks)
        check_supported(optimizer, ranks)
        self._compared = False  # whether all ranks know that they started alike
        self._size: float | None = None
        self._state = 0, 0, 0  # step, hash of the settings, hash of some weights
        self._rounds, self._kind = 0, ""
        self._used: dict[str, set[int]] = {}  # kind of pass -> the streams that all know as used
        self._news: list[int] = []  # on the root: streams that some ranks do not know yet

    def restart(self) -> None:
        """Compare all weights again before the next step, as after a state was loaded."""
        self._compared = False
        self._used.clear()

    def agree(self, measure: Callable[[], Measured], size: float | None) -> Agreed:
        """Return what all ranks will apply, given what each finds by measure().

        RanksDiffer if they disagree on what they start from, RankFailed if one cannot measure: on
        all ranks, and with nothing changed.
        """
        o, ranks = self._optimizer, self.ranks
        self._turn, self._rounds = SENDS, 0
        try:
            check_supported(o, ranks)
            o.passes.restore()  # a hash is of the weights, without what a pass has left in them
            self._size = None if size is None else checked_size(o, size)
            if not self._compared:
                self._compare()
            before = ranks.sent + ranks.received
            self._state = o.steps, fingerprints.of_settings(o, ranks), fingerprints.of_chunk(o)
            measured = measure()
            if not self._rounds:
                raise NotImplementedError(
                    f"{type(o).__name__}: its measure() merges nothing over the ranks; let it use "
                    "measure_slopes, or run it in one process"
                )
            with without_autograd():
                agreed = self._decided(measured)
        except BaseException as error:
            self._give_up(error)
            raise
        stats = dict(agreed.direction.stats)
        stats["network_bytes"] = ranks.sent + ranks.received - before
        return replace(agreed, direction=replace(agreed.direction, stats=stats))

    # Rounds

    @property
    def device(self) -> torch.device:
        """Where an optimizer's numbers are."""
        return self._optimizer.device

    @property
    def size(self) -> float | None:
        """The size of this rank's part of the batch, if the caller of the step gave it."""
        return self._size

    def mine(self, n: int) -> range:
        """Which of the n passes of a step this rank runs."""
        return range(self.ranks.direction, n, self.ranks.direction_ranks)

    def gather(self, *tensors: Tensor, kind: str, size: float | None = None) -> list[Part] | None:
        """Send this rank's tensors to the root. There, return the parts of all ranks, in order;
        elsewhere None.

        kind: that of the passes. size: of this part, where the caller of the step gave none.
        """
        o, ranks = self._optimizer, self.ranks
        size = size if self._size is None else self._size
        used = sorted(set(o.passes.used().get(kind, ())) - self._used.get(kind, set()))
        hashed = *self._state, zlib.crc32(kind.encode())
        body = STATE.pack(*hashed, len(used), math.nan if size is None else size)
        body += struct.pack(f"<{len(used)}q", *used) + packed(*tensors)
        self._rounds, self._kind = self._rounds + 1, kind
        bodies = self._collect(STEP, body)
        if bodies is None:
            return None
        states = [STATE.unpack_from(body) for body in bodies]
        for i, what in enumerate(ALIKE):
            self._check_alike(what, [state[i] for state in states])
        parts, news = [], set()
        for rank, (body, (*_, n, size)) in enumerate(zip(bodies, states, strict=True)):
            news |= set(struct.unpack_from(f"<{n}q", body, STATE.size))
            found = unpacked(memoryview(body)[STATE.size + 8 * n :])
            size = None if math.isnan(size) else size
            parts.append(Part(rank % ranks.direction_ranks, size, found))
        self._news = sorted(news)
        return parts

    def of_part(self, measure: Callable[[], list[Tensor]], n: int) -> list[Tensor]:
        """On the first rank of a part of the batch: what n passes found on it; elsewhere [].

        measure() -> what this rank's passes, mine(n), found. The other ranks of the part send it to
        the first.
        """
        ranks = self.ranks
        first, others = ranks.rank - ranks.direction, range(1, min(ranks.direction_ranks, n))
        mates = [first + direction for direction in others]
        try:
            found = measure()
        except Exception as error:
            if ranks.direction in others:
                ranks.send([first], FAILED, self._reason(error))
            elif ranks.direction == 0:
                self._heard(*mates)  # so that none waits for this rank to take its tensors
            raise
        if ranks.direction:
            if ranks.direction in others:
                self._send([first], STEP, STEP_OF.pack(self._state[0]) + packed(*found))
            return []
        by_direction = [found]
        for kind, body in self._heard(*mates):
            if kind != STEP:
                raise RankFailed(body.decode())
            if STEP_OF.unpack_from(body) != self._state[:1]:
                raise RankFailed(f"{self._op}: a rank was interrupted and is at another step")
            by_direction.append(unpacked(memoryview(body)[STEP_OF.size :]))
        d = ranks.direction_ranks
        return [by_direction[i % d][i // d] for i in range(n)]

    def share(self, *tensors: Tensor) -> list[Tensor]:
        """Send the root's tensors to all, and return them, on the optimizer's device. What other
        ranks give is ignored."""
        news = b""
        if self.ranks.is_root:
            streams = struct.pack(f"<{len(self._news)}q", *self._news)
            news = NEWS.pack(len(self._news)) + streams + packed(*tensors)
        body = self._shared(news)
        (n,) = NEWS.unpack_from(body)
        used = struct.unpack_from(f"<{n}q", body, NEWS.size)
        self._optimizer.passes.also_used(self._kind, used)
        self._used.setdefault(self._kind, set()).update(used)
        found = unpacked(memoryview(body)[NEWS.size + 8 * n :])
        return [x.to(self.device) for x in found]

    def _decided(self, measured: Measured) -> Agreed:
        """The root's loss and update, on all ranks."""
        o, root = self._optimizer, self.ranks.is_root
        given: Sequence[Tensor] = ()
        if root:
            direction = o.coefficients(measured)
            if o.journal is not None:
                o.journal.prepare()  # fail on all ranks if it cannot be recorded
            skipped, stats = bool(direction.found_inf), direction.stats
            given = (
                *(measured.loss, direction.seeds, direction.coefs, direction.found_inf),
                stats.get("projected_grad", direction.coefs[:0]),
                torch.tensor([stats.get("momentum", 0), stats.get("window", 0)]).double(),
                text(direction.skip_reason if skipped else ""),
            )
        loss, seeds, coefs, found_inf, slopes, numbers, reason = self.share(*given)
        if not root:
            momentum, window = numbers.tolist()
            stats = {"projected_grad": slopes, "momentum": momentum, "window": int(window)}
            why = read_text(reason) or NOT_FINITE
            direction = Direction(
                seeds, coefs, found_inf, measured.kind, stats=stats, skip_reason=why
            )
        return Agreed(loss, direction)

    def _compare(self) -> None:
        """Check that all ranks start alike."""
        mine = fingerprints.of_start(self._optimizer, self.ranks)
        bodies = self._collect(START, json.dumps(mine).encode())
        if bodies is not None:
            every = [json.loads(body) for body in bodies]
            for what in mine:
                self._check_alike(what, [found.get(what) for found in every])
        self._shared(b"")
        self._compared = True


def checked_size(o: ZeroOrder, size: Any) -> float:
    size = float(size)
    if not 0 <= size < math.inf:
        raise ValueError(
            f"{type(o).__name__}.step: size must be a number of rows or tokens, got {size}"
        )
    return size
