"""Models, data and arguments for the tests of the trainer."""

import torch
from pseuzo import CausalLMObjective
from pseuzo.cli.run import model_path
from pseuzo.models.loading import load_model
from pseuzo.tasks import TaskData
from pseuzo.train.arguments import PseuZOTrainingArguments
from tiny_models import VOCAB, batch_of
from torch.nn import functional as F
from transformers import (
    OPTConfig,
    OPTForSequenceClassification,
)


def fresh() -> torch.nn.Module:
    return load_model(model_path("demo"))[0]


def arguments(folder, **changes) -> PseuZOTrainingArguments:
    defaults = dict(
        output_dir=str(folder),
        max_steps=9,
        per_device_train_batch_size=7,
        learning_rate=2e-4,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_steps=1,
        seed=3,
        weight_decay=0.02,
    )
    return PseuZOTrainingArguments(**(defaults | changes))


def loop(data: TaskData, args: PseuZOTrainingArguments, make, step) -> dict[str, torch.Tensor]:
    """Train in a plain loop over the sampler's batches, epoch by epoch."""
    model = fresh()
    objective = CausalLMObjective(model, data.options)
    optimizer = make(model)
    sampler = data.sampler(args.per_device_train_batch_size, args.seed)
    done, epoch = 0, 0
    while done < args.max_steps:
        sampler.set_epoch(epoch)
        order = list(sampler)
        for first in range(0, len(order), args.per_device_train_batch_size):
            if done == args.max_steps:
                break
            batch = data.collate(
                [data[i] for i in order[first : first + args.per_device_train_batch_size]]
            )
            step(optimizer, objective, batch)
            done += 1
        epoch += 1
    return dict(model.named_parameters())


class Rows(torch.utils.data.Dataset):
    """A user's own data: token ids and labels."""

    def __init__(self, n: int = 12):
        batch = batch_of(rows=n, length=10)
        self.rows = [
            {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        ]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i]


class Regression(torch.nn.Module):
    """A module that is not a Transformers model."""

    def __init__(self):
        super().__init__()
        self.body, self.out = torch.nn.Linear(5, 40), torch.nn.Linear(40, 1)

    def forward(self, x):
        return self.out(self.body(x).tanh())[:, 0]


def of_a_regression():
    torch.manual_seed(0)
    model, x = Regression(), torch.randn(8, 5)
    rows = [{"x": row, "y": row.sum()} for row in x]

    def objective(batch):
        return lambda: model.body(batch["x"]).tanh(), lambda o: F.mse_loss(
            model.out(o)[:, 0], batch["y"]
        )

    return model, rows, objective, {"body.weight", "body.bias"}


def of_a_classifier():
    torch.manual_seed(0)
    model = OPTForSequenceClassification(
        OPTConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            ffn_dim=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=64,
        )
    )
    batch = batch_of(rows=8)
    rows = [
        {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor(i % 2)}
        for i, (ids, mask) in enumerate(
            zip(batch["input_ids"], batch["attention_mask"], strict=True)
        )
    ]

    def objective(batch):
        def forward():
            return model.model(
                batch["input_ids"], attention_mask=batch["attention_mask"]
            ).last_hidden_state[:, -1]

        return forward, lambda o: F.cross_entropy(model.score(o), batch["labels"])

    return model, rows, objective, {n for n, _ in model.named_parameters() if n != "score.weight"}
