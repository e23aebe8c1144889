"""Node perturbation agrees with its formula, and on average with autograd."""

import copy
import itertools

import pytest
import torch
from optimizers import Broken
from pseuzo import NodePseuZO
from pseuzo.optim.seeds import direction_seed
from torch import nn

from pseuzo_kernels import noise


def network(blocks=False):
    """Return a network of a convolution, a linear layer and an output layer, of awkward sizes, in
    fp64."""
    torch.manual_seed(3)
    conv = nn.Conv2d(1, 3, 2)
    first = [nn.Sequential(conv, nn.Tanh())] if blocks else [conv, nn.Tanh()]
    body = [nn.Flatten(), nn.Linear(18, 7), nn.ReLU(), nn.Linear(7, 5)]
    return nn.Sequential(*first, *body).double()


def batch(step, rows=6):
    g = torch.Generator().manual_seed(step)
    x = torch.randn(rows, 1, 3, 4, generator=g).double()
    return x, torch.randint(0, 5, (rows,), generator=g)


def head_for(y):
    return lambda o: nn.functional.cross_entropy(o, y)


def gradients(model):
    return [p.grad.clone() for p in model.parameters()]


def autograd(model, x, y):
    other = copy.deepcopy(model)
    other.zero_grad()
    head_for(y)(other(x)).backward()
    return gradients(other)


def stages(model, blocks):
    """Split the network after each layer. Return each part as a function of its input."""
    cuts = [1, 3, 5] if blocks else [1, 4, 6]
    edges = [0, *cuts]
    return [model[a:b] for a, b in itertools.pairwise(edges)]


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("grouped", [False, True])
def test_the_formula(blocks, together, grouped):
    model, eps, lam, K, q = network(blocks), 1e-3, 0.7, 3, 2
    layers = [model[0], model[2 if blocks else 3], model[4 if blocks else 5]]
    nodes = NodePseuZO(
        model, layers, eps, directions=q, window=K, momentum=lam, together=together, seed=4
    )
    parts, window, passes = stages(model, blocks), [], 0

    def run(x, shifts):
        """Return the output of each part before its noise, with noise added to some outputs."""
        outputs = []
        for i, part in enumerate(parts):
            x = part(x)
            outputs.append(x)
            x = x + shifts.get(i, 0.0)
        return outputs

    for t in range(5):
        x, y = batch(t, rows=6 if t % 2 else 4)
        clean = [o.detach() for o in run(x, {})]
        o = clean[-1].clone().requires_grad_()
        (e,) = torch.autograd.grad(head_for(y)(o), o)
        entry = []
        for j in range(q):
            z = [noise(c.shape, direction_seed(4, t, j), i).double() for i, c in enumerate(clean)]
            for active in [[0, 1]] if together else [[0], [1]]:
                with torch.no_grad():
                    moved = run(x, {i: eps * z[i] for i in active})[-1] - clean[-1]
                entry += [(i, z[i], moved) for i in active]
        window = [*window, (entry, y if grouped else torch.zeros_like(y))][-K:]
        want = [torch.zeros_like(c) for c in clean[:2]]
        total = sum(lam**age for age in range(len(window)))
        for age, (made, groups) in enumerate(reversed(window)):
            for (i, z, moved), b in itertools.product(made, range(len(x))):
                own = y[b] if grouped else 0
                rows = [b] if age == 0 else [r for r in range(len(z)) if groups[r] == own]
                for r in rows:
                    c = float(moved[r] @ e[b]) / eps / len(rows) / q
                    want[i][b] += lam**age / total * c * z[r]

        def forward(x=x):
            nonlocal passes
            passes += 1
            return model(x)

        model.zero_grad()
        loss = nodes.backward(forward, head_for(y), y if grouped else None)
        assert float(loss) == pytest.approx(float(head_for(y)(clean[-1])))
        inputs = [x, *clean[:2]]
        for part, given, gradient in zip(parts, inputs, [*want, e], strict=True):
            params = list(part.parameters())
            for p, g in zip(
                params, torch.autograd.grad(part(given), params, gradient), strict=True
            ):
                # In fp64, differences are rounded by 1e-16 and divided by eps, 1e-3. Sums have some
                # 20 terms.
                torch.testing.assert_close(p.grad, g, rtol=1e-9, atol=1e-11)
    assert passes == nodes.forwards == 5 * (1 + q * (1 if together else 2))
    assert nodes.steps == 5 and not any(m._forward_hooks for m in model.modules())


