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


class EmaWindow:
    """A sliding window of output changes, projected on the present gradient: PseuZO's EMA of Jacobians.

    Each entry holds a seed and do = o1 - o0, what the perturbation eps * z(seed) did to the model's output. A step adds
    one and returns, for every entry, c_k = momentum^age_k * <do_k, grad> / eps (age 0: the newest). The update of the
    weights is then sum_k c_k z(seed_k).

    Rows of an old entry belong to another batch, so how they pair with the rows of grad is a choice:
    - groups given ([B] integers, say the labels): an entry keeps the mean of do over the rows of each group; that mean
      is paired with the sum of grad over the present rows of the same group. A group that either side lacks adds
      nothing. The newest entry pairs its own rows exactly.
    - groups None: row i with row i, as published; a row that either side lacks adds nothing.
    Positions are aligned from the right: the last min(P_old, P) pair up. Batches of any size and length may follow each
    other; mixing steps with and without groups is refused, as the pairing would have no meaning.

    Sums in fp32 on a GPU (a fixed order, so deterministic), in fp64 on a CPU. Nothing waits for the device: if any
    coefficient is NaN or infinite (or loss is), all of the step's are zero, found_inf ([1] fp32) is 1, `skipped` counts
    it, and an entry whose own coefficient was not finite is dropped. update_ leaves the weights as they are in such a
    step, weight decay included: the coefs bring found_inf along, as their attribute of that name (not out of what
    torch.compile traces: give update_ found_inf=window.found_inf there).
    """

    _op: Callable  # window_step, see pseuzo_kernels.reference

    def __init__(self, capacity: int = 14, *, momentum: float = 1.0, eps: float = 1e-3):
        if not isinstance(capacity, int) or capacity < 1:
            raise ValueError(f"EmaWindow: capacity must be an int of at least 1, got {capacity!r}")
        if not 0 <= momentum <= 1:
            raise ValueError(f"EmaWindow: momentum must be in 0 .. 1, got {momentum}")
        if not (math.isfinite(eps) and eps > 0):
            raise ValueError(f"EmaWindow: eps must be finite and positive, got {eps}")
        self.capacity, self.momentum, self.eps = capacity, float(momentum), float(eps)
        self._ring: dict[str, Tensor] | None = None
        self.clear()
        self._skipped: Tensor | None = None
        self.found_inf: Tensor | None = None

    def __len__(self) -> int:
        """The number of entries, at most capacity."""
        return self._used

    def clear(self) -> None:
        """Drop all entries; memory and the count of skipped steps stay."""
        self._slot, self._used, self._grouped = -1, 0, None

    @property
    def skipped(self) -> int:
        """Steps that were zeroed because something was not finite. Waits for the device."""
        return 0 if self._skipped is None else int(self._skipped)

    def step(
        self,
        seed: int,
        o0: Tensor | None,
        o1: Tensor,
        grad: Tensor,
        groups: Tensor | Sequence[int] | None = None,
        loss: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Add (seed, o1 - o0) and project grad on all entries: seeds [n] int64, coefs [n] fp32, the newest last.

        o0, o1, grad: [B, P, D] or [B, D], floating point, one device; o0 None means that o1 is the difference already.
        groups: [B] integers or None. loss: a scalar tensor; where it is not finite, the step is skipped.
        """
        o1, grad = self._check_output("o1", o1), self._check_output("grad", grad)
        o0 = None if o0 is None else self._check_output("o0", o0)
        for name, other in (("o0", o0), ("grad", grad)):
            if other is not None and (other.shape != o1.shape or other.device != o1.device):
                raise ValueError(
                    f"EmaWindow.step: {name} must be like o1, {tuple(o1.shape)} on {o1.device}, "
                    f"got {tuple(other.shape)} on {other.device}"
                )
        rows, positions, width = o1.shape
        group = None
        if groups is not None:
            group = torch.as_tensor(groups)
            if group.dtype.is_floating_point or group.dtype is torch.bool or group.shape != (rows,):
                raise ValueError(
                    f"EmaWindow.step: groups must be {rows} integers, one per row of o1, "
                    f"got shape {tuple(group.shape)} {group.dtype}"
                )
            # a copy from pageable memory is staged by the driver at once: not waiting for it is safe
            group = group.to(device=o1.device, dtype=torch.int64, non_blocking=True).contiguous()
        if self._used and self._grouped != (groups is not None):
            raise ValueError(
                "EmaWindow.step: the window holds entries "
                f"{'with' if self._grouped else 'without'} groups; call clear() before changing that"
            )
        if loss is not None and not isinstance(loss, Tensor):
            raise TypeError(
                f"EmaWindow.step: loss must be a scalar tensor, got {type(loss).__name__}"
            )
        if loss is not None and (loss.numel() != 1 or loss.device != o1.device):
            raise ValueError(
                f"EmaWindow.step: loss must be a scalar on {o1.device}, got shape {tuple(loss.shape)} on {loss.device}"
            )
        seed = signed64("EmaWindow.step", seed)
        self._reserve(rows, positions, width, o1.device)
        slot, used = (self._slot + 1) % self.capacity, min(self._used + 1, self.capacity)
        ring = self._ring
        seeds, coefs, self.found_inf = type(self)._op(
            ring["values"], ring["seeds"], ring["groups"], ring["counts"], self._skipped,
            o0, o1, grad, group, None if loss is None else loss.detach().float(),
            seed, slot, used, self.momentum, self.eps,
        )  # fmt: skip
        self._slot, self._used, self._grouped = slot, used, groups is not None
        if not torch.compiler.is_compiling():  # which cannot trace it
            coefs.found_inf = self.found_inf
        return seeds, coefs

    @staticmethod
    def _check_output(name: str, o: Tensor) -> Tensor:
        if not isinstance(o, Tensor) or not o.dtype.is_floating_point:
            raise TypeError(f"EmaWindow.step: {name} must be a floating-point tensor, got {o!r}")
        if o.dim() not in (2, 3):
            raise ValueError(
                f"EmaWindow.step: {name} must be [B, P, D] or [B, D], got shape {tuple(o.shape)}"
            )
        if o.numel() == 0:
            raise ValueError(f"EmaWindow.step: {name} is empty, of shape {tuple(o.shape)}")
        o = o.detach()
        if o.dtype not in DTYPES:
            o = o.float()
        return (o if o.dim() == 3 else o[:, None]).contiguous()

    def _reserve(self, rows: int, positions: int, width: int, device: torch.device) -> None:
        """Make room for an entry [rows, positions, width]; what is there stays, aligned to the first row and last
        position.
        """
        if self._skipped is None:
            self._skipped = torch.zeros((), dtype=torch.int64, device=device)
        old = self._ring
        if (
            old is not None
            and self._used == 0
            and (old["values"].shape[3] != width or old["values"].device != device)
        ):
            old = None
        if old is not None:
            _, r, p, d = old["values"].shape
            if d != width or old["values"].device != device:
                raise ValueError(
                    f"EmaWindow.step: the window holds outputs of width {d} on {old['values'].device}, "
                    f"got {width} on {device}; call clear() first"
                )
            if rows <= r and positions <= p:
                return
            # slowly growing lengths would copy the ring again and again: grow by a quarter at least
            rows = r if rows <= r else max(rows, r + r // 4)
            positions = p if positions <= p else max(positions, p + p // 4)
        self._skipped = self._skipped.to(device)
        k = self.capacity
        new = {
            "values": torch.zeros(k, rows, positions, width, dtype=torch.float32, device=device),
            "seeds": torch.zeros(k, dtype=torch.int64, device=device),
            "groups": torch.zeros(k, rows, dtype=torch.int64, device=device),
            "counts": torch.zeros(k, rows, dtype=torch.int32, device=device),
        }
        if old is not None:
            new["values"][:, :r, positions - p :].copy_(old["values"])
            new["seeds"].copy_(old["seeds"])
            new["groups"][:, :r].copy_(old["groups"])
            new["counts"][:, :r].copy_(old["counts"])
        self._ring = new

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on; tensors are copies, on the window's device."""
        state: dict[str, Any] = {
            "capacity": self.capacity, "momentum": self.momentum, "eps": self.eps,
            "slot": self._slot, "used": self._used, "grouped": self._grouped, "skipped": self.skipped,
        }  # fmt: skip
        if self._ring is not None and self._used:
            state |= {name: tensor.clone() for name, tensor in self._ring.items()}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state_dict: capacity, momentum and eps too. Raises ValueError and changes nothing if it is not
        one.
        """
        names = ("capacity", "momentum", "eps", "slot", "used", "grouped", "skipped")
        tensors = ("values", "seeds", "groups", "counts")
        missing = [n for n in names + (tensors if state.get("used") else ()) if n not in state]
        if missing:
            raise ValueError(
                f"EmaWindow.load_state_dict: not a window's state, it lacks {', '.join(missing)}"
            )
        if not 0 <= state["used"] <= state["capacity"]:
            raise ValueError(
                f"EmaWindow.load_state_dict: {state['used']} entries do not fit a capacity of {state['capacity']}"
            )
        if state["used"]:
            kinds = {
                "values": torch.float32,
                "seeds": torch.int64,
                "groups": torch.int64,
                "counts": torch.int32,
            }
            k, rows = state["capacity"], getattr(state["groups"], "shape", (0, 0))[-1]
            for name, leading in (
                ("values", (k, rows)),
                ("seeds", (k,)),
                ("groups", (k, rows)),
                ("counts", (k, rows)),
            ):
                t = state[name]
                if (
                    not isinstance(t, Tensor)
                    or t.dtype is not kinds[name]
                    or t.shape[:2] != leading
                ):
                    raise ValueError(
                        f"EmaWindow.load_state_dict: {name} is not what a window of {k} entries holds"
                    )
        self.capacity, self.momentum, self.eps = state["capacity"], state["momentum"], state["eps"]
        self._slot, self._used, self._grouped = state["slot"], state["used"], state["grouped"]
        self._ring = {n: state[n].clone() for n in tensors} if self._used else None
        device = self._ring["values"].device if self._ring else "cpu"
        self._skipped = torch.tensor(state["skipped"], dtype=torch.int64, device=device)
        self.found_inf = None
