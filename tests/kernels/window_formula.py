"""The formula of the method in float64, and helpers for the tests of windows."""

import math

import numpy as np
import pytest
import torch

from pseuzo_kernels import reference, window

U32 = 2.0**-24  # half an ulp of 1 in fp32
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WINDOWS = {"op": window.EmaWindow, "reference": reference.EmaWindow}
NATIVE = torch._C._dispatch_has_kernel_for_dispatch_key("pseuzo::window_step", "CPU")
needs_native = pytest.mark.skipif(
    not NATIVE,
    reason="pseuzo_kernels._C is not built: PSEUZO_BUILD=cpu pip install --no-build-isolation -e .",
)


class Formula:
    """c_k = momentum^age * sum over groups g and positions of <mean_k,g, sum_g grad> / eps."""

    def __init__(self, capacity, momentum=1.0, eps=1e-3):
        self.capacity, self.momentum, self.eps = capacity, momentum, eps
        self.entries = []  # (seed, {group: mean [P, D]})

    def step(self, seed, o0, o1, grad, groups=None, loss=None):
        """Return seeds, coefs, and the sums of the sizes of the terms, to which errors are
        relative."""
        change = o1.float().numpy() if o0 is None else o1.float().numpy() - o0.float().numpy()
        change, grad = change.astype(np.float64), grad.double().numpy()
        if change.ndim == 2:
            change, grad = change[:, None], grad[:, None]
        ids = list(range(len(change))) if groups is None else [int(g) for g in groups]
        rows_of = {g: [i for i in range(len(ids)) if ids[i] == g] for g in ids}
        entry = {g: change[rows].mean(axis=0) for g, rows in rows_of.items()}
        slope = {g: grad[rows].sum(axis=0) for g, rows in rows_of.items()}

        coefs, sizes = [], []
        kept = self.entries[max(0, len(self.entries) - self.capacity + 1) :]
        for age, (_, old) in zip(range(len(kept), 0, -1), kept, strict=True):
            weight = self.momentum**age / self.eps
            dot = size = 0.0
            for g in old.keys() & slope.keys():
                p = min(len(old[g]), len(slope[g]))
                terms = old[g][len(old[g]) - p :] * slope[g][len(slope[g]) - p :]
                dot, size = dot + terms.sum(), size + np.abs(terms).sum()
            coefs.append(dot * weight)
            sizes.append(size * weight)
        coefs.append((change * grad).sum() / self.eps)
        sizes.append(np.abs(change * grad).sum() / self.eps)

        loss_ok = loss is None or math.isfinite(float(loss))
        finite = loss_ok and np.isfinite(coefs).all()
        self.entries = [*kept, (seed, entry if loss_ok and np.isfinite(coefs[-1]) else {})]
        coefs = np.array(coefs) if finite else np.zeros(len(coefs))
        return [seed for seed, _ in self.entries], torch.from_numpy(coefs), torch.tensor(sizes)


def draw(generator, rows, positions, width, dtype=torch.float32, g_dtype=torch.float32):
    o0 = torch.randn(rows, positions, width, generator=generator)
    o1 = o0 + 0.1 * torch.randn(rows, positions, width, generator=generator)
    grad = torch.randn(rows, positions, width, generator=generator)
    return o0.to(dtype), o1.to(dtype), grad.to(g_dtype)


def assert_near(coefs, want, sizes):
    # Sums are in fp64. Two roundings to fp32 remain on either side of the comparison, by half an
    # ulp each: a kept mean is rounded relative to the size of its terms, and so is the result.
    if isinstance(want, torch.Tensor):
        want = want.double().cpu()
    assert ((coefs.double().cpu() - want).abs() <= 2 * U32 * (sizes + want.abs())).all(), (
        coefs,
        want,
    )
