"""Counts the steps that were skipped, for example because something was not finite."""

import warnings

import torch
from torch import Tensor

from pseuzo.machine import Fetched

NOT_FINITE = (
    "the loss or the projected gradient was NaN or infinite (as where no label carries a loss)"
)


class Skips:
    """Counts skipped steps on the device, and warns once the count reaches the host, without
    waiting for it.

    It warns at the first skipped step, and whenever there are ten times as many as at the last
    warning. reason: why steps were skipped, for the warning.
    """

    def __init__(self, count: int = 0, device: torch.device | None = None) -> None:
        self.count: Tensor | None = None
        self.reason = NOT_FINITE
        if device is not None:
            self.count = torch.full((1,), count, dtype=torch.int64, device=device)
        self._news: Fetched | None = None
        self._told = count

    def total(self) -> int:
        """Wait for the device, and return the count."""
        return 0 if self.count is None else int(self.count)

    def after(self, found_inf: Tensor) -> Tensor:
        """The count after a step with this flag, [1] int64. `count` itself stays as it is."""
        count = found_inf.long().view(1)
        return count if self.count is None else self.count + count.to(self.count.device)

    def tell(self) -> None:
        """Warn about skipped steps that the host knows about, and fetch the present count."""
        self._warn()
        if self.count is None:
            return
        if not self.count.is_cuda:
            self._news = Fetched(self.count)
            self._warn()
        elif self._news is None and not torch.cuda.is_current_stream_capturing():
            self._news = Fetched(self.count)

    def _warn(self) -> None:
        if self._news is None or not self._news.here():
            return
        total = int(self._news.get()[0])
        self._news = None
        # A run that diverged would otherwise warn at every step.
        if total > self._told and total >= 10 * self._told:
            self._told = total
            warnings.warn(
                f"{total} step(s) skipped so far: {self.reason}; the weights were left as they "
                "are. Lower lr or eps, or use float32, if this continues",
                stacklevel=6,
            )
