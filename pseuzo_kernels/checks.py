"""The public functions over one implementation of the ops: they check, normalise, and call.

`pseuzo_kernels` builds them over the dispatcher's ops (Triton, C++ or the reference, by device),
`pseuzo_kernels.reference` over the plain-torch definitions; so both have the same names, arguments and errors. No
arithmetic on weights happens here.
"""

import math
import numbers
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

NOISES = ("hadamard", "hadamard-fp16", "normal", "rademacher")
ROUNDINGS = ("nearest", "stochastic")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_ELEMENTS = 1 << 36  # 2^32 counters of 16 elements
MAX_STREAM = (1 << 32) - 1
MAX_FLOAT = torch.finfo(torch.float32).max

Seeds = int | Sequence[int] | Tensor
Coefs = float | Sequence[float] | Tensor
Params = Tensor | Iterable[Tensor]


def check_noise(op: str, noise: str) -> None:
    if noise not in NOISES:
        raise ValueError(f"{op}: unknown noise {noise!r}; known: {', '.join(map(repr, NOISES))}")


def check_rounding(op: str, rounding: str) -> None:
    if rounding not in ROUNDINGS:
        raise ValueError(
            f"{op}: unknown rounding {rounding!r}; known: {', '.join(map(repr, ROUNDINGS))}"
        )


def _is_list(value: Any) -> bool:
    return (
        isinstance(value, Iterable) and getattr(value, "shape", None) != ()
    )  # tensors and arrays of one number


def check_finite(op: str, name: str, value: Any) -> float:
    """value, a number or a 0-d tensor or array, as a float. TypeError if it is neither, ValueError if not finite."""
    if not isinstance(value, float) and getattr(value, "shape", None) == ():
        value = value.item()
    if not isinstance(
        value, float | numbers.Real
    ):  # float: the other is slow to ask, and a list has hundreds
        raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}")
    if not abs(value) <= MAX_FLOAT:
        raise ValueError(f"{op}: {name} must be finite in float32, got {value}")
    return value if isinstance(value, float) else float(value)


def check_not_negative(op: str, name: str, value: Any) -> float:
    """check_finite, and ValueError if it is negative."""
    value = check_finite(op, name, value)
    if value < 0:
        raise ValueError(f"{op}: {name} must be finite and not negative, got {value}")
    return value


def refuse_freed(op: str, name: str) -> NoReturn:
    raise ValueError(
        f"{op}: the memory of {name} was freed (its storage is empty), as offloading and sharding do; call {op} while "
        "it is there"
    )


def check_tensors(op: str, xs: Sequence[Tensor], name: str = "x") -> None:
    """Contiguous fp32, bf16 or fp16 tensors on one device that have memory and share none, none too large for the
    counter."""
    labels = [name] if len(xs) == 1 else [f"{name}[{i}]" for i in range(len(xs))]
    for label, x in zip(labels, xs, strict=True):
        if not isinstance(x, Tensor):
            raise TypeError(f"{op}: {label} must be a tensor, got {type(x).__name__}")
        if x.dtype not in DTYPES:
            raise TypeError(f"{op}: {label} must be float32, bfloat16 or float16, got {x.dtype}")
        if not x.is_contiguous():
            raise ValueError(
                f"{op}: {label} must be contiguous, got strides {tuple(x.stride())}; call .contiguous()"
            )
        if x.numel() > MAX_ELEMENTS:
            raise ValueError(
                f"{op}: {label} has {x.numel()} elements, more than the 2^36 that the 32-bit counter "
                "reaches; split the tensor"
            )
        if x.device != xs[0].device:
            raise ValueError(
                f"{op}: mixed devices, {name}[0] is on {xs[0].device} and {label} on {x.device}; call once per device"
            )
    if torch.compiler.is_compiling():
        return  # addresses and identities are not known yet
    end = -math.inf
    spans = [(x.data_ptr(), x.nbytes) if x.numel() and not x.is_meta else (-id(x), 1) for x in xs]
    for start, n_bytes in sorted(spans):
        if start == 0:
            refuse_freed(
                op, next(label for label, span in zip(labels, spans, strict=True) if span[0] == 0)
            )
        if start < end:
            raise ValueError(
                f"{op}: the same tensor, or a part of it, is in the list twice; pass each once"
            )
        end = start + n_bytes


