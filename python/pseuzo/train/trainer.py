"""PseuZOTrainer: Transformers' Trainer with zeroth-order steps.

    args = PseuZOTrainingArguments(output_dir="run", method="pseuzo", learning_rate=1e-7, max_steps=10_000)
    PseuZOTrainer(model, args, train_dataset=data["train"], eval_dataset=data["dev"]).train()

Hooks only: its loop, logging, callbacks, checkpoints and best-model selection are Transformers' own. A training step is
the passes of optimizer.estimate(...); the Trainer's optimizer.step() applies the update. The logged loss of a two-sided
MeZO step is the mean of its perturbed passes' losses: it never sees the one at the weights themselves, evaluations do.
"""

import json
import logging
import math
import shutil
import sys
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from tqdm import tqdm
from transformers import Trainer, TrainerCallback
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState, TrainerState
from transformers.trainer_utils import (
    PREFIX_CHECKPOINT_DIR,
    SaveStrategy,
    TrainOutput,
    rotate_checkpoints,
)

from pseuzo.files import check_saving, read_json, write_json
from pseuzo.machine import Fetched, peak_memory
from pseuzo.models import placement, probe
from pseuzo.models.loading import keep_as_loaded, quantised
from pseuzo.models.objective import CausalLMObjective
from pseuzo.models.positions import IGNORED, NOT_INPUTS, padded, with_positions
from pseuzo.models.split import head_parameters
from pseuzo.optim import MeZO, PseuZO
from pseuzo.optim.base import ZeroOrder
from pseuzo.optim.clip import row_factors
from pseuzo.optim.schedule import Constant, CyclicHyperbola, Linear, Schedule
from pseuzo.perturb.graphs import MAX_GRAPHS
from pseuzo.tasks import TaskData, evaluate, nondiff_loss
from pseuzo.train import checkpoints
from pseuzo.train.arguments import PseuZOTrainingArguments
from pseuzo.train.checkpoints import last_checkpoint
from pseuzo.train.journal import Journal
from pseuzo.train.journal_file import JournalError, owner
from pseuzo.train.methods import forwards_per_step

_log = logging.getLogger(__name__)

SHAPES = (
    64,
    8,
)  # with capture, lengths are padded to multiples of the one, loss positions of the other
LOGGED_STATE = (
    "global_step",
    "epoch",
    "num_input_tokens_seen",
)  # that a row of the log is told with
PLACEMENT_FILE = "noise_on.json"
REQUEST = (
    "method",
    "noise_on",
    "learning_rate",
    "eps",
    "noise",
    "scale_lr",
    "scale_eps",
)  # what it was decided for


NOT_TAKEN = {  # arguments of Transformers' Trainer
    "model_init": "make the model and give it as model",
    "compute_loss_func": "give objective, a callable batch -> (forward, head)",
    "optimizer_cls_and_kwargs": "the optimizer is that of args.method, or give optimizers=(optimizer, None)",
}
NOT_OF_TASKS = {  # with a TaskData, these may have no other value
    "compute_metrics": None, "preprocess_logits_for_metrics": None, "remove_unused_columns": False,
    "train_sampling_strategy": "random",
}  # fmt: skip


class _Watcher(TrainerCallback):
    """Opens the journal when everything is loaded."""

    def __init__(self, trainer: "PseuZOTrainer"):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer._start()


