"""The public noise functions over one implementation of the ops: they check, normalise, and call.

`pseuzo_kernels.ops` builds them over the dispatcher's ops (Triton, C++ or the reference, by
device), and `pseuzo_kernels.reference` over the plain-torch definitions, so both have the same
names, arguments and errors. No arithmetic on weights happens here.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from pseuzo_kernels.checks import (
    check_finite,
    check_found_inf,
    check_noise,
    check_not_negative,
    check_rounding,
    check_stream,
    check_tensors,
    per_tensor,
    seeds_and_coefs,
    signed64,
)

Seeds = int | Sequence[int] | Tensor
Coefs = float | Sequence[float] | Tensor
Params = Tensor | Iterable[Tensor]


def _bump_versions(xs: Sequence[Tensor]) -> None:
    """Tell autograd that xs changed, so that a stale backward fails loudly instead of using new
    weights."""
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(xs)


def _how(
    op: str,
    device: torch.device,
    coefs: Coefs,
    noise: str,
    rounding: str,
    rounding_seed: int | None,
    found_inf: Tensor | None,
) -> tuple[str, bool, int, Tensor | None]:
    """The last arguments of an op: noise, stochastic, rounding_seed, found_inf."""
    check_noise(op, noise)
    check_rounding(op, rounding)
    if rounding == "stochastic" and rounding_seed is None:
        raise ValueError(
            f'{op}: rounding="stochastic" needs a rounding_seed, another one at each call (such as '
            "the number of the step): with the same one all calls draw the same bits, and their "
            "errors add up"
        )
    rounding_seed = 0 if rounding_seed is None else signed64(op, rounding_seed)
    found_inf = check_found_inf(op, found_inf, coefs, device)
    return noise, rounding == "stochastic", rounding_seed, found_inf


class NoiseApi:
    """The public functions; `pseuzo_kernels.reference` says what the two ops compute."""

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

        noise: "hadamard" (sums of 16 independent terms, normal to KS distance 4e-4, bit-exact
        everywhere), "hadamard-fp16" (the same z; sums over several seeds are made in half
        precision, to 1e-3 of their size, bit-exact everywhere), "rademacher" (+1 or -1, bit-exact
        everywhere) or "normal" (Box-Muller from 16-bit radius and angle, at most 4.85 in size;
        backends agree to 4 ulp of max(|z|, 1) on CPUs, and on GPUs to the 5e-5 that the documented
        errors of their fast logarithm and sine allow).
        """
        check_noise("noise", noise)
        out = torch.empty(shape, dtype=dtype, device=device)
        check_tensors("noise", [out])
        s, c = seeds_and_coefs("noise", seed, 1.0, out.device)
        streams = [check_stream("noise", stream)]
        self._out([], s, c, streams, [1.0], [1.0], noise, False, 0, None, out=[out])
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
        """x <- keep * x + noise_scale * sum_k coefs[k] * z(seeds[k], stream), in place, in one
        pass.

        x: contiguous fp32, bf16 or fp16; sums are made in fp32 and rounded once, to nearest or
        stochastically: without bias for whatever fp32 holds, 2^-16 of the spacing of bf16, 2^-13 of
        that of fp16. seeds [K] int64 and coefs [K] fp32: numbers, lists, or tensors on x's device.
        noise_scale 0 skips: nothing is made or written. rounding_seed: needed to round
        stochastically, another one at each call: with the same one all calls draw the same bits,
        and their errors add up. found_inf: a float32 tensor of one element on x's device, as
        torch.amp has it, or None. If it is not 0, x stays as it is, to the bit: no noise, no keep.
        The same happens if a tensor of coefs holds a NaN or an infinity (for "hadamard-fp16" with
        several seeds, anything above 2^126); that also sets found_inf to 1, for callers that count
        skipped updates. Nothing waits for the device. Numbers that are not finite are refused.
        Raises ValueError or TypeError before anything is written.
        """
        check_tensors("add_noise_", [x])
        how = noise, rounding, rounding_seed, found_inf
        scale = check_not_negative("add_noise_", "noise_scale", noise_scale)
        args = self._one("add_noise_", x, seeds, coefs, stream, keep, scale, how)
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

        Arguments as add_noise_. out: like x (shape, dtype, device, contiguous), made if None; it
        may be x, but must not share other memory with it. With noise_scale 0 no noise is made. If
        found_inf or coefs skip the call, out becomes a copy of x.
        """
        op = "add_noise"
        check_tensors(op, [x])
        how = noise, rounding, rounding_seed, found_inf
        scale = check_not_negative(op, "noise_scale", noise_scale)
        args = self._one(op, x, seeds, coefs, stream, keep, scale, how)
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
                f"{op}: out must be x itself or share no memory with it, got another part of its "
                "memory"
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

        params: a tensor or a list of tensors that share no memory; streams: a number per tensor, by
        default its position in the list; scale: of either sign; noise_scale: a float or one per
        tensor, not negative, 0 skips the tensor. restore_ undoes it up to the rounding of x's
        dtype. noise, rounding, rounding_seed, found_inf: as add_noise_. Source: MeZO (Malladi et
        al. 2023), Algorithm 1, PerturbParameters.
        """
        scale = check_finite("perturb_", "scale", scale)
        how = noise, rounding, rounding_seed, found_inf
        self._list("perturb_", params, seed, scale, streams, noise_scale, how)

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
        """x <- x - scale * noise_scale * z(seed): undoes perturb_ with the same arguments, up to
        rounding."""
        scale = check_finite("restore_", "scale", scale)
        how = noise, rounding, rounding_seed, found_inf
        self._list("restore_", params, seed, -scale, streams, noise_scale, how)

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
        """x <- (1 - lr * weight_decay) x - lr * noise_scale * sum_k coefs[k] z(seeds[k]), in one
        pass.

        Arguments as perturb_ and add_noise_; weight_decay: a float or one per tensor, applied once
        whatever K. A step that EmaWindow skipped leaves params as they are, without decay either:
        the coefs that EmaWindow.step returned carry its found_inf. Give found_inf=window.found_inf
        if you computed others from them.
        """
        lr = check_not_negative("update_", "lr", lr)
        how = noise, rounding, rounding_seed, found_inf
        self._list("update_", params, seeds, coefs, streams, noise_scale, how, lr, weight_decay)

    def _one(self, op, x, seeds, coefs, stream, keep, scale, how) -> tuple:
        """The arguments of the ops after the tensors, for one tensor."""
        keep = check_finite(op, "keep", keep)
        how = _how(op, x.device, coefs, *how)
        streams = [check_stream(op, stream)]
        return *seeds_and_coefs(op, seeds, coefs, x.device), streams, [keep], [scale], *how

    def _list(
        self,
        op,
        params,
        seeds,
        coefs,
        streams,
        noise_scale,
        how,
        lr=None,
        weight_decay=0.0,
        run=None,
    ) -> None:
        """Check the arguments and call the op. run: is called in its place, with coefs as they are;
        the op gets coefs times -lr."""
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
        how = _how(op, xs[0].device, coefs, *how)
        streams = [check_stream(op, stream) for stream in streams]
        s, c = seeds_and_coefs(op, seeds, coefs, xs[0].device)
        if lr is not None and run is None:
            c = c * -lr
        written = [x for x, scale in zip(xs, scales, strict=True) if scale]
        if written:
            run = run or self._in_place
            run([x.detach() for x in xs], s, c, streams, keeps, scales, *how)
            _bump_versions(written)
