"""Splits a causal language model into h (everything up to its output head's input) and g (head and loss).

    objective = CausalLMObjective(model)
    forward, head = objective(batch)            # o = forward(); loss = head(o)
    loss = optimizer.step(forward, head)

o holds the hidden states at the positions that carry a loss, no others: [B, P, D]. The head runs on those alone, in the
clean pass alone (PseuZO's perturbed pass never calls it), and for a choice between label words only its rows for those
words. Nothing in Transformers is changed: a hook on the head reads its input and ends the forward there.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pseuzo.perturbed import frozen_mode, rows_of

IGNORED = -100  # a label that carries no loss, as everywhere in Transformers


class _HeadReached(Exception):
    """Ends a forward where its output head would begin."""

    def __init__(self, states: Tensor):
        self.states = states


class CausalLMObjective:
    """The loss of a Transformers causal LM as PseuZO needs it.

    model: any with an output head that is a Linear (`get_output_embeddings()`), tied or not. options: token ids of
    label words, one per class: the loss is then the cross entropy over their logits alone, at the last token of the
    prompt. Without options it is the language-modelling loss of `labels`.

    On first use, the logits made from the gathered states are compared once with the model's own, since a model may do
    more after its head than the soft caps and scales known here: RuntimeError then.
    """

    def __init__(self, model: nn.Module, options: list[int] | None = None):
        lm_head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        if not isinstance(lm_head, nn.Linear):
            raise TypeError(
                f"CausalLMObjective: {type(model).__name__} has no Linear output head (get_output_embeddings() gave "
                f"{type(lm_head).__name__}); use a ...ForCausalLM model"
            )
        if options is not None:
            if len(options) < 2 or len(set(options)) != len(options):
                raise ValueError(f"CausalLMObjective: options must be two or more different token ids, got {options}")
            if not all(0 <= i < lm_head.weight.shape[0] for i in options):
                raise ValueError(
                    f"CausalLMObjective: options must be token ids below {lm_head.weight.shape[0]}, got {options}"
                )
        self.model, self.lm_head, self.options = model, lm_head, options
        self._option_ids: Tensor | None = None
        self._verified = False

    def __call__(self, batch: Mapping[str, Tensor]) -> tuple[Callable[[], Tensor], Callable[[Tensor], Tensor]]:
        """forward() -> o [B, P, D] and head(o) -> loss, fp32, for a batch.

        batch: input_ids [B, T], attention_mask [B, T] (padding on either side), labels: with options [B], the class;
        without, [B, T] token ids with -100 where there is no loss, not shifted, as in Transformers; P is then the most
        loss positions of a row, rows with fewer being filled up on the left with zeros that carry no loss. labels may
        stay on the CPU: their positions are then found without waiting for the device.
        """
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        device = self.lm_head.weight.device
        labels = batch["labels"]
        if self.options is None:
            positions, targets = self._loss_positions(labels)
            targets = targets.to(device, non_blocking=True)
        else:
            positions, targets = self._last_token(inputs), labels.to(device, non_blocking=True)
            if targets.shape != positions.shape[:1]:
                raise ValueError(
                    f"CausalLMObjective: with options, labels must be [B] classes, got shape {tuple(targets.shape)}"
                )
        positions = positions.to(device, non_blocking=True)

        def forward() -> Tensor:
            return self.hidden_states(inputs, positions)

        def head(o: Tensor) -> Tensor:
            logits = self.logits(o)
            if self.options is None:
                return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
            return F.cross_entropy(logits[:, -1], targets)

        if not self._verified:
            self._verify(inputs, positions)
        return forward, head

    @staticmethod
    def _last_token(inputs: Mapping[str, Tensor]) -> Tensor:
        """[B, 1]: the last position with attention, whichever side is padded."""
        ids = inputs["input_ids"]
        mask = inputs.get("attention_mask")
        if mask is None:
            return torch.full((ids.shape[0], 1), ids.shape[1] - 1, device=ids.device)
        places = torch.arange(1, mask.shape[1] + 1, device=mask.device)
        return (places * (mask != 0)).argmax(1, keepdim=True)

    @staticmethod
    def _loss_positions(labels: Tensor) -> tuple[Tensor, Tensor]:
        """positions, targets [B, P]: where the next token carries a loss, and that token; aligned to the right, with
        positions -1 and targets -100 where a row has fewer."""
        shifted = labels[:, 1:]
        carries = shifted != IGNORED
        count = int(carries.sum(1).max()) if carries.numel() else 0
        if count == 0:
            raise ValueError("CausalLMObjective: no label of the batch carries a loss (all are -100)")
        order = torch.argsort(carries.to(torch.int8), dim=1, stable=True)[:, -count:]  # loss positions last, in order
        there = carries.gather(1, order)
        return torch.where(there, order, -1), torch.where(there, shifted.gather(1, order), IGNORED)

    def hidden_states(self, inputs: Mapping[str, Tensor], positions: Tensor) -> Tensor:
        """o: the head's input at positions [B, P] -> [B, P, D]; zeros where a position is -1. The head does not run."""

        def stop(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            raise _HeadReached(args[0])

        handle = self.lm_head.register_forward_pre_hook(stop, prepend=True)  # before a perturbed pass makes its weight
        try:
            self.model(**inputs, use_cache=False)
        except _HeadReached as reached:
            states = reached.states
        else:
            raise RuntimeError(
                f"CausalLMObjective: {type(self.model).__name__} does not call its output head; "
                "split it by hand: optimizer.step(forward, head)"
            )
        finally:
            handle.remove()
        rows = torch.arange(states.shape[0], device=states.device)[:, None]
        return states[rows, positions.clamp(min=0)].masked_fill((positions < 0)[..., None], 0)

    def logits(self, o: Tensor) -> Tensor:
        """fp32 logits of o [..., D]: over the options if there are any, else over the vocabulary."""
        if self.options is None:
            return self._after_head(self.lm_head(o).float())
        weight, bias = self.lm_head.weight, self.lm_head.bias
        if self._option_ids is None or self._option_ids.device != weight.device:
            self._option_ids = torch.tensor(self.options, device=weight.device)
        rows = rows_of(self.model, weight, self._option_ids).float()
        bias = None if bias is None else bias.detach().index_select(0, self._option_ids).float()
        return self._after_head(F.linear(o.float(), rows, bias))

    def _after_head(self, logits: Tensor) -> Tensor:
        """What some models do to their logits: Cohere's scale, Granite's divisor, Gemma's soft cap."""
        config = getattr(self.model.config, "text_config", self.model.config)
        if (scale := getattr(config, "logit_scale", None)) is not None:
            logits = logits * scale
        if (divisor := getattr(config, "logits_scaling", None)) is not None:
            logits = logits / divisor
        if (cap := getattr(config, "final_logit_softcapping", None)) is not None:
            logits = torch.tanh(logits / cap) * cap
        return logits

    @torch.no_grad()
    def _verify(self, inputs: Mapping[str, Tensor], positions: Tensor) -> None:
        """Compare with the model's own logits, once, on one row of the first batch."""
        one = {k: v[:1] if isinstance(v, Tensor) and v.dim() else v for k, v in inputs.items()}
        places = positions[:1]
        with frozen_mode(self.model):  # dropout would differ between the two passes
            ours = self.logits(self.hidden_states(one, places))
            theirs = self.model(**one, use_cache=False).logits[0, places[0].clamp(min=0)].float()[None]
        if self.options is not None:
            theirs = theirs[..., self.options]
        there = (places >= 0)[..., None]
        exact = torch.get_float32_matmul_precision() == "highest" and not torch.is_autocast_enabled()
        eps = torch.finfo(self.lm_head.weight.dtype if exact else torch.bfloat16).eps
        # a matrix product of another shape may round differently: a few ulps of the largest logit
        limit = 32 * eps * theirs.abs().max().clamp(min=1)
        if not bool((((ours - theirs).abs() * there) <= limit).all()) and bool(theirs.isfinite().all()):
            raise RuntimeError(
                f"CausalLMObjective: {type(self.model).__name__} does more to its logits after the output head than is "
                "known here; split it by hand: optimizer.step(forward, head)"
            )
        self._verified = True
