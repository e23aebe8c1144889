"""The ops of pseuzo and the public functions over them.

    x <- keep * x + scale * sum_k coefs[k] z(seeds[k], stream)

The dispatcher sends CUDA tensors to Triton, CPU tensors to C++ (`pseuzo_kernels._C` registers
itself), and others, or all where these are missing, to `pseuzo_kernels.reference`, which defines
every bit.
"""

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pseuzo_kernels import adam, low_rank, masks, parts, reference
from pseuzo_kernels.api import NoiseApi
from pseuzo_kernels.implementations import say_slow
from pseuzo_kernels.triton.tables import capturing, tables_of_a_graph

try:
    from pseuzo_kernels.triton import adam as triton_adam
    from pseuzo_kernels.triton import adam_parts as triton_adam_parts
    from pseuzo_kernels.triton import launch
    from pseuzo_kernels.triton import low_rank as triton_low_rank
    from pseuzo_kernels.triton import parts as triton_parts
except ImportError:  # a build of torch without CUDA may come without triton: CPU tensors need none
    launch = triton_adam = triton_adam_parts = None  # type: ignore[assignment]
    triton_low_rank = triton_parts = None  # type: ignore[assignment]

__all__ = [
    "RepeatedPerturb",
    "adam_list_",
    "adam_parts_",
    "adam_update_",
    "add_low_rank_out",
    "add_noise",
    "add_noise_",
    "add_noise_list_",
    "add_noise_list_out",
    "add_noise_masked_list_",
    "add_noise_masked_list_out",
    "add_noise_masked_rows",
    "add_noise_parts_",
    "add_noise_parts_out",
    "add_noise_rows",
    "add_noise_steps_",
    "add_outer_out",
    "add_outer_parts_out",
    "low_rank_factors",
    "low_rank_perturb",
    "low_rank_perturb_",
    "low_rank_update_",
    "noise",
    "perturb",
    "perturb_",
    "restore_",
    "sign_update_",
    "tables_of_a_graph",
    "update",
    "update_",
]

lib = torch.library.Library("pseuzo", "FRAGMENT")
_TERMS = "Tensor seeds, Tensor coefs, SymInt[] streams, {0} keeps, {0} scales"
_HOW = "str noise, bool stochastic, SymInt rounding_seed, Tensor(b!)? found_inf"
for _overload, _numbers in (("", "float[]"), (".traced", "Tensor")):
    _rest = f"{_TERMS.format(_numbers)}, {_HOW}"
    lib.define(f"add_noise_list_{_overload}(Tensor(a!)[] xs, {_rest}) -> ()")
    lib.define(f"add_noise_list_out{_overload}(Tensor[] xs, {_rest}, *, Tensor(a!)[] out) -> ()")
lib.define(
    "add_noise_steps_(Tensor(a!)[] xs, Tensor seeds, Tensor coefs, int[] counts, int[] streams, "
    "float[] keeps, float[] scales, str noise, bool stochastic, int[] rounding_seeds) -> ()"
)
lib.define(
    "add_noise_rows(Tensor x, Tensor index, Tensor seeds, Tensor coefs, int stream, float scale, "
    "str noise) -> Tensor"
)
lib.define(
    "adam_list_(Tensor(a!)[] xs, Tensor seeds, Tensor coefs, int directions, SymInt[] streams, "
    f"float[] keeps, float[] scales, float[] numbers, {_HOW}) -> ()"
)
_where = "SymInt[] places, float[] limits, Tensor? mask_seed, Tensor[] takes"
lib.define(
    "adam_parts_(Tensor(a!)[] xs, Tensor seeds, Tensor coefs, int directions, SymInt[] streams, "
    f"float[] keeps, float[] scales, float[] numbers, {_HOW}, {_where}) -> ()"
)
_rest = f"{_TERMS.format('float[]')}, {_HOW}"
_masked = f"{_rest}, float[] limits, Tensor? mask_seed"
lib.define(f"add_noise_masked_list_(Tensor(a!)[] xs, {_masked}) -> ()")
lib.define(f"add_noise_masked_list_out(Tensor[] xs, {_masked}, *, Tensor(a!)[] out) -> ()")
lib.define(
    "add_noise_masked_rows(Tensor x, Tensor index, Tensor seeds, Tensor coefs, int stream, "
    "float scale, str noise, float limit, Tensor? mask_seed) -> Tensor"
)
_rest += f", {_where}, bool sign"
lib.define(f"add_noise_parts_(Tensor(a!)[] xs, {_rest}) -> ()")
lib.define(f"add_noise_parts_out(Tensor[] xs, {_rest}, *, Tensor(a!)[] out) -> ()")
_rest = "SymInt[] streams, float[] keeps, float[] factors"
for _name, _more in (("add_outer_out", ""), ("add_outer_parts_out", f", {_where}")):
    lib.define(
        f"{_name}(Tensor[] xs, Tensor[] lefts, Tensor[] rights, Tensor coefs, {_rest}, bool "
        f"stochastic, SymInt rounding_seed, Tensor(b!)? found_inf{_more}, *, Tensor(a!)[] out) "
        "-> ()"
    )
