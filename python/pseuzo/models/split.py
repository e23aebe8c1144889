"""A language model in two parts: all before its output head, and the head with what follows.

No code of Transformers is changed. A hook on the head reads its input and ends the forward there.
The first forward continues instead, with a made-up output of the head that shows what the model
does to its logits.
"""

import inspect
import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pseuzo.machine import holds_codes
from pseuzo.models.attention import listen_in_sdpa, padding_known
from pseuzo.models.kinds import kind_of, without_adapter
from pseuzo.models.packing import LEAST_WIDTH, Packing
from pseuzo.models.positions import NOT_INPUTS, token_inputs
from pseuzo.perturb.module import rows_of
from pseuzo.perturb.offloaded import device_of

BY_HAND = "split it by hand: optimizer.step(forward, head)"
# The made-up output of the head: a soft cap shows in the large numbers, a factor in the small ones.
PROBE = (2.0**12, -(2.0**12), 2.0**-6, 1.0, -3.0, 20.0)


@dataclass(frozen=True)
class AfterHead:
    """What a model does to the first columns x of its head's output: cap * tanh(factor * x / cap),
    or factor * x if it has no cap."""

    factor: float
    cap: float | None
    columns: int

    def __call__(self, logits: Tensor, cut: bool) -> Tensor:
        """Return the model's logits for those of its head. cut: take the first columns only."""
        if cut and self.columns < logits.shape[-1]:
            logits = logits[..., : self.columns]
        if self.factor != 1:
            logits = logits * self.factor
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap

    @classmethod
    def read(cls, logits: Tensor | None) -> "AfterHead | None":
        """Find what a model did that turned PROBE into these logits; None if it is something
        else."""
        if logits is None or logits.shape[-1] < len(PROBE):
            return None
        got = logits.reshape(-1, logits.shape[-1])[-1, : len(PROBE)].tolist()
        eps = max(torch.finfo(logits.dtype).eps, torch.finfo(torch.float32).eps)
        largest, _, small, factor, *_ = got
        cap = largest if largest < 0.5 * PROBE[0] / PROBE[2] * small else None
        if cap is not None:
            factor = cap / PROBE[2] * math.atanh(small / cap)
        if abs(factor - 1) <= 4 * eps:
            factor = 1.0
        for x, y in zip(PROBE, got, strict=True):
            want = factor * x if cap is None else cap * math.tanh(factor * x / cap)
            if not abs(y - want) <= 16 * eps * abs(want):
                return None
        return cls(factor, cap, logits.shape[-1])


@dataclass
class Known:
    """What the first forwards of a model showed."""

    after_head: AfterHead | None = None
    verified: bool = False  # its logits were compared, and its loss if it is the one trained on
    padding: str | None = None  # where rows may be padded: "anywhere", "right" or "nowhere"
    padding_error: str | None = None  # of a pass with padding, if it failed
    packs: bool | None = None  # whether it gives the same without padding, see models.packing


_known: WeakKeyDictionary[nn.Module, Known] = WeakKeyDictionary()


class _HeadReached(Exception):
    """Ends a forward where its output head would start."""


