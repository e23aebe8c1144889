"""Splits a causal language model into h (everything up to its output head's input) and g (head and loss).

    objective = CausalLMObjective(model)
    forward, head = objective(batch)            # o = forward(); loss = head(o)
    loss = optimizer.step(forward, head)

o holds the hidden states at the positions that carry a loss, no others: [R, P, D] for the R rows of a batch. The head
runs on those alone, in the clean pass alone (PseuZO's perturbed pass never calls it), and for a choice between label
words only its rows for those words. No code of Transformers is changed: a hook on the head reads its input and ends the
forward there, and a function in its registry of attention masks, which does as before elsewhere, is told of padding.
"""

import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pseuzo.machine import holds_codes
from pseuzo.perturbed import frozen_mode, rows_of

IGNORED = -100  # a label that carries no loss, as everywhere in Transformers
# what a batch holds for the objective and the optimizer; the model gets the rest
NOT_INPUTS = frozenset(
    ("labels", "answers", "examples", "groups", "rows", "option_rows", "positions", "targets")
)  # fmt: skip


class _HeadReached(Exception):
    """Ends a forward where its output head would begin."""

    def __init__(self, states: Tensor):
        self.states = states


def loss_positions(labels: Tensor) -> tuple[Tensor, Tensor]:
    """positions, targets [R, P]: where the next token carries a loss, and that token; aligned to the right, with
    positions -1 and targets -100 where a row has fewer. P is at least 1. Waits for the device that labels [R, T] are
    on."""
    shifted = F.pad(labels[:, 1:], (0, int(labels.shape[1] < 2)), value=IGNORED)
    carries = shifted != IGNORED
    count = max(int(carries.sum(1).max()), 1)
    order = torch.argsort(carries.to(torch.int8), dim=1, stable=True)[:, -count:]  # loss positions last, in order
    there = carries.gather(1, order)
    return torch.where(there, order, -1), torch.where(there, shifted.gather(1, order), IGNORED)


def rows_of_options(examples: Tensor, n: int) -> Tensor:
    """[n, most options]: the rows of each of n examples, -1 where one has fewer. examples [R]: whose option a row is.

    Waits for the device that examples are on."""
    counts = torch.bincount(examples, minlength=n)
    if len(counts) > n or int(counts.min()) < 1:
        raise ValueError(
            f"CausalLMObjective: examples must give each of the {n} examples (one an answer) a row, "
            f"got {examples.tolist()}"
        )
    order = torch.argsort(examples, stable=True)
    of = examples[order]
    place = torch.arange(len(of), device=of.device) - (counts.cumsum(0) - counts)[of]
    out = torch.full((n, int(counts.max())), -1, device=of.device)
    out[of, place] = order
    return out


def with_positions(collate: Callable[[Any], dict[str, Any]]) -> Callable[[Any], dict[str, Any]]:
    """A collator whose batches also have `positions` and `targets` (loss_positions), and no attention_mask if there is
    no padding: found on the CPU, so that CausalLMObjective need not wait for the device to find them.

    Only batches of token ids to predict, labels [B, T], get them; others are left as they are. The objective keeps both
    from the model; a loss of your own has to do that too."""
    return partial(_collated_with_positions, collate)


def _collated_with_positions(collate: Callable[[Any], dict[str, Any]], items: Any) -> dict[str, Any]:
    batch = collate(items)
    labels = batch.get("labels")
    if isinstance(labels, Tensor) and labels.dim() == 2 and not {"examples", "positions", "targets"} & set(batch):
        batch["positions"], batch["targets"] = loss_positions(labels)
        mask = batch.get("attention_mask")
        if isinstance(mask, Tensor) and bool(mask.all()):
            del batch["attention_mask"]
    return batch


