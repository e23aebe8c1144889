"""The kinds of model: how a model tells the classes of a row apart.

    causal      the next token after the prompt: GPT, OPT, Llama
    masked      the token at the mask after the prompt: BERT, RoBERTa, as a ...ForMaskedLM
    classifier  the logits of a classification head: any ...ForSequenceClassification

This module imports neither torch nor Transformers, because the command line lists the kinds before
it imports either.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

KINDS = ("causal", "masked", "classifier")
_ENDS = {"ForMaskedLM": "masked", "ForSequenceClassification": "classifier"}


def kind_named(architectures: Iterable[str] | None) -> str:
    """The kind of the first architecture in a config that names one; causal if none does."""
    found = (kind for name in architectures or () for end, kind in _ENDS.items() if end in name)
    return next(found, "causal")


def kind_of(model: "nn.Module") -> str:
    """The kind of a model, by the name of its class, or of its base's if it has an adapter."""
    return kind_named([type(without_adapter(model)).__name__])


def without_adapter(model: Any) -> Any:
    """The model that an adapter of peft was made for; a model without one as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def max_positions(model: "nn.Module") -> int | None:
    """How many tokens a row may have; None where the config does not say.

    RoBERTa and its relatives give the first token the position after the padding's.
    """
    config = model.config
    most = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    for name, module in model.named_modules():
        skipped = getattr(module, "padding_idx", None)
        if most and skipped is not None and name.endswith("position_embeddings"):
            return min(most, module.num_embeddings - skipped - 1)
    return most


def auto_class(name: str, config: Any, kind: str) -> Any:
    """The class of Transformers that loads a model of this kind. ValueError if its kind differs."""
    import transformers
    from transformers.models.auto import modeling_auto

    named = config.architectures or ()
    chosen = kind_named(named) if kind == "auto" else kind
    for_what, what, names = {
        "causal": ("CausalLM", "causal language model", "CAUSAL_LM"),
        "masked": ("MaskedLM", "masked language model", "MASKED_LM"),
        "classifier": (
            "SequenceClassification",
            "model with a classification head",
            "SEQUENCE_CLASSIFICATION",
        ),
    }[chosen]
    known = getattr(modeling_auto, f"MODEL_FOR_{names}_MAPPING_NAMES").get(config.model_type)
    others = [a for a in named if ("For" in a or "LMHead" in a) and a != known]
    encodes = chosen != "causal" and getattr(config, "is_encoder_decoder", False)
    if known is None or encodes or (chosen == "causal" and others):
        is_a = others[0] if others else config.model_type
        use = f"use a ...For{for_what} model"
        if chosen == "causal" and kind == "auto":
            use += ", or the kind classifier, with a new head, if it is an encoder"
        raise ValueError(f"load_model: {name} is no {what} but a {is_a}; {use}")
    return getattr(transformers, f"AutoModelFor{for_what}")


def name_classes(name: str, config: Any, labels: Sequence[str] | None) -> None:
    """Give the config the classes of a new head. ValueError if the model has a head with another
    number of classes, or if a new head is needed and labels are missing."""
    has_head = kind_named(config.architectures) == "classifier"
    if has_head and labels is not None and len(labels) != config.num_labels:
        raise ValueError(
            f"load_model: {name} has a head for {config.num_labels} classes, and the task has "
            f"{len(labels)}"
        )
    if has_head:
        return
    if labels is None or len(labels) < 2:
        raise ValueError(
            f"load_model: {name} has no classification head, and a new one needs the classes of a "
            "classification task (labels)"
        )
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: i for i, label in enumerate(labels)}
