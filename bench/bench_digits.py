"""Trains networks from scratch on digits by node perturbation, SPSA and backpropagation.

python bench/bench_digits.py [--seeds 0 1 2] [--epochs 40] [--only node] [--threads 1]

The digits are scikit-learn's 1797 images of 8 x 8. A multilayer perceptron and a convolutional
network learn 1437 of them in batches of 64, and are tested on the other 360. The seed draws the
split, the weights, the batches and the noise. A convolutional network of 414 weights compares the
methods that move weights, at about equal forward passes. A row in results/digits.csv, for each case
and seed, has the test accuracy, the forward passes and the CPU seconds of training. A backward pass
counts as two forward passes; DeepZero's scores, 33 passes once, are not counted.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch
from harness import Table
from pseuzo import DeepZero, MeZO, NodePseuZO, PseuZO
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import CosineAnnealingLR

BATCH = 64
COLUMNS = ("network", "method", "epochs", "seed", "accuracy", "forwards", "cpu_seconds")
Split = tuple[Tensor, Tensor, Tensor, Tensor]


def digits(seed: int) -> Split:
    """Return images and labels for training, and for testing."""
    images, labels = (torch.from_numpy(a) for a in load_digits(return_X_y=True))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    x, y = images[order].float().view(-1, 1, 8, 8) / 16, labels[order]
    return x[:1437], y[:1437], x[1437:], y[1437:]


def mlp() -> nn.Sequential:
    first, second = nn.Linear(64, 128), nn.Linear(128, 64)
    blocks = nn.Sequential(first, nn.ReLU()), nn.Sequential(second, nn.ReLU())
    return nn.Sequential(nn.Flatten(), *blocks, nn.Linear(64, 10))


def conv() -> nn.Sequential:
    first = nn.Conv2d(1, 16, 3, padding=1)
    second = nn.Conv2d(16, 32, 3, stride=2, padding=1)
    blocks = nn.Sequential(first, nn.ReLU()), nn.Sequential(second, nn.ReLU())
    return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(512, 10))


def small() -> nn.Sequential:
    """Return the convolutional network of 414 weights."""
    body = nn.Conv2d(1, 4, 3, stride=2), nn.Tanh(), nn.Flatten()
    return nn.Sequential(*body, nn.Linear(36, 10))


NETWORKS = {"mlp": mlp, "conv": conv, "small": small}


def train(
    model: nn.Module,
    step: Callable[[Tensor, Tensor], object],
    optimizer: torch.optim.Optimizer,
    data: Split,
    epochs: int,
) -> tuple[float, int, float]:
    """Train at a rate that falls to 0 as a cosine. Return test accuracy, steps and CPU seconds."""
    x, y, test_x, test_y = data
    batches = len(x) // BATCH
    schedule = CosineAnnealingLR(optimizer, epochs * batches)
    start = time.process_time()
    for _ in range(epochs):
        for rows in torch.randperm(len(x))[: batches * BATCH].split(BATCH):
            step(x[rows], y[rows])
            schedule.step()
    seconds = time.process_time() - start
    with torch.no_grad():
        right = (model(test_x).argmax(1) == test_y).float().mean()
    return float(right), epochs * batches, seconds


def by_gradients(model: nn.Module, lr: float, backward: Callable[[Tensor, Tensor], object]):
    """Return a step of Adam on the gradients that backward(x, y) leaves in .grad."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)

    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        backward(x, y)
        optimizer.step()

    return step, optimizer


def backpropagation(model: nn.Module, seed: int):
    backward = lambda x, y: cross_entropy(model(x), y).backward()  # noqa: E731
    return *by_gradients(model, 2e-3, backward), 3


def node(model: nn.Module, seed: int, **options):
    layers = [m for m in model if isinstance(m, nn.Sequential | nn.Linear)]
    nodes = NodePseuZO(model, layers, seed=seed, **options)

    def backward(x: Tensor, y: Tensor) -> None:
        nodes.backward(lambda: model(x), lambda o: cross_entropy(o, y))

    return *by_gradients(model, 2e-3, backward), 2


def by_closure(model: nn.Module, optimizer: torch.optim.Optimizer, passes: int):
    step = lambda x, y: optimizer.step(lambda: cross_entropy(model(x), y))  # noqa: E731
    return step, optimizer, passes


def mezo(model: nn.Module, seed: int, lr: float):
    return by_closure(model, MeZO(model, lr, seed=seed), 2)


def deepzero(model: nn.Module, seed: int, lr: float = 3.0, n: int = 64):
    optimizer = DeepZero(model, lr, coordinates=n, seed=seed)
    return by_closure(model, optimizer, 1 + n)


def pseuzo(model: nn.Module, seed: int, lr: float = 3e-3):
    optimizer = PseuZO(model, lr, seed=seed)

    def step(x: Tensor, y: Tensor) -> None:
        optimizer.step(lambda: model(x), lambda o: cross_entropy(o, y), groups=y)

    return step, optimizer, 2


# (network, method, training, factor of the epochs); lr was found in a few tries at seed 0.
CASES: list[tuple[str, str, Callable, float]] = [
    ("mlp", "backpropagation", backpropagation, 1),
    ("mlp", "node perturbation, K = 14", node, 1),
    ("mlp", "node perturbation, K = 14", node, 2.5),
    ("mlp", "node perturbation, K = 1", partial(node, window=1), 1),
    ("mlp", "SPSA, lr 1e-2", partial(mezo, lr=1e-2), 1),
    ("mlp", "SPSA, lr 5e-3", partial(mezo, lr=5e-3), 4),
    ("conv", "backpropagation", backpropagation, 1),
    ("conv", "node perturbation, K = 14", node, 1),
    ("conv", "node perturbation, K = 14", node, 2.5),
    ("conv", "node perturbation, K = 1", partial(node, window=1), 1),
    ("conv", "SPSA, lr 1e-2", partial(mezo, lr=1e-2), 1),
    ("small", "backpropagation, Adam", backpropagation, 1),
    ("small", "MeZO, lr 2e-2", partial(mezo, lr=2e-2), 4),
    ("small", "DeepZero, 64 weights a step, lr 3", deepzero, 1 / 8),
    ("small", "PseuZO by label, K = 14, lr 3e-3", pseuzo, 4),
]


def run(made: Callable, net: Callable, seed: int, epochs: int) -> tuple[float, int, float]:
    """Return the test accuracy, the forward passes and the CPU seconds of a run."""
    torch.manual_seed(seed)
    model = net()
    step, optimizer, passes = made(model, seed)
    right, steps, seconds = train(model, step, optimizer, digits(seed), epochs)
    return right, passes * steps, seconds


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--epochs", type=int, default=40)
    p.add_argument("--only", default="", help="cases whose network and method have this")
    p.add_argument("--threads", type=int, default=1)
    args = p.parse_args()
    on = argparse.Namespace(device="cpu", threads=args.threads, seconds=0)
    table = Table("digits", on, COLUMNS)
    for network, method, made, factor in CASES:
        if args.only not in f"{network} {method}":
            continue
        epochs = round(factor * args.epochs)
        for seed in args.seeds:
            right, forwards, seconds = run(made, NETWORKS[network], seed, epochs)
            table.add(
                network=network,
                method=method,
                epochs=epochs,
                seed=seed,
                accuracy=right,
                forwards=forwards,
                cpu_seconds=seconds,
            )


if __name__ == "__main__":
    main()