class PseuZOTrainer(Trainer):
    """Fine-tunes a Transformers causal LM by forward passes alone; with method fo-* as the stock Trainer does.

    train_dataset, eval_dataset: a pseuzo.tasks.TaskData (batches balanced by class, evaluation by the task's metric),
    or any dataset whose collated batches have input_ids, attention_mask and labels [B, T], -100 where there is no loss.
    objective: a callable batch -> (forward, head) in place of CausalLMObjective, for a loss of your own; with
    clip_examples it also gets reduction="none", and head returns the loss of each example, [B]. The model may then be
    any module, and a batch a dict of any tensors, with a row for each of forward's output; evaluation knows the labels
    among them by args.label_names.
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
        if not isinstance(args, PseuZOTrainingArguments):
            raise TypeError(
                f"PseuZOTrainer: args must be PseuZOTrainingArguments, got {type(args).__name__}"
            )
        for name, instead in NOT_TAKEN.items():
            if kwargs.get(name) is not None:
                raise ValueError(f"PseuZOTrainer: {name} is not supported; {instead}")
        some = eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset]
        given = [d for d in (train_dataset, *some) if d is not None]
        data = next((d for d in given if isinstance(d, TaskData)), None)
        if data is not None and not all(isinstance(d, TaskData) for d in given):
            raise ValueError(
                "PseuZOTrainer: train_dataset and eval_dataset must both be TaskData, or neither"
            )
        if args.remove_unused_columns is None:
            args.remove_unused_columns = data is None and objective is None
        for name, only in NOT_OF_TASKS.items() if data is not None else ():
            if (kwargs.get(name) if only is None else getattr(args, name)) != only:
                raise ValueError(
                    f"PseuZOTrainer: {name} does nothing with a TaskData, which makes its own batches and is evaluated "
                    "by its task's metric"
                )
        if data_collator is None and data is not None:
            data_collator = data.collate
        if (
            train_dataset is not None
            and hasattr(train_dataset, "__len__")
            and len(train_dataset) == 0
        ):
            raise ValueError("PseuZOTrainer: train_dataset is empty")
        args.refuse()
        if isinstance(model, nn.Module):
            keep_as_loaded(model)
        with _head_alone(model):
            super().__init__(model, args, data_collator, train_dataset, eval_dataset, **kwargs)
        args.refuse()  # Transformers writes some of them
        own = objective is None
        if own:
            objective = CausalLMObjective(self.model, data.options if data is not None else None)
        self.objective = objective
        if data is None and isinstance(objective, CausalLMObjective):
            self.data_collator = with_positions(self.data_collator)
        if args.capture and not isinstance(objective, CausalLMObjective):
            raise ValueError(
                "PseuZOTrainer: capture needs CausalLMObjective; with a loss of your own, see PseuZO"
            )
        self._recorded: OrderedDict[tuple, tuple] = OrderedDict()
        self.zero_order = self.optimizer if isinstance(self.optimizer, ZeroOrder) else None
        if self.optimizer is not None and args.zeroth_order and self.zero_order is None:
            raise ValueError(
                f"PseuZOTrainer: method {args.method} needs MeZO or PseuZO, got {type(self.optimizer).__name__}"
            )
        # does a loss count the labels of all batches that are accumulated? Else it is a mean over its batch
        self.model_accepts_loss_kwargs = own and data is None and not args.zeroth_order
        self._loss_only = False  # of the prediction_step that runs
        self._journal: Journal | None = None
        self.run_id: str | None = None  # for the header of the journal; None: a random one
        self.found_whole: str | None = (
            None  # a checkpoint that last_checkpoint gave: train() need not read it again
        )
        self.kept_step: int | None = (
            None  # of the checkpoint that train() loaded in the end; None: the last step's
        )
        self._tokens = torch.zeros((), dtype=torch.int64, device=args.device)
        self._losses = torch.zeros(2)  # sum and number of the finite
        self._masked = torch.zeros_like(
            self._tokens
        )  # rows of the run in which no label carries a loss
        self._masked_told = 0
        self._began, self._logged = time.perf_counter(), 0.0
        self._untold: deque[tuple[Fetched, Callable[[list], None]]] = (
            deque()
        )  # rows of the log, on their way
        self.add_callback(_Watcher(self))

    # the optimizer

    def create_optimizer(self, *unused: Any, **ignored: Any) -> torch.optim.Optimizer:
        if self.optimizer is None:
            where, lr, eps = self._placement()
            groups = placement.param_groups(
                self.model, where, lr=lr, weight_decay=self.args.weight_decay
            )
            if self.args.zeroth_order:
                self.optimizer = self.zero_order = self._zeroth_order(groups, lr, eps)
            else:
                for p in self.model.parameters():
                    p.requires_grad_(p in where)
                self.optimizer = self._first_order(groups, lr)
        return self.optimizer

    def _first_order(self, groups: list[dict], lr: float) -> torch.optim.Optimizer:
        args = self.args
        for (
            group
        ) in groups:  # noise of scale s moves weights by -lr s^2 g on average, g their gradient
            group["lr"] *= group["noise_scale"] ** 2
            group["weight_decay"] /= group["noise_scale"] ** 2  # decay is by lr, whatever the scale
        if args.method == "fo-sgd":
            return torch.optim.SGD(groups, lr=lr, momentum=args.momentum)
        betas = (args.adam_beta1, args.adam_beta2)
        return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=args.adam_epsilon)

    def _zeroth_order(self, groups: list[dict], lr: float, eps: float) -> ZeroOrder:
        args = self.args
        common = dict(
            lr=lr, eps=eps, noise=args.noise, rounding=args.rounding, seed=args.seed, model=self.model,
            clip_examples=args.clip_examples, capture=args.capture,
        )  # fmt: skip
        if args.method != "pseuzo":
            momentum = (
                {"momentum": args.momentum, "window": args.window}
                if args.method == "mezo-momentum"
                else {}
            )
            two_sided = args.two_sided is not False
            return MeZO(
                groups, two_sided=two_sided, directions=args.directions, **momentum, **common
            )
        head = [p for p in head_parameters(self.model) if p.requires_grad]
        for group in groups:
            group["params"] = [p for p in group["params"] if not any(p is h for h in head)]
        groups = [g for g in groups if g["params"]]
        if not groups:
            raise ValueError(
                "method pseuzo: its perturbed passes end before the output head, and noise_on or the mode leaves "
                "nothing else to train; use mezo, or fo-sgd or fo-adam for the head's exact gradient"
            )
        if args.head == "exact":
            if not head:
                raise ValueError(
                    "head=exact: there is no output head of its own that is trained: it is tied to the embedding, "
                    "which takes noise, or the mode or noise_on leaves it out; use head=frozen"
                )
            head_lr = args.head_lr if args.head_lr is not None else 1000 * lr
            groups.append(
                {"params": head, "lr": head_lr, "weight_decay": 0.0, "exact_gradient": True}
            )
        return PseuZO(
            groups, window=args.window, momentum=self._schedule(), two_sided=bool(args.two_sided), **common
        )  # fmt: skip

    def _schedule(self) -> Schedule:
        args = self.args
        if args.schedule == "constant":
            return Constant(args.momentum)
        steps = self._planned_steps()
        if args.schedule == "linear":
            return Linear(args.momentum, 0.0, steps)
        return CyclicHyperbola.from_steps(steps, self._steps_an_epoch())

    def _planned_steps(self) -> int:
        if self.args.max_steps > 0:
            return self.args.max_steps
        return math.ceil(self.args.num_train_epochs * self._steps_an_epoch())

    def _steps_an_epoch(self) -> int:
        if not hasattr(self.train_dataset, "__len__"):
            raise ValueError(
                f"schedule {self.args.schedule} counts epochs: it needs a train_dataset of a known length"
            )
        n, size = len(self.train_dataset), self.args.train_batch_size
        return max(1, n // size if self.args.dataloader_drop_last else -(-n // size))

    def _placement(self) -> tuple[dict[nn.Parameter, float], float, float]:
        """Where the noise goes (of fo-*: what is trained), and lr and eps for it. What a probe found is kept in the
        output folder: a resumed run must not look again."""
        args = self.args
        if args.noise_on != ["auto"] and not (args.scale_lr or args.scale_eps):
            return placement.place(self.model, args.noise_on), args.learning_rate, args.eps
        file = Path(args.output_dir) / PLACEMENT_FILE
        request = {name: getattr(args, name) for name in REQUEST}
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            with torch.random.fork_rng(
                devices=[]
            ):  # loaders draw from it: dropout is as where nothing is probed
                found = self.find_placement()
            write_json(file, found | {"request": request})
        decided = read_json(file, "noise_on", "lr", "eps", "request")
        if decided["request"] != request:
            other = next(name for name in REQUEST if decided["request"].get(name) != request[name])
            raise ValueError(
                f"{file} was decided for {other} {decided['request'].get(other)}, not {request[other]}; choose another "
                "output folder, or delete that file"
            )
        return placement.place(self.model, decided["noise_on"]), decided["lr"], decided["eps"]

    def find_placement(self) -> dict[str, Any]:
        """Where the noise goes (args.noise_on, or by a probe of the groups of weights if that is auto), lr and eps
        (scaled if args say so), and the table that it was decided by. A few hundred forward passes, printed."""
        args = self.args
        where, lr, eps, table = list(args.noise_on), args.learning_rate, args.eps, []
        how = "lr and eps as given"
        if where == ["auto"]:
            groups = placement.groups_of(self.model)
            rows = self._probe(groups, args.probe_forwards, "probing where noise pays")
            where = probe.choose(rows)
            table = [asdict(row) | {"cost": row.cost, "chosen": row.name in where} for row in rows]
            _print_probe(table)
        everywhere = dict.fromkeys((p for p in self.model.parameters() if p.requires_grad), 1.0)
        here = placement.place(self.model, where)
        both = {"here": here} if here == everywhere else {"here": here, "everywhere": everywhere}
        found = {
            row.name: row
            for row in self._probe(both, max(args.probe_forwards // 3, 10), "probing the curvature")
        }
        if len(found) == 2 and (args.scale_lr or args.scale_eps):
            scaled = probe.equal_change(lr, eps, found["everywhere"], found["here"])
            how = scaled.how
            if args.scale_lr:
                lr, how = scaled.lr, f"{how}; lr times {scaled.lr / lr:.3g} is {scaled.lr:.3g}"
            if args.scale_eps:
                eps, how = (
                    scaled.eps,
                    f"{how}; eps times {scaled.eps / eps:.3g} is {scaled.eps:.3g}",
                )
            print(f"noise on {', '.join(where)}: {how}", flush=True)
        return {"noise_on": where, "lr": lr, "eps": eps, "how": how, "curvature": found["here"].cost[0],
                "table": table}  # fmt: skip

    def _probe(self, groups: dict, forwards: int, what: str) -> list[probe.Row]:
        per_batch = 1 + 2 * len(groups)
        n = max(3, forwards // per_batch)
        with tqdm(
            total=n * per_batch,
            desc=what,
            unit="forward",
            disable=self.args.disable_tqdm,
            leave=False,
        ) as bar:
            # per example, if they can be had: then the curvature need not be seen as a difference of differences
            each = (
                isinstance(self.objective, CausalLMObjective) or self.args.clip_examples is not None
            )
            batches = [
                self._closure(self._prepare_inputs(batch), each)
                for batch in islice(self.get_train_dataloader(), n)
            ]
            return probe.probe(
                self.model, groups, batches, eps=self.args.eps, noise=self.args.noise, seed=self.args.seed,
                progress=bar.update,
            )  # fmt: skip

    # a step

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self.train_dataset, TaskData):
            return self.train_dataset.sampler(
                self.args.train_batch_size,
                self.args.seed if self.args.data_seed is None else self.args.data_seed,
            )
        return super()._get_train_sampler(*args, **kwargs)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:  # and the Trainer's optimizer.step() applies what is estimated here
        self._tell()
        inputs = self._prepare_inputs(inputs)
        self._count(inputs)
        if not self.args.zeroth_order:
            loss = super().training_step(model, inputs, num_items_in_batch)
            if "targets" in inputs:  # where no label carries a loss, it is NaN, and its gradient 0
                loss = torch.where((inputs["targets"] != IGNORED).any(), loss, self._mean_loss())
            return loss
        optimizer, args = self.zero_order, self.args
        each = args.clip_examples is not None
        if isinstance(optimizer, MeZO):
            closure = (
                self._to_record(inputs, each)[2] if args.capture else self._closure(inputs, each)
            )
            return self._logged_loss(optimizer.estimate(closure))
        forward, head = (
            self._to_record(inputs, each)[:2] if args.capture else self._split(inputs, each)
        )
        groups = inputs.get("groups") if args.groups == "label" else None
        if args.groups == "none":
            rows = next(
                len(x)
                for x in (inputs.get("input_ids"), *inputs.values())
                if isinstance(x, Tensor) and x.dim()
            )
            groups = torch.zeros(rows, dtype=torch.int64, device=args.device)
        return self._logged_loss(
            optimizer.estimate(forward, head, groups=groups, examples=inputs.get("examples"))
        )

    def _logged_loss(self, loss: Tensor) -> Tensor:
        """The loss, or the mean of those before if it is not finite: such a step is skipped, and must not spoil the
        mean that is logged."""
        if self._losses.device != loss.device:
            self._losses = self._losses.to(loss.device)
        finite = loss.isfinite()
        self._losses += torch.stack([torch.where(finite, loss, 0.0).float(), finite.float()])
        return torch.where(finite, loss, self._mean_loss())

    def _mean_loss(self) -> Tensor:
        """Of the steps that Transformers has not taken out of its sum yet; of a zeroth-order run, it never does."""
        first = (
            self._initial_global_step if self.args.zeroth_order else self._globalstep_last_logged
        )
        return self._tr_loss / max(self.state.global_step - first, 1)

    def _split(
        self, inputs: dict[str, Any], each: bool
    ) -> tuple[Callable[[], Tensor], Callable[[Tensor], Tensor]]:
        """forward and head; each: with the losses of the examples, which an objective need not be able to give."""
        return self.objective(inputs, reduction="none") if each else self.objective(inputs)

    def _to_record(self, inputs: dict[str, Any], each: bool) -> tuple[Callable, Callable, Callable]:
        """forward, head and both in one. They are the same for all batches of a shape, and read the tensors that the
        batch is copied to here."""
        plan = self.objective.checked(padded(self.objective.plan(inputs), *SHAPES))
        shape = tuple((name, x.shape, x.dtype) for name, x in plan.items())
        if shape not in self._recorded:
            own = {name: x.clone() for name, x in plan.items()}
            forward, head = self.objective.functions(own, "none" if each else "mean")
            self._recorded[shape] = own, (forward, head, lambda: head(forward()))
            if len(self._recorded) > MAX_GRAPHS:
                self._recorded.popitem(last=False)
        self._recorded.move_to_end(shape)
        own, functions = self._recorded[shape]
        for name, x in plan.items():
            own[name].copy_(x)
        return functions

    def _closure(self, inputs: dict[str, Any], each: bool) -> Callable[[], Tensor]:
        if self.args.objective == "metric":
            if not isinstance(self.train_dataset, TaskData):
                raise ValueError(
                    "objective=metric needs a TaskData as train_dataset: it knows the metric"
                )
            rows = inputs["rows"].tolist()
            return lambda: nondiff_loss(self.model, self.train_dataset, rows)
        forward, head = self._split(inputs, each)
        return lambda: head(forward())

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        logits = return_outputs and not self._loss_only
        if logits and self._is_the_models(inputs):
            return super().compute_loss(model, self._model_inputs(inputs, "labels"), return_outputs)
        clip = (
            self.args.clip_examples if torch.is_grad_enabled() else None
        )  # the gradient is all it changes
        with (
            self.accelerator.autocast()
        ):  # of fo-* in mixed precision; the model's own ends before the head
            forward, head = self._split(inputs, clip is not None)
            o = forward()
            loss = head(o) if clip is None else _clipped_mean(head, o, clip, inputs.get("examples"))
        if torch.is_grad_enabled() and not loss.requires_grad:
            raise ValueError(
                f"method {self.args.method}: no gradient reaches the weights that are trained (layers of the model, as "
                "some quantised ones, pass none on); use mezo or pseuzo, which need none"
            )
        if (
            torch.is_grad_enabled() and num_items_in_batch is not None
        ):  # its share of the batches that are accumulated
            tokens = "targets" in inputs and "examples" not in inputs
            loss *= (
                (inputs["targets"] != IGNORED).sum() / num_items_in_batch
                if tokens
                else (1 / self.current_gradient_accumulation_steps)
            )
        if not return_outputs:
            return loss
        outputs = model(**self._model_inputs(inputs)) if logits else {}
        if not isinstance(outputs, dict):  # as Transformers' loop takes them
            outputs = (loss, *outputs) if isinstance(outputs, tuple) else {"logits": outputs}
        return loss, outputs

    def _is_the_models(self, inputs: dict[str, Any]) -> bool:
        """Is the loss of a batch the one that the model gives with its logits?"""
        objective = self.objective
        return (
            isinstance(objective, CausalLMObjective)
            and objective.options is None
            and "examples" not in inputs
        )

    def _model_inputs(self, inputs: dict[str, Any], *more: str) -> dict[str, Any]:
        """What the model gets of a batch, without what is the objective's alone, but for `more`; with the objective's
        positions where rows are padded on the left."""
        kept = {
            k: v
            for k, v in inputs.items()
            if k in more or k not in (*NOT_INPUTS, *self.label_names)
        }
        mask = inputs.get("attention_mask")
        if (
            isinstance(self.objective, CausalLMObjective)
            and mask is not None
            and not bool(mask[:, 0].all())
        ):
            kept |= self.objective.model_inputs(kept)
        return kept

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: Any = None,
    ) -> Any:
        """As Transformers'; the logits are the model's own, and positions are counted as in training."""
        if any(inputs.get(name) is None for name in self.label_names):
            inputs = self._model_inputs(inputs)  # there is no loss
        self._loss_only = prediction_loss_only
        try:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        finally:
            self._loss_only = False

    # what is written

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As Transformers': batches whose loss is not finite, as where no label carries one, are not in its mean."""
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
        if isinstance(data, str):  # one of several
            data = self.eval_dataset[data]
        if isinstance(data, dict):  # each comes here
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        with self._not_training():
            if not isinstance(data, TaskData):
                return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
            started = time.perf_counter()
            figures = evaluate(self.model, data, batch_size=self.args.eval_batch_size)
            metrics = {f"{metric_key_prefix}_{k}": v for k, v in figures.items()}
            metrics[f"{metric_key_prefix}_runtime"] = round(time.perf_counter() - started, 4)
            metrics |= self._spent(started)
            self.log(metrics)
            self.control = self.callback_handler.on_evaluate(
                self.args, self.state, self.control, metrics
            )
        return metrics

    def predict(self, test_dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """As Transformers'."""
        if isinstance(test_dataset, TaskData):
            raise ValueError(
                "PseuZOTrainer.predict: for a TaskData use evaluate, or pseuzo.tasks.generate for its texts"
            )
        with self._not_training():
            return super().predict(test_dataset, *args, **kwargs)

    def hyperparameter_search(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError(
            "PseuZOTrainer: hyperparameter_search is not supported, as model_init is not; make a trainer for each "
            "trial, or use pseuzo train --lr auto"
        )

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Transformers' are of a forward and a backward pass, which counts as two."""
        return super().floating_point_ops(inputs) * self.forwards(1) // 3

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        if (
            "attention_mask" not in inputs and "input_ids" in inputs
        ):  # which says that there is no padding
            inputs = {**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])}
        super()._track_num_input_tokens(inputs)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = [*dict.fromkeys((*self._signature_columns, *NOT_INPUTS))]

    def _spent(self, now: float) -> dict[str, float]:
        return {
            "forwards": self.forwards(self.state.global_step),
            "train_seconds": round(now - self._began, 4),
        }

    def forwards(self, steps: int) -> int:
        """Forward passes of the first steps; a backward pass counts as two."""
        each = forwards_per_step(self.args.method, self.args.directions, self.args.two_sided)
        if (
            each == 3 and self.args.method == "pseuzo" and self.zero_order is not None
        ):  # where lambda is 0: MeZO's two
            return sum(3 if self.zero_order.schedule(step) > 0 else 2 for step in range(steps))
        return steps * each

    @contextmanager
    def _not_training(self) -> Iterator[None]:
        """Time spent in here is not counted as time of training."""
        self._tell(wait=True)
        if self.args.device.type == "cuda":
            torch.cuda.synchronize(self.args.device)
        started = time.perf_counter()
        try:
            yield
        finally:
            self._began += time.perf_counter() - started

    def _count(self, inputs: dict[str, Any]) -> None:
        mask, ids = inputs.get("attention_mask"), inputs.get("input_ids")
        if mask is not None:
            self._tokens += mask.sum()  # on the device: nobody waits
        elif ids is not None:
            self._tokens += ids.numel()
        if "targets" in inputs:
            self._masked += (inputs["targets"] == IGNORED).all(-1).sum()

    def _tell_masked(self, rows: int) -> None:
        """Of the first rows without a loss, and whenever there are ten times as many."""
        if rows > self._masked_told and rows >= 10 * self._masked_told:
            self._masked_told = rows
            _log.warning(
                "%d training row(s) so far carry no loss: all their labels are -100, as where an answer was cut off. "
                "They teach nothing, and a step whose batch has no other rows is skipped", rows,
            )  # fmt: skip

    def _maybe_log_save_evaluate(
        self, tr_loss: Tensor, grad_norm: Any, *args: Any, **kwargs: Any
    ) -> None:
        if (
            self.args.zeroth_order
        ):  # it would wait for this loss; log() has its own, and there is no gradient
            tr_loss, grad_norm = torch.zeros(()), None
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As Transformers'. What a training step logs is fetched from the device while the next steps run, and told to
        callbacks and log_history then, under the step that it is of."""
        if "loss" not in logs:
            self._tell(wait=True)  # in their order
            return super().log(logs, *args, **kwargs)
        figures = {"tokens": self._tokens, "masked_rows": self._masked}
        if self.args.zeroth_order:
            total, count = self._losses
            figures |= {"loss": total / count} | self._figures()
        tensors = {name: x for name, x in figures.items() if isinstance(x, Tensor)}
        fetched = Fetched(
            torch.stack([x.to(self._tokens.device).double().reshape(()) for x in tensors.values()])
        )
        state = {name: getattr(self.state, name) for name in LOGGED_STATE}
        self._untold.append(
            (fetched, partial(self._tell_row, logs | figures, list(tensors), state, args, kwargs))
        )
        self._tokens.zero_()
        self._losses.zero_()
        self._tell()

    def _tell(self, wait: bool = False) -> None:
        """Log what is here. Of two rows the older is waited for: the host must not run ahead of the device for ever."""
        while self._untold and (wait or len(self._untold) > 1 or self._untold[0][0].here()):
            fetched, tell = self._untold.popleft()
            tell(fetched.get()[0].tolist())

    def _tell_row(
        self, logs: dict, names: list[str], state: dict, args: tuple, kwargs: dict, values: list
    ) -> None:
        logs |= zip(names, values, strict=True)
        logs["loss"] = round(logs["loss"], 6)
        if "skipped_steps" in logs:
            logs["skipped_steps"] = int(logs["skipped_steps"])
        if masked := int(logs.pop("masked_rows")):
            logs["masked_rows"] = masked
            self._tell_masked(masked)
        now = {name: getattr(self.state, name) for name in state}
        vars(self.state).update(state)
        try:
            logs |= self._spent(time.perf_counter())
            seconds = max(logs["train_seconds"] - self._logged, 1e-9)
            if tokens := logs.pop("tokens"):  # batches of a loss of one's own need not have any
                logs["tokens_per_second"] = round(tokens / seconds, 1)
            self._logged = logs["train_seconds"]
            logs["peak_memory_mib"] = round(peak_memory(self.args.device), 1)
            super().log(logs, *args, **kwargs)
        finally:
            vars(self.state).update(now)

    def _figures(self) -> dict[str, Any]:
        """Of the last step: numbers, and tensors of one element on the device."""
        stats = self.zero_order.stats
        if not stats:
            return {}
        found = stats["projected_grad"].float()
        figures = {
            "projected_grad": found.square().mean().sqrt() if found.numel() > 1 else found,
            "momentum": stats["momentum"], "window": stats["window"], "skipped_steps": stats["skipped_steps"],
        }  # fmt: skip
        for (
            dtype,
            ulps,
        ) in self.zero_order.update_rms().items():  # below 1, rounding to nearest would lose it
            figures[f"update_ulps_{dtype}"] = ulps
        return figures

    # journal, checkpoints

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As Transformers', whose states say how a run goes on; and a line for each argument that says otherwise."""
        given = self._settings()
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except ValueError as error:
            raise ValueError(
                f"{checkpoint} cannot be resumed: {' '.join(str(error).split())}; a run goes on with the method, "
                "noise_on, head and kind of weight decay that it began with"
            ) from error
        for name, value in self._settings().items():
            if value != given[name]:
                also = (
                    f"; the order of the batches is that of seed {self.args.seed}"
                    if name == "seed"
                    else ""
                )
                _log.warning(
                    "resumed: %s %s of the checkpoint goes on, not %s%s",
                    name,
                    value,
                    given[name],
                    also,
                )

    def _settings(self) -> dict[str, Any]:
        """What the states of the optimizer and the scheduler hold of the arguments."""
        found: dict[str, Any] = {"learning_rate": getattr(self.lr_scheduler, "base_lrs", None)}
        for name in ("weight_decay", "noise_scale", "momentum", "betas"):
            found[name] = [group[name] for group in self.optimizer.param_groups if name in group]
        if self.zero_order is not None:
            found |= {
                name: getattr(self.zero_order, name)
                for name in ("eps", "seed", "noise", "rounding")
            }
        if isinstance(self.zero_order, MeZO):
            found |= {
                name: getattr(self.zero_order, name)
                for name in ("directions", "momentum", "window")
            }
        if isinstance(self.zero_order, PseuZO):
            found["window"] = self.zero_order.window.capacity
        alike = {
            name: value
            for name, value in found.items()
            if isinstance(value, list) and len(set(value)) == 1
        }
        return found | {name: value[0] for name, value in alike.items()}

    def _check_saving(self) -> None:
        """ValueError if a checkpoint could not be written; a warning, if args ask for none."""
        if not self.args.should_save:
            return
        trained = sum(
            p.numel() * p.element_size() for p in self.model.parameters() if p.requires_grad
        )
        moments = {"fo-adam": 2, "fo-sgd": bool(self.args.momentum)}.get(self.args.method, 0)

        def save(folder: Path, state_dict: dict[str, Any] | None) -> None:
            self._save(str(folder), state_dict=state_dict)
            torch.save(self.lr_scheduler.state_dict(), folder / SCHEDULER_NAME)
            json.dumps(
                [
                    c.state()
                    for c in self.callback_handler.callbacks
                    if isinstance(c, ExportableState)
                ]
            )

        try:
            check_saving(
                save,
                self.model,
                Path(self.args.output_dir),
                0 if self.args.save_only_model else trained * moments,
            )
        except ValueError as error:
            if self.args.save_strategy != "no":
                raise
            _log.warning("save_model() would fail after the training: %s", error)

    def _start(self) -> None:
        self._check_saving()
        before = max(
            (row.get("train_seconds", 0.0) for row in self.state.log_history), default=0.0
        )  # if resumed
        self._began, self._logged = time.perf_counter() - before, before
        self._masked_told = max(
            (row.get("masked_rows", 0) for row in self.state.log_history), default=0
        )
        self._masked.fill_(self._masked_told)
        self._tokens.zero_()
        self._losses.zero_()
        self._untold.clear()
        if self.args.journal and self.zero_order is not None:
            if self.zero_order.journal_run and owner(self.args.journal) == (None, 0):
                raise JournalError(
                    f"{self.args.journal}, where the steps so far should be recorded, is not there, or empty: name the "
                    "file of the run's journal, or leave out journal to go on without one"
                )
            self._journal = Journal(self.args.journal, self.zero_order, run=self.run_id)

    def _stop(self) -> None:
        if self._journal is not None:
            self._journal.close()
            self._journal = None

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """As Transformers'. True resumes from the newest whole checkpoint of output_dir: one that is damaged, or whose
        writing was interrupted, is passed over, and a line says so."""
        self.kept_step = None
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(f"no whole checkpoint in {self.args.output_dir}")
        elif isinstance(resume_from_checkpoint, str) and resume_from_checkpoint != self.found_whole:
            if wrong := checkpoints.flaw(Path(resume_from_checkpoint)):
                raise ValueError(f"{resume_from_checkpoint} is not a whole checkpoint: {wrong}")
        if resume_from_checkpoint:
            step = TrainerState.load_from_json(
                str(Path(resume_from_checkpoint) / TRAINER_STATE_NAME)
            ).global_step
            if step >= self._planned_steps():
                return self._finished(resume_from_checkpoint)
        try:
            outcome = super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self._stop()
        self._settle_what_is_kept()
        self._tell_masked(int(self._masked))
        return outcome

    def _finished(self, checkpoint: str) -> TrainOutput:
        """What a run that was over comes back to; Transformers would make one more step."""
        self._load_from_checkpoint(checkpoint)
        self.state = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
        self.create_optimizer_and_scheduler(self._planned_steps())
        self._load_optimizer_and_scheduler(checkpoint)
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
            self._load_best_model()
        self._settle_what_is_kept()
        return TrainOutput(self.state.global_step, 0.0, {})

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        if not self._load_trained(Path(resume_from_checkpoint)):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_trained(self, folder: Path) -> bool:
        """Load the weights that are trained beside quantised ones, of which some cannot be loaded again once they have
        been used. False, and nothing is loaded, of other models and of adapters."""
        if hasattr(self.model, "peft_type") or not quantised(self.model):
            return False
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        for file in folder.glob("model*.safetensors"):
            with safe_open(file, "pt") as weights, torch.no_grad():
                for name in trained.keys() & set(weights.keys()):
                    trained.pop(name).copy_(weights.get_tensor(name))
        if trained:
            raise ValueError(
                f"{folder} lacks {len(trained)} of the trained weights, the first being {min(trained)}"
            )
        return True

    def _load_best_model(self) -> None:
        """As Transformers', if the best checkpoint is whole; else the weights stay those of the last step."""
        folder = Path(self.state.best_model_checkpoint)
        if not folder.is_dir():  # the run may have been moved
            folder = Path(self.args.output_dir) / folder.name
        if checkpoints.flaw(folder, weights_alone=True):
            self.state.best_model_checkpoint = None
            return
        self.state.best_model_checkpoint = str(folder)
        if not self._load_trained(folder):
            super()._load_best_model()
        self.kept_step = checkpoints.step_of(folder)

    def _settle_what_is_kept(self) -> None:
        """Where the best checkpoint was to be loaded, and could not be, a line on stderr says which weights stay."""
        best, last = self.state.best_global_step, self.state.global_step
        if not self.args.load_best_model_at_end or best is None or self.kept_step is not None:
            return
        if best == last:
            self.kept_step = last
            return
        folder = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{best}"
        wrong = checkpoints.flaw(folder, weights_alone=True)
        if wrong is None:  # Transformers forgets where it is when a run that was moved is resumed
            self.state.best_model_checkpoint = str(folder)
            return self._load_best_model()
        replay = (
            f" (pseuzo replay --until {best} makes those of the best)" if self.args.journal else ""
        )
        print(
            f"{folder}, the best checkpoint, cannot be loaded: {wrong}; the weights are those of the last step, {last}"
            f"{replay}", file=sys.stderr, flush=True,
        )  # fmt: skip

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """As Transformers'; where the best checkpoint is to be loaded in the end, only steps that have one count."""
        only_saved = (
            self.args.load_best_model_at_end and self.args.save_strategy != SaveStrategy.BEST
        )
        if only_saved and not self.control.should_save:
            return False
        return super()._determine_best_metric(metrics, trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As Transformers', and sealed with checksums before any older checkpoint is removed."""
        folder = (
            Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        )
        if self.args.world_size > 1:  # the other processes write files of it as well
            return super()._save_checkpoint(model, trial)
        if folder.exists():  # of an earlier try: no part of it may pass for a part of this one
            (folder / TRAINER_STATE_NAME).unlink(
                missing_ok=True
            )  # first: without it the rest counts for nothing
            shutil.rmtree(folder)
        limit = self.args.save_total_limit
        with self._not_training():
            if self._journal is not None:
                self._journal.sync()
            checkpoints.begin(folder)
            try:
                self.args.save_total_limit = None
                super()._save_checkpoint(model, trial)
            finally:
                self.args.save_total_limit = limit
            checkpoints.seal(folder)
            rotate_checkpoints(
                str(folder.parent), limit, self.state.best_model_checkpoint, use_mtime=True
            )


@contextmanager
def _head_alone(model: Any) -> Iterator[None]:
    """Transformers trains adapters alone on a quantised model; the output head of one, which is not quantised, is as
    good, if nothing else is trained."""
    trained = (
        {p for p in model.parameters() if p.requires_grad}
        if getattr(model, "is_quantized", False)
        else set()
    )
    if not trained or not trained <= set(head_parameters(model)):
        yield
        return
    model.is_quantized = False
    try:
        yield
    finally:
        model.is_quantized = True


def _clipped_mean(
    head: Callable[[Tensor], Tensor], o: Tensor, ratio: float, examples: Tensor | None
) -> Tensor:
    """The mean of the losses head(o) [B], but with the gradient of the mean of w_i loss_i: w_i = min(1, ratio * median
    of the |e| / |e_i|), a constant, where e_i is the gradient of loss_i at all rows of o [R, ...] of example i.

    examples [R]: the number, 0 to B - 1, of the example that a row is of; None: row i is example i.
    """
    losses = head(o.requires_grad_())
    if losses.dim() != 1 or (examples is None and len(losses) != len(o)):
        raise ValueError(
            f"clip_examples needs the loss of each example, [B], and got shape {tuple(losses.shape)}"
        )
    (e,) = torch.autograd.grad(losses.sum(), o, retain_graph=True)
    weights = (
        row_factors(e.float().square().flatten(1).sum(1), ratio**2, examples)
        .sqrt()
        .to(losses.dtype)
    )
    if examples is not None:
        weights = torch.ones_like(losses).scatter(0, examples, weights)
    losses.register_hook(lambda gradient: gradient * weights)
    return losses.mean()


def _print_probe(table: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    shown = Table(title="Where noise pays: slope^2 / curvature, by group of weights")
    for column in ("group", "weights", "slope^2", "curvature", "ratio", "noise"):
        shown.add_column(column, justify="left" if column == "group" else "right")
    for row in table:
        cost, error = row["cost"]
        ratio = f"{row['slope2'] / cost:.2g}" if cost > 0 else "-"
        shown.add_row(
            row["name"], f"{row['parameters']:.0f}", f"{row['slope2']:.3g} ± {row['slope2_error']:.1g}",
            f"{cost:.3g} ± {error:.1g}", ratio, "yes" if row["chosen"] else "",
        )  # fmt: skip
    Console().print(shown)
