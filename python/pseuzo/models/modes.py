"""The tuning modes: which weights of a model are trained.

    model = tune(model, "prefix", prefix_tokens=5)

MODES has one row per mode. The choices and the help of the command line, its options, its defaults
of the learning rate and of eps, and `tune` derive from it. To add a mode, add a row, and write the
function that it names. This module imports neither torch nor Transformers: the command line lists
the modes before it imports either.
"""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class ModeOption:
    """An option of a mode: an argument of its function, and a flag of the command line."""

    name: str
    default: Any
    help: str = ""
    least: float | None = None
    on_command_line: bool = True


@dataclass(frozen=True)
class Mode:
    help: str
    # "package.module.function", imported when it is first called: (model, *, seed, **options) ->
    # the model in which the weights of the mode, and no others, require grad. `seed` decides what
    # it draws at random. It may change the model that it is given.
    function: str
    eps: float  # the default size of a perturbation
    # Default learning rates: of the zeroth-order methods, of fo-sgd and of fo-adam.
    lr: float
    sgd_lr: float
    adam_lr: float
    options: tuple[ModeOption, ...] = ()
    # Whether the weights it trains have the dtype of the model. Adapters are in fp32.
    model_dtype: bool = False
    # Whether it adds no weights, so that a journal is replayed from the base model. For other modes
    # a run with a journal saves the model that it starts from.
    starts_from_base: bool = False
    # Whether it makes the model smaller, so that it is made before the model moves to its device.
    on_host: bool = False


# eps and lr are those published for OPT-1.3B, the other rates are common ones.
MODES: dict[str, Mode] = {
    "full": Mode(
        help="every weight",
        function="pseuzo.models.tuning.tune_full",
        eps=1e-3,
        lr=1e-7,
        sgd_lr=1e-3,
        adam_lr=1e-5,
        model_dtype=True,
        starts_from_base=True,
    ),
    "lora": Mode(
        help="LoRA adapters of the layers that make queries and values",
        function="pseuzo.models.tuning.tune_lora",
        eps=1e-2,
        lr=5e-5,
        sgd_lr=1e-2,
        adam_lr=1e-4,
        options=(
            ModeOption("lora_r", 8, "Rank of the adapters.", least=1),
            ModeOption("lora_alpha", 16, "The adapters are scaled by alpha / r.", least=1),
            ModeOption("lora_targets", None, on_command_line=False),
        ),
    ),
    "prefix": Mode(
        help="keys and values of a few tokens in every layer",
        function="pseuzo.models.tuning.tune_prefix",
        eps=1e-1,
        lr=1e-3,
        sgd_lr=1e-1,
        adam_lr=1e-3,
        options=(
            ModeOption("prefix_tokens", 5, "Number of tokens of the prefix.", least=1),
            ModeOption("prefix_from", None, on_command_line=False),
        ),
    ),
    # Ten tokens, as ZO-Bench has (Zhang et al. 2024); eps and lr are those published for ZO-SGD on
    # OPT-1.3B beside SubZero (Yu et al. 2024).
    "prompt": Mode(
        help="embeddings of a few tokens before the text",
        function="pseuzo.models.tuning.tune_prompt",
        eps=1e-2,
        lr=1e-3,
        sgd_lr=1e-1,
        adam_lr=1e-3,
        options=(
            ModeOption("prompt_tokens", 10, "Number of virtual tokens.", least=1),
            ModeOption("prompt_from", None, on_command_line=False),
        ),
    ),
    "head": Mode(
        help="the output head",
        function="pseuzo.models.tuning.tune_head",
        eps=1e-3,
        lr=1e-4,
        sgd_lr=1e-2,
        adam_lr=1e-4,
        model_dtype=True,
    ),
    # A weight moves by its code times the move of its scale, and codes are about 3 in size. So eps
    # and the rate of Adam are those of full divided by 3, the other rates are divided by 10.
    "scales": Mode(
        help="scales of the layers, whose weights become 4-bit codes",
        function="pseuzo.models.tuning.tune_scales",
        eps=3e-4,
        lr=1e-8,
        sgd_lr=1e-4,
        adam_lr=3e-6,
        options=(
            ModeOption("group_size", 64, "Weights that share a scale, an even number.", least=2),
        ),
        on_host=True,
    ),
}


def mode_options() -> dict[str, tuple[ModeOption, tuple[str, ...]]]:
    """Return the options of all modes by name, each with the modes that take it."""
    found: dict[str, tuple[ModeOption, tuple[str, ...]]] = {}
    for mode, row in MODES.items():
        for option in row.options:
            found[option.name] = option, (*found.get(option.name, (None, ()))[1], mode)
    return found


def by_mode(field: str) -> dict[str, Any]:
    """Return a field of the rows of MODES, by the name of the mode."""
    return {name: getattr(row, field) for name, row in MODES.items()}


def tune(model: "nn.Module", mode: str = "full", *, seed: int = 0, **options: Any) -> "nn.Module":
    """Return the model in which the weights of a mode, and no others, require grad.

    full: every weight. lora: adapters of rank `lora_r`, scaled by `lora_alpha` / `lora_r`, on the
    layers named `lora_targets`, by default those that make queries and values. prefix: the keys and
    values of `prefix_tokens` tokens in every layer, which start as the model's own for the tokens
    `prefix_from`, by default random ones of its vocabulary. prompt: the embeddings of
    `prompt_tokens` tokens before the text, which start as those of the tokens `prompt_from`, chosen
    likewise. head: the output head; one that is tied to the embedding becomes a copy of its own.
    scales: the weights of the Linear layers become 4-bit codes in groups of `group_size`, unless
    they are already, and the scales of the groups are trained.

    Adapters, prefixes, prompts and scales are in fp32 whatever the dtype of the model. For the
    first three `peft` wraps the model. seed decides what is drawn at random; torch's own generator
    is not used. An option of another mode has no effect. The given model is changed.

    ValueError if the mode is unknown, if the model has adapters already, if its weights are not in
    memory (offloaded by accelerate), or if it cannot have the mode.
    """
    if mode not in MODES:
        raise ValueError(f"tune: mode must be one of {', '.join(MODES)}, got {mode!r}")
    if unknown := options.keys() - mode_options().keys():
        raise TypeError(f"tune: no mode has an option {', '.join(sorted(unknown))}")
    if hasattr(model, "peft_type"):
        raise ValueError(
            "tune: the model has an adapter already; tune the model that it was made from"
        )
    from pseuzo.machine import refuse_meta  # which imports torch

    refuse_meta("tune", model.parameters())
    row = MODES[mode]
    module, _, name = row.function.rpartition(".")
    function = getattr(importlib.import_module(module), name)
    own: Mapping[str, Any] = {o.name: options.get(o.name, o.default) for o in row.options}
    return function(model, seed=seed, **own)