class SplitModel:
    """A model and its output head, one module: a Linear, tied or not, or one that peft wrapped.

    The head of a classifier is the Linear that makes the logits of its classes. options: token ids,
    or classes of a classifier; `logits` then returns only their logits. anew: forget what an
    earlier SplitModel learned about the model.
    """

    def __init__(self, model: nn.Module, options: list[int] | None, *, anew: bool):
        kind = type(model).__name__
        head, self.kind = output_head(model), kind_of(model)
        if not isinstance(head, nn.Module) or isinstance(head, nn.Embedding | nn.ModuleList):
            raise TypeError(
                f"CausalLMObjective: {kind} has no Linear output head (get_output_embeddings() "
                f"gave {type(head).__name__}); use a ...ForCausalLM model"
            )
        if self.kind != "causal" and options is None:
            raise ValueError(
                f"CausalLMObjective: {kind} predicts no next token: it is for "
                "classifications, with options"
            )
        if getattr(model.config, "is_encoder_decoder", False):
            raise TypeError(
                f"CausalLMObjective: {kind} has an encoder, and a batch has no labels for its "
                f"decoder to continue from; use a ...ForCausalLM model, or {BY_HAND}"
            )
        if options is not None and (len(options) < 2 or len(set(options)) != len(options)):
            raise ValueError(
                f"CausalLMObjective: options must be two or more different token ids, got {options}"
            )
        self.model, self.head, self.options = model, head, options
        plain = type(head).forward is nn.Linear.forward and "forward" not in vars(head)
        # The rows of a plain weight, without an adapter or quantisation, can be multiplied alone.
        self._has_rows = plain and not holds_codes(head.weight)
        self.quantised = any(map(holds_codes, model.parameters()))
        if self._has_rows:
            self.check_options(head.weight.shape[0])
        self._option_ids: Tensor | None = None
        if anew or model not in _known:
            _known[model] = Known()
        self.known = _known[model]
        if self.kind == "classifier":
            self.known.after_head = AfterHead(1.0, None, model.config.num_labels)
        self._takes_positions = takes_argument(model, "position_ids")
        caches = self.kind == "causal" or takes_argument(model, "use_cache")
        self._always: dict[str, Any] = {"use_cache": False} if caches else {}
        self.config = getattr(model.config, "text_config", model.config)
        listen_in_sdpa()

    def check_options(self, tokens: int) -> None:
        """Raise ValueError unless the options are ids in a vocabulary of so many tokens."""
        if not all(0 <= i < tokens for i in self.options or ()):
            raise ValueError(
                f"CausalLMObjective: options must be token ids below {tokens}, got {self.options}"
            )

    @property
    def device(self) -> torch.device:
        """The device of the head, or the one that the model is offloaded to."""
        return device_of(self.model, self.head)

    def hidden_states(self, plan: Mapping[str, Tensor]) -> Tensor:
        """Return o, the head's input at positions [R, P], as [R, P, D]; zeros at position -1.

        The head does not run, except once on one state. Where it runs on one state for each row, as
        in most classifiers, o is those, [R, 1, D].
        """
        positions, kind, seen = plan["positions"], type(self.model).__name__, []
        first, own = self.known.after_head is None, threading.get_ident()

        def reached(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            if threading.get_ident() != own:  # the pass of another thread, see perturb.lock_step
                return None
            seen.append(args[0])
            if not first:
                raise _HeadReached
            return args[0][:1, -1:], *args[1:]

        def put_out(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            x = output.new_zeros(output.shape, dtype=torch.float32)
            x[..., : len(PROBE)] = torch.tensor(PROBE[: x.shape[-1]])
            return x

        # This hook runs first, so that the forward ends before a perturbed head is made.
        hooks = [self.head.register_forward_pre_hook(reached, prepend=True)]
        if first:
            hooks.append(self.head.register_forward_hook(put_out))
        packing = self.packing(plan) if self.known.packs else None
        inputs = packing.inputs(plan, token_inputs(plan)) if packing else self.model_inputs(plan)
        try:
            with padding_known(self.config, "attention_mask" in plan, packing):
                output = self.run(inputs)
        except _HeadReached:
            pass
        finally:
            for hook in hooks:
                hook.remove()
        if not seen:
            raise RuntimeError(
                f"CausalLMObjective: {kind} does not call its output head; {BY_HAND}"
            )
        if first:
            logits = getattr(output, "logits", None) if len(seen) == 1 else None
            self.known.after_head = AfterHead.read(logits)
            if self.known.after_head is None:
                raise self.does_more()
        states, (rows, length) = seen[0], plan["input_ids"].shape
        if packing:
            return packing.at(states, positions).masked_fill((positions < 0)[..., None], 0)
        if self.kind == "classifier" and states.dim() == 2 and len(states) == rows:
            return states[:, None]
        before = states.shape[1] - length  # tokens of a learned prompt
        if states.dim() != 3 or states.shape[0] != rows or before < 0:
            raise RuntimeError(
                f"CausalLMObjective: {kind} runs its output head on {tuple(states.shape)}, which "
                f"is not one state for each of {rows} times {length} tokens; {BY_HAND}"
            )
        at = torch.arange(rows, device=states.device)[:, None], positions.clamp(min=0) + before
        return states[at].masked_fill((positions < 0)[..., None], 0)

    def run(self, inputs: Mapping[str, Tensor]) -> Any:
        """The output of the model itself."""
        return self.model(**inputs, **self._always)

    def model_inputs(self, plan: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the inputs of the model, with positions and a mask if its own would be wrong.

        Some models (GPT-2) count positions from the first column even if it is padding. Without a
        mask, some (Llama) read their positions to see whether a row holds several texts.
        """
        inputs = {k: v for k, v in plan.items() if k not in NOT_INPUTS}
        mask = inputs.get("attention_mask")
        if "position_ids" in inputs:  # they may say that a row holds several texts
            return inputs
        attends = getattr(self.config, "num_attention_heads", 0)
        attention = getattr(self.config, "_attn_implementation", None)
        reads_none = attends and attention in ("sdpa", "eager")
        if mask is None and reads_none and "input_ids" in inputs:
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        on_left = self.kind == "causal" and self.known.padding != "right"
        if mask is not None and self._takes_positions and on_left:
            inputs["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0)
        return inputs

    def packing(self, plan: Mapping[str, Tensor]) -> Packing | None:
        """Return how this batch would run without its padding; None if it must not, whatever
        `known.packs` says, or if that would not be faster."""
        ids, mask, config = plan["input_ids"], plan.get("attention_mask"), self.config
        if mask is None or mask.shape != ids.shape or self.kind != "causal":
            return None
        if {ids.device.type, self.device.type} != {"cpu"} or not self._takes_positions:
            return None
        if getattr(config, "_attn_implementation", None) != "sdpa":
            return None
        adapter = getattr(self.model, "active_peft_config", None)
        if getattr(adapter, "is_prompt_learning", False):  # the prompt is a part of each row
            return None
        others = plan.keys() - NOT_INPUTS - set(token_inputs(plan))
        if others or "position_ids" in plan or getattr(config, "hidden_size", 0) < LEAST_WIDTH:
            return None
        names = ("sliding_window", "attention_chunk_size")
        windows = [size for name in names if (size := getattr(config, name, None))]
        if min(windows, default=math.inf) <= ids.shape[1]:
            return None
        packing = Packing.of(mask)
        return packing if packing.pays else None

    def logits(self, o: Tensor) -> Tensor:
        """Return fp32 logits of o [..., D], over the options if there are any, else over the
        vocabulary.

        For options, only their rows of the head are multiplied.
        """
        after = self.known.after_head
        if self.options is None:
            return after(self.head(o).float(), cut=True)
        if self._option_ids is None or self._option_ids.device != self.device:
            self._option_ids = torch.tensor(self.options, device=self.device)
        if not self._has_rows:
            return after(self.head(o).index_select(-1, self._option_ids).float(), cut=False)
        weight, bias = self.head.weight, self.head.bias
        rows = rows_of(self.model, weight, self._option_ids).float()
        if bias is not None:  # it may be on the host, see perturb.offload
            bias = bias.index_select(0, self._option_ids.to(bias.device)).to(o.device).float()
        return after(F.linear(o.float(), rows, bias), cut=False)

    def does_more(self) -> RuntimeError:
        """Make the error that says that the model cannot be split here."""
        return RuntimeError(
            f"CausalLMObjective: {type(self.model).__name__} runs its output head more than once, "
            f"or does more to its logits after it than to scale and cap them; {BY_HAND}"
        )


def takes_argument(model: nn.Module, name: str) -> bool:
    """Return whether the model's forward takes this argument.

    With a learned prompt before the text, peft allows no position_ids. With a prefix of keys and
    values it does, and shifts them by the length of the prefix.
    """
    config = getattr(model, "active_peft_config", None)
    learned = getattr(config, "is_prompt_learning", False) and config.peft_type != "PREFIX_TUNING"
    if learned and name == "position_ids":
        return False
    base = without_adapter(model)
    return name in inspect.signature(base.forward).parameters


def output_head(model: nn.Module) -> nn.Module | None:
    """Return the module that makes a model's logits, over tokens or over the classes of a
    classifier; None if it has none, or if it is not a Transformers model."""
    if kind_of(model) != "classifier":
        return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    base = without_adapter(model)
    inside = f"{base.base_model_prefix}."
    outside = [m for name, m in base.named_modules() if not name.startswith(inside)]
    linear = [m for m in outside if isinstance(m, nn.Linear)]
    # In an adapter, the head that it was made from comes before its own.
    return next((m for m in reversed(linear) if m.out_features == base.config.num_labels), None)


def head_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the weights of the output head that the model uses nowhere else; [] if they are the
    embedding's, or if it is not a Transformers model with a head of logits.

    PseuZO's perturbed passes end before the head, so these weights can only be frozen, or trained
    by the exact gradient that the backward pass of the head gives.
    """
    head = output_head(model)
    if head is None:
        return []
    shared = set(model.get_input_embeddings().parameters())
    return [p for p in head.parameters() if p not in shared]
