"""Makes small models, batches and optimizers, and writes out the formulas plainly."""

import copy

import torch
from pseuzo import (
    CyclicHyperbola,
    DeepZero,
    Evolution,
    ForwardGradient,
    MeZO,
    MeZOSVRG,
    PseuZO,
    ZOAdam,
)
from pseuzo.optim import SparseMeZO, ZOBlocks, ZOConservative, ZOSign
from pseuzo.optim.seeds import step_seed
from torch import nn

from pseuzo_kernels import reference

LABELS = torch.tensor([0, 1, 1, 0])


def small_model():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))


def data(step: int, rows: int = 4):
    g = torch.Generator().manual_seed(100 + step)
    return torch.randn(rows, 6, generator=g), torch.randint(0, 5, (rows,), generator=g)


def head_for(y):
    return lambda o: nn.functional.cross_entropy(o.float(), y)


def losses_beside(model, z, bys, x, y):
    """Return the losses at weights + by * z, from copies of the model."""
    losses = []
    for by in bys:
        other = copy.deepcopy(model)
        with torch.no_grad():
            for p, zi in zip(other.parameters(), z, strict=True):
                p.add_(by * zi)
            losses.append(head_for(y)(other(x)).double())
    return losses


def plain_pseuzo(
    model,
    steps,
    lr,
    eps,
    K,
    momentum,
    decay,
    groups,
    seed,
    two_sided=False,
    scale=None,
    mean=False,
    skipped=(),
):
    """Train by PseuZO as in the paper, in float64 except for the forward. There is no ring and no
    fused kernel, and weights are copied. mean: take the weighted mean in place of the sum. skipped:
    steps that are not finite."""
    params = list(model.parameters())
    scale = scale or [1.0] * len(params)
    entries = []
    for t in range(steps):
        x, y = data(t)
        s = step_seed(seed, t)
        z = [
            f * reference.noise(p.shape, s, i)
            for i, (p, f) in enumerate(zip(params, scale, strict=True))
        ]

        @torch.no_grad()
        def output(by, x=x, z=z):
            other = copy.deepcopy(model)
            for p, zi in zip(other.parameters(), z, strict=True):
                p.add_(by * zi)
            return other(x)

        o0 = output(0.0)
        o = o0.clone().requires_grad_()
        (e,) = torch.autograd.grad(head_for(y)(o), o)
        change = (output(eps) - output(-eps)) / 2 if two_sided else output(eps) - o0
        entries = [*entries, (s, None if t in skipped else change.double())][-K:]
        if t in skipped:
            continue
        present = [momentum**age for age, (_, d) in enumerate(reversed(entries)) if d is not None]
        total = sum(present) if mean else 1.0
        update = [torch.zeros_like(p, dtype=torch.float64) for p in params]
        for age, (sk, d) in enumerate(reversed(entries)):
            if d is None:
                continue
            if age == 0 or groups is None:
                dot = (d * e.double()).sum()
            else:
                dot = sum(
                    d[groups == g].mean(0) @ e[groups == g].double().sum(0) for g in groups.unique()
                )
            c = momentum**age * dot / eps / total
            for i, p in enumerate(params):
                update[i] += c * scale[i] * reference.noise(p.shape, sk, i).double()
        with torch.no_grad():
            for p, u, f in zip(params, update, scale, strict=True):
                if f:
                    p.copy_((1 - lr * decay) * p.double() - lr * u)


class Broken(Exception):
    pass


MAKERS = {
    "pseuzo": lambda p, **o: PseuZO(p, 0.02, 1e-2, 3, 0.9, 0.1, seed=2, **o),
    "pseuzo two-sided": lambda p, **o: PseuZO(
        p, 0.02, 1e-2, 3, 0.9, 0.1, seed=2, two_sided=True, **o
    ),
    "pseuzo cyclic": lambda p, **o: PseuZO(p, 0.02, 1e-2, 3, CyclicHyperbola(3, 2), seed=2, **o),
    "mezo": lambda p, **o: MeZO(p, 0.02, 1e-2, weight_decay=0.1, seed=2, **o),
    "mezo momentum": lambda p, **o: MeZO(
        p,
        0.02,
        1e-2,
        weight_decay=0.1,
        seed=2,
        momentum=0.9,
        window=3,
        directions=2,
        two_sided=False,
        **o,
    ),
    "deepzero": lambda p, **o: DeepZero(
        p, 0.02, 1e-2, coordinates=7, scores="random", weight_decay=0.1, seed=2, **o
    ),
    "zo-adam": lambda p, **o: ZOAdam(p, 0.02, 1e-2, weight_decay=0.1, seed=2, window=3, **o),
    "evolution": lambda p, **o: Evolution(
        p, 0.02, 1e-2, directions=2, weight_decay=0.1, seed=2, **o
    ),
    "sparse-mezo": lambda p, **o: SparseMeZO(
        p, 0.02, 1e-2, mask="random", sparsity=0.5, weight_decay=0.1, seed=2, **o
    ),
    "zo-sign": lambda p, **o: ZOSign(p, 0.02, 1e-2, weight_decay=0.1, seed=2, directions=2, **o),
    "zo-conservative": lambda p, **o: ZOConservative(p, 0.02, 1e-2, weight_decay=0.1, seed=2, **o),
    "mezo-svrg": lambda p, **o: MeZOSVRG(
        p, 0.02, 1e-2, weight_decay=0.1, seed=2, anchor_every=3, anchor_scale=0.5, **o
    ),
    "forward-gradient": lambda p, **o: ForwardGradient(
        p, 0.02, weight_decay=0.1, seed=2, directions=2, **o
    ),
    "zo-blocks": lambda p, **o: ZOBlocks(p, 0.02, 1e-2, blocks=2, weight_decay=0.1, seed=2, **o),
}


NEED_MODEL = ("mezo-svrg", "forward-gradient")  # these refuse bare parameters


def arguments(opt, model, t, poison=False):
    """Return the arguments of step() and estimate() for batch t."""
    x, y = data(t)
    factor = float("nan") if poison else 1.0
    dtype = next(model.parameters()).dtype
    forward, head = lambda: model(x.to(dtype)), lambda o: head_for(y)(o) * factor
    if isinstance(opt, PseuZO):
        return forward, head, LABELS
    return with_data(opt, lambda: head(forward()))


def with_data(opt, closure):
    """Return the arguments of step() for an optimizer without a head. All data are this one
    batch."""
    return (closure, lambda: [closure]) if opt.needs_data else (closure,)


def equal(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


class Headed(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(5)
        self.body, self.out = nn.Linear(6, 8), nn.Linear(8, 5)
        self.to(dtype)


def exact_groups(model, lr=0.05, weight_decay=0.2, **options):
    head = {
        "params": model.out.parameters(),
        "lr": lr,
        "weight_decay": weight_decay,
        "exact_gradient": True,
    }
    return [{"params": model.body.parameters()}, head | options]
