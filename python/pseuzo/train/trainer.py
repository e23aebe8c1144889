"""PseuZOTrainer: Transformers' Trainer with zeroth-order steps.

    args = PseuZOTrainingArguments(output_dir="run", method="pseuzo", learning_rate=1e-7,
                                   max_steps=10_000)
    PseuZOTrainer(model, args, train_dataset=data["train"], eval_dataset=data["dev"]).train()

It only overrides hooks: the loop, logging, callbacks, checkpoints and best-model selection are
Transformers' own. A training step runs the passes of optimizer.estimate(...); the Trainer's call of
optimizer.step() applies the update. The logged loss of a two-sided MeZO step is the mean over its
perturbed passes, since it never computes the loss at the weights themselves; evaluations do.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pseuzo.models.loading import keep_as_loaded
from pseuzo.models.objective import CausalLMObjective
from pseuzo.models.positions import IGNORED, with_positions
from pseuzo.models.readout import Readout, head_to_fit, no_readout
from pseuzo.optim.seeds import step_seed
from pseuzo.perturb.offload import offload
from pseuzo.perturb.offloaded import store_of
from pseuzo.tasks import TaskData
from pseuzo.train import checks
from pseuzo.train.arguments import PseuZOTrainingArguments
from pseuzo.train.batches import even_batches
from pseuzo.train.losses import Losses
from pseuzo.train.searching import SearchingTrainer


class PseuZOTrainer(SearchingTrainer):
    """Fine-tunes a Transformers causal LM by forward passes alone, or with method fo-* as usual; on
    a TaskData of its kind, also a masked language model or a classifier.

    train_dataset, eval_dataset: a pseuzo.tasks.TaskData (batches balanced by class, evaluation by
    the task's metric), or any dataset whose collated batches have input_ids, attention_mask and
    labels [B, T], -100 where there is no loss.
    objective: a callable batch -> (forward, head) in place of CausalLMObjective, for a loss of your
    own; with clip_examples or find_lr it also gets reduction="none", and head returns the loss of
    each example, [B]. The model may then be any module, and a batch a dict of any tensors, with a
    row for each of forward's output; evaluation knows the labels among them by args.label_names.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        args: PseuZOTrainingArguments | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        *,
        objective: Callable | None = None,
        **kwargs: Any,
    ):
        checks.check_arguments(args, kwargs)
        data = checks.task_data(train_dataset, eval_dataset)
        own = objective is None
        if args.remove_unused_columns is None:
            args.remove_unused_columns = data is None and own
        if data is not None:
            checks.check_task_data(args, kwargs)
            data_collator = data_collator or data.collate
        checks.check_not_empty(train_dataset)
        args.refuse()
        checks.check_parts(args, train_dataset)
        fits = args.readout == "fit"
        if isinstance(model, nn.Module):
            keep_as_loaded(model)
            options = data.options if own and data is not None else None
            if args.readout == "auto":
                fits = not (args.no_readout or no_readout(model, options))
            if fits:
                head_to_fit(model, options)
            if args.offload != "none":
                offload(model, args.device)
        with checks.head_alone(model):
            super().__init__(model, args, data_collator, train_dataset, eval_dataset, **kwargs)
        args.refuse()  # checked again, as Transformers changes some of them
        if store_of(self.model) is not None:
            self.accelerator.device_placement = False  # it would move the weights
            if not args.zeroth_order:
                raise ValueError(
                    f"PseuZOTrainer: the model is offloaded, and method {args.method} needs its "
                    "weights on the device; use mezo or pseuzo, or a model that is not offloaded"
                )
        if objective is None:
            objective = CausalLMObjective(self.model, data.options if data is not None else None)
        self.objective = objective
        if fits:
            self.readout = Readout(objective, args.readout_decay)
        self.losses = Losses(self.model, args, objective, train_dataset)
        if data is None and self.losses.of_model:
            self.data_collator = with_positions(self.data_collator)
        if args.capture and not self.losses.of_model:
            raise ValueError(
                "PseuZOTrainer: capture needs CausalLMObjective; with a loss of your own, see "
                "PseuZO"
            )
        if self.optimizer is not None and args.zeroth_order and self.zero_order is None:
            raise ValueError(
                f"PseuZOTrainer: method {args.method} needs MeZO or PseuZO, got "
                f"{type(self.optimizer).__name__}"
            )
        # If true, a loss is divided by the labels of all accumulated batches, else by its batch's.
        self.model_accepts_loss_kwargs = own and data is None and not args.zeroth_order
        self._loss_only = False  # whether the prediction_step that is running needs no logits

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        if store_of(model) is None:
            super()._move_model_to_device(model, device)

    def _begin(self) -> None:
        self._initial_global_step = self.state.global_step  # older Transformers do not set it
        # How often a resumed run logs, evaluates and saves is what its arguments say.
        self.state.compute_steps(self.args, self.state.max_steps)
        super()._begin()

    # A step

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self.train_dataset, TaskData):
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            return self.train_dataset.sampler(self.args.global_batch_size, seed)
        return super()._get_train_sampler(*args, **kwargs)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """Estimate a step, which the Trainer's optimizer.step() applies; return the loss. A step
        that is made from its record in the journal needs no estimate. A model on several devices
        may have the loss on any of them; it is returned on that of the arguments."""
        self.step_log.emit()
        inputs = self._prepare_inputs(inputs)
        self.repeats = self.zero_order is not None and self.zero_order.repeats
        self.step_log.count(inputs, measured=not self.repeats)
        if self.repeats:  # its loss is not known, and counts in no mean
            self._initial_global_step += 1
            return torch.zeros((), device=self.args.device)
        if not self.args.zeroth_order:
            loss = super().training_step(model, inputs, num_items_in_batch)
            if "targets" in inputs:  # a batch without labels has a loss of NaN and no gradient
                loss = torch.where((inputs["targets"] != IGNORED).any(), loss, self._mean_loss())
            return loss.to(self.args.device)
        functions, more = self.losses.step_inputs(inputs, self.zero_order)
        if self.zero_order.needs_data:
            more["batches"] = self.data_losses
        with self.listening():
            loss = self.zero_order.estimate(*functions, **more).to(self.args.device)
        return self.step_log.finite(loss, self._mean_loss())

    def data_losses(self) -> Iterator[Callable[[], Tensor]]:
        """The loss of one batch after another of the training data: each of its rows once, or
        args.anchor_batches batches of rows that depend on the seed and the step."""
        args, data = self.args, self.train_dataset
        if not hasattr(data, "__len__"):
            raise ValueError(
                f"method {args.method} measures the loss of all the training data: it needs a "
                "train_dataset of a known length"
            )
        collate = self._get_collator_with_removed_columns(self.data_collator, "training")
        seed = step_seed(args.seed, self.zero_order.steps)
        for rows in even_batches(len(data), args.global_batch_size, args.anchor_batches, seed):
            inputs = self._prepare_inputs(collate([data[i] for i in rows]))
            yield self.losses.closure(inputs, self.losses.reduction)

    def _mean_loss(self) -> Tensor:
        """Return the mean of the losses that are still in Transformers' sum."""
        # A zeroth-order run never takes them out of the sum: see _maybe_log_save_evaluate.
        zeroth = self.args.zeroth_order
        first = self._initial_global_step if zeroth else self._globalstep_last_logged
        return self._tr_loss / max(self.state.global_step - first, 1)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        losses, names = self.losses, self.label_names
        logits = return_outputs and not self._loss_only
        if logits and losses.comes_with_logits(inputs):
            inputs = losses.model_inputs(inputs, names, "labels")
            return super().compute_loss(model, inputs, return_outputs)
        # Mixed precision also applies to the head, before which the model's own autocast ends.
        with self.accelerator.autocast():
            loss = losses.loss(inputs)
        if torch.is_grad_enabled() and num_items_in_batch is not None:
            accumulated = self.current_gradient_accumulation_steps
            loss *= losses.share(inputs, num_items_in_batch, accumulated)
        if not return_outputs:
            return loss
        outputs = model(**losses.model_inputs(inputs, names)) if logits else {}
        if not isinstance(outputs, dict):  # give it a form that Transformers' loop can use
            outputs = (loss, *outputs) if isinstance(outputs, tuple) else {"logits": outputs}
        return loss, outputs

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: Any = None,
    ) -> Any:
        if any(inputs.get(name) is None for name in self.label_names):  # there is no loss
            inputs = self.losses.model_inputs(inputs, self.label_names)
        self._loss_only = prediction_loss_only
        try:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        finally:
            self._loss_only = False
