"""Checks of the arguments that the public functions take, and the sentences they raise."""

import math
import numbers
import operator
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn, TypeGuard

import torch
from torch import Tensor

from pseuzo_kernels.laws import noise_names, resolve

NOISES = noise_names()
ROUNDINGS = ("nearest", "stochastic")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_ELEMENTS = 1 << 36  # 2^32 counters of 16 elements
MAX_STREAM = (1 << 32) - 1
MAX_FLOAT = torch.finfo(torch.float32).max


def check_noise(op: str, noise: str) -> None:
    """ValueError if there is no such noise."""
    resolve(noise, op)


def check_rounding(op: str, rounding: str) -> None:
    if rounding not in ROUNDINGS:
        raise ValueError(
            f"{op}: unknown rounding {rounding!r}; known: {', '.join(map(repr, ROUNDINGS))}"
        )


def _is_list(value: Any) -> TypeGuard[Sequence[Any]]:
    # tensors and arrays of one number have a shape of ()
    return isinstance(value, Iterable) and getattr(value, "shape", None) != ()


def check_finite(op: str, name: str, value: Any) -> float:
    """value, a number or a 0-d tensor or array, as a float. TypeError if it is neither, ValueError
    if not finite."""
    if not isinstance(value, float) and getattr(value, "shape", None) == ():
        value = value.item()
    # float comes first: isinstance of numbers.Real is slow, and a list may have hundreds
    if not isinstance(value, float | numbers.Real):
        raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}")
    if not abs(value) <= MAX_FLOAT:  # type: ignore[operator]
        raise ValueError(f"{op}: {name} must be finite in float32, got {value}")
    return value if isinstance(value, float) else float(value)


def check_not_negative(op: str, name: str, value: Any) -> float:
    """check_finite, and ValueError if it is negative."""
    value = check_finite(op, name, value)
    if value < 0:
        raise ValueError(f"{op}: {name} must be finite and not negative, got {value}")
    return value


def check_count(op: str, name: str, value: Any) -> None:
    """Raise ValueError unless value is an int of at least 1."""
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{op}: {name} must be an int of at least 1, got {value!r}")


def refuse_freed(op: str, name: str) -> NoReturn:
    raise ValueError(
        f"{op}: the memory of {name} was freed (its storage is empty), as offloading and sharding "
        f"do; call {op} while it is there"
    )


def is_dense(x: Tensor) -> bool:
    """Whether x is contiguous up to the order of its dimensions, as channels_last and transposed
    tensors are. Its elements then fill its memory, each once."""
    expected = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def check_tensors(op: str, xs: Sequence[Tensor], name: str = "x", *, dense: bool = False) -> None:
    """Raise unless xs are contiguous fp32, bf16 or fp16 tensors on one device that have memory,
    share none, and are not too large for the counter.

    dense: they need not be contiguous, only dense; see is_dense.
    """
    labels = labels_of(xs, name)
    for label, x in zip(labels, xs, strict=True):
        if not isinstance(x, Tensor):
            raise TypeError(f"{op}: {label} must be a tensor, got {type(x).__name__}")
        if x.dtype not in DTYPES:
            raise TypeError(f"{op}: {label} must be float32, bfloat16 or float16, got {x.dtype}")
        if not x.is_contiguous() and not (dense and is_dense(x)):
            raise ValueError(
                f"{op}: {label} must be contiguous, got strides {tuple(x.stride())}; "
                "call .contiguous()"
            )
        if x.numel() > MAX_ELEMENTS:
            raise ValueError(
                f"{op}: {label} has {x.numel()} elements, more than the 2^36 that the 32-bit "
                "counter reaches; split the tensor"
            )
        if x.device != xs[0].device:
            raise ValueError(
                f"{op}: mixed devices, {name}[0] is on {xs[0].device} and {label} on {x.device}; "
                "call once per device"
            )
    check_apart(
        op, xs, labels, "the same tensor, or a part of it, is in the list twice; pass each once"
    )


def labels_of(xs: Sequence[Tensor], name: str) -> list[str]:
    return [name] if len(xs) == 1 else [f"{name}[{i}]" for i in range(len(xs))]


def check_apart(op: str, xs: Sequence[Tensor], labels: Sequence[str], sentence: str) -> None:
    """Raise if a dense tensor of xs has no memory, or shares some with another: the sentence."""
    if torch.compiler.is_compiling():
        return  # addresses and identities are not known yet
    end = -math.inf
    spans = [(x.data_ptr(), x.nbytes) if x.numel() and not x.is_meta else (-id(x), 1) for x in xs]
    for start, n_bytes in sorted(spans):
        if start == 0:
            freed = next(label for label, span in zip(labels, spans, strict=True) if not span[0])
            refuse_freed(op, freed)
        if start < end:
            raise ValueError(f"{op}: {sentence}")
        end = start + n_bytes


