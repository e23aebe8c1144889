"""A session: ops see the copies of an offloaded model's weights that are on the device.

Each op of torch that is given a weight gets the weight's copy instead: the buffer of its region, or
x + scale * z made from that in scratch. The first such op of a region waits for its upload. Rows of
an embedding are made on the host and copied.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from pseuzo.perturb.contexts import outside_inference_mode
from pseuzo.perturb.lock_step import Lane
from pseuzo.perturb.regions import Region
from pseuzo.perturb.scratch import alike
from pseuzo.perturb.store import Store
from pseuzo_kernels.checks import signed64
from pseuzo_kernels.ops import add_noise_list_out, add_noise_rows

# What these return does not depend on the numbers in a weight, so the host's copy serves.
ABOUT = frozenset(
    ("size", "dim", "ndimension", "numel", "nelement", "stride", "element_size", "is_contiguous")
    + ("is_floating_point", "is_complex", "storage_offset", "__len__", "__hash__", "__repr__")
)
NUMBERS = frozenset(("T", "mT", "H", "mH", "data", "real", "imag"))  # attributes that do


class Perturbed(Protocol):
    """Which weights are perturbed in a pass, by which noise, and where."""

    noise: str

    @property
    def params(self) -> Mapping[nn.Parameter, tuple[int, float]]:
        """weight -> (stream, noise scale)"""

    def scratch(self, region: Region, number: int) -> dict[nn.Parameter, Tensor]:
        """Memory for the perturbed weights of a region, in the session of this number."""


class Aim:
    """What one pass sees: x + scale * z(seed) for the weights of its passes.

    reached: the weights that passes of its kind have used, to which this one adds.
    """

    def __init__(
        self,
        passes: Perturbed,
        seed: int,
        scale: float | Tensor,
        reached: set[nn.Parameter],
    ) -> None:
        self.passes, self.reached = passes, reached
        self._seed, self._scale = signed64("perturbed", seed), float(scale)
        self._terms: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def terms(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The seed and the scale on a device, [1] each."""
        if device not in self._terms:
            seeds = torch.full((1,), self._seed, dtype=torch.int64, device=device)
            self._terms[device] = seeds, torch.full((1,), self._scale, device=device).float()
        return self._terms[device]

    def perturb(self, params: list[nn.Parameter], xs: list[Tensor], outs: list[Tensor]) -> None:
        """Write x + scale * noise_scale * z to outs, for params of one dtype with the copies xs."""
        streams, scales = zip(*(self.passes.params[p] for p in params), strict=True)
        at = list(streams), [1.0] * len(xs), list(scales), self.passes.noise, False, 0, None
        add_noise_list_out(xs, *self.terms(xs[0].device), *at, out=outs)
        # A backward that kept what was in the memory before must fail.
        torch.autograd.graph.increment_version(outs)

    def rows(self, p: nn.Parameter, x: Tensor, index: Tensor) -> Tensor:
        """Perturbed rows of a weight on the host, whose tensor is x."""
        stream, scale = self.passes.params[p]
        return add_noise_rows(x, index, *self.terms(x.device), stream, scale, self.passes.noise)