class CausalLMObjective:
    """The loss of a Transformers causal LM as PseuZO needs it.

    model: any with an output head that is a Linear (`get_output_embeddings()`), tied or not. options: token ids of
    label words, one per class: the loss is then the cross entropy over their logits alone, at the last token of the
    prompt. Without options, it is the cross entropy over options of any number of tokens if the batch has `examples`,
    and else the language-modelling loss of `labels`.

    On first use, the logits made from the gathered states are compared once with the model's own, since a model may do
    more after its head than the soft caps and scales known here: RuntimeError then. verify False leaves that out.

    Positions are counted from the first token with attention, so that padding on the left changes nothing. A batch
    without padding should leave the attention mask out: it is then attended causally, by torch's fastest kernel. One
    with a mask counts as padded, and nobody reads the mask to see whether it is, which would wait for the device. (With
    SDPA or eager attention, that is; Transformers' flash attention and recurrent layers read it all the same.)
    """

    def __init__(self, model: nn.Module, options: list[int] | None = None, *, verify: bool = True):
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
        self._verified = not verify
        self._takes_positions = _takes_positions(model)
        self._config = getattr(model.config, "text_config", model.config)
        _listen_in_sdpa_mask()

    def __call__(
        self, batch: Mapping[str, Tensor], reduction: str = "mean"
    ) -> tuple[Callable[[], Tensor], Callable[[Tensor], Tensor]]:
        """forward() -> o [R, P, D] and head(o) -> loss, fp32, for a batch.

        batch: input_ids [R, T], attention_mask [R, T] (padding on either side; none, no padding), and

        - with options, labels [B], the class of each row; P is 1;
        - with `examples` in the batch: labels [R, T], token ids with -100 outside the option's tokens; examples [R],
          the example 0 to B - 1 whose option a row is; answers [B], the row of each one's right option. The loss of an
          example is the cross entropy over the mean log-likelihoods of its options' tokens;
        - else labels [B, T], token ids with -100 where there is no loss.

        Labels are not shifted, as in Transformers; P is then the most loss positions of a row, rows with fewer being
        filled up on the left with zeros that carry no loss. Where no row has any, the loss is NaN, as in Transformers,
        and the optimizers skip the step. While labels and examples are on the CPU nothing waits for the device;
        elsewhere it does, unless the batch has `positions` and `targets` (loss_positions) and `option_rows`
        (rows_of_options) as well. Whatever else there is goes to the model.

        reduction "none": head(o) -> [B], a loss for each example, whose mean is the loss (so that an example with more
        tokens of an answer has more).
        """
        return self.functions(self.plan(batch), reduction)

    def functions(
        self, plan: Mapping[str, Tensor], reduction: str = "mean"
    ) -> tuple[Callable[[], Tensor], Callable[[Tensor], Tensor]]:
        """forward and head of what plan(batch) gave. They read its tensors whenever they are called."""
        if reduction not in ("mean", "none"):
            raise ValueError(f"CausalLMObjective: reduction must be 'mean' or 'none', got {reduction!r}")
        targets, option_rows, answers = plan["targets"], plan.get("option_rows"), plan.get("answers")

        def forward() -> Tensor:
            return self.hidden_states(plan)

        def head(o: Tensor) -> Tensor:
            if option_rows is not None:
                right = (option_rows == answers[:, None]).to(torch.int8).argmax(1)
                return F.cross_entropy(self._option_scores(o, targets, option_rows), right, reduction=reduction)
            logits = self.logits(o)
            if self.options is not None:
                return F.cross_entropy(logits[:, -1], targets, reduction=reduction)
            losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction=reduction)
            if reduction == "mean":
                return losses
            return losses.view(targets.shape).sum(1) * (len(targets) / (targets != IGNORED).sum())

        return forward, head

    @torch.no_grad()
    def scores(self, batch: Mapping[str, Tensor]) -> Tensor:
        """[B, n] fp32, the larger the likelier: of the label words their logits (their log-likelihoods up to a number
        for each example), of options the mean log-likelihoods of their tokens, -inf where an example has fewer."""
        plan = self.plan(batch)
        o = self.hidden_states(plan)
        if "option_rows" in plan:
            return self._option_scores(o, plan["targets"], plan["option_rows"])
        if self.options is None:
            raise ValueError(
                "CausalLMObjective.scores: the batch has no options: give options, or a batch with examples"
            )
        return self.logits(o)[:, -1]

    @torch.no_grad()
    def row_scores(self, batch: Mapping[str, Tensor]) -> Tensor:
        """[R] fp32: the mean log-likelihood of the tokens of each row whose labels [R, T] are not -100."""
        plan = self.plan({k: v for k, v in batch.items() if k != "examples"})
        return self._mean_log_likelihood(self.hidden_states(plan), plan["targets"])

    def plan(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All that forward and head need of a batch: the model's inputs, and, on the head's device, positions, targets
        and, if there are options in the batch, option_rows and answers."""
        inputs = {k: v for k, v in batch.items() if k not in NOT_INPUTS}
        device, labels, plan = self.lm_head.weight.device, batch["labels"], {}
        if self.options is not None:
            positions, targets = self._last_token(inputs), labels
            if "examples" in batch or targets.shape != positions.shape[:1]:
                raise ValueError(
                    f"CausalLMObjective: with options, labels must be [B] classes, got shape {tuple(targets.shape)}"
                    + (" and examples" if "examples" in batch else "")
                )
        elif "positions" in batch and "targets" in batch:
            positions, targets = batch["positions"], batch["targets"]
        else:
            if labels.shape != inputs["input_ids"].shape:
                raise ValueError(
                    f"CausalLMObjective: without options, labels must be token ids in the shape of input_ids, "
                    f"{tuple(inputs['input_ids'].shape)}, got {tuple(labels.shape)}"
                )
            positions, targets = loss_positions(labels)
            if "examples" in batch and bool((targets == IGNORED).all(1).any()):
                raise ValueError("CausalLMObjective: a row of the batch has no token of its option (all are -100)")
        if "examples" in batch:
            option_rows = batch.get("option_rows")
            if option_rows is None:
                option_rows = rows_of_options(batch["examples"], len(batch["answers"]))
            plan = {"option_rows": option_rows, "answers": batch["answers"]}
        plan = {k: v.to(device, non_blocking=True) for k, v in plan.items()}
        plan |= {"positions": positions.to(device, non_blocking=True), "targets": targets.to(device, non_blocking=True)}
        plan |= inputs
        if not self._verified:
            self._verify(plan)
        return plan

    def _mean_log_likelihood(self, o: Tensor, targets: Tensor) -> Tensor:
        """[R]: of the targets [R, P] that are not -100."""
        losses = F.cross_entropy(
            self.logits(o).flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none"
        )
        return -losses.view(targets.shape).sum(1) / (targets != IGNORED).sum(1)

    def _option_scores(self, o: Tensor, targets: Tensor, option_rows: Tensor) -> Tensor:
        scores = self._mean_log_likelihood(o, targets)
        return scores[option_rows.clamp(min=0)].masked_fill(option_rows < 0, -torch.inf)

    @staticmethod
    def _last_token(inputs: Mapping[str, Tensor]) -> Tensor:
        """[B, 1]: the last position with attention, whichever side is padded."""
        ids = inputs["input_ids"]
        mask = inputs.get("attention_mask")
        if mask is None:
            return torch.full((ids.shape[0], 1), ids.shape[1] - 1, device=ids.device)
        places = torch.arange(1, mask.shape[1] + 1, device=mask.device)
        return (places * (mask != 0)).argmax(1, keepdim=True)

    def hidden_states(self, plan: Mapping[str, Tensor]) -> Tensor:
        """o: the head's input at positions [R, P] -> [R, P, D]; zeros where a position is -1. The head does not run."""
        positions = plan["positions"]

        def stop(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            raise _HeadReached(args[0])

        handle = self.lm_head.register_forward_pre_hook(stop, prepend=True)  # before a perturbed pass makes its weight
        try:
            self._run_model(plan)
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

    def _run_model(self, plan: Mapping[str, Tensor]) -> Any:
        with _told_of_padding(self._config, "attention_mask" in plan):
            return self.model(**self._model_inputs(plan), use_cache=False)

    def _model_inputs(self, plan: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """With position_ids: left alone, some models (GPT-2) count positions from the first column, padding or not. And
        with a mask: without one, some (Llama) read their positions, to see whether a row holds several texts."""
        inputs = {k: v for k, v in plan.items() if k not in NOT_INPUTS}
        mask = inputs.get("attention_mask")
        if "position_ids" in inputs:  # which may say that it does
            return inputs
        attends = getattr(self._config, "num_attention_heads", 0)
        reads_none = attends and getattr(self._config, "_attn_implementation", None) in ("sdpa", "eager")
        if mask is None and reads_none and "input_ids" in inputs:
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        if mask is not None and self._takes_positions:
            inputs["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0)
        return inputs

    def logits(self, o: Tensor) -> Tensor:
        """fp32 logits of o [..., D]: over the options if there are any, else over the vocabulary."""
        if self.options is None:
            return self._after_head(self.lm_head(o).float())
        weight, bias = self.lm_head.weight, self.lm_head.bias
        if holds_codes(weight):  # it has no rows to choose from
            return self._after_head(self.lm_head(o).float())[..., self.options]
        if self._option_ids is None or self._option_ids.device != weight.device:
            self._option_ids = torch.tensor(self.options, device=weight.device)
        rows = rows_of(self.model, weight, self._option_ids).float()
        bias = None if bias is None else bias.index_select(0, self._option_ids).float()
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
    def _verify(self, plan: Mapping[str, Tensor]) -> None:
        """Compare with the model's own logits, once, on one row of the first batch that carries a loss."""
        row = int((plan["positions"] >= 0).sum(1).argmax())
        if not bool((plan["positions"][row] >= 0).any()):
            return
        one = {k: v[row : row + 1] if isinstance(v, Tensor) and v.dim() else v for k, v in plan.items()}
        places = one["positions"]
        with frozen_mode(self.model):  # dropout would differ between the two passes
            ours = self.logits(self.hidden_states(one))
            logits = self._run_model(one).logits
            theirs = logits[0, places[0].clamp(min=0)].float()[None]
        if self.options is not None:
            theirs = theirs[..., self.options]
        there = (places >= 0)[..., None]
        weight = self.lm_head.weight
        exact = torch.get_float32_matmul_precision() == "highest" and not torch.is_autocast_enabled(weight.device.type)
        exact = exact and not holds_codes(weight)
        # the logits are in fp32, whatever the model is in
        eps = max(torch.finfo(weight.dtype if exact else torch.bfloat16).eps, torch.finfo(torch.float32).eps)
        # a matrix product of another shape may round differently: a few ulps of the largest logit
        limit = 32 * eps * theirs.abs().max().clamp(min=1)
        if not bool((((ours - theirs).abs() * there) <= limit).all()) and bool(theirs.isfinite().all()):
            raise RuntimeError(
                f"CausalLMObjective: {type(self.model).__name__} does more to its logits after the output head than is "
                "known here; split it by hand: optimizer.step(forward, head)"
            )
        self._verified = True


def padded(plan: Mapping[str, Tensor], length: int, count: int) -> dict[str, Tensor]:
    """The plan of a batch with its length a multiple of `length` and its loss positions one of `count`, so that batches
    come in a few shapes. Filled up on the left; the loss is the same, to rounding."""
    ids, positions = plan["input_ids"], plan["positions"]
    several = plan["targets"].dim() == 2  # label words have one position a row
    more, more_positions = -ids.shape[1] % length, -positions.shape[1] % count if several else 0
    out = dict(plan)
    if more:
        out["attention_mask"] = plan.get("attention_mask", torch.ones_like(ids))
        for name, x in out.items():
            if name not in NOT_INPUTS and isinstance(x, Tensor) and x.shape[:2] == ids.shape:
                out[name] = F.pad(x, (0, 0) * (x.dim() - 2) + (more, 0))
    out["positions"] = F.pad(torch.where(positions < 0, positions, positions + more), (more_positions, 0), value=-1)
    if several:
        out["targets"] = F.pad(plan["targets"], (more_positions, 0), value=IGNORED)
    return out


# Transformers reads an attention mask to see whether any row is padded, which waits for the device, and if none is, it
# lets torch attend causally without one. While a CUDA graph is recorded it does not read, and always makes a mask:
# another kernel, other bits. Told, it does the same in both cases. Its registry of mask functions is made for that.

_forward = threading.local()  # told: the configuration of the model whose forward runs in this thread, and padded


def _listen_in_sdpa_mask() -> None:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface, sdpa_mask  # 2 s

    def sdpa_mask_of_known_padding(**kwargs: Any) -> Tensor | None:
        config, padded = getattr(_forward, "told", (None, None))
        if config is None or kwargs.get("config") is not config:  # of another model, it may be inside of that one
            return sdpa_mask(**kwargs)
        local_size = kwargs.get("local_size")
        causal = kwargs["q_length"] == kwargs["kv_length"] and (local_size is None or kwargs["kv_length"] < local_size)
        if causal and not padded and kwargs.get("allow_is_causal_skip", True):
            return None
        return sdpa_mask(**kwargs | {"allow_is_causal_skip": False})

    if ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] is sdpa_mask:  # neither done nor somebody else's
        AttentionMaskInterface.register("sdpa", sdpa_mask_of_known_padding)


@contextmanager
def _told_of_padding(config: Any, padded: bool) -> Iterator[None]:
    before = getattr(_forward, "told", (None, None))
    _forward.told = config, padded
    try:
        yield
    finally:
        _forward.told = before


def _takes_positions(model: nn.Module) -> bool:
    """Does its forward take position_ids? With a learned prompt before the text, peft allows none, except that it
    shifts them by the length of a prefix of keys and values."""
    config = getattr(model, "active_peft_config", None)
    if getattr(config, "is_prompt_learning", False) and config.peft_type != "PREFIX_TUNING":
        return False
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "position_ids" in inspect.signature(base.forward).parameters
