"""Tasks: data, prompts and answers from a short YAML file; batches of them; evaluation.

task = load_task("sst2")                        # or a path: my-task.yaml, my-rows.jsonl
examples = task.load(seed=0)                    # {"train": [Example], "dev": ..., "test": ...}
data = TaskData(examples["train"], task, tokenizer, max_length=2048)
batch = data.collate([data[i] for i in range(16)])
test = TaskData(examples["test"], task, tokenizer, max_length=2048)
evaluate(model, test)                           # {"accuracy": ..., "loss": ..., "examples": ...}
"""

from pseuzo.tasks.data import TaskData
from pseuzo.tasks.evaluation import evaluate, nondiff_loss
from pseuzo.tasks.loading import BUILTIN, load_task
from pseuzo.tasks.sampler import StratifiedSampler
from pseuzo.tasks.task import Example, Task

__all__ = [
    "BUILTIN",
    "Example",
    "StratifiedSampler",
    "Task",
    "TaskData",
    "evaluate",
    "load_task",
    "nondiff_loss",
]