def _as_int(value: Any) -> int | None:
    """None if it is no integer. torch.compile traces an int, and operator.index would make it a constant."""
    if isinstance(value, int):
        return value
    return operator.index(value) if hasattr(value, "__index__") else None


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
    # beyond int64, which is as far as torch.compile can trace it: index makes it a constant
    return operator.index(number) - (1 << 64) if number >= 1 << 63 else number


def _filled(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[1], filled in by a kernel: a copy from the host would wait for it."""
    if dtype.is_floating_point and torch.compiler.is_compiling():
        return (
            torch.ones(1, dtype=dtype, device=device) * value
        )  # where full would compile anew for each value
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
        if (
            not torch.compiler.is_compiling()
            and value.numel()
            and not value.is_meta
            and not value.data_ptr()
        ):
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


def seeds_and_coefs(
    op: str, seeds: Seeds, coefs: Coefs, device: torch.device
) -> tuple[Tensor, Tensor]:
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


def _bump_versions(xs: Sequence[Tensor]) -> None:
    """Tell autograd that xs changed, so that a stale backward fails loudly in place of using new weights."""
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(xs)


class NoiseApi:
    """The public noise functions over two list ops; see `pseuzo_kernels.reference` for what those compute."""

    def __init__(self, add_noise_list_: Callable, add_noise_list_out: Callable):
        self._in_place, self._out = add_noise_list_, add_noise_list_out

    def noise(
        self,
        shape: Sequence[int] | int,
        seed: int,
        stream: int,
        *,
        noise: str = "hadamard",
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> Tensor:
        """z(seed, stream) of the given shape: mean 0, variance 1, the same on every device.

        noise: "hadamard" (sums of 16 independent terms, normal to KS distance 4e-4, bit-exact everywhere),
        "hadamard-fp16" (the same z; sums over several seeds are made in half precision, to 1e-3 of their size,
        bit-exact everywhere), "rademacher" (+1 or -1, bit-exact everywhere) or "normal" (Box-Muller from 16-bit
        radius and angle, at most 4.85 in size; backends agree to 4 ulp of max(|z|, 1) on CPUs, and on GPUs to the 5e-5
        that the documented errors of their fast logarithm and sine allow).
        """
        check_noise("noise", noise)
        out = torch.empty(shape, dtype=dtype, device=device)
        check_tensors("noise", [out])
        s, c = seeds_and_coefs("noise", seed, 1.0, out.device)
        self._out(
            [],
            s,
            c,
            [check_stream("noise", stream)],
            [1.0],
            [1.0],
            noise,
            False,
            0,
            None,
            out=[out],
        )
        return out

    def add_noise_(
        self,
        x: Tensor,
        seeds: Seeds,
        coefs: Coefs,
        stream: int,
        *,
        keep: float = 1.0,
        noise: str = "hadamard",
        rounding: str = "nearest",
        rounding_seed: int | None = None,
        noise_scale: float = 1.0,
        found_inf: Tensor | None = None,
    ) -> None:
        """x <- keep * x + noise_scale * sum_k coefs[k] * z(seeds[k], stream), in place, in one pass for any K.

        x: contiguous fp32, bf16 or fp16; sums in fp32 and rounds once, to nearest or stochastically: without bias
        for whatever fp32 holds, 2^-16 of the spacing of bf16, 2^-13 of that of fp16. seeds [K] int64 and coefs [K]
        fp32: numbers, lists, or tensors on x's device. noise_scale 0 skips: nothing is made or written.
        rounding_seed: needed to round stochastically, another one at each call: with the same one all calls draw the
        same bits, and their errors add up.
        found_inf: a float32 tensor of one element on x's device, as torch.amp has it, or None. Where it is not 0, x
        stays as it is, to the bit: no noise, no keep. So it does where a tensor of coefs holds a NaN or an infinity
        (of "hadamard-fp16" with several seeds, anything above 2^126), which sets found_inf to 1, for whoever counts
        what was skipped. Nothing waits for the device. Numbers that are not finite are refused.
        Raises ValueError or TypeError before anything is written.
        """
        op = "add_noise_"
        check_tensors(op, [x])
        keep, scale = (
            check_finite(op, "keep", keep),
            check_not_negative(op, "noise_scale", noise_scale),
        )
        args = self._args(
            op,
            x.device,
            seeds,
            coefs,
            [stream],
            [keep],
            [scale],
            noise,
            rounding,
            rounding_seed,
            found_inf,
        )
        if scale:
            self._in_place([x.detach()], *args)
            _bump_versions([x])

    def add_noise(
        self,
        x: Tensor,
        seeds: Seeds,
        coefs: Coefs,
        stream: int,
        *,
        out: Tensor | None = None,
        keep: float = 1.0,
        noise: str = "hadamard",
        rounding: str = "nearest",
        rounding_seed: int | None = None,
        noise_scale: float = 1.0,
        found_inf: Tensor | None = None,
    ) -> Tensor:
        """out <- keep * x + noise_scale * sum_k coefs[k] * z(seeds[k], stream); x is untouched.

        Arguments as add_noise_. out: like x (shape, dtype, device, contiguous), made if None; may be x, but share no
        other memory with it. With noise_scale 0 no noise is made. A call that found_inf or coefs skip copies x.
        """
        op = "add_noise"
        check_tensors(op, [x])
        keep, scale = (
            check_finite(op, "keep", keep),
            check_not_negative(op, "noise_scale", noise_scale),
        )
        args = self._args(
            op,
            x.device,
            seeds,
            coefs,
            [stream],
            [keep],
            [scale],
            noise,
            rounding,
            rounding_seed,
            found_inf,
        )
        if out is None:
            out = torch.empty_like(x, requires_grad=False)
        check_tensors(op, [out], "out")
        if out.shape != x.shape or out.dtype != x.dtype or out.device != x.device:
            raise ValueError(
                f"{op}: out must be like x, {tuple(x.shape)} {x.dtype} on {x.device}, "
                f"got {tuple(out.shape)} {out.dtype} on {out.device}"
            )
        if not torch.compiler.is_compiling() and 0 < abs(out.data_ptr() - x.data_ptr()) < x.nbytes:
            raise ValueError(
                f"{op}: out must be x itself or share no memory with it, got another part of its memory"
            )
        if out is x and scale:
            self._in_place([x.detach()], *args)
        else:
            self._out([x.detach()], *args, out=[out.detach()])
        _bump_versions([out])
        return out

    def perturb_(
        self,
        params: Params,
        seed: int | Tensor,
        scale: float,
        *,
        streams: Sequence[int] | None = None,
        noise: str = "hadamard",
        rounding: str = "nearest",
        rounding_seed: int | None = None,
        noise_scale: float | Sequence[float] = 1.0,
        found_inf: Tensor | None = None,
    ) -> None:
        """x <- x + scale * noise_scale * z(seed) for each tensor x of params, in place.

        params: a tensor or a list of tensors that share no memory; streams: a number per tensor, by default its
        position in the list; scale: of either sign; noise_scale: a float or one per tensor, not negative, 0 skips the
        tensor. Undone by restore_ up to the rounding of x's dtype. noise, rounding, rounding_seed, found_inf: as
        add_noise_.
        Source: MeZO (Malladi et al. 2023), Algorithm 1, PerturbParameters.
        """
        scale = check_finite("perturb_", "scale", scale)
        self._list_op(
            "perturb_",
            params,
            seed,
            scale,
            streams,
            noise_scale,
            noise,
            rounding,
            rounding_seed,
            found_inf,
        )

    def restore_(
        self,
        params: Params,
        seed: int | Tensor,
        scale: float,
        *,
        streams: Sequence[int] | None = None,
        noise: str = "hadamard",
        rounding: str = "nearest",
        rounding_seed: int | None = None,
        noise_scale: float | Sequence[float] = 1.0,
        found_inf: Tensor | None = None,
    ) -> None:
        """x <- x - scale * noise_scale * z(seed): takes back perturb_ with the same arguments, up to rounding."""
        scale = check_finite("restore_", "scale", scale)
        self._list_op(
            "restore_",
            params,
            seed,
            -scale,
            streams,
            noise_scale,
            noise,
            rounding,
            rounding_seed,
            found_inf,
        )

    def update_(
        self,
        params: Params,
        seeds: Seeds,
        coefs: Coefs,
        *,
        lr: float,
        weight_decay: float | Sequence[float] = 0.0,
        streams: Sequence[int] | None = None,
        noise: str = "hadamard",
        rounding: str = "nearest",
        rounding_seed: int | None = None,
        noise_scale: float | Sequence[float] = 1.0,
        found_inf: Tensor | None = None,
    ) -> None:
        """x <- (1 - lr * weight_decay) x - lr * noise_scale * sum_k coefs[k] z(seeds[k]), one pass for any K.

        Arguments as perturb_ and add_noise_; weight_decay: a float or one per tensor, applied once whatever K.
        A step that EmaWindow skipped leaves params as they are, with no decay either: the coefs that EmaWindow.step
        returned bring its found_inf along. Give found_inf=window.found_inf where you computed others from them.
        """
        lr = check_not_negative("update_", "lr", lr)
        self._list_op(
            "update_", params, seeds, coefs, streams, noise_scale, noise, rounding, rounding_seed, found_inf,
            lr=lr, weight_decay=weight_decay,
        )  # fmt: skip

    def _list_op(
        self, op, params, seeds, coefs, streams, noise_scale, noise, rounding, rounding_seed, found_inf,
        lr=None, weight_decay=0.0,
    ) -> None:  # fmt: skip
        xs = [params] if isinstance(params, Tensor) else list(params)
        check_tensors(op, xs, "params")
        streams = list(range(len(xs))) if streams is None else list(streams)
        if len(streams) != len(xs):
            raise ValueError(
                f"{op}: one stream per tensor ({len(xs)}) is needed, got {len(streams)}"
            )
        scales = per_tensor(op, "noise_scale", noise_scale, len(xs))
        decays = per_tensor(op, "weight_decay", weight_decay, len(xs))
        keeps = [
            check_finite(op, "1 - lr * weight_decay", 1 - lr * d) if d else 1.0 for d in decays
        ]
        if not xs:
            return
        args = self._args(
            op,
            xs[0].device,
            seeds,
            coefs,
            streams,
            keeps,
            scales,
            noise,
            rounding,
            rounding_seed,
            found_inf,
        )
        if lr is not None:
            args = (args[0], args[1] * -lr, *args[2:])
        written = [x for x, scale in zip(xs, scales, strict=True) if scale]
        if written:
            self._in_place([x.detach() for x in xs], *args)
            _bump_versions(written)

    def _args(
        self,
        op,
        device,
        seeds,
        coefs,
        streams,
        keeps,
        scales,
        noise,
        rounding,
        rounding_seed,
        found_inf,
    ) -> tuple:
        check_noise(op, noise)
        check_rounding(op, rounding)
        if rounding == "stochastic" and rounding_seed is None:
            raise ValueError(
                f'{op}: rounding="stochastic" needs a rounding_seed, another one at each call (the number of the step, '
                "say): with the same one all calls draw the same bits, and their errors add up"
            )
        streams = [check_stream(op, stream) for stream in streams]
        s, c = seeds_and_coefs(op, seeds, coefs, device)
        stochastic = rounding == "stochastic"
        rounding_seed = 0 if rounding_seed is None else signed64(op, rounding_seed)
        found_inf = check_found_inf(op, found_inf, coefs, device)
        return s, c, streams, keeps, scales, noise, stochastic, rounding_seed, found_inf
