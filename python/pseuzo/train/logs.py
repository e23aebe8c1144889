"""The log of a run: rows of training steps, fetched while the next steps run, and their time."""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import TrainerState

from pseuzo.machine import Fetched, peak_memory
from pseuzo.models.positions import IGNORED
from pseuzo.optim.base import ZeroOrder

_log = logging.getLogger(__name__)

STATE = ("global_step", "epoch", "num_input_tokens_seen")  # what the Trainer adds to a row


class AtBeginning(TrainerCallback):
    """Calls a function when everything is loaded, before the first step."""

    def __init__(self, function: Callable[[], None]):
        self.function = function

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.function()


class StepLog:
    """Counts on the device what training steps log, and emits their rows when they have arrived.

    The host waits for the device only when two rows are pending, and then for the older one. This
    limits how far it runs ahead.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._tokens = torch.zeros((), dtype=torch.int64, device=device)
        self._masked = torch.zeros_like(self._tokens)  # rows so far whose labels are all -100
        self._masked_warned = 0
        self._losses = torch.zeros(2)  # sum and number of the finite ones
        self._waiting: deque[tuple[Fetched, Callable[[list], None]]] = deque()
        self._began, self._last = time.perf_counter(), 0.0

    def begin(self, history: list[dict[str, Any]]) -> None:
        """Begin a run, or continue one with this history."""
        before = max((row.get("train_seconds", 0.0) for row in history), default=0.0)
        self._began, self._last = time.perf_counter() - before, before
        self._masked_warned = max((row.get("masked_rows", 0) for row in history), default=0)
        self._masked.fill_(self._masked_warned)
        self._tokens.zero_()
        self._losses.zero_()
        self._waiting.clear()

    def end(self) -> None:
        self._warn_of_masked(int(self._masked))

    def seconds(self, now: float | None = None) -> float:
        """Return the seconds of training so far."""
        return round((time.perf_counter() if now is None else now) - self._began, 4)

    def count(self, inputs: dict[str, Any], measured: bool = True) -> None:
        """Count the tokens of a batch, if any pass reads them, and its rows that have no loss."""
        mask, ids = inputs.get("attention_mask"), inputs.get("input_ids")
        if not measured:
            pass
        elif mask is not None:
            self._tokens += mask.sum()
        elif ids is not None:
            self._tokens += ids.numel()
        if "targets" in inputs:
            self._masked += (inputs["targets"] == IGNORED).all(-1).sum()

    def finite(self, loss: Tensor, mean: Tensor) -> Tensor:
        """Return the loss, or the given mean of earlier ones if it is not finite.

        A step with such a loss is skipped, and must not spoil the mean that is logged.
        """
        if self._losses.device != loss.device:
            self._losses = self._losses.to(loss.device)
        finite = loss.isfinite()
        self._losses += torch.stack([torch.where(finite, loss, 0.0).float(), finite.float()])
        return torch.where(finite, loss, mean)

    def add(
        self,
        row: dict[str, Any],
        optimizer: ZeroOrder | None,
        state: TrainerState,
        forwards: Callable[[int], int],
        emit: Callable[[dict[str, Any]], None],
    ) -> None:
        """Add a row of the steps since the last one; emit gets it when its numbers are here.

        optimizer: the one whose figures the row gets; None for a first-order one. forwards: returns
        the forward passes of the first n steps.
        """
        figures: dict[str, Any] = {"tokens": self._tokens, "masked_rows": self._masked}
        if optimizer is not None:
            total, count = self._losses
            figures |= {"loss": total / count} | _figures(optimizer)
        tensors = {name: x for name, x in figures.items() if isinstance(x, Tensor)}
        numbers = [x.to(self.device).double().reshape(()) for x in tensors.values()]
        then = {name: getattr(state, name) for name in STATE}
        complete = partial(
            self._complete, row | figures, list(tensors), state, then, forwards, emit
        )
        self._waiting.append((Fetched(torch.stack(numbers)), complete))
        self._tokens.zero_()
        self._losses.zero_()
        self.emit()

    def emit(self, wait: bool = False) -> None:
        """Emit the rows that have arrived. wait: wait for all of them."""
        while self._waiting and (wait or len(self._waiting) > 1 or self._waiting[0][0].here()):
            fetched, complete = self._waiting.popleft()
            complete(fetched.get()[0].tolist())

    def _complete(
        self,
        row: dict[str, Any],
        names: list[str],
        state: TrainerState,
        then: dict[str, Any],
        forwards: Callable[[int], int],
        emit: Callable[[dict[str, Any]], None],
        values: list,
    ) -> None:
        row |= zip(names, values, strict=True)
        row["loss"] = round(row["loss"], 6)
        if "skipped_steps" in row:
            row["skipped_steps"] = int(row["skipped_steps"])
        if masked := int(row.pop("masked_rows")):
            row["masked_rows"] = masked
            self._warn_of_masked(masked)
        # The Trainer writes the state into the row: it must be that of the row's step.
        now = {name: getattr(state, name) for name in then}
        vars(state).update(then)
        try:
            row |= {"forwards": forwards(state.global_step), "train_seconds": self.seconds()}
            seconds = max(row["train_seconds"] - self._last, 1e-9)
            if tokens := row.pop("tokens"):  # a batch of a user's own may have none
                row["tokens_per_second"] = round(tokens / seconds, 1)
            self._last = row["train_seconds"]
            row["peak_memory_mib"] = round(peak_memory(self.device), 1)
            emit(row)
        finally:
            vars(state).update(now)

    def _warn_of_masked(self, rows: int) -> None:
        """Warn of the first rows without a loss, and whenever there are ten times as many."""
        if rows > self._masked_warned and rows >= 10 * self._masked_warned:
            self._masked_warned = rows
            _log.warning(
                "%d training row(s) so far have no loss, as all their labels are -100 (an answer "
                "may have been cut off). They teach nothing, and a step whose batch has no other "
                "rows is skipped",
                rows,
            )

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count the time of a `with` block as time of training."""
        self.emit(wait=True)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        started = time.perf_counter()
        try:
            yield
        finally:
            self._began += time.perf_counter() - started


def _figures(optimizer: ZeroOrder) -> dict[str, Any]:
    """Return the figures of the last step: numbers, and tensors of one element on the device."""
    stats = optimizer.stats
    if not stats:
        return {}
    slopes = stats["projected_grad"].float()
    figures = {
        "projected_grad": slopes.square().mean().sqrt() if slopes.numel() > 1 else slopes,
        "momentum": stats["momentum"],
        "window": stats["window"],
        "skipped_steps": stats["skipped_steps"],
    }
    if "curvature" in stats:  # the learning rate is in units of its inverse
        figures["curvature"] = stats["curvature"]
    if "network_bytes" in stats:  # there are several ranks
        figures["network_bytes"] = stats["network_bytes"]
    # Below 1, rounding to nearest would lose the update.
    for dtype, ulps in optimizer.update_rms().items():
        figures[f"update_ulps_{dtype}"] = ulps
    return figures
