"""PseuZOTrainingArguments: Transformers' arguments, and the options of the methods."""

from dataclasses import dataclass, field, fields
from typing import Any

import torch
from transformers import TrainingArguments

from pseuzo.meeting import join_group
from pseuzo.train.methods import (
    METHODS,
    OF_METHOD,
    ZEROTH_ORDER,
    refused_in_ranks,
    with_defaults,
)
from pseuzo.train.options import OPTIONS, ZeroOrderOptions

# Arguments of Transformers that would have no effect, or another effect: the methods for which this
# holds, the arguments, and what to do instead.
ANY = tuple(METHODS)
UNUSED = (
    (ANY, ("optim", "optim_args", "optim_target_modules"), "the optimizer is the method's"),
    (ANY, ("label_smoothing_factor",), "give a loss of your own as the trainer's objective"),
    (ANY, ("torch_compile", "use_liger_kernel"),
     "the model is run as it is; capture=True records CUDA graphs of it"),
    (ANY, ("deepspeed", "fsdp", "parallelism_config"), "it runs on one device"),
    (ANY, ("auto_find_batch_size",), "give the batch size"),
    (ANY, ("fp16_full_eval", "bf16_full_eval"),
     "the weights would stay in that dtype; load the model in it"),
    (ZEROTH_ORDER, ("fp16", "bf16"),
     "it is for mixed-precision backward passes; load the model in that dtype"),
    (ZEROTH_ORDER,
     ("activation_checkpointing", "gradient_checkpointing", "torch_empty_cache_steps"),
     "it saves memory of backward passes, and there are none"),
    (ZEROTH_ORDER, ("max_grad_norm",),
     "there is no gradient; clip_examples limits each example's part of a step"),
    (ZEROTH_ORDER, ("neftune_noise_alpha",),
     "its passes are without dropout and noise of the embeddings"),
    (tuple(m for m in METHODS if not m.endswith("-adam")),
     ("adam_beta1", "adam_beta2", "adam_epsilon"),
     "it is Adam's"),
)  # fmt: skip

# What says how pseuzo, the default method, works may stay set under another method, where it does
# nothing: runs of several methods share their settings. The options left out do something anywhere.
SHARED = set(METHODS["pseuzo"].options) - {"journal", "capture", "offload", "find_lr", "readout"}


