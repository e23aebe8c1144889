"""Decisions of the ranks of a run: one of them decides for all, or all have to agree.

They go over the messages of pseuzo.optim.ranks, as JSON. Every rank has to make the same calls in
the same order, as with every collective operation. In a single process nothing is sent.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from typing import Any, TypeVar

from pseuzo.optim.ranks import Ranks
from pseuzo.sentences import one_line

T = TypeVar("T")
DECISION = 0x64656331  # the kind of these messages


class RefusedElsewhere(RuntimeError):
    """Another rank refused what all were to do, or differs from rank 0; that rank says why."""


@contextmanager
def one_speaks(speaks: bool) -> Iterator[None]:
    """Print nothing in a `with` block, unless this process is the one that speaks."""
    if speaks:
        yield
        return
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        yield


class Together:
    """The ranks of a run. ranks: None means that there is one process."""

    def __init__(self, ranks: Ranks | None = None):
        self.ranks = ranks

    @property
    def size(self) -> int:
        return 1 if self.ranks is None else self.ranks.size

    @property
    def rank(self) -> int:
        return 0 if self.ranks is None else self.ranks.rank

    @property
    def is_root(self) -> bool:
        """Whether this is rank 0, which alone writes files and prints."""
        return self.rank == 0

    def all_of(self, value: Any) -> list[Any]:
        """Return the values of all ranks, by rank. value: something that JSON can hold, in which
        floats stay what they are, to the bit."""
        if self.ranks is None:
            return [value]
        body, others = json.dumps(value).encode(), range(1, self.size)
        if not self.is_root:
            self.ranks.send([0], DECISION, body)
            return self._received(0)
        values = [json.loads(body), *(self._received(rank) for rank in others)]
        self.ranks.send(others, DECISION, json.dumps(values).encode())
        return values

    def _received(self, rank: int) -> Any:
        assert self.ranks is not None
        kind, body = self.ranks.receive(rank)
        if kind != DECISION:
            raise RuntimeError(f"rank {rank} is at another place of the run; start it again")
        return json.loads(body)

    def agreed(self, call: Callable[[], T]) -> T:
        """Run call() on every rank, and return what it returned here. Where it raised, the first of
        these ranks raises that, and the others RefusedElsewhere."""
        if self.ranks is None:
            return call()
        result, error = None, None
        try:
            result = call()
        except Exception as raised:
            error = raised
        words = error and one_line(error)
        said = self.all_of(words)
        first = next((rank for rank, sentence in enumerate(said) if sentence is not None), None)
        if error is not None and first == self.rank:
            raise error
        if first is not None:
            raise RefusedElsewhere(f"rank {first}: {said[first]}") from error
        return result  # type: ignore[return-value]  # call() returned it

    def of_root(self, decide: Callable[[], T]) -> T:
        """Return what decide() returns on rank 0, which alone calls it; see agreed. The others get
        what JSON makes of that: a tuple becomes a list."""
        mine = self.agreed(lambda: decide() if self.is_root else None)
        if self.ranks is None:
            return mine  # type: ignore[return-value]  # this is the root
        found = self.all_of(mine)[0]
        return mine if self.is_root else found  # type: ignore[return-value]

    def alike(self, facts: Callable[[], Mapping[str, Any]]) -> None:
        """Raise, on all ranks, if one has other facts than rank 0: ValueError on rank 0. A single
        process does not ask for its facts."""
        if self.ranks is None:
            return
        root, *others = self.all_of({name: str(fact) for name, fact in facts().items()})
        for rank, theirs in enumerate(others, 1):
            for name in root:
                if theirs.get(name) == root[name]:
                    continue
                sentence = (
                    f"rank {rank} has {name} {theirs.get(name)}, and rank 0 has {root[name]}: all "
                    "ranks of a run need the same"
                )
                raise (ValueError if self.is_root else RefusedElsewhere)(sentence)

    def one_speaks(self) -> AbstractContextManager[None]:
        """Print nothing in a `with` block, except on rank 0."""
        return one_speaks(self.is_root)
