"""The public noise functions over one implementation of the ops.

`pseuzo_kernels.ops` builds them over the dispatcher's ops (Triton, C++ or the reference, by
device), and `pseuzo_kernels.reference` over the plain-torch definitions, so both have the same
names, arguments and errors. `pseuzo_kernels.calls` checks the arguments.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pseuzo_kernels.calls import (
    Coefs,
    How,
    Seeds,
    bump_versions,
    call_in_place,
    call_out,
)
from pseuzo_kernels.checks import (
    check_noise,
    check_not_negative,
    check_shape,
    check_stream,
    check_tensors,
    seeds_and_coefs,
)
from pseuzo_kernels.model_api import ModelApi
from pseuzo_kernels.selection import EVERYTHING, Part, RandomMask, SmallMask, places_of


class NoiseApi(ModelApi):
    """The public functions; `pseuzo_kernels.reference` says what the ops compute."""

    def noise(
        self,
        shape: Sequence[int] | int,
        seed: int,
        stream: int,
        *,
        noise: str = "hadamard",
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        out: Tensor | None = None,
        offset: int | Part | None = None,
    ) -> Tensor:
        """z(seed, stream) of the given shape: mean 0, variance 1, the same on every device.

        noise: "hadamard" (sums of 16 independent terms, normal to KS distance 4e-4, bit-exact
        everywhere), "hadamard-fp16" (the same z; sums over several seeds are made in half
        precision, to 1e-3 of their size, bit-exact everywhere), "rademacher" (+1 or -1, bit-exact
        everywhere) or "normal" (Box-Muller from 16-bit radius and angle, at most 4.85 in size;
        backends agree to 4 ulp of max(|z|, 1) on CPUs, and on GPUs to the 5e-5 that the documented
        errors of their fast logarithm and sine allow). out: a tensor of this shape to write and
        return; its dtype and device are then those of z, else float32 and the CPU are the defaults.
        offset: where the shape is in a whole tensor, if it is a shard of it: see perturb_.
        """
        check_noise("noise", noise)
        check_shape("noise", shape)
        if out is None:
            out = torch.empty(shape, dtype=dtype or torch.float32, device=device or "cpu")
            check_tensors("noise", [out])  # it is new, so there is nothing to remember
        else:
            self._lists.check("noise", [out], "out")
        wanted = torch.Size([shape] if isinstance(shape, int) else shape)
        if out.shape != wanted or out.dtype != (dtype or out.dtype):
            raise ValueError(
                f"noise: out must be {tuple(wanted)} {dtype or ''}, got {tuple(out.shape)} "
                f"{out.dtype}"
            )
        if device is not None and torch.empty(0, device=device).device != out.device:
            raise ValueError(f"noise: out must be on {device}, got {out.device}")
        s, c = seeds_and_coefs("noise", seed, 1.0, out.device)
        streams = [check_stream("noise", stream)]
        ops, rest = self._op_for(EVERYTHING, places_of("noise", offset, [out]))
        args = s, c, streams, [1.0], [1.0], noise, False, 0, None, *rest
        call_out(ops[1], [], [out], *args)
        bump_versions([out])
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
        mask: Tensor | SmallMask | RandomMask | None = None,
        offset: int | Part | None = None,
    ) -> None:
        """x <- keep * x + noise_scale * sum_k coefs[k] * z(seeds[k], stream), in place, in one
        pass.

        x: fp32, bf16 or fp16, contiguous, or dense such as channels_last or transposed, which takes
        a contiguous copy of it; sums are made in fp32 and rounded once, to nearest or
        stochastically: without bias for whatever fp32 holds, 2^-16 of the spacing of bf16, 2^-13 of
        that of fp16. seeds [K] int64 and coefs [K] fp32: numbers, lists, or tensors on x's device.
        noise_scale 0 skips: nothing is made or written. rounding_seed: needed to round
        stochastically, another one at each call: with the same one all calls draw the same bits,
        and their errors add up. found_inf: a float32 tensor of one element on x's device, as
        torch.amp has it, or None. If it is not 0, x stays as it is, to the bit: no noise, no keep.
        The same happens if a tensor of coefs holds a NaN or an infinity (for "hadamard-fp16" with
        several seeds, anything above 2^126); that also sets found_inf to 1, for callers that count
        skipped updates. Nothing waits for the device. Numbers that are not finite are refused.
        mask, offset: as in perturb_, for one tensor; elements that a mask leaves out stay as they
        are, without keep.
        Raises ValueError or TypeError before anything is written.
        """
        self._lists.check("add_noise_", [x], "x")
        how = How(noise, rounding, rounding_seed, found_inf)
        scale = check_not_negative("add_noise_", "noise_scale", noise_scale)
        ops, args = self._one("add_noise_", x, seeds, coefs, stream, keep, scale, how, mask, offset)
        if scale:
            call_in_place(ops[0], [x], *args)
            bump_versions([x])

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
        mask: Tensor | SmallMask | RandomMask | None = None,
        offset: int | Part | None = None,
    ) -> Tensor:
        """out <- keep * x + noise_scale * sum_k coefs[k] * z(seeds[k], stream); x is untouched.

        Arguments as add_noise_. out: like x (shape, dtype, device), made if None; it may be x, but
        must not share other memory with it. With noise_scale 0 no noise is made. If found_inf or
        coefs skip the call, out becomes a copy of x.
        """
        op = "add_noise"
        self._lists.check(op, [x], "x", None if out is None else [out])
        if out is None:
            out = torch.empty_like(x, requires_grad=False)
        how = How(noise, rounding, rounding_seed, found_inf)
        scale = check_not_negative(op, "noise_scale", noise_scale)
        ops, args = self._one(op, x, seeds, coefs, stream, keep, scale, how, mask, offset)
        if out is x and scale:
            call_in_place(ops[0], [x], *args)
        else:
            call_out(ops[1], [x], [out], *args)
        bump_versions([out])
        return out
