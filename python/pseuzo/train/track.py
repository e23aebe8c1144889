"""Where the candidates of a race train: one model, whose weights are the base's again in the end.

There is one copy of the trained weights, on the host. A candidate that goes on is made again from
it by its updates, which are sums of seeded noise and cost no forward pass.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pseuzo.interrupts import undoing
from pseuzo.models.readout import Readout
from pseuzo.optim.base import ZeroOrder
from pseuzo.optim.together import Together
from pseuzo.optim.update import Direction, prepare
from pseuzo.perturb.contexts import frozen_mode
from pseuzo.perturb.module import forget_passes
from pseuzo.perturb.offload import flush


class Tape:
    """A journal in memory: it has the updates of an optimizer, which it can make again."""

    def __init__(self) -> None:
        self.updates: list[tuple[Any, ...]] = []

    def prepare(self) -> None:
        """Any update can be recorded."""

    def record(self, step: int, rounding_seed: int, unused: Any, *numbers: Tensor) -> None:
        # A step of CUDA graphs has its numbers in memory that the next step overwrites.
        self.updates.append((rounding_seed, unused, *(x.clone() for x in numbers)))

    def play(self, optimizer: ZeroOrder) -> None:
        """Make all updates again, to the bit, on weights that are those of the start."""
        for rounding_seed, unused, seeds, coefs, found_inf in self.updates:
            groups = [(group, group["params"]) for group in optimizer.param_groups]
            direction = Direction(seeds, coefs, found_inf, "")
            prepare(optimizer, groups, direction, rounding_seed, unused).run()


class Track:
    """Takes candidates on by steps, and measures them.

    make: the optimizer of a candidate, at the base weights; its updates are sums of seeded noise
    over whole weights. step: makes step i of an optimizer. dev: functions that each give the loss
    of some dev rows by one forward pass; the ranks of a run share them. forwards: the passes of the
    first n steps. readout: that of the run; each candidate fits its own.
    """

    def __init__(
        self,
        model: nn.Module,
        make: Callable[[Any], Any],
        step: Callable[[Any, int], None],
        dev: Sequence[Callable[[], Tensor]],
        forwards: Callable[[int], int],
        together: Together,
        readout: Readout | None = None,
    ):
        self.model, self._make, self._step = model, make, step
        self._dev, self.forwards, self.together = dev, forwards, together
        self.readout = readout
        self._base: dict[Tensor, Tensor] = {}
        self._fitted: dict[str, Tensor] = {}  # what the readout knew before
        # The optimizer, the updates and the readout of each candidate.
        self._lanes: dict[Any, tuple[Any, Tape, dict[str, Tensor]]] = {}

    @contextmanager
    def reserved(self) -> Iterator[None]:
        """A block in which candidates may train. After it, however it ends, the weights have the
        bits that they had before."""
        flush(self.model)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self._base = {p: p.detach().to("cpu", copy=True) for p in trained}
        self._fitted = self._of_readout()
        with undoing(self._restore):
            yield
        self._base, self._lanes = {}, {}
        forget_passes(self.model)  # frees their scratch

    @torch.no_grad()
    def _restore(self) -> None:
        flush(self.model)
        for p, saved in self._base.items():
            p.copy_(saved)
        if self.readout is not None:
            self.readout.load(self._fitted)
        torch.clear_autocast_cache()

    def _of_readout(self) -> dict[str, Tensor]:
        return {} if self.readout is None else dict(self.readout.state)

    @property
    def evaluation(self) -> int:
        """The forward passes of `loss`."""
        return len(self._dev)

    def price(self, before: int, to: int) -> int:
        """The forward passes of `go` for a candidate that has made some steps before."""
        return self.forwards(to) - self.forwards(before) + self.evaluation

    def go(self, candidate: Any, steps: int) -> float:
        """Take a candidate on to this number of steps; return its loss on the dev rows."""
        self._restore()
        optimizer, tape, fitted = self._lanes.pop(candidate, (None, Tape(), {}))
        if optimizer is not None and self.readout is not None:
            self.readout.load(fitted)
        if optimizer is None:
            optimizer = self._make(candidate)
            optimizer.journal = tape
        tape.play(optimizer)
        for i in range(len(tape.updates), steps):
            self._step(optimizer, i)
        self._lanes[candidate] = optimizer, tape, self._of_readout()
        return self.loss()

    @torch.no_grad()
    def loss(self) -> float:
        """The mean loss of the dev rows, as all ranks know it."""
        mine = range(self.together.rank, len(self._dev), self.together.size)
        with frozen_mode(self.model):
            found = [(i, float(self._dev[i]())) for i in mine]
        losses = dict(pair for pairs in self.together.all_of(found) for pair in pairs)
        return sum(losses.values()) / len(losses)
