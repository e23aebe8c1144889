"""Tasks: data, prompts and answers from a short YAML file; batches for CausalLMObjective; evaluation.

task = load_task("sst2")                        # or a path: my-task.yaml, my-rows.jsonl
examples = task.load(seed=0)                    # {"train": [Example], "dev": ..., "test": ...}
data = TaskData(examples["train"], task, tokenizer, max_length=2048)
batch = data.collate([data[i] for i in range(16)])
evaluate(model, TaskData(examples["test"], task, tokenizer, max_length=2048))   # {"accuracy": ..., ...}
"""

from pseuzo.tasks.data import StratifiedSampler, TaskData
from pseuzo.tasks.evaluation import evaluate, nondiff_loss
from pseuzo.tasks.task import BUILTIN, Example, Task, load_task

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
