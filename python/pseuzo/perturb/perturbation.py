"""Which weights are perturbed, by what noise, and what seed and scale the passes see at present."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pseuzo.machine import refuse_meta
from pseuzo.perturb.contexts import outside_inference_mode
from pseuzo.perturb.masks import Mask, Masks, mask_of, op_out
from pseuzo_kernels.checks import check_noise, check_tensors, signed64
from pseuzo_kernels.ops import RepeatedPerturb, add_noise_masked_rows, add_noise_rows

Base = Mapping[nn.Parameter, Tensor]


class Launch:
    """Writes perturbed params, all of one dtype and device, to outs."""

    def __init__(
        self, perturbation: "Perturbation", params: list[nn.Parameter], outs: list[Tensor]
    ) -> None:
        self._perturbation, self._params, self._outs = perturbation, params, outs
        streams, scales = zip(*(perturbation.params[p] for p in params), strict=True)
        self._at = list(streams), list(scales)
        reals = [perturbation.real[p] for p in params]
        seeds = perturbation.aim_on(params[0].device)
        noise, mask = perturbation.noise, perturbation.mask_of(params)
        self._usual = RepeatedPerturb(reals, *seeds, *self._at, noise, outs, mask)

    def __call__(self) -> None:
        perturbation = self._perturbation
        if perturbation.base is None:
            self._usual()
            return
        # The launch is not kept, because the model's passes may outlive the base.
        xs = [perturbation.base[p] for p in self._params]
        seeds, (streams, scales) = perturbation.aim_on(xs[0].device), self._at
        arguments = (*seeds, streams, [1.0] * len(xs), scales, perturbation.noise)
        mask = perturbation.mask_of(self._params)
        op_out(perturbation.masks)(xs, *arguments, False, 0, None, *mask, out=self._outs)


class Perturbation:
    """x + scale * noise_scale * z(seed, stream) for each weight x.

    params: weight -> (stream, noise scale). The seed and the scale are tensors that aim() writes in
    place, so that a recorded pass reads them when it is replayed. masks: which elements take noise;
    aim() writes their seed in the same way. base: weight -> a tensor that the running pass perturbs
    in its place; None: the weights themselves.
    """

    base: Base | None = None

    def __init__(
        self,
        params: Mapping[nn.Parameter, tuple[int, float]],
        noise: str,
        masks: Masks | None = None,
    ) -> None:
        check_noise("perturbed", noise)
        self.masks = masks
        self.noise = noise
        self.params = {p: place for p, place in params.items() if place[1] != 0}
        self.streams = {p: stream for p, (stream, _) in self.params.items()}
        refuse_meta("perturbed", self.params)
        # The weights as the ops take them: without autograd, in the same memory.
        with outside_inference_mode():  # because they are used outside of that mode, too
            self.real = {p: p.detach() for p in self.params}
        self.devices = {p.device for p in self.params}
        for device in self.devices:
            check_tensors("perturbed", [p for p in self.params if p.device == device], "parameter")
        self._memory = [(p.data_ptr(), p.dtype) for p in self.params]
        self.by_storage: dict[int, list[nn.Parameter]] = {}
        for p in self.params:
            self.by_storage.setdefault(p.untyped_storage().data_ptr(), []).append(p)
        self._matched = params  # the last argument that matches() found to be equal
        self._aims: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self._mask_seeds: dict[torch.device, Tensor] = {}

    def matches(
        self,
        params: Mapping[nn.Parameter, tuple[int, float]],
        noise: str,
        masks: Masks | None = None,
    ) -> bool:
        """Whether this is the perturbation of params: not if one was moved, replaced or rescaled,
        or has another mask. If only the seed of the masks differs, passes use it from here on."""
        if masks is not self.masks:
            if masks is None or not masks.alike(self.masks):
                return False
            self.masks = masks
        if noise != self.noise or [(p.data_ptr(), p.dtype) for p in self.params] != self._memory:
            return False
        if params is not self._matched:
            if {p: place for p, place in params.items() if place[1] != 0} != self.params:
                return False
            self._matched = params
        return True

    def aim(self, seed: int, scale: float | Tensor) -> None:
        """Set the seed and the scale that passes see from here on."""
        for seeds, scales in map(self.aim_on, self.devices):
            seeds.fill_(signed64("perturbed", seed))
            scales.fill_(scale)
        if self.masks is not None and self.masks.seed is not None:
            for mask_seed in map(self._mask_seed_on, self.devices):
                mask_seed.fill_(self.masks.seed)

    def aim_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The seed and the scale that passes see, [1] each."""
        if device not in self._aims:
            with outside_inference_mode():
                seeds = torch.empty(1, dtype=torch.int64, device=device)
                self._aims[device] = seeds, torch.empty(1, dtype=torch.float32, device=device)
        return self._aims[device]

    def mask_of(self, params: list[nn.Parameter]) -> Mask:
        """The masks of params on one device, as the ops take them."""
        random = self.masks is not None and self.masks.seed is not None
        seed = self._mask_seed_on(params[0].device) if random else None
        return mask_of(self.masks, params, seed)

    def _mask_seed_on(self, device: torch.device) -> Tensor:
        if device not in self._mask_seeds:
            with outside_inference_mode():
                self._mask_seeds[device] = torch.empty(1, dtype=torch.int64, device=device)
        return self._mask_seeds[device]

    def launch(self, params: list[nn.Parameter], outs: list[Tensor]) -> Launch:
        """The launch that writes the perturbed params, all of one dtype and device, to outs."""
        return Launch(self, params, outs)

    def rows(self, param: nn.Parameter, index: Tensor) -> Tensor:
        """Rows of the perturbed weight. No others are made."""
        stream, scale = self.params[param]
        x = self.real[param] if self.base is None else self.base[param]
        at = *self.aim_on(param.device), stream, scale
        if self.masks is None:
            return add_noise_rows(x, index.long(), *at, self.noise)
        (limit,), mask_seed = self.mask_of([param])  # type: ignore[misc]  # there are masks
        return add_noise_masked_rows(x, index.long(), *at, self.noise, limit, mask_seed)
