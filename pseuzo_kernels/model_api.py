"""The public functions over all tensors of a model, or of a part of it, in one call of an op."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from pseuzo_kernels.calls import Calls, Coefs, How, Out, Seeds, Streams
from pseuzo_kernels.checks import check_finite, check_not_negative
from pseuzo_kernels.lists import Params
from pseuzo_kernels.selection import Mask, Offset


class ModelApi(Calls):
    """perturb_, restore_ and update_, and the same out of place."""

    def perturb_(
        self,
        params: Params,
        seed: int | Tensor,
        scale: float,
        *,
        streams: Streams = None,
        noise: str = "hadamard",
        rounding: str = "nearest",
        rounding_seed: int | None = None,
        noise_scale: float | Sequence[float] = 1.0,
        found_inf: Tensor | None = None,
        mask: Mask = None,
        offset: Offset = None,
    ) -> None:
        """x <- x + scale * noise_scale * z(seed) for each tensor x of params, in place.

        params: a tensor, a list of tensors that share no memory, or pairs of a name and a tensor,
        as named_parameters() has them. streams: a number per tensor, or "names", for pairs: the
        stream of a tensor is then `stream_of_name`, the same in any order and for any part of the
        model. By default names are used where there are any, else positions in the list; if a seed
        then gives two tensors the same noise, because two calls passed other lists, a StreamWarning
        says so. scale: of either sign; noise_scale: a float or one per tensor, not negative, 0
        skips the tensor. restore_ undoes it up to the rounding of x's dtype; `perturb` leaves x as
        it is, so that nothing has to be undone. noise, rounding, rounding_seed, found_inf: as
        add_noise_.

        mask: which elements take noise; any other stays as it is, to the bit. A bool tensor for
        each of params (of its shape, on its device), a RandomMask(share, seed), or, where x itself
        does not move meanwhile (perturb, update_), a SmallMask(limit). offset: for tensors that are
        shards, where each is in its whole tensor: the position of its first element, or a Part; one
        for all or one for each. The shard then becomes what these elements of the whole tensor
        become, to the bit. A DTensor brings its own: its local part is written.
        Source: MeZO (Malladi et al. 2023), Algorithm 1, PerturbParameters.
        """
        scale = check_finite("perturb_", "scale", scale)
        how = How(noise, rounding, rounding_seed, found_inf)
        terms = params, seed, scale, streams, noise_scale, how
        self._list("perturb_", *terms, mask=mask, offset=offset)

    def restore_(
        self,
        params: Params,
        seed: int | Tensor,
        scale: float,
        *,
        streams: Streams = None,
        noise: str = "hadamard",
        rounding: str = "nearest",
        rounding_seed: int | None = None,
        noise_scale: float | Sequence[float] = 1.0,
        found_inf: Tensor | None = None,
        mask: Mask = None,
        offset: Offset = None,
    ) -> None:
        """x <- x - scale * noise_scale * z(seed): undoes perturb_ with the same arguments, up to
        rounding.

        In bf16 and fp16 each pair of perturb_ and restore_ may leave an error of an ulp, and these
        add up over the steps of a run; `perturb` into other tensors leaves none.
        """
        scale = check_finite("restore_", "scale", scale)
        how = How(noise, rounding, rounding_seed, found_inf)
        terms = params, seed, -scale, streams, noise_scale, how
        self._list("restore_", *terms, mask=mask, offset=offset)

    def perturb(
        self,
        params: Params,
        seed: int | Tensor,
        scale: float,
        *,
        out: Out = None,
        streams: Streams = None,
        noise: str = "hadamard",
        rounding: str = "nearest",
        rounding_seed: int | None = None,
        noise_scale: float | Sequence[float] = 1.0,
        found_inf: Tensor | None = None,
        mask: Mask = None,
        offset: Offset = None,
    ) -> Tensor | list[Tensor]:
        """out <- x + scale * noise_scale * z(seed) for each tensor x of params, which stay as they
        are.

        So there is nothing to restore, in any dtype, at the price of memory for out: a tensor, or a
        list with one for each of params, of its shape, dtype and device, made if None; it shares no
        memory with params, except that an element of it may be the tensor itself. Returns out; a
        tensor if params is a tensor. Other arguments as perturb_. A tensor whose noise_scale is 0,
        and all of them if the call is skipped, are copied.
        """
        scale = check_finite("perturb", "scale", scale)
        how = How(noise, rounding, rounding_seed, found_inf)
        terms = params, seed, scale, streams, noise_scale, how
        where: dict[str, Any] = dict(mask=mask, offset=offset, out=out, in_place=False)
        return self._list("perturb", *terms, **where)

    def update_(
        self,
        params: Params,
        seeds: Seeds,
        coefs: Coefs,
        *,
        lr: float,
        weight_decay: float | Sequence[float] = 0.0,
        streams: Streams = None,
        noise: str = "hadamard",
        rounding: str = "nearest",
        rounding_seed: int | None = None,
        noise_scale: float | Sequence[float] = 1.0,
        found_inf: Tensor | None = None,
        mask: Mask = None,
        offset: Offset = None,
    ) -> None:
        """x <- (1 - lr * weight_decay) x - lr * noise_scale * sum_k coefs[k] z(seeds[k]), in one
        pass.

        Arguments as perturb_ and add_noise_; weight_decay: a float or one per tensor, applied once
        whatever K. A step that EmaWindow skipped leaves params as they are, without decay either:
        the coefs that EmaWindow.step returned carry its found_inf. Give found_inf=window.found_inf
        if you computed others from them.
        """
        lr = check_not_negative("update_", "lr", lr)
        how = How(noise, rounding, rounding_seed, found_inf)
        terms = params, seeds, coefs, streams, noise_scale, how
        numbers: dict[str, Any] = dict(lr=lr, weight_decay=weight_decay)
        self._list("update_", *terms, **numbers, mask=mask, offset=offset)

    def update(
        self,
        params: Params,
        seeds: Seeds,
        coefs: Coefs,
        *,
        lr: float,
        weight_decay: float | Sequence[float] = 0.0,
        out: Out = None,
        streams: Streams = None,
        noise: str = "hadamard",
        rounding: str = "nearest",
        rounding_seed: int | None = None,
        noise_scale: float | Sequence[float] = 1.0,
        found_inf: Tensor | None = None,
        mask: Mask = None,
        offset: Offset = None,
    ) -> Tensor | list[Tensor]:
        """out <- (1 - lr * weight_decay) x - lr * noise_scale * sum_k coefs[k] z(seeds[k]).

        As update_, into out instead of params; out as in perturb.
        """
        lr = check_not_negative("update", "lr", lr)
        how = How(noise, rounding, rounding_seed, found_inf)
        terms = params, seeds, coefs, streams, noise_scale, how
        numbers: dict[str, Any] = dict(lr=lr, weight_decay=weight_decay)
        numbers |= dict(mask=mask, offset=offset, out=out, in_place=False)
        return self._list("update", *terms, **numbers)

    def sign_update_(
        self,
        params: Params,
        seeds: Seeds,
        coefs: Coefs,
        *,
        lr: float,
        weight_decay: float | Sequence[float] = 0.0,
        streams: Streams = None,
        noise: str = "hadamard",
        rounding: str = "nearest",
        rounding_seed: int | None = None,
        noise_scale: float | Sequence[float] = 1.0,
        found_inf: Tensor | None = None,
        mask: Mask = None,
        offset: Offset = None,
    ) -> None:
        """x <- (1 - lr * weight_decay) x - lr * noise_scale * sgn(sum_k coefs[k] z(seeds[k])), in
        one pass: the sign of each element of the estimate, which is made in registers.

        Arguments as update_. An element whose sum is 0 only decays. Source: ZO-signSGD (Liu et al.
        2019), Algorithm 1.
        """
        lr = check_not_negative("sign_update_", "lr", lr)
        how = How(noise, rounding, rounding_seed, found_inf)
        terms = params, seeds, coefs, streams, noise_scale, how
        numbers: dict[str, Any] = dict(lr=lr, weight_decay=weight_decay)
        self._list("sign_update_", *terms, **numbers, mask=mask, offset=offset, sign=True)