def test_the_mean_over_all_signs_is_the_gradient(monkeypatch):
    """Two hidden layers with two outputs each get noise in the same pass, which makes 2^4 patterns
    per row."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 3))
    model = model.double()
    x, y = torch.randn(1, 3).double(), torch.tensor([2])
    nodes = NodePseuZO(model, eps=1e-4, window=1)
    patterns = list(itertools.product((-1.0, 1.0), repeat=4))
    for signs in patterns:

        def given(shape, seed, i, signs=signs, **options):
            return torch.tensor(signs[2 * i : 2 * i + 2]).view(shape)

        monkeypatch.setattr("pseuzo.optim.nodes.noise", given)
        nodes.backward(lambda: model(x), head_for(y))
    for got, want in zip(gradients(model), autograd(model, x, y), strict=True):
        # Odd powers of eps cancel between opposite signs, so the error is eps^2 = 1e-8 times third
        # derivatives.
        torch.testing.assert_close(got / len(patterns), want, rtol=0, atol=1e-7)
    assert max(float(g.abs().max()) for g in gradients(model)) > 1e-2


def test_the_estimate_is_unbiased():
    """The mean of n estimates is the gradient, within 5 standard errors for each weight."""
    model = network()
    x, y = batch(0, rows=4)
    nodes, n = NodePseuZO(model, window=1, seed=9), 300
    estimates = []
    for _ in range(n):
        model.zero_grad()
        nodes.backward(lambda: model(x), head_for(y))
        estimates.append(torch.cat([g.flatten() for g in gradients(model)]))
    mean, error = torch.stack(estimates).mean(0), torch.stack(estimates).std(0) / n**0.5
    want = torch.cat([g.flatten() for g in autograd(model, x, y)])
    # The differences are one-sided, so their bias is eps = 1e-3 times a second derivative below 1.
    assert ((mean - want).abs() <= 5 * error + 1e-3).all()
    # The test is significant, since the errors are well below the gradient.
    assert error.norm() < 0.35 * want.norm()
    exact = slice(-40, None)  # the output layer: 35 weights and 5 biases
    torch.testing.assert_close(estimates[0][exact], want[exact])


def test_a_window_of_the_same_rows_has_less_variance():
    """If weights and inputs stay the same and each row is a group, old steps act as additional
    draws."""
    model, (x, y) = network(), batch(0)
    want = torch.cat([g.flatten() for g in autograd(model, x, y)])[:-40]
    off = {}
    for window in (1, 16):
        nodes, found = NodePseuZO(model, window=window), []
        for _ in range(40):
            model.zero_grad()
            nodes.backward(lambda: model(x), head_for(y), torch.arange(6))
            found.append(torch.cat([g.flatten() for g in gradients(model)])[:-40])
        off[window] = float(torch.stack([(g - want).norm() for g in found[16:]]).mean())
    # The error falls to 1 / sqrt(16) = 0.25 on average. Successive estimates share draws.
    assert 0.1 < off[16] / off[1] < 0.5


def test_a_state_continues_to_the_bit(tmp_path):
    def run(nodes, model, steps):
        for t in steps:
            x, y = batch(t)
            model.zero_grad()
            nodes.backward(lambda x=x: model(x), head_for(y), y)

    make = lambda m, **o: NodePseuZO(m, window=3, momentum=0.5, directions=2, **o)  # noqa: E731
    model = network()
    nodes = make(model, seed=7)
    run(nodes, model, range(4))
    torch.save(nodes.state_dict(), tmp_path / "nodes.pt")
    other = copy.deepcopy(model)
    again = make(other)
    again.load_state_dict(torch.load(tmp_path / "nodes.pt", weights_only=True))
    run(nodes, model, range(4, 7))
    run(again, other, range(4, 7))
    assert all(map(torch.equal, gradients(model), gradients(other)))
    assert again.steps == nodes.steps == 7 and again.forwards == nodes.forwards
    with pytest.raises(ValueError, match="the state has 3 layers, and this NodePseuZO has 1"):
        NodePseuZO(model, nn.Conv2d).load_state_dict(nodes.state_dict())
    with pytest.raises(TypeError, match="cannot be copied"):
        copy.copy(nodes)


@pytest.mark.parametrize("error", [Broken, KeyboardInterrupt])
def test_a_pass_that_fails_leaves_nothing(error):
    model = network().train()
    x, y = batch(0)
    nodes = NodePseuZO(model, directions=2)
    nodes.backward(lambda: model(x), head_for(y))
    before, held = gradients(model), nodes.state_dict()
    for failing in range(1, 4):
        calls = itertools.count(1)

        def forward(calls=calls, failing=failing):
            if next(calls) == failing:
                raise error
            return model(x)

        with pytest.raises(error):
            nodes.backward(forward, head_for(y))
        assert all(map(torch.equal, gradients(model), before))
        assert nodes.state_dict()["steps"] == held["steps"] == 1 and len(nodes._held[1]) == 1
        assert model.training and torch.is_grad_enabled()
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_what_is_not_finite_is_seen_and_not_kept():
    model = network()
    x, y = batch(0)
    nodes = NodePseuZO(model, window=4)
    nodes.backward(lambda: model(x * float("inf")), head_for(y))
    assert not all(bool(g.isfinite().all()) for g in gradients(model))
    model.zero_grad()
    nodes.backward(lambda: model(x), head_for(y))
    assert all(bool(g.isfinite().all()) for g in gradients(model))


def test_frozen_layers_and_layers_of_several_kinds():
    model = network(blocks=True)
    model[0].requires_grad_(False)
    x, y = batch(0)
    nodes = NodePseuZO(model, [model[0], nn.Linear], together=False)
    nodes.backward(lambda: model(x), head_for(y))
    assert nodes.forwards == 2, "not only the linear layer before the last takes noise"
    assert [p.grad is not None for p in model.parameters()] == [False] * 2 + [True] * 4


def test_refusals():
    model = network()
    x, y = batch(0)
    for layers, match in (
        ([nn.Linear(2, 2)], "a Linear is not one of the model's"),
        ([nn.Sequential, nn.Linear], "a Sequential contains another of the layers"),
        (nn.Tanh, "none of the layers has a weight that requires grad"),
    ):
        with pytest.raises(ValueError, match=match):
            NodePseuZO(model, layers)
    with pytest.raises(ValueError, match="window must be an int of at least 1"):
        NodePseuZO(model, window=0)
    with pytest.raises(ValueError, match=r"layer 0 \(Conv2d\) runs twice in a pass"):
        NodePseuZO(model).backward(lambda: (model(x), model(x))[0], head_for(y))
    with pytest.raises(ValueError, match="groups must be 6 integers"):
        NodePseuZO(model).backward(lambda: model(x), head_for(y), [1, 2])
    with pytest.raises(RuntimeError, match="used no layer with a trained weight"):
        NodePseuZO(model).backward(lambda: copy.deepcopy(network())(x), head_for(y))
    nodes = NodePseuZO(model[3:])
    nodes.backward(lambda: model[3:](model[:3](x)), head_for(y))
    wide = nn.Conv2d(1, 3, 2).double()
    sizes = NodePseuZO(nn.Sequential(wide, nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    sizes.backward(lambda: sizes.model(x), lambda o: o.square().mean())
    with pytest.raises(ValueError, match="others than in the window"):
        sizes.backward(lambda: sizes.model(x[..., :3]), lambda o: o.square().mean())