@dataclass
class PseuZOTrainingArguments(ZeroOrderOptions, TrainingArguments):
    """Transformers' arguments and those of the methods. Units are steps unless said otherwise.

    Defaults that differ from Transformers': learning_rate 1e-6, lr_scheduler_type "constant", and
    logging_nan_inf_filter, which filters evaluations alone. A zeroth-order run computes in the
    precision of the model's weights: fp16 and bf16 (mixed precision, for backward passes) are
    refused, as is each argument that would have no effect (UNUSED).
    """

    logging_nan_inf_filter: bool | None = field(  # type: ignore[assignment]  # None: decided later
        default=None,
        metadata={
            "help": "Filter losses that are not finite; for training losses this waits for each "
            "step. Default: evaluations alone."
        },
    )
    remove_unused_columns: bool | None = field(  # type: ignore[assignment]  # None: decided later
        default=None,
        metadata={"help": "Default: True, but False with a TaskData or an objective of your own."},
    )

    def __post_init__(self) -> None:
        if isinstance(self.learning_rate, str):
            raise ValueError(
                f"learning_rate must be a number, got {self.learning_rate!r}; for a rate from the "
                "curvature of the loss, as of --lr auto, set find_lr=True"
            )
        if isinstance(self.noise_on, str):
            self.noise_on = [self.noise_on]
        if self.method in METHODS:
            of_method = {name: getattr(self, name) for name in OF_METHOD}
            for name, value in with_defaults(self.method, of_method).items():
                setattr(self, name, value)
        for name, option in OPTIONS.items():
            option.check(getattr(self, name))
        if (
            self.accelerator_config is None
            and self.dataloader_pin_memory
            and torch.cuda.is_available()
        ):
            # A step must not wait for its batch to be copied.
            self.accelerator_config = {"non_blocking": True}
        self._refuse_unused()  # before super(), where some of them take effect beyond this object
        join_group(self.use_cpu or not torch.cuda.is_available(), self.ddp_timeout)
        super().__post_init__()
        self.refuse()

    @property
    def zeroth_order(self) -> bool:
        return METHODS[self.method].zeroth_order

    def _refuse_unused(self) -> None:
        usual = {f.name: f.default for f in fields(TrainingArguments)}
        for methods, names, instead in UNUSED:
            for name in names if self.method in methods else ():
                value = getattr(self, name, None)  # older Transformers lack some
                if value and value != usual[name]:
                    raise ValueError(
                        f"{name}={value} cannot be used with method {self.method}: {instead}"
                    )

    def _refuse_of_other_methods(self, name: str) -> None:
        option, value = OPTIONS[name], getattr(self, name)
        methods = option.applies_to["method"]
        usual = with_defaults(self.method, {name: option.default})[name]
        if value and value != usual and self.method not in methods:
            raise ValueError(
                f"{name}={value} needs method {' or '.join(methods)}, not {self.method}"
            )

    @property
    def row_parts(self) -> int:
        """Into how many parts the ranks divide a batch."""
        return max(1, self.world_size // self.direction_ranks)

    @property
    def global_batch_size(self) -> int:
        """The number of examples of a step, on all ranks together."""
        return self.train_batch_size * self.row_parts

    def _refuse_ranks(self, options: dict[str, Any]) -> None:
        """Raise ValueError for what several ranks cannot do together."""
        if self.world_size % self.direction_ranks:
            raise ValueError(
                f"direction_ranks must divide the number of ranks, {self.world_size}, got "
                f"{self.direction_ranks}"
            )
        if self.world_size > 1 and (why := refused_in_ranks(self.method, options)):
            raise ValueError(
                f"{why} is for one process, but this is one of {self.world_size} ranks"
            )

    def refuse(self) -> None:
        """Raise ValueError for arguments that exclude the method or each other.

        The trainer calls this again, since arguments may be assigned after they were made.
        """
        self._refuse_unused()
        options = {name: getattr(self, name) for name in OPTIONS}
        self._refuse_ranks(options)
        if self.learning_rate == 0 and (self.readout != "fit" or self.find_lr):
            fits = "; with readout=fit and without find_lr, 0 trains the head alone"
            hint = fits if "readout" in METHODS[self.method].options else ""
            raise ValueError(f"learning_rate must be positive, got 0{hint}")
        if self.n_gpu > 1:
            raise ValueError(
                f"{self.method} runs on one GPU, but {self.n_gpu} were given; set "
                "CUDA_VISIBLE_DEVICES=0"
            )
        for name, option in OPTIONS.items():
            if "method" in option.applies_to and name not in SHARED:
                self._refuse_of_other_methods(name)
        if self.noise_on == ["auto"] and not self.find_lr:
            raise ValueError("noise_on=auto needs rates that suit every placement: set find_lr")
        if not self.zeroth_order:
            return
        why = METHODS[self.method].refusal(**options, batch_size=self.global_batch_size)
        if why is not None:
            raise ValueError(f"method {self.method}: {why}")
        if self.gradient_accumulation_steps != 1:
            raise ValueError(
                f"gradient_accumulation_steps is {self.gradient_accumulation_steps}, but "
                f"{self.method} has no gradients to accumulate; use a larger batch (it needs the "
                "memory of inference only), or directions > 1"
            )
        if self.objective == "metric" and self.clip_examples is not None:
            raise ValueError(
                "clip_examples needs the loss of each example, and objective=metric has none"
            )
        if self.objective == "metric" and self.capture:
            raise ValueError("capture records the loss; objective=metric is computed on the host")
        if self.offload != "none" and (self.capture or self.head == "exact"):
            other = "capture" if self.capture else "head=exact"
            raise ValueError(
                f"{other} needs weights that stay on the device, and offload={self.offload} "
                "uploads them; leave off one of the two"
            )
        if self.head == "exact" and self.journal:
            raise ValueError(
                "a journal holds seeds and coefficients, not the exact gradients of head=exact"
            )
        if self.noise_on == ["auto"] and self.head == "exact":
            raise ValueError(
                "noise_on=auto races placements, which go on by their seeds; head=exact has none: "
                "leave off one"
            )
        if self.find_lr:
            excluded = {
                "objective=metric, which has no loss of each example": self.objective == "metric",
                "weight_decay, which is multiplied by the rate": self.weight_decay,
                "head=exact without head_lr": self.head == "exact" and self.head_lr is None,
            }
            if why := next((why for why, is_set in excluded.items() if is_set), None):
                raise ValueError(f"find_lr cannot be used with {why}")
        if self.readout == "fit" and (why := self.no_readout):
            raise ValueError(f"readout=fit cannot be used with {why}; leave off one")

    @property
    def no_readout(self) -> str | None:
        """Which of these arguments excludes a readout, and why; None if none does."""
        excluded = {
            "journal: it holds seeds and coefficients, not a fitted head": self.journal,
            "offload: the head must stay on the device": self.offload != "none",
            "capture: CUDA graphs keep no outputs of their passes": self.capture,
            "head=exact: the head is trained in one way": self.head == "exact",
            "objective=metric: it fits the loss": self.objective == "metric",
            "several ranks: the outputs are in one process": self.world_size > 1,
        }
        return next((why for why, is_set in excluded.items() if is_set), None)
