"""The data of the demo."""

import pytest
from pseuzo.cli.run import max_length, model_path
from pseuzo.models.loading import load_model
from pseuzo.tasks import TaskData, load_task


@pytest.fixture(scope="module")
def demo():
    task = load_task("demo")
    examples = task.load(None, train=50, dev=20, test=20, seed=0)
    model, tokenizer = load_model(model_path("demo"))
    data = {
        k: TaskData(e, task, tokenizer, max_length=max_length(model)) for k, e in examples.items()
    }
    return data, tokenizer