lib.define(
    "add_low_rank_out(Tensor[] xs, Tensor seeds, Tensor right_seeds, Tensor coefs, int rank, "
    f"{_rest}, {_HOW}, {_where}, *, Tensor(a!)[] out) -> ()"
)


def _fake(*args, out=()) -> None:
    """The fake of ops that write in place, which return nothing."""


def _fake_rows(x, index, *args) -> Tensor:
    return x.new_empty(*index.shape, x.shape[1])


def _in_plain_torch(op: Callable) -> Callable:
    """op, the definition, which says once that it is slow where it runs in place of a kernel."""

    @wraps(op)
    def run(*args, **kwargs):
        first = next((a for a in pytree.tree_leaves((args, kwargs)) if isinstance(a, Tensor)), None)
        if first is not None:
            names = [a for a in args if isinstance(a, str)]
            say_slow(op.__name__, first.device, names[0] if names else None)
        return op(*args, **kwargs)

    return run


for _name, _triton, _its_fake in (
    ("add_noise_parts_", "add_noise_parts_triton_", _fake),
    ("add_noise_parts_out", "add_noise_parts_out_triton", _fake),
    ("add_noise_list_", "add_noise_list_triton_", _fake),
    ("add_noise_list_out", "add_noise_list_out_triton", _fake),
    ("add_noise_steps_", "add_noise_steps_triton_", _fake),
    ("add_noise_rows", "add_noise_rows_triton", _fake_rows),
    ("adam_list_", "adam_list_triton_", _fake),
    ("adam_parts_", "adam_parts_triton_", _fake),
    ("add_noise_masked_list_", "add_noise_list_triton_", _fake),
    ("add_noise_masked_list_out", "add_noise_list_out_triton", _fake),
    ("add_noise_masked_rows", "add_noise_rows_triton", _fake_rows),
):
    _defined, _launched = (adam, triton_adam) if "adam" in _name else (reference, launch)
    if "masked" in _name:
        _defined = masks
    if _name.startswith("add_noise_parts"):
        _defined, _launched = parts, triton_parts
    if _name == "adam_parts_":
        _launched = triton_adam_parts
    lib.impl(_name, _in_plain_torch(getattr(_defined, _name)), "CompositeExplicitAutograd")
    if launch is not None:
        lib.impl(_name, getattr(_launched, _triton), "CUDA")
    torch.library.register_fake(f"pseuzo::{_name}", _its_fake, lib=lib)
for _name in ("add_outer_out", "add_outer_parts_out", "add_low_rank_out"):
    lib.impl(_name, getattr(low_rank, _name), "CompositeExplicitAutograd")
    torch.library.register_fake(f"pseuzo::{_name}", _fake, lib=lib)
for _name in ("add_noise_list_", "add_noise_list_out"):
    torch.library.register_fake(f"pseuzo::{_name}.traced", _fake, lib=lib)
lib.impl("window_step", _in_plain_torch(reference.window_step), "CompositeExplicitAutograd")

# For optimizers: the ops with the schemas above, one launch each. They check nothing and do not
# tell autograd about the change (call torch.autograd.graph.increment_version).
# `pseuzo_kernels.reference` has functions with the same names and explains the arguments.
_ops = torch.ops.pseuzo
# x <- keep x + scale sum_k c_k z_k for each x of a list
add_noise_list_ = _ops.add_noise_list_.default
# the same into other tensors, out=
add_noise_list_out = _ops.add_noise_list_out.default
# several such updates in a row, while each x is read and written once
add_noise_steps_ = _ops.add_noise_steps_.default
# Adam's update, which makes its moments again from the seeds of the last steps
adam_list_ = _ops.adam_list_.default
# the same for parts of tensors and under masks: see pseuzo_kernels.parts
adam_parts_ = _ops.adam_parts_.default
# some rows of x + scale sum_k c_k z_k
add_noise_rows = _ops.add_noise_rows.default
# the same, but elements outside of a mask stay as they are: see pseuzo_kernels.masks
add_noise_masked_list_ = _ops.add_noise_masked_list_.default
add_noise_masked_list_out = _ops.add_noise_masked_list_out.default
add_noise_masked_rows = _ops.add_noise_masked_rows.default
# the same for parts of tensors, under any mask, or with the sign alone: see pseuzo_kernels.parts
add_noise_parts_ = _ops.add_noise_parts_.default
add_noise_parts_out = _ops.add_noise_parts_out.default
# keep x + a product of thin factors, which are given or made from seeds: see
# pseuzo_kernels.low_rank
add_outer_out = _ops.add_outer_out.default
add_outer_parts_out = _ops.add_outer_parts_out.default
add_low_rank_out = _ops.add_low_rank_out.default


