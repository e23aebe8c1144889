"""Weights on the host, and the few buffers on the device into which they are uploaded.

All that touches the weights of an offloaded model runs in one worker thread, in order: the updates
that a region still lacks, then its upload. While the model computes with one region, the worker
uploads the next, and updates the one after that. Nothing is ever copied back.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pseuzo.perturb.regions import DeviceMemory, Region, Regions, views


class Buffer:
    """A buffer on the device. holds: the region that is in it, and of which round it is."""

    def __init__(self, memory: Tensor) -> None:
        self.memory = memory
        self.holds: tuple[Region | None, int] = None, 0
        self._views: dict[Region, dict[nn.Parameter, Tensor]] = {}

    def parts(self, region: Region) -> dict[nn.Parameter, Tensor]:
        """The parts of the buffer for the weights of a region, the same tensors each time."""
        if region not in self._views:
            self._views[region] = views(self.memory, region.params)
        return self._views[region]


class Store:
    """The regions of a model on the host, and their buffers on the device.

    buffers: how many; two are enough to upload one region while another is used. A round is a step,
    or one forward: in it, no weight is uploaded twice, unless another region needed its buffer.
    """

    def __init__(self, regions: Regions, memory: DeviceMemory, buffers: int) -> None:
        self.regions, self.memory, self.device = regions, memory, memory.device
        # The weights without autograd, in the same memory. A session does not replace these.
        self._real = {p: p.detach() for p in regions.of}
        size = regions.largest()
        self._buffers = [Buffer(memory.take(size)) for _ in range(buffers)]
        self._kept = Buffer(memory.take(regions.residents.n_bytes()))
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="pseuzo-upload")
        self._loads: dict[Region, Future] = {}  # of this round
        self._round = 0
        self._now: Region | None = None  # the region in use
        layers = [region for region in regions.all if region.by_layer]
        # The region that followed each one in the last round, which is uploaded ahead.
        self._next: dict[Region, Region | None] = dict(pairwise(layers))
        self._addresses = self._places()
        cuda = self.device.type == "cuda"
        self._stream = torch.cuda.Stream(self.device) if cuda else None

    def _places(self) -> list[tuple[int, torch.dtype]]:
        return [(p.data_ptr(), p.dtype) for p in self.regions.of]

    @property
    def memory_of_buffers(self) -> list[Tensor]:
        return [buffer.memory for buffer in (*self._buffers, self._kept)]

    def buffer_of(self, region: Region) -> Buffer:
        """The buffer that the region is uploaded into, always the same one."""
        if region is self.regions.residents:
            return self._kept
        return self._buffers[region.number % len(self._buffers)]

    # Rounds

    def begin(self) -> None:
        """Begin a round: upload the small weights. RuntimeError if weights were moved."""
        if self._places() != self._addresses:
            raise RuntimeError(
                "offload: weights of the model were moved or converted since offload(), as by "
                "model.to(...); call offload(model, device) again"
            )
        self._round += 1
        self._loads.clear()
        self._now = None
        self._ready(self.regions.residents)

    def end(self) -> None:
        """End a round: let the worker make the updates that no upload has made."""
        if self._now is not None:
            self._next[self._now] = None
        for region in self.regions.all:
            if region.pending:
                self._worker.submit(self._settle, region)

    def serve(self, region: Region) -> None:
        """Make the weights of a region ready for what the current stream computes next."""
        if self._now is not None:
            self._next[self._now] = region
        self._now = region
        self._ready(region)
        following = self._next.get(region)
        if following is None:
            return
        if self.buffer_of(following) is not self.buffer_of(region):
            self._ask(following)
        if (after := self._next.get(following)) is not None and after.pending:
            self._worker.submit(self._settle, after)

    def _ready(self, region: Region) -> None:
        self._ask(region).result()
        if self._stream is not None:
            torch.cuda.current_stream(self.device).wait_event(region.uploaded)

    def _ask(self, region: Region) -> Future:
        """Ask the worker for the upload of a region, unless it is in its buffer already."""
        buffer = self.buffer_of(region)
        if buffer.holds != (region, self._round) or region not in self._loads:
            free = None
            if self._stream is not None:  # the end of what has used the buffer so far
                free = torch.cuda.Event()
                free.record(torch.cuda.current_stream(self.device))
            buffer.holds = region, self._round
            self._loads[region] = self._worker.submit(self._load, region, free)
        return self._loads[region]

    # In the worker

    def _load(self, region: Region, free: Any) -> None:
        self._settle(region)
        parts = self.buffer_of(region).parts(region)
        with torch.no_grad(), torch.cuda.stream(self._stream) if self._stream else nullcontext():
            if self._stream is not None:
                self._stream.wait_event(free)
            self.memory.upload([(self._real[p], part) for p, part in parts.items()])
            if self._stream is not None:
                region.uploaded = torch.cuda.Event()
                region.uploaded.record(self._stream)

    def _settle(self, region: Region) -> None:
        """Make the updates that the region still lacks, each once."""
        while region.pending:
            if region.uploaded is not None:
                region.uploaded.synchronize()  # the last upload may still read the weights
            region.pending[0]()
            region.pending.popleft()

    # Updates

    def by_region(self, params: Iterable[Tensor]) -> list[tuple[Region, list[Tensor]]]:
        """The params by the region that they are in."""
        found: dict[Region, list[Tensor]] = {}
        for p in params:
            found.setdefault(self.regions.of[p], []).append(p)  # type: ignore[index]
        return list(found.items())

    def defer(self, region: Region, update: Callable[[], Any]) -> None:
        """Make an update of weights of a region later, before they are used or read."""
        region.pending.append(update)

    def settle(self, region: Region) -> None:
        """Return when the weights of a region on the host are up to date."""
        if region.pending:
            self._worker.submit(self._settle, region).result()

    def rows(
        self,
        p: nn.Parameter,
        index: Tensor,
        made: Callable[[nn.Parameter, Tensor, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Rows of a weight, on the device. made: makes others in their place, on the host, from the
        parameter, its tensor and the index."""
        self.settle(self.regions.of[p])
        x = self._real[p]
        index = index.to(x.device).long()
        rows = F.embedding(index, x) if made is None else made(p, x, index)
        return rows.to(self.device)

    def flush(self) -> None:
        """Return when all weights on the host are up to date, and nothing reads them any more."""
        for region in (*self.regions.all, self.regions.residents):
            self.settle(region)
        if self._stream is not None:
            self._stream.synchronize()
