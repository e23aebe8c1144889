"""The hooks of Transformers' Trainer that report on a run: rows of its steps, and evaluations."""

import time
from typing import Any

import torch
from torch import Tensor

from pseuzo.models.positions import NOT_INPUTS
from pseuzo.optim.base import ZeroOrder
from pseuzo.tasks import TaskData, evaluate
from pseuzo.train.logs import StepLog
from pseuzo.train.methods import forwards_of_steps, forwards_per_step
from pseuzo.train.options import OPTIONS
from pseuzo.train.ranked import RankedTrainer


class ReportingTrainer(RankedTrainer):
    """Logs without waiting for the device, counts forward passes, and evaluates a TaskData.

    zero_order: the optimizer of a zeroth-order run, else None. It is stored here because
    Transformers wraps self.optimizer. repeats: whether the last step was made from its record in a
    journal, without passes; such steps have no row in the log. search_forwards: the passes of a
    search before the first step, see SearchingTrainer. still: whether the weights stay, at lr 0,
    and the readout alone learns, for which a step takes one pass.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.zero_order = self.optimizer if isinstance(self.optimizer, ZeroOrder) else None
        self.step_log = StepLog(self.args.device)
        self.repeats = False
        self.search_forwards = 0
        self.still = self.args.readout == "fit" and self.args.learning_rate == 0

    # Logs

    def forwards(self, steps: int) -> int:
        """Return the forward passes of the first steps, and of the search before them if there was
        one; a backward pass counts as two."""
        return self.search_forwards + self._forwards(steps)

    def _forwards(self, steps: int) -> int:
        args, options = self.args, self.counted_options()
        each = forwards_per_step(args.method, options)
        if each == 3 and args.method == "pseuzo" and self.zero_order is not None:
            # A step at which lambda is 0 is MeZO's, and has two passes.
            return sum(3 if self.zero_order.schedule(step) > 0 else 2 for step in range(steps))
        return forwards_of_steps(args.method, steps, options)

    def counted_options(self) -> dict[str, Any]:
        """What the number of forward passes of a step depends on, see forwards_per_step."""
        options = {name: getattr(self.args, name) for name in OPTIONS}
        options["batch_size"] = self.args.global_batch_size
        options["lr"] = 0.0 if self.still else None
        if hasattr(self.train_dataset, "__len__"):
            options["train_size"] = len(self.train_dataset)
        return options

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Count the operations of our passes, those of an average step. Transformers counts a
        forward and a backward pass, which are three forward passes."""
        passes = forwards_per_step(self.args.method, self.counted_options())
        return int(super().floating_point_ops(inputs) * passes // 3)

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        if "attention_mask" not in inputs and "input_ids" in inputs:  # there is no padding
            inputs = {**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])}
        super()._track_num_input_tokens(inputs)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = [*dict.fromkeys((*self._signature_columns, *NOT_INPUTS))]

    def _maybe_log_save_evaluate(
        self, tr_loss: Tensor, grad_norm: Any, *args: Any, **kwargs: Any
    ) -> None:
        if self.args.zeroth_order:  # Transformers would wait for this loss, and log() adds its own
            where = self.args.device if self.distributed else "cpu"  # it is sent to other ranks
            tr_loss, grad_norm = torch.zeros((), device=where), None
        if self.repeats:
            self.control.should_log = False
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log as Transformers does, but log rows of training steps when their numbers have arrived.

        The numbers are fetched from the device while the next steps run. Callbacks and log_history
        get them with the number of their own step.
        """
        if "loss" not in logs:
            self.step_log.emit(wait=True)  # rows keep their order
            return super().log(logs, *args, **kwargs)
        log = super().log
        optimizer = self.zero_order if self.args.zeroth_order else None
        self.step_log.add(
            logs, optimizer, self.state, self.forwards, lambda row: log(row, *args, **kwargs)
        )

    # Evaluation

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate as Transformers does, but leave losses that are not finite out of the mean."""
        given = self.args.logging_nan_inf_filter
        self.args.logging_nan_inf_filter = given is not False
        try:
            return super().evaluation_loop(*args, **kwargs)
        finally:
            self.args.logging_nan_inf_filter = given

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict:
        data = eval_dataset if eval_dataset is not None else self.eval_dataset
        if isinstance(data, str):  # the name of one of several
            data = self.eval_dataset[data]
        if isinstance(data, dict):  # Transformers calls this for each of them
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        with self.step_log.paused():
            if not isinstance(data, TaskData):
                return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
            started = time.perf_counter()
            figures = evaluate(
                self.model, data, batch_size=self.args.eval_batch_size, together=self.together
            )
            metrics = {f"{metric_key_prefix}_{k}": v for k, v in figures.items()}
            metrics[f"{metric_key_prefix}_runtime"] = round(time.perf_counter() - started, 4)
            metrics["forwards"] = self.forwards(self.state.global_step)
            metrics["train_seconds"] = self.step_log.seconds(started)
            self.log(metrics)
            self.control = self.callback_handler.on_evaluate(
                self.args, self.state, self.control, metrics
            )
        return metrics

    def predict(self, test_dataset: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(test_dataset, TaskData):
            raise ValueError(
                "PseuZOTrainer.predict: for a TaskData use evaluate, or pseuzo.tasks.generate for "
                "its texts"
            )
        with self.step_log.paused():
            return super().predict(test_dataset, *args, **kwargs)

    def hyperparameter_search(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError(
            "PseuZOTrainer: hyperparameter_search is not supported, as model_init is not; make a "
            "trainer for each trial, or use pseuzo train --lr auto"
        )
