"""Models larger than the device: weights stay on the host, and each layer is uploaded once a step.

    model = offload(model, "cuda")
    optimizer = PseuZO(model, lr=1e-7)      # steps, state_dict and evaluation are the same

An update is bit-exact on a CPU and on a GPU, so the weights are updated on the host, where they
are. They only ever travel up: a layer's update is made just before its upload, and all passes of a
step run on the layer while it is there.
"""

import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import update_wrapper
from typing import Any
from weakref import finalize, ref

import torch
from torch import nn

from pseuzo.machine import usable_device
from pseuzo.perturb.mapped import FileMaps, folder_of, map_frozen
from pseuzo.perturb.module import forget_passes
from pseuzo.perturb.offloaded import Sessions, sessions_of, set_sessions
from pseuzo.perturb.regions import DeviceMemory, Outline, Regions, device_bytes, outline
from pseuzo.perturb.scratch import SMALL, copied
from pseuzo.perturb.store import Store

__all__ = ["device_bytes", "flush", "offload"]


def offload(
    model: nn.Module,
    device: torch.device | str | None = None,
    *,
    buffers: int = 2,
    memory: DeviceMemory | None = None,
) -> nn.Module:
    """Keep the weights of a model on the host, and compute with it on a device. Returns the model.

    model: on the CPU, in the state in which it is trained (with its adapter). Call this before the
    optimizer is made. From then on forwards of the model, and steps of MeZO, PseuZO and other
    optimizers whose passes and updates are theirs, take inputs on the device and give the bits that
    they give without offloading. Parameters stay on the host; an update reaches them when their
    layer is next uploaded, or in `flush(model)`, which state_dict() calls too: call it before you
    read weights yourself. What is registered as a buffer moves to the device.

    device: to compute on; None means cuda if there is one. With cpu, the buffers are other host
    memory, which is of use for tests. buffers: how many regions are on the device at once; with 1,
    nothing is uploaded ahead. memory: counts and limits what is taken of the device, see
    device_bytes. ValueError if the layers cannot be found, or if a weight is quantised or not on
    the CPU. Idea: ZO2 (Wang et al. 2025), which also brings the weights back.

    Frozen weights of a model that Transformers loaded from a folder, in the dtype of its files, are
    maps of these files, see pseuzo.perturb.mapped.map_frozen. On CUDA, other weights are
    page-locked where they are, and copied on a stream of their own. This part has not run on a GPU
    yet.
    """
    where = torch.empty(0, device=usable_device(device)).device  # with its index
    if not isinstance(buffers, int) or buffers < 1:
        raise ValueError(f"offload: buffers must be at least 1, got {buffers}")
    found, regions = outline(model), Regions(model)
    if any(not x.is_floating_point() and x.numel() > SMALL for x in model.buffers()):
        raise ValueError(
            "offload: the model holds codes of weights in its buffers, which are not uploaded; it "
            "is small enough to stay on the device"
        )
    away = next((p for p in model.parameters() if p.device.type != "cpu"), None)
    if away is not None:
        raise ValueError(
            f"offload: a weight is on {away.device}; load the model on the CPU, where its weights "
            "are to stay"
        )
    flush(model)
    if sessions_of(model) is None:
        _attach(model, found)
    _map_frozen(model)
    if where.type == "cuda":
        _lock_pages(model, where)
    for module in model.modules():
        for name, x in module.named_buffers(recurse=False):
            setattr(module, name, x.to(where))
    set_sessions(model, Sessions(Store(regions, memory or DeviceMemory(where), buffers)))
    forget_passes(model)
    return model


def flush(model: nn.Module | None) -> None:
    """Return when the weights of an offloaded model on the host have all updates so far. Nothing is
    to be done for any other model."""
    if (sessions := sessions_of(model)) is not None:
        sessions.store.flush()


class _Forward:
    """The forward of a module that contains the layers, in a session."""

    def __init__(self, model: ref[nn.Module], forward: Callable[..., Any]) -> None:
        self._model, self._forward = model, forward
        update_wrapper(self, forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        sessions = sessions_of(self._model())
        if sessions is None:
            return self._forward(*args, **kwargs)
        with sessions.open():
            return self._forward(*args, **kwargs)


class _Hooks:
    """Hooks of a layer, or of another part of the model, which may be called by itself."""

    def __init__(self, model: ref[nn.Module]) -> None:
        self._model = model

    def before(self, module: nn.Module, args: tuple) -> None:
        sessions = sessions_of(self._model())
        if sessions is not None and (sessions.now is None or sessions.now.by_hook):
            sessions.close()  # one that an interrupt left open
            sessions.start(by_hook=True)

    def after(self, module: nn.Module, args: tuple, output: object) -> object:
        """Copy outputs that are views of a buffer, as it is used again."""
        sessions = sessions_of(self._model())
        if sessions is None:
            return None
        if sessions.now is not None and sessions.now.by_hook:
            sessions.close()
            sessions.store.end()
        return copied(output, sessions.holds)


class _Flush:
    """A hook that brings the weights on the host up to date. A module is copied with its hooks
    first, so that a deep copy has all updates as well."""

    def __init__(self, model: ref[nn.Module]) -> None:
        self._model = model

    def __call__(self, *ignored: Any) -> None:
        flush(self._model())

    def __deepcopy__(self, memo: dict) -> "_Flush":
        self()
        return self


def _attach(model: nn.Module, found: Outline) -> None:
    """Have the modules of a model run in sessions, and states made of updated weights."""
    model_ref = ref(model)
    for module in found.path:
        module.forward = _Forward(model_ref, module.forward)
        module.register_state_dict_pre_hook(_Flush(model_ref))
        module.register_load_state_dict_pre_hook(_Flush(model_ref))
    hooks = _Hooks(model_ref)
    for module in (*found.parts.values(), *found.layers.values()):
        module.register_forward_pre_hook(hooks.before)
        module.register_forward_hook(hooks.after, always_call=True)


def _map_frozen(model: nn.Module) -> None:
    """Map the frozen weights that can be, and say once which of a folder cannot be."""
    folder = folder_of(model)
    if folder is None:
        return
    if stay := map_frozen(model, folder):
        warnings.warn(
            f"offload: {len(stay)} frozen weights, the first being {stay[0]}, take host memory, as "
            f"the safetensors in {folder} do not hold them in this dtype and form; load the model "
            "in the dtype of its files to have them read from there",
            stacklevel=3,
        )


def _lock_pages(model: nn.Module, device: torch.device) -> None:
    """Page-lock the weights where they are, so that copies of them need no staging.

    Frozen weights that are mapped from a file stay as they are: they would be read into memory.
    """
    cuda, maps, pageable = torch.cuda.cudart(), FileMaps(), 0
    for p in model.parameters():
        storage = p.untyped_storage()
        mapped = maps.hold(p) and not p.requires_grad
        if mapped or storage.nbytes() == 0 or storage.is_pinned():
            continue
        if int(cuda.cudaHostRegister(storage.data_ptr(), storage.nbytes(), 0)) == 0:
            finalize(storage, cuda.cudaHostUnregister, storage.data_ptr())
            continue
        pageable += 1
        with suppress(RuntimeError):  # CUDA reports the failure once more, at its next call
            torch.zeros(1, device=device)
    if pageable:
        warnings.warn(
            f"offload: {pageable} weights cannot be page-locked (see ulimit -l), so their uploads "
            "are slower",
            stacklevel=3,
        )
