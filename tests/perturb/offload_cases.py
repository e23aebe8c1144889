"""Models with and without offloading, side by side, and a watch over ops on the host's weights."""

from collections.abc import Callable
from typing import Any

import torch
from pseuzo import CausalLMObjective, PseuZO, device_bytes, offload
from pseuzo.perturb.offloaded import store_of
from pseuzo.perturb.regions import DeviceMemory
from pseuzo.perturb.store import Store
from tiny_models import batch_of, causal_lm
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CPU = torch.device("cpu")


class NoWeightsOfTheHost(TorchDispatchMode):
    """Fails where an op of a pass gets a weight of the host, which a GPU could not read. Ops that
    make rows on the host are pseuzo's own, or run with this mode off, in the store."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._storages = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() in self._storages:
                assert func.namespace == "pseuzo" or func.__name__ in HOST_OPS, func
        return func(*args, **(kwargs or {}))


HOST_OPS = ("detach.default", "embedding.default")  # the store looks up rows


def labelled(seed: int = 0, rows: int = 3) -> dict[str, Tensor]:
    """A batch with a loss at its last four tokens."""
    batch = batch_of(rows, seed=seed)
    labels = batch["input_ids"].clone()
    labels[:, :-4] = -100
    return batch | {"labels": labels}


def offloaded(model: nn.Module, passes: int = 2, **options: Any) -> tuple[nn.Module, DeviceMemory]:
    """The model, offloaded to other host memory of which no more than promised can be had."""
    memory = DeviceMemory(CPU, device_bytes(model, passes=passes))
    return offload(model, CPU, memory=memory, **options), memory


class Run:
    """Steps of an optimizer with losses and evaluations."""

    def __init__(self, model: nn.Module, make: Callable[[nn.Module], Any]) -> None:
        self.model, self.optimizer = model, make(model)
        self.objective = CausalLMObjective(model)
        self.seen: list[Tensor] = []

    def step(self, number: int) -> None:
        forward, head = self.objective(labelled(number))
        if isinstance(self.optimizer, PseuZO):
            loss = self.optimizer.step(forward, head)
        else:
            loss = self.optimizer.step(lambda: head(forward()))
        self.seen.append(loss)

    def evaluate(self) -> None:
        batch = labelled(99)
        batch["examples"], batch["answers"] = torch.tensor([0, 0, 0]), torch.tensor([1])
        self.seen.append(self.objective.scores(batch))
        with torch.no_grad():
            self.seen.append(self.model(input_ids=batch["input_ids"]).logits)

    def steps(self, numbers: range) -> "Run":
        for number in numbers:
            self.step(number)
        return self


def assert_same(run: Run, other: Run) -> None:
    """Both have the same losses, evaluations and weights, to the bit."""
    for x, y in zip(run.seen, other.seen, strict=True):
        assert torch.equal(x, y)
    ours, theirs = run.model.state_dict(), other.model.state_dict()
    assert ours.keys() == theirs.keys()
    for name, x in ours.items():
        assert torch.equal(x, theirs[name]), name


def model_bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def llm(kind: str, tied: bool = True, dtype: torch.dtype = torch.float32) -> nn.Module:
    return causal_lm(kind, tied).to(dtype).eval()


def store_of_run(run: Run) -> Store:
    store = store_of(run.model)
    assert store is not None
    return store
