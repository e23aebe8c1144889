"""window_step: put o1 - o0 into the window, c_k = momentum^age_k * <do_k, grad> / eps for every entry k.

One launch on a GPU (csrc/window.cu), one pass over the entries on a CPU (csrc/window_cpu.cpp), elsewhere the reference,
which defines what is correct. Source: PseuZO (NeurIPS 2025), the EMA of Jacobians.
"""

import torch

from pseuzo_kernels import checks, reference

lib = torch.library.Library("pseuzo", "FRAGMENT")
lib.define(
    "window_step(Tensor(a!) values, Tensor(b!) seeds, Tensor(c!) groups, Tensor(d!) counts, Tensor(e!) skipped, "
    "Tensor? o0, Tensor o1, Tensor grad, Tensor? group, Tensor? loss, SymInt seed, SymInt slot, SymInt used, "
    "float momentum, float eps) -> (Tensor, Tensor, Tensor)"
)
lib.impl("window_step", reference.window_step, "CompositeExplicitAutograd")


def _window_step_fake(
    values,
    seeds,
    groups,
    counts,
    skipped,
    o0,
    o1,
    grad,
    group,
    loss,
    seed,
    slot,
    used,
    momentum,
    eps,
):
    return seeds.new_empty(used), values.new_empty(used), values.new_empty(1)


torch.library.register_fake("pseuzo::window_step", _window_step_fake, lib=lib)


class EmaWindow(checks.EmaWindow):
    __doc__ = checks.EmaWindow.__doc__
    _op = torch.ops.pseuzo.window_step.default