def _as_int(value: Any) -> int | None:
    """None if it is not an integer. torch.compile traces an int, and operator.index would make it a
    constant."""
    if isinstance(value, int):
        return value
    return operator.index(value) if hasattr(value, "__index__") else None


def check_shape(op: str, shape: Any) -> Any:
    """shape, a number of elements or a sequence of numbers. ValueError if it is neither."""
    sizes = list(shape) if isinstance(shape, Iterable) else [shape]
    if any((size := _as_int(number)) is None or size < 0 for number in sizes):
        raise ValueError(
            f"{op}: shape must be a number of elements or a sequence of numbers, none of them "
            f"negative, got {shape!r}"
        )
    return shape


def check_stream(op: str, stream: int) -> int:
    number = _as_int(stream)
    if number is None or not 0 <= number <= MAX_STREAM:
        raise ValueError(f"{op}: stream must be an int in 0 .. 2^32 - 1, got {stream!r}")
    return number


def signed64(op: str, seed: int) -> int:
    """The int64 with the bits of seed."""
    number = None if isinstance(seed, bool) else _as_int(seed)
    if number is None:
        raise TypeError(f"{op}: a seed must be an int, got {type(seed).__name__}")
    if not -(1 << 63) <= number < 1 << 64:
        raise ValueError(f"{op}: a seed must fit 64 bits, got {seed}")
    # torch.compile can trace a seed only up to int64; index makes a larger one a constant.
    return operator.index(number) - (1 << 64) if number >= 1 << 63 else number


def _filled(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[1], filled by a kernel, because a copy from the host would wait."""
    if dtype.is_floating_point and torch.compiler.is_compiling():
        # torch.full would be compiled anew for each value.
        return torch.ones(1, dtype=dtype, device=device) * value
    return torch.full((1,), value, dtype=dtype, device=device)


def _vector(op: str, name: str, value: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A 1-d tensor of dtype on device."""
    if isinstance(value, Tensor):
        if value.dim() > 1:
            raise ValueError(
                f"{op}: {name} must have one dimension, got shape {tuple(value.shape)}"
            )
        if value.dtype.is_floating_point != dtype.is_floating_point or value.dtype is torch.bool:
            raise TypeError(f"{op}: {name} must be {dtype}, got {value.dtype}")
        if value.device != device:
            raise ValueError(f"{op}: mixed devices, {name} is on {value.device} and x on {device}")
        has_memory = torch.compiler.is_compiling() or value.is_meta or value.data_ptr()
        if value.numel() and not has_memory:
            refuse_freed(op, name)
        return value.detach().reshape(-1).to(dtype).contiguous()
    values = list(value) if _is_list(value) else [value]
    if dtype is torch.int64:
        values = [signed64(op, v) for v in values]
    else:
        values = [check_finite(op, f"each of {name}", v) for v in values]
    if len(values) == 1:
        return _filled(values[0], dtype, device)
    if values and torch.compiler.is_compiling():
        return torch.cat([_filled(v, dtype, device) for v in values])
    return torch.tensor(values, dtype=dtype, device=device)


def seeds_and_coefs(op: str, seeds: Any, coefs: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """[K] int64 and [K] fp32 on device, K >= 1."""
    s = _vector(op, "seeds", seeds, torch.int64, device)
    c = _vector(op, "coefs", coefs, torch.float32, device)
    if s.numel() != c.numel():
        raise ValueError(
            f"{op}: as many coefs as seeds are needed, got {s.numel()} seeds and {c.numel()} coefs"
        )
    if s.numel() == 0:
        raise ValueError(f"{op}: at least one seed is needed, got K = 0")
    return s, c


def check_found_inf(
    op: str, found_inf: Tensor | None, coefs: Any, device: torch.device
) -> Tensor | None:
    """found_inf, or what EmaWindow.step sent along with coefs."""
    if found_inf is None and isinstance(coefs, Tensor):
        found_inf = getattr(coefs, "found_inf", None)
    if found_inf is None:
        return None
    if (
        not isinstance(found_inf, Tensor)
        or found_inf.dtype is not torch.float32
        or found_inf.numel() != 1
    ):
        got = type(found_inf).__name__
        if isinstance(found_inf, Tensor):
            got = f"{tuple(found_inf.shape)} {found_inf.dtype}"
        raise TypeError(
            f"{op}: found_inf must be a float32 tensor of one element, or None, got {got}"
        )
    return _vector(op, "found_inf", found_inf, torch.float32, device)


def per_tensor(op: str, name: str, value: float | Sequence[float], n: int) -> list[float]:
    """One finite value >= 0 for each of n tensors."""
    if not _is_list(value):
        return [check_not_negative(op, name, value)] * n
    values = list(value)
    if len(values) != n:
        raise ValueError(
            f"{op}: {name} must be one number or one per tensor ({n}), got {len(values)}"
        )
    return [check_not_negative(op, name, v) for v in values]
