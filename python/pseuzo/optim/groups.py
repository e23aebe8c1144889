"""Parameter groups: which parameters are trained, and which options a group may have."""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from pseuzo.machine import refuse_meta
from pseuzo.perturb.offloaded import store_of
from pseuzo_kernels.checks import check_not_negative, check_tensors

NUMBERS = ("lr", "weight_decay", "noise_scale")


def is_frozen(p: Tensor) -> bool:
    """Whether p is not trained: a parameter that does not require grad. Plain tensors are trained
    either way."""
    return isinstance(p, nn.Parameter) and not p.requires_grad


def not_frozen(params: Iterable[Tensor]) -> list[Tensor]:
    return [p for p in params if p.requires_grad or not is_frozen(p)]


def check_trains(op: str, groups: Iterable[Mapping[str, Any]]) -> None:
    if all(is_frozen(p) for group in groups for p in group["params"]):
        raise ValueError(f"{op}: no parameter requires grad; there is nothing to train")


def check_numbers(
    name: str, *, eps: float, clip_examples: float | None, **not_negative: float
) -> None:
    for key, value in not_negative.items():
        check_not_negative(name, key, value)
    if not check_not_negative(name, "eps", eps):
        raise ValueError(f"{name}: eps must be positive, got 0")
    if clip_examples is None:
        return
    if not check_not_negative(name, "clip_examples", clip_examples):
        raise ValueError(f"{name}: clip_examples must be positive, or None, got 0")


def model_streams(model: nn.Module | None) -> dict[Tensor, int] | None:
    """The stream of each parameter of a model: its position in model.parameters()."""
    return None if model is None else {p: i for i, p in enumerate(model.parameters())}


def new_streams(
    name: str, params: Iterable[Tensor], positions: Mapping[Tensor, int] | None, first: int
) -> dict[Tensor, int]:
    """The streams of a new group's parameters.

    positions: model_streams of the optimizer's model. None: the streams are the numbers from
    `first` on.
    """
    if positions is None:
        return {p: i for i, p in enumerate(params, first)}
    for p in params:
        if p not in positions:
            raise ValueError(
                f"{name}: a parameter of shape {tuple(p.shape)} is not one of the model's"
            )
    return {p: positions[p] for p in params}


def check_group(
    name: str,
    group: Mapping[str, Any],
    given: Iterable[str],
    known: Iterable[str],
    has_gradient: bool,
) -> None:
    """Refuse a new group with options or parameters that make no sense.

    given: the options that the user wrote. known: the options that a group can have. has_gradient:
    whether the optimizer differentiates a head.
    """
    for key in NUMBERS:
        check_not_negative(name, key, group[key])
    if group["exact_gradient"] and not has_gradient:
        raise ValueError(
            f"{name}: exact_gradient=True needs the head that PseuZO differentiates; use PseuZO"
        )
    if "eps" in given:
        raise ValueError(
            f"{name}: eps is one for all groups; give it to {name}, or a group a noise_scale"
        )
    for key in set(given) - set(known):
        if meant := get_close_matches(key, known, n=1, cutoff=0.8):
            raise ValueError(f"{name}: a group has no option {key!r}; did you mean {meant[0]!r}?")
    used = not_frozen(group["params"])
    refuse_meta(name, used)
    for device in {p.device for p in used}:
        check_tensors(name, [p for p in used if p.device == device], "parameter")


def trained(op: str, groups: Iterable[dict[str, Any]]) -> list[tuple[dict[str, Any], list[Tensor]]]:
    """Each group with its parameters that take noise. Checks the numbers, which schedulers and
    users may have changed."""
    groups = list(groups)
    for group in groups:
        for key in NUMBERS:
            check_not_negative(op, key, group[key])
    return [
        (group, not_frozen(group["params"]))
        for group in groups
        if group["noise_scale"] and not group["exact_gradient"]
    ]


class Streamed(torch.optim.Optimizer):
    """An optimizer whose parameters each have a stream of noise."""

    has_gradient = False  # whether it differentiates a head, as exact_gradient groups need
    model: nn.Module | None

    def __init__(self, params: Iterable, defaults: dict[str, Any], model: nn.Module | None):
        self._model_streams = model_streams(model)
        self._streams: dict[Tensor, int] = {}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict) -> None:
        """As in torch. New parameters get the next streams (with a model: their position in
        model.parameters())."""
        super().add_param_group(param_group)
        name, group = type(self).__name__, self.param_groups[-1]
        try:
            check_group(name, group, param_group, self.defaults, self.has_gradient)
            known = self._streams
            known |= new_streams(name, group["params"], self._model_streams, len(known))
        except Exception:
            self.param_groups.pop()
            raise

    @property
    def streams(self) -> Mapping[Tensor, int]:
        """The stream of noise of each parameter."""
        return MappingProxyType(self._streams)

    @property
    def device(self) -> torch.device:
        """The device of the first trained parameter, or the one that the model is offloaded to."""
        if (store := store_of(self.model)) is not None:
            return store.device
        params = [p for group in self.param_groups for p in group["params"]]
        return next((p for p in params if not is_frozen(p)), params[0]).device
