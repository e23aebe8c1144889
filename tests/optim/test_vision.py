"""Networks for images learn scikit-learn's digits from scratch, in a few seconds each."""

import pytest
import torch
from pseuzo import DeepZero, MeZO, NodePseuZO, PseuZO
from torch import nn
from torch.nn.functional import cross_entropy

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def digits():
    from sklearn.datasets import load_digits

    images, labels = (torch.from_numpy(a) for a in load_digits(return_X_y=True))
    x = images.float().view(-1, 1, 8, 8) / 16
    return x[:1437], labels[:1437], x[1437:], labels[1437:]


def accuracy(model, digits):
    with torch.no_grad():
        return float((model(digits[2]).argmax(1) == digits[3]).float().mean())


def batches(digits, steps):
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        rows = torch.randint(len(digits[0]), (64,), generator=generator)
        yield digits[0][rows], digits[1][rows]


def small_conv():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(36, 10))


STEPPED = {
    "deepzero": (lambda m: DeepZero(m, 3.0, coordinates=64, seed=0), 30, 0.6),
    "mezo": (lambda m: MeZO(m, 2e-2, seed=0), 400, 0.4),
    "pseuzo": (lambda m: PseuZO(m, 3e-3, seed=0), 400, 0.4),
}


@pytest.mark.parametrize("name", STEPPED)
def test_a_small_convolutional_network_learns(name, digits):
    make, steps, least = STEPPED[name]
    model = small_conv()
    optimizer = make(model)
    assert accuracy(model, digits) < 0.25
    for x, y in batches(digits, steps):
        closure = lambda x=x, y=y: cross_entropy(model(x), y)  # noqa: E731
        if name == "pseuzo":
            optimizer.step(lambda x=x: model(x), lambda o, y=y: cross_entropy(o, y), groups=y)
        else:
            optimizer.step(closure)
    assert accuracy(model, digits) > least
    assert optimizer.skipped_steps == 0


def test_node_perturbation_trains_a_network_from_scratch(digits):
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(64, 64), nn.ReLU())
    model = nn.Sequential(nn.Flatten(), block, nn.Linear(64, 10))
    nodes = NodePseuZO(model, [block, model[-1]], seed=0)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for x, y in batches(digits, 200):
        optimizer.zero_grad()
        nodes.backward(lambda x=x: model(x), lambda o, y=y: cross_entropy(o, y))
        optimizer.step()
    assert accuracy(model, digits) > 0.8
