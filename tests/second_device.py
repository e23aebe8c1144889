"""Two devices on a machine that has none: tensors that say they are on `elsewhere:0` or
`elsewhere:1`, keep their numbers in the memory of the CPU, and refuse to be mixed.

An op on tensors of both devices, or of one and the CPU, raises as it would on two GPUs; moving
tensors, numbers of no dimension on the CPU, and indices on the CPU are allowed, as there. Importing
this module registers the devices with torch for the rest of the process.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("elsewhere")

MOVES = ("aten::_to_copy", "aten::copy_", "aten::fill_")
TAKE_INDICES = ("aten::index", "aten::index_put_", "aten::_index_put_impl_")


def inner(x: Any) -> Any:
    return x.inner if isinstance(x, Elsewhere) else x


class Elsewhere(Tensor):
    """A tensor that says it is on `device`, with its numbers in `inner`."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor, device: torch.device):
        return Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=device,
        )

    def __init__(self, inner: Tensor, device: torch.device):
        self.inner = inner

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def untyped_storage(self) -> Any:
        return self.inner.untyped_storage()

    def numpy(self) -> Any:
        return self.inner.numpy()

    def tolist(self) -> list:
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), func._schema.name
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        there = [x.device for x in tensors if isinstance(x, cls)]
        if name not in MOVES:
            for x in tensors:
                free = x.dim() == 0 or name in TAKE_INDICES
                if x.device != there[0] and not (x.device.type == "cpu" and free):
                    where = ", ".join(f"{tuple(t.shape)} on {t.device}" for t in tensors)
                    raise RuntimeError(f"{name}: tensors on two devices: {where}")
        device = there[0]
        if kwargs.get("device") is not None:
            device = torch.device(kwargs["device"])
            kwargs["device"] = torch.device("cpu")
        out = func(*tree_map(inner, args), **tree_map(inner, kwargs))
        if name == "aten::copy_":
            return args[0]
        written = {id(x.inner): x for x in tensors if isinstance(x, cls)}

        def put(x: Any) -> Any:
            if not isinstance(x, Tensor) or device.type == "cpu":
                return x
            return written.get(id(x)) if id(x) in written else cls(x, device)

        return tree_map(put, out)


def empty(size, *, dtype=None, device=None, **ignored):
    return Elsewhere(torch.empty(size, dtype=dtype), torch.device("elsewhere", device.index or 0))


def empty_strided(size, stride, *, dtype=None, device=None, **ignored):
    x = torch.empty_strided(size, stride, dtype=dtype)
    return Elsewhere(x, torch.device("elsewhere", device.index or 0))


def zeros(size, *, dtype=None, device=None, **ignored):
    return Elsewhere(torch.zeros(size, dtype=dtype), torch.device("elsewhere", device.index or 0))


def arange(*numbers, dtype=None, device=None, **ignored):
    return Elsewhere(
        torch.arange(*numbers, dtype=dtype), torch.device("elsewhere", device.index or 0)
    )


def copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    inner(target).copy_(inner(source))
    return target


_lib = torch.library.Library("aten", "IMPL")  # as long as this module
_lib.impl("empty.memory_format", empty, "PrivateUse1")
_lib.impl("empty_strided", empty_strided, "PrivateUse1")
_lib.impl("_efficientzerotensor", zeros, "PrivateUse1")
for name in ("arange", "arange.start", "arange.start_step"):
    _lib.impl(name, arange, "PrivateUse1")
_lib.impl("_copy_from", copy_from, "PrivateUse1")
