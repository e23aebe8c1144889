"""The examples of docs/trainers.md run as they stand and train, where their libraries are
installed."""

import re
from pathlib import Path

import pytest
import torch
from pseuzo.optim import MeZO, PseuZO
from torch.nn.functional import cross_entropy

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "trainers.md").read_text()
DEMO = str(ROOT / "python/pseuzo/demo/assets/model")


def blocks(part: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", part, re.DOTALL)


COMMON = blocks(PAGE.partition("\n## ")[0])[0]


def run(heading: str, which: int = 0) -> dict:
    """Run an example of a section after the model and the batches of the page; return its names."""
    (part,) = (part for part in PAGE.split("\n## ") if part.startswith(heading + "\n"))
    names: dict = {}
    for code in (COMMON, blocks(part)[which].replace("facebook/opt-125m", DEMO)):
        exec(compile(code, heading, "exec"), names)
    return names


def loss_of(names: dict) -> float:
    with torch.no_grad():
        return cross_entropy(names["model"](names["x"]), names["y"]).item()


@pytest.fixture(scope="module")
def plain() -> tuple[float, torch.Tensor]:
    """The loss before training, and the weights after the steps of the examples in a plain loop."""
    names: dict = {}
    exec(COMMON, names)
    before, model = loss_of(names), names["model"]
    optimizer = MeZO(model, lr=0.02)
    for _ in range(50):
        for x, y in names["batches"]:
            optimizer.step(lambda x=x, y=y: cross_entropy(model(x), y))
    return before, torch.nn.utils.parameters_to_vector(model.parameters()).detach()


@pytest.fixture
def accelerated():
    """End Accelerate's state, which a process has once, with the test."""
    state = pytest.importorskip("accelerate.state")
    yield
    state.AcceleratorState._reset_state(reset_partial_state=True)


def test_pytorch(plain):
    names = run("PyTorch")
    assert loss_of(names) < 0.7 * plain[0]
    assert names["optimizer"].steps == 200 and names["scheduler"].get_last_lr()[0] < 1e-9


@pytest.mark.usefixtures("accelerated")
def test_accelerate(plain):
    names = run("Accelerate")
    after = torch.nn.utils.parameters_to_vector(names["model"].parameters())
    assert torch.equal(after, plain[1]) and loss_of(names) < 0.7 * plain[0]
    assert len(names["losses"]) == 2 * 200


@pytest.mark.usefixtures("accelerated")
def test_accelerate_applies_an_estimate_of_pseuzo():
    accelerate = pytest.importorskip("accelerate")
    model, twin = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    twin.load_state_dict(model.state_dict())
    x, y = torch.randn(5, 3), torch.tensor([0, 1, 0, 1, 1])
    model, optimizer = accelerate.Accelerator().prepare(model, PseuZO(model, lr=0.1))
    own = PseuZO(twin, lr=0.1)
    for _ in range(2):
        optimizer.optimizer.estimate(lambda: model(x), lambda o: cross_entropy(o, y))
        optimizer.step()
        own.step(lambda: twin(x), lambda o: cross_entropy(o, y))
    assert torch.equal(model.weight, twin.weight) and own.steps == optimizer.optimizer.steps == 2


def test_lightning(plain, tmp_path, monkeypatch):
    pytest.importorskip("lightning", reason="lightning is not installed")
    monkeypatch.chdir(tmp_path)
    names = run("Lightning")
    after = torch.nn.utils.parameters_to_vector(names["model"].parameters())
    assert torch.equal(after, plain[1]) and loss_of(names) < 0.7 * plain[0]
    assert names["trainer"].global_step == 200


def test_lightning_past_its_wrapper(tmp_path, monkeypatch):
    """PseuZO's step takes two functions, and Lightning counts no steps."""
    lightning = pytest.importorskip("lightning", reason="lightning is not installed")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(COMMON, names)

    class Classifier(lightning.LightningModule):
        def __init__(self, model):
            super().__init__()
            self.model, self.automatic_optimization = model, False

        def training_step(self, batch):
            inputs, labels = batch
            optimizer = self.optimizers(use_pl_optimizer=False)
            optimizer.step(lambda: self.model(inputs), lambda o: cross_entropy(o, labels))

        def configure_optimizers(self):
            self.made = PseuZO(self.model, lr=0.01)
            return self.made

    before, module = loss_of(names), Classifier(names["model"])
    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    trainer = lightning.Trainer(max_epochs=10, accelerator="cpu", **quiet)
    trainer.fit(module, names["batches"])
    assert module.made.steps == 40 and trainer.global_step == 0
    assert loss_of(names) < before


def test_a_reward(plain):
    names = run("Rewards")
    assert loss_of(names) < plain[0] and names["reward"] > 0.8


@pytest.mark.slow
def test_a_reward_of_completions():
    pytest.importorskip("transformers")
    names = run("Rewards", 1)
    assert len(names["rewards"]) == 3 and all(0 <= reward for reward in names["rewards"])
    assert names["optimizer"].steps == 3


def test_scikit_learn():
    selection = pytest.importorskip("sklearn.model_selection")
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    names = run("scikit-learn")
    before = names["model"][0].weight.clone()
    estimator = names["ZerothOrderClassifier"](names["model"], steps=100)
    x, y = names["x"].numpy(), names["y"].numpy()
    scores = selection.cross_val_score(make_pipeline(StandardScaler(), estimator), x, y, cv=2)
    assert scores.min() > 0.75, "half of the labels are right without training"
    assert torch.equal(names["model"][0].weight, before), "the estimator trains a copy"
