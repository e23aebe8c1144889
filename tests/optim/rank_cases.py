"""A model whose losses are exact, its batches, and the runs that test_ranks*.py make on it.

All weights and activations are rounded to coarse grids, so that every sum over rows, positions or
widths is exact in fp32: no order of a sum, instruction set or division into parts of 1/2, 1/4 or
1/8 of the batch can change a bit of losses, output changes and gradients.
"""

from contextlib import ExitStack

import torch
from pseuzo import (
    FZOO,
    Evolution,
    ForwardGradient,
    Journal,
    MeZO,
    PseuZO,
    ZOAdam,
    ZOBlocks,
    ZOConservative,
    ZOSign,
)
from pseuzo.optim import Schedule, SparseMeZO
from pseuzo.optim.together import Together
from pseuzo.train.following import share_records
from torch import nn

ROWS, WIDTH = 8, 4
OPTIONS = dict(lr=2**-6, eps=2**-2, seed=5, weight_decay=0.25)


class OffEveryThird(Schedule):
    def __call__(self, step):
        return 0.0 if step % 3 == 2 else 0.5


class Grid(torch.autograd.Function):
    """Rounds x to multiples of 1/8, of at most `most`; its derivative is 1."""

    @staticmethod
    def forward(x, most):
        return (x.float() * 8).round().clamp(-8 * most, 8 * most) / 8

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None

    @staticmethod
    def jvp(ctx, tangent, _):
        return (tangent * 8).round() / 8


class Exact(nn.Module):
    """[B, P, 4] inputs of integers -> [B, P, 4] outputs, in multiples of 1/8."""

    def __init__(self, hidden=16, dtype=torch.float32):
        super().__init__()
        g = torch.Generator().manual_seed(7)

        def weight(*shape):
            return nn.Parameter(torch.randint(-60, 61, shape, generator=g).div(64).to(dtype))

        self.first, self.last = weight(hidden, WIDTH), weight(WIDTH, hidden)
        self.bias = weight(WIDTH)

    def forward(self, x):
        h = Grid.apply(x @ Grid.apply(self.first, 1.0).T, 4.0)
        o = Grid.apply(h @ Grid.apply(self.last, 1.0).T / 4, 4.0)
        return o + Grid.apply(self.bias, 1.0)


def batch(step, positions=2):
    """Return inputs [8, P, 4], targets of their shape, and a label for each row."""
    g = torch.Generator().manual_seed(100 + step)
    x, y = torch.randint(-2, 3, (2, ROWS, positions, WIDTH), generator=g).float()
    return x, y, torch.randint(3, (ROWS,), generator=g)


def losses(o, y):
    """Return [B], exact: the distances of o from y, at positions aligned from the right."""
    return (o - y).square().flatten(1).mean(1)


def losses_of_tokens(o, y, rows):
    """Return [B, P], whose sums over P are such losses. Rows 0 to 3 have none at position 0, which
    a part with these rows alone lacks."""
    each = (o - y).square().mean(2) / y.shape[1]
    late = torch.arange(ROWS)[rows] >= ROWS // 2
    each = torch.cat([torch.where(late[:, None], each[:, :1], 0.0), each[:, 1:]], 1)
    return each if late.any() else each[:, 1:]


CASES = {
    "mezo": (MeZO, {}),
    "mezo, 3 directions": (MeZO, dict(directions=3)),
    "mezo, one-sided": (MeZO, dict(directions=2, two_sided=False, maximize=True)),
    "mezo, momentum": (MeZO, dict(momentum=0.5, window=3, noise="rademacher")),
    "mezo, clipped": (MeZO, dict(clip_examples=1.5)),
    "mezo, tokens": (MeZO, dict(curvature_window=3, weight_decay=0.0)),
    "mezo, fp16 weights": (MeZO, {}),
    "pseuzo": (PseuZO, dict(window=3, momentum=0.5)),
    "pseuzo, by row": (PseuZO, dict(window=3, momentum=0.5)),
    "pseuzo, two-sided": (PseuZO, dict(window=3, two_sided=True, momentum=0.5)),
    "pseuzo, mean": (PseuZO, dict(window=4, weighting="mean")),
    "pseuzo, schedule": (PseuZO, dict(window=3, momentum=OffEveryThird())),
    "evolution": (Evolution, dict(directions=2)),
    "fzoo": (FZOO, dict(directions=4)),
    "zo-adam": (ZOAdam, dict(window=3)),
    "zo-adam, state": (ZOAdam, dict(moments="state")),
    "zo-sign": (ZOSign, dict(directions=2)),
    "zo-conservative": (ZOConservative, {}),
    "zo-blocks": (ZOBlocks, dict(blocks=2)),
    "sparse-mezo": (SparseMeZO, {}),
    "forward-gradient": (ForwardGradient, dict(directions=2)),
}


def make(name, model=None, **more):
    """Return the optimizer of a case, and its model."""
    kind, options = CASES[name]
    model = model or Exact(dtype=torch.float16 if "fp16" in name else torch.float32)
    options = OPTIONS | options | more
    if kind is ForwardGradient:
        del options["eps"]
    return kind(model, **options), model


