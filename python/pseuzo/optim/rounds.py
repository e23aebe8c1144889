"""The messages of a round: from all ranks to the root, and from the root to all.

A rank that cannot go on says so in place of its part. The root then tells all, so that none waits
for it, and all raise the same error.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from pseuzo.optim.ranks import RankFailed, Ranks, RanksDiffer
from pseuzo.sentences import first_line

if TYPE_CHECKING:
    from pseuzo.optim.base import ZeroOrder

START, STEP, FAILED, GO, DIFFER, STOP = range(1, 7)  # kinds of messages
SENDS, REPLIES, WAITS, OVER = range(4)  # what a rank has to do next in a round
ADVICE = {
    "version": "install the same version of pseuzo on all ranks",
    "step": "call step equally often on all ranks, and load the same state",
    "settings": "give all ranks the same options, learning rates and schedules",
    "parameters": "give all ranks the same model, and train the same parameters",
    "weights": "start all ranks from the same weights, such as those of the last checkpoint",
    "data": "give all ranks the same data",
    "kind of pass": "give all ranks the same options and schedules",
}


class Rounds:
    """The rounds of one optimizer with those of the other ranks."""

    def __init__(self, optimizer: ZeroOrder, ranks: Ranks) -> None:
        self._optimizer, self.ranks = optimizer, ranks
        self._turn = SENDS

    def _collect(self, kind: int, body: bytes) -> list[bytes] | None:
        """Send this rank's body to the root, which returns those of all ranks, in order."""
        if self.ranks.is_root:
            return self._received(kind, body)
        self._turn = OVER
        self._send([0], kind, body)
        self._turn = WAITS
        return None

    def _received(self, kind: int, own: bytes) -> list[bytes]:
        """On the root: the bodies that all ranks send in this round, in order."""
        bodies, failures = [own], []
        others = range(1, self.ranks.size)
        for rank, (found, body) in zip(others, self._heard(*others), strict=True):
            bodies.append(body)
            if found == FAILED:
                failures.append(body.decode())
            elif found != kind:
                begins, goes_on = (rank, 0) if found == START else (0, rank)
                failures.append(
                    f"rank {begins} begins from a new state, and rank {goes_on} does not; load a "
                    "state on all ranks or on none"
                )
        self._turn = REPLIES
        if failures:
            raise RankFailed(f"{self._op}: {'; '.join(dict.fromkeys(failures))}")
        return bodies

    def _send(self, to: Sequence[int], kind: int, body: bytes) -> None:
        """Send a body to other ranks. RankFailed if one of them is gone."""
        try:
            self.ranks.send(to, kind, body)
        except RuntimeError as error:
            names, reason = ", ".join(map(str, to)), first_line(error)
            raise RankFailed(f"{self._op}: rank {names} cannot be heard ({reason})") from error

    def _heard(self, *ranks: int) -> list[tuple[int, bytes]]:
        """The kind and the body of each rank's message. A rank that cannot be heard has failed."""
        heard = []
        for rank, found in zip(ranks, self.ranks.receive_all(ranks), strict=True):
            if isinstance(found, RuntimeError):
                found = FAILED, f"rank {rank} cannot be heard ({first_line(found)})".encode()
            heard.append(found)
        return heard

    def _shared(self, body: bytes) -> bytes:
        """The root's body, on all ranks; an error, if that is what the root sends."""
        ranks, self._turn = self.ranks, OVER
        kind = GO
        if ranks.is_root:
            self._send(range(1, ranks.size), GO, body)
        else:
            ((kind, body),) = self._heard(0)
        if kind != GO:
            raise (RanksDiffer if kind == DIFFER else RankFailed)(body.decode())
        self._turn = SENDS
        return body

    def _give_up(self, error: BaseException) -> None:
        """Tell the ranks that wait for this one why it does not go on."""
        ranks, turn, self._turn = self.ranks, self._turn, OVER
        if turn in (WAITS, OVER) or (turn == SENDS and not isinstance(error, Exception)):
            return  # an interrupt does not wait for other ranks
        body = self._reason(error)
        if not ranks.is_root:
            with suppress(RuntimeError):
                ranks.send([0], FAILED, body)
                ranks.receive(0)
            return
        if turn == SENDS:
            self._heard(*range(1, ranks.size))
        kind = DIFFER if isinstance(error, RanksDiffer) else STOP
        for rank in range(1, ranks.size):
            with suppress(RuntimeError):
                ranks.send([rank], kind, body)

    def _reason(self, error: BaseException) -> bytes:
        """What other ranks are told about an error of this one."""
        if isinstance(error, RanksDiffer | RankFailed):
            return str(error).encode()
        return f"rank {self.ranks.rank}: {type(error).__name__}: {error}".encode()

    def _check_alike(self, what: str, values: Sequence[Hashable]) -> None:
        """Raise RanksDiffer, which names the ranks that are not like most, or not like rank 0."""
        most = Counter(values).most_common(1)[0]
        usual = values[0] if values.count(values[0]) == most[1] else most[0]
        if others := [rank for rank, value in enumerate(values) if value != usual]:
            step = self._optimizer.steps
            raise RanksDiffer(
                f"{self._op}: rank {', '.join(map(str, others))} of {len(values)} differs from the "
                f"others in {what} before step {step} ({values[others[0]]}, not {usual}); nothing "
                f"was changed; {ADVICE[what]}"
            )

    @property
    def _op(self) -> str:
        return f"{type(self._optimizer).__name__}.step"