class Session(TorchFunctionMode):
    """Gives ops the copies of weights on the device.

    number: among the sessions that are open at the same time. lane: that of a pass in lock step.
    by_hook: whether a module's hook opened it, which an interrupt can keep from closing it.
    """

    def __init__(self, store: Store, number: int, lane: Lane | None, by_hook: bool) -> None:
        super().__init__()
        self._store, self._number, self._lane, self.by_hook = store, number, lane, by_hook
        self.aimed: Aim | None = None
        self._region: Region | None = None
        self._copies: dict[nn.Parameter, Tensor] = {}  # of the region's weights, as the pass sees
        self._small: dict[nn.Parameter, Tensor] = {}  # of the residents
        self.aim(None)

    def aim(self, aim: Aim | None) -> None:
        """See x + scale * z from here on; None: x."""
        self.aimed, self._region = aim, None
        self._small = self._seen(self._store.regions.residents)

    def enter(self, region: Region) -> None:
        """Wait for a region, and perturb it where the pass does."""
        if self._lane is None:
            self._store.serve(region)
        else:
            self._lane.wait_for(region)
        self._copies, self._region = self._seen(region), region

    @torch.no_grad()
    def _seen(self, region: Region) -> dict[nn.Parameter, Tensor]:
        """The copies of a region's weights, with noise where the pass has it."""
        clean = self._store.buffer_of(region).parts(region)
        if self.aimed is None:
            return clean
        with outside_inference_mode():  # the memory is used outside of that mode, too
            noisy = self.aimed.passes.scratch(region, self._number)
        for params in alike(noisy):
            self.aimed.perturb(params, [clean[p] for p in params], [noisy[p] for p in params])
        return {**clean, **noisy}

    def copy_of(self, p: nn.Parameter) -> Tensor:
        """The copy of a weight as the pass sees it."""
        if self.aimed is not None and p in self.aimed.passes.params:
            self.aimed.reached.add(p)
        if p in self._small:
            return self._small[p]
        region = self._store.regions.of[p]
        if region is not self._region:
            self.enter(region)
        return self._copies[p]

    @torch.no_grad()
    def rows(self, p: nn.Parameter, index: Tensor) -> Tensor:
        """Rows of a weight as the pass sees them. No others leave the host."""
        if self.aimed is None or p not in self.aimed.passes.params:
            return self._store.rows(p, index)
        self.aimed.reached.add(p)
        return self._store.rows(p, index, self.aimed.rows)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        found: list[nn.Parameter] = []
        self._find(args, found)
        self._find(kwargs.values(), found)
        if not found:
            return func(*args, **kwargs)
        name = func.__name__
        if name == "__get__":
            attribute = getattr(getattr(func, "__self__", None), "__name__", "")
            if attribute == "device":
                return self._store.device
            if attribute == "is_cuda":
                return self._store.device.type == "cuda"
            if attribute not in NUMBERS:
                return func(*args, **kwargs)
        elif name in ABOUT:
            return func(*args, **kwargs)
        elif (index := self._index_of_rows(func, args, kwargs, found)) is not None:
            return self.rows(found[0], index)
        regions = {self._store.regions.of[p] for p in found} - {self._store.regions.residents}
        if len(regions) > 1:
            names = " and ".join(sorted(region.name for region in regions))
            raise RuntimeError(
                f"offload: {name} uses weights of {names} at once, which are not on the device "
                "together; leave offload off for this model"
            )
        return func(*self._swap(args), **{k: self._swap(x) for k, x in kwargs.items()})

    def _index_of_rows(
        self, func: Any, args: tuple, kwargs: dict[str, Any], found: list[nn.Parameter]
    ) -> Tensor | None:
        """The rows that a call looks up in a large weight outside of the layers, if that is all
        that it does."""
        region = self._store.regions.of[found[0]]
        elsewhere = region.by_layer or region is self._store.regions.residents
        if elsewhere or len(args) < 2 or found[0].dim() != 2:
            return None
        if func is F.embedding and args[1] is found[0]:
            max_norm = args[3] if len(args) > 3 else kwargs.get("max_norm")
            return args[0] if max_norm is None else None
        if func is Tensor.index_select and args[0] is found[0] and args[1] == 0:
            return args[2] if len(args) > 2 else kwargs["index"]
        return None

    def _find(self, values: Any, found: list[nn.Parameter]) -> None:
        for x in values:
            if isinstance(x, nn.Parameter):
                if x in self._store.regions.of:
                    found.append(x)
            elif isinstance(x, list | tuple):
                self._find(x, found)

    def _swap(self, x: Any) -> Any:
        if isinstance(x, nn.Parameter):
            return self.copy_of(x) if x in self._store.regions.of else x
        if isinstance(x, list | tuple) and not isinstance(x, torch.Size):
            swapped = [self._swap(y) for y in x]
            return type(x)(*swapped) if hasattr(x, "_fields") else type(x)(swapped)
        return x