def arguments(name, optimizer, model, step, rows=slice(None), scalar=False, positions=2):
    """Return what step takes for some rows of a batch."""
    x, y, labels = (part[rows] for part in batch(step, positions))

    def of(o):
        each = losses_of_tokens(o, y, rows) if "tokens" in name else losses(o, y)
        return each.mean() if scalar else each

    if not isinstance(optimizer, PseuZO):
        return (lambda: of(model(x)),), dict(size=len(x)) if scalar else {}
    groups = None if "by row" in name else labels
    return (lambda: model(x), of, groups), dict(size=len(x)) if scalar else {}


def flat(model):
    return torch.cat([p.detach().float().flatten() for p in model.parameters()])


def run(name, rows=slice(None), steps=4, scalar=False, **more):
    """Return the losses of some steps, and the weights after each, as lists."""
    optimizer, model = make(name, **more)
    found = []
    for step in range(steps):
        inputs, options = arguments(name, optimizer, model, step, rows, scalar)
        loss = optimizer.step(*inputs, **options)
        found.append((float(loss), flat(model).tolist()))
    return found


def run_all(rank, parts, direction_ranks, scalar):
    """Return what `run` returns for each case, on this rank's part of the batch."""
    rows, found = parts[rank // direction_ranks], {}
    for name in CASES:
        scalars = scalar and not ("clipped" in name or "tokens" in name)
        found[name] = run(name, rows, scalar=scalars, direction_ranks=direction_ranks)
    return found


def bytes_of_steps(rank, name, parts, hidden):
    """Return the bytes that a rank sent and received at each of three steps."""
    optimizer, model = make(name, Exact(hidden))
    found = []
    for step in range(3):
        inputs, options = arguments(name, optimizer, model, step, parts[rank])
        optimizer.step(*inputs, **options)
        found.append(optimizer.stats["network_bytes"])
    return found


def begun(rank, name, parts):
    """Make steps 0 .. 2; return the state and the weights."""
    optimizer, model = make(name)
    for step in range(3):
        inputs, options = arguments(name, optimizer, model, step, parts[rank])
        optimizer.step(*inputs, **options)
    return optimizer.state_dict(), model.state_dict()


def continued(rank, name, state, weights, parts):
    """Load a state and the weights, make steps 3 .. 5, and return losses and weights."""
    model = Exact()
    model.load_state_dict(weights)
    optimizer, _ = make(name, model)
    optimizer.load_state_dict(state)
    found = []
    for step in range(3, 6):
        inputs, options = arguments(name, optimizer, model, step, parts[rank])
        found.append((float(optimizer.step(*inputs, **options)), flat(model).tolist()))
    return found


def followed(rank, names, folder, parts):
    """Make steps 0 .. 5 of each case; rank 0 has the journal of the first of them. Return the steps
    that ran passes, and the weights."""
    found = {}
    for name in names:
        optimizer, model = make(name)
        with ExitStack() as stack:
            if rank == 0:
                stack.enter_context(Journal(folder / f"{name}.pzj", optimizer, follow=True))
            share_records(optimizer, Together(optimizer.ranks))
            measured = []
            for step in range(6):
                inputs, options = arguments(name, optimizer, model, step, parts[rank])
                if optimizer.step(*inputs, **options) is not None:
                    measured.append(step)
        found[name] = measured, flat(model).tolist()
    return found


FLOATS = {
    "pseuzo": dict(window=3, momentum=0.5),
    "pseuzo, clipped": dict(window=3, momentum=0.5, clip_examples=1.2),
    "pseuzo, two-sided, by row": dict(window=3, weighting="mean", two_sided=True),
}


def ragged(rank, parts, scalar=False):
    """Train a float model by PseuZO on rows of 1 to 3 positions; return losses and weights.

    A rank pads its rows on the left to the longest of them.
    """
    found = {}
    for name, options in FLOATS.items():
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))
        g = torch.Generator().manual_seed(3)
        for p in model.parameters():  # drawn as integers: floats depend on the instruction set
            p.data = torch.randint(-16, 17, p.shape, generator=g) / 32
        optimizer = PseuZO(model, lr=0.05, eps=0.25, seed=2, **options)
        found[name] = []
        for step in range(4):
            g = torch.Generator().manual_seed(step)
            x, y = (
                torch.randint(-64, 65, (8, 3, 6), generator=g) / 32,
                torch.randint(5, (8, 3), generator=g),
            )
            lengths, labels = torch.randint(1, 4, (2, 8), generator=g)
            x, y, lengths, labels = (part[parts[rank]] for part in (x, y, lengths, labels))
            longest = int(lengths.max())
            x, y = x[:, -longest:], y[:, -longest:]
            mask = (torch.arange(longest) >= longest - lengths[:, None]).float()

            def forward(model=model, x=x, mask=mask):
                return model(x) * mask[:, :, None]

            def head(o, y=y, mask=mask):
                each = nn.functional.cross_entropy(o.transpose(1, 2), y, reduction="none")
                each = (each * mask).sum(1)
                return each.mean() if scalar else each

            groups = None if "by row" in name else labels
            loss = optimizer.step(forward, head, groups, size=len(x))
            found[name].append((float(loss), flat(model)))
    return found
