"""The hooks of Transformers' Trainer by which the ranks of a run make the same steps.

Transformers divides data among processes, and has them exchange gradients. Ranks of a zeroth-order
run exchange losses alone (pseuzo.optim.ranks). All of them draw the same global batches as a single
process would, and cut their part out of each: so every row has the padding that it has in one
process, every collator draws the same random numbers, and each rank knows the sizes of all parts.
"""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from accelerate.data_loader import BatchSamplerShard
from numpy import generic, ndarray
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PrinterCallback, ProgressCallback, Trainer
from transformers.training_args import ParallelMode

from pseuzo.optim.ranks import present_ranks
from pseuzo.optim.together import Together
from pseuzo.tasks import Example, TaskData
from pseuzo.train.arguments import PseuZOTrainingArguments


@contextmanager
def whole_run(args: PseuZOTrainingArguments) -> Iterator[None]:
    """In a `with` block, let Transformers take this process for the only one."""
    state, args.distributed_state = args.distributed_state, None
    try:
        yield
    finally:
        args.distributed_state = state


@contextmanager
def whole_batch(args: PseuZOTrainingArguments) -> Iterator[None]:
    """In a `with` block, let Transformers take the global batch for that of this process."""
    own, args.per_device_train_batch_size = (
        args.per_device_train_batch_size,
        args.per_device_train_batch_size * args.row_parts,
    )
    try:
        yield
    finally:
        args.per_device_train_batch_size = own


def leave_as_they_are(accelerator: Any) -> None:
    """Have a model prepared without DistributedDataParallel, which would allocate gradients, and an
    optimizer without loading its own state, which is that of rank 0 alone."""
    accelerator.prepare_model = partial(accelerator.prepare_model, evaluation_mode=True)
    prepare = accelerator.prepare_optimizer
    accelerator.prepare_optimizer = lambda optimizer, **how: prepare(optimizer, False)


def digest(data: Any) -> str:
    """Return the number of rows and a hash of them, or of about a thousand of many; "" if their
    number is not known. Where an example was read is left out, as paths differ among machines."""
    if not hasattr(data, "__len__"):
        return ""
    rows = data.examples if isinstance(data, TaskData) else data
    hashed, n = hashlib.sha256(), len(rows)
    with torch.random.fork_rng(devices=[]):  # a row may be drawn with random numbers
        for i in range(0, n, max(1, n // 1000)):
            hashed.update(f"{_plain(rows[i])!r}\n".encode())
    return f"{n} rows, hash {hashed.hexdigest()[:16]}"


def _plain(x: Any) -> Any:
    """Return what is the same in all processes, as an address would not be."""
    if isinstance(x, Example):
        return replace(x, place="")
    if isinstance(x, Tensor | ndarray | generic):
        return x.tolist()
    if isinstance(x, Mapping):
        return {str(name): _plain(value) for name, value in x.items()}
    if isinstance(x, list | tuple):
        return [_plain(value) for value in x]
    return x if isinstance(x, str | bytes | int | float | None) else type(x).__name__


class RankedTrainer(Trainer):
    """Leaves the model as it is, and gives each rank whole batches.

    together: the ranks of the run.
    """

    args: PseuZOTrainingArguments

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        ranks = present_ranks(type(self).__name__, self.args.direction_ranks)
        self.together = Together(ranks)
        self.distributed = self.args.parallel_mode == ParallelMode.DISTRIBUTED
        self._train_batch_size = self.args.global_batch_size
        if self.distributed and self.args.zeroth_order:
            leave_as_they_are(self.accelerator)
        if not self.together.is_root:
            for callback in (PrinterCallback, ProgressCallback):
                self.remove_callback(callback)

    def get_train_dataloader(self) -> DataLoader:
        with whole_batch(self.args), whole_run(self.args):
            loader = super().get_train_dataloader()
        shard = loader.batch_sampler
        if isinstance(shard, BatchSamplerShard):  # accelerate would give each rank other batches
            shard.num_processes, shard.process_index, shard.even_batches = 1, 0, False
        elif self.together.ranks is not None:
            raise ValueError(
                "PseuZOTrainer: several ranks cut their parts out of the same batches, so they "
                "need a train_dataset of a known length"
            )
        return loader

    def get_total_train_batch_size(self, args: Any) -> int:
        return self._train_batch_size * args.gradient_accumulation_steps

    def _init_training_state(self, *args: Any, **kwargs: Any) -> Any:
        with whole_batch(self.args):  # it is compared with that of a checkpoint
            return super()._init_training_state(*args, **kwargs)

    # All ranks count and draw the same.

    def store_flos(self) -> None:
        with whole_run(self.args):
            super().store_flos()

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        before = self.state.num_input_tokens_seen
        super()._track_num_input_tokens(inputs)
        seen = self.state.num_input_tokens_seen - before
        self.state.num_input_tokens_seen = before + seen // self.together.size

    def _save_rng_state(self, output_dir: str) -> None:
        with whole_run(self.args):
            super()._save_rng_state(output_dir)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with whole_run(self.args):
            super()._load_rng_state(checkpoint)