def _traceable(op: Any) -> Callable[..., None]:
    """Return the list op `op` in a form that torch.compile can trace.

    torch.compile would compile anew for each new number in a list of floats. So keeps and scales
    that are not known when it traces are put into tensors on the CPU, for the overload `traced`.
    """

    def from_tensors(xs, seeds, coefs, streams, keeps, scales, *rest, **out) -> None:
        op.default(xs, seeds, coefs, streams, keeps.tolist(), scales.tolist(), *rest, **out)

    lib.impl(op.traced.name(), from_tensors, "CompositeExplicitAutograd")

    def call(xs, seeds, coefs, streams, keeps, scales, *rest, **out) -> None:
        if torch.compiler.is_compiling():
            from torch.fx.experimental import symbolic_shapes  # slow to import

            # torch 2.6 has no such function
            known = getattr(symbolic_shapes, "has_static_value", lambda number: True)
            if not all(known(number) for number in (*keeps, *scales)):
                one = torch.ones((), dtype=torch.float64, device="cpu")
                keeps, scales = (
                    torch.stack([one * number for number in numbers]) for numbers in (keeps, scales)
                )
                op.traced(xs, seeds, coefs, streams, keeps, scales, *rest, **out)
                return
        op.default(xs, seeds, coefs, streams, keeps, scales, *rest, **out)

    return call


_api = NoiseApi(
    _traceable(_ops.add_noise_list_),
    _traceable(_ops.add_noise_list_out),
    (add_noise_masked_list_, add_noise_masked_list_out),
    (add_noise_parts_, add_noise_parts_out),
)
noise, add_noise_, add_noise = _api.noise, _api.add_noise_, _api.add_noise
perturb_, restore_, update_ = _api.perturb_, _api.restore_, _api.update_
perturb, update, sign_update_ = _api.perturb, _api.update, _api.sign_update_
adam_update_ = adam.AdamApi(adam_list_, adam_parts_, _api).adam_update_
_of_kernels = partial(low_rank.add_low_rank_out, noise_of=noise, add=add_outer_parts_out)
lib.impl("add_low_rank_out", _of_kernels, "CPU")
if launch is not None:
    lib.impl("add_low_rank_out", triton_low_rank.add_low_rank_out_triton, "CUDA")
_low_rank = low_rank.LowRankApi(add_low_rank_out, _api)
low_rank_factors, low_rank_update_ = _low_rank.low_rank_factors, _low_rank.low_rank_update_
low_rank_perturb, low_rank_perturb_ = _low_rank.low_rank_perturb, _low_rank.low_rank_perturb_


class RepeatedPerturb:
    """out <- xs + scales * coefs[0] z(seeds[0]) for the same tensors each time; no scale is 0.

    mask: the limits and the seed of masks, the last arguments of add_noise_masked_list_out; or ().

    This does what add_noise_list_out does, at less cost to the host: on a GPU, the first launches
    on a stream are kept and launched again. Where ops are observed, or a CUDA graph is recorded, it
    calls the op itself.
    """

    def __init__(
        self,
        xs: list[Tensor],
        seeds: Tensor,
        coefs: Tensor,
        streams: list[int],
        scales: list[float],
        noise: str,
        out: list[Tensor],
        mask: tuple[list[float], Tensor | None] | tuple[()] = (),
    ):
        keeps = [1.0] * len(xs)
        self._op = add_noise_masked_list_out if mask else add_noise_list_out
        self._args = xs, seeds, coefs, streams, keeps, scales, noise, False, 0, None, *mask
        self._out, self._device = out, out[0].device
        self._repeated = None
        if self._device.type == "cuda" and launch is not None and launch.is_compiled():
            if launch.implemented(noise, "RepeatedPerturb"):
                self._repeated = launch.RepeatedLaunches(self._args, out)

    def __call__(self) -> None:
        if (
            self._repeated is None
            or torch.compiler.is_compiling()
            or capturing(self._device)
            or torch._C._len_torch_dispatch_stack()
        ):
            self._op(*self._args, out=self._out)
        else:
            self._repeated()
