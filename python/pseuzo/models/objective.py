"""Splits a causal language model into h (everything up to its output head's input) and g (head and loss).

    objective = CausalLMObjective(model)
    forward, head = objective(batch)            # o = forward(); loss = head(o)
    loss = optimizer.step(forward, head)

o holds the hidden states at the positions that carry a loss, no others: [R, P, D] for the R rows of a batch. The head
runs on those alone, in the clean pass alone (PseuZO's perturbed pass never calls it), and for a choice between label
words only its rows for those words. No code of Transformers is changed: a hook on the head reads its input and ends the
forward there (the first forward goes on, from an output that shows what the model does to its logits), and a function
in its registry of attention masks, which does as before elsewhere, is told of padding.
"""

import inspect
import math
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pseuzo.machine import holds_codes
from pseuzo.perturb.contexts import frozen_mode
from pseuzo.perturb.module import rows_of

IGNORED = -100  # a label that carries no loss, as everywhere in Transformers
# what a batch holds for the objective and the optimizer; the model gets the rest
NOT_INPUTS = frozenset(
    ("labels", "answers", "examples", "groups", "rows", "option_rows", "positions", "targets")
)  # fmt: skip
# Tokens that a model is verified by; of those the first, where padding changes most, are verified with some padding.
MOST_TOKENS, FIRST_TOKENS, PADS = 64, 8, 7
# What a model's head is made to put out once: a soft cap shows in the large ones, a factor in the small ones.
PROBE = (2.0**12, -(2.0**12), 2.0**-6, 1.0, -3.0, 20.0)


@dataclass
class _Found:
    """What its first forwards showed of a model."""

    # It makes logits of the output x of its head by cap * tanh(factor * x / cap), or factor * x, of the first columns.
    factor: float | None = None  # None: it did not run yet
    cap: float | None = None
    columns: int = 0
    verified: bool = False  # its logits, and its loss where that is trained on
    padding: str | None = (
        None  # where its rows may have some: "anywhere", "right", "nowhere"; None: not known yet
    )


_found: WeakKeyDictionary[nn.Module, _Found] = WeakKeyDictionary()


class _HeadReached(Exception):
    """Ends a forward where its output head would begin."""


def predicted(labels: Tensor, mask: Tensor | None) -> Tensor:
    """labels [R, T], -100 where the token before is padding: it is the first of its text, which nothing predicts. What
    a model makes of the padding before it is noise, another one on each attention backend."""
    return (
        labels
        if mask is None
        else labels.masked_fill(F.pad(mask[:, :-1], (1, 0), value=1) == 0, IGNORED)
    )


def loss_positions(labels: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """positions, targets [R, P]: where the next token carries a loss, and that token; aligned to the right, with
    positions -1 and targets -100 where a row has fewer. P is at least 1. mask [R, T]: 0 for padding, on which no
    position is. Waits for the device that labels [R, T] are on."""
    shifted = F.pad(predicted(labels, mask)[:, 1:], (0, int(labels.shape[1] < 2)), value=IGNORED)
    carries = shifted != IGNORED
    count = max(int(carries.sum(1).max()), 1)
    order = torch.argsort(carries.to(torch.int8), dim=1, stable=True)[
        :, -count:
    ]  # loss positions last, in order
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
    """A collator whose batches also have `positions` and `targets` (loss_positions), labels only where a token is
    predicted (see predicted), and no attention_mask if there is no padding: found on the CPU, so that
    CausalLMObjective need not wait for the device to find them.

    Only batches of token ids to predict, labels [B, T], get them; others are left as they are. The objective keeps both
    from the model; a loss of your own has to do that too."""
    return partial(_collated_with_positions, collate)


def _collated_with_positions(
    collate: Callable[[Any], dict[str, Any]], items: Any
) -> dict[str, Any]:
    batch = collate(items)
    labels = batch.get("labels")
    if (
        isinstance(labels, Tensor)
        and labels.dim() == 2
        and not {"examples", "positions", "targets"} & set(batch)
    ):
        mask = batch.get("attention_mask")
        batch["labels"] = predicted(labels, mask)
        batch["positions"], batch["targets"] = loss_positions(batch["labels"])
        if isinstance(mask, Tensor) and bool(mask.all()):
            del batch["attention_mask"]
    return batch


class CausalLMObjective:
    """The loss of a Transformers causal LM as PseuZO needs it: the model's own, of a row alone and in a padded batch.

    model: any whose output head is one module (`get_output_embeddings()`): a Linear, tied or not, or one that peft has
    wrapped. options: token ids of label words, one per class: the loss is then the cross entropy over their logits
    alone, at the last token of the prompt. Without options, it is the cross entropy over options of any number of
    tokens if the batch has `examples`, and else the language-modelling loss of `labels`.

    What a model does to the output of its head (a factor, a soft cap) is read off its first forward. On first use its
    logits of one row, and its loss if it is trained on that one, are compared with those made here: RuntimeError if the
    logits differ, ValueError if the loss does. verify "once" verifies only what no objective of this model has, False
    nothing.

    Positions are counted from the first token with attention, so that padding on the left changes nothing. With the
    first attention mask that is verified, too, by a row alone and padded. Where padding on the left does change a
    model's numbers (recurrent ones take it in, some count columns), rows are padded on the right; where even that does,
    batches with padding are refused: ValueError.

    A batch without padding should leave the attention mask out: it is then attended causally, by torch's fastest
    kernel. One with a mask counts as padded, and nobody reads the mask to see whether it is, which would wait for the
    device. (With SDPA or eager attention, that is; Transformers' flash attention and recurrent layers read it all the
    same.)
    """

    def __init__(
        self, model: nn.Module, options: list[int] | None = None, *, verify: bool | str = True
    ):
        kind = type(model).__name__
        lm_head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        if not isinstance(lm_head, nn.Module) or isinstance(lm_head, nn.Embedding | nn.ModuleList):
            raise TypeError(
                f"CausalLMObjective: {kind} has no Linear output head (get_output_embeddings() gave "
                f"{type(lm_head).__name__}); use a ...ForCausalLM model"
            )
        if getattr(model.config, "is_encoder_decoder", False):
            raise TypeError(
                f"CausalLMObjective: {kind} has an encoder, and no labels for its decoder to go on from; use a "
                "...ForCausalLM model, or split it by hand: optimizer.step(forward, head)"
            )
        if options is not None:
            if len(options) < 2 or len(set(options)) != len(options):
                raise ValueError(
                    f"CausalLMObjective: options must be two or more different token ids, got {options}"
                )
        self.model, self.lm_head, self.options = model, lm_head, options
        plain = type(lm_head).forward is nn.Linear.forward and "forward" not in vars(lm_head)
        self._has_rows = plain and not holds_codes(lm_head.weight)  # of which some can be chosen
        self._quantised = any(map(holds_codes, model.parameters()))
        if options is not None and self._has_rows:
            self._check_options(lm_head.weight.shape[0])
        self._option_ids: Tensor | None = None
        self._verifies = bool(verify)
        if verify is True or model not in _found:
            _found[model] = _Found()
        self._found = _found[model]
        self._takes_positions = _takes(model, "position_ids")
        self._config = getattr(model.config, "text_config", model.config)
        _listen_in_sdpa_mask()

    def _check_options(self, tokens: int) -> None:
        if not all(0 <= i < tokens for i in self.options):
            raise ValueError(
                f"CausalLMObjective: options must be token ids below {tokens}, got {self.options}"
            )

    @property
    def padding(self) -> str | None:
        """Where rows of this model may have padding: "anywhere", "right" or "nowhere"; None: that was not seen yet."""
        return self._found.padding

    @property
    def _device(self) -> torch.device:
        return next(self.lm_head.parameters()).device

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
            raise ValueError(
                f"CausalLMObjective: reduction must be 'mean' or 'none', got {reduction!r}"
            )
        targets, option_rows, answers = (
            plan["targets"],
            plan.get("option_rows"),
            plan.get("answers"),
        )

        def forward() -> Tensor:
            return self.hidden_states(plan)

        def head(o: Tensor) -> Tensor:
            if option_rows is not None:
                right = (option_rows == answers[:, None]).to(torch.int8).argmax(1)
                return F.cross_entropy(
                    self._option_scores(o, targets, option_rows), right, reduction=reduction
                )
            logits = self.logits(o)
            if self.options is not None:
                return F.cross_entropy(logits[:, -1], targets, reduction=reduction)
            losses = F.cross_entropy(
                logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction=reduction
            )
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
        device, labels, plan = self._device, batch["labels"], {}
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
            positions, targets = loss_positions(labels, inputs.get("attention_mask"))
            if "examples" in batch and bool((targets == IGNORED).all(1).any()):
                raise ValueError(
                    "CausalLMObjective: a row of the batch has no token of its option (all are -100)"
                )
        if "examples" in batch:
            option_rows = batch.get("option_rows")
            if option_rows is None:
                option_rows = rows_of_options(batch["examples"], len(batch["answers"]))
            plan = {"option_rows": option_rows, "answers": batch["answers"]}
        plan = {k: v.to(device, non_blocking=True) for k, v in plan.items()}
        plan |= {
            "positions": positions.to(device, non_blocking=True),
            "targets": targets.to(device, non_blocking=True),
        }
        return self.checked(plan | inputs)

    def checked(self, plan: dict[str, Tensor]) -> dict[str, Tensor]:
        """The plan, with its padding where the model may have it. The first ones verify the model: see the class."""
        if self._verifies and not self._found.verified:
            self._verify(plan)
        if "attention_mask" not in plan:
            return plan
        if self._verifies and self.padding is None:
            self._verify_padding(plan)
        if self.padding == "nowhere" and not bool(plan["attention_mask"].all()):
            raise ValueError(
                f"CausalLMObjective: padding on either side changes the numbers of {type(self.model).__name__}; make "
                "batches of rows of one length, or of one row"
            )
        return padded_on_the_right(plan) if self.padding == "right" else plan

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
        """o: the head's input at positions [R, P] -> [R, P, D]; zeros where a position is -1. The head does not run,
        except once on one state."""
        positions, kind, seen = plan["positions"], type(self.model).__name__, []
        looks = self._found.factor is None

        def reached(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            seen.append(args[0])
            if not looks:
                raise _HeadReached
            return args[0][:1, -1:], *args[1:]

        def put_out(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            x = output.new_zeros(output.shape, dtype=torch.float32)
            x[..., : len(PROBE)] = torch.tensor(PROBE[: x.shape[-1]])
            return x

        hooks = [
            self.lm_head.register_forward_pre_hook(reached, prepend=True)
        ]  # before a perturbed weight is made
        if looks:
            hooks.append(self.lm_head.register_forward_hook(put_out))
        try:
            output = self._run_model(plan)
        except _HeadReached:
            pass
        finally:
            for hook in hooks:
                hook.remove()
        if not seen:
            raise RuntimeError(
                f"CausalLMObjective: {kind} does not call its output head; split it by hand: "
                "optimizer.step(forward, head)"
            )
        if looks:
            self._read_off(getattr(output, "logits", None) if len(seen) == 1 else None)
        states, (rows, length) = seen[0], plan["input_ids"].shape
        before = states.shape[1] - length  # tokens of a learned prompt
        if states.dim() != 3 or states.shape[0] != rows or before < 0:
            raise RuntimeError(
                f"CausalLMObjective: {kind} runs its output head on {tuple(states.shape)}, which is not one state for "
                f"each of {rows} times {length} tokens; split it by hand: optimizer.step(forward, head)"
            )
        at = torch.arange(rows, device=states.device)[:, None], positions.clamp(min=0) + before
        return states[at].masked_fill((positions < 0)[..., None], 0)

    def _read_off(self, logits: Tensor | None) -> None:
        """Finds what the model does to the output of its head: logits are what it made of PROBE."""
        if logits is None or logits.shape[-1] < len(PROBE):
            raise self._not_its_own()
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
                raise self._not_its_own()
        found = self._found
        found.factor, found.cap, found.columns = factor, cap, logits.shape[-1]

    def _not_its_own(self) -> RuntimeError:
        return RuntimeError(
            f"CausalLMObjective: {type(self.model).__name__} runs its output head more than once, or does more to its "
            "logits after it than to scale and cap them; split it by hand: optimizer.step(forward, head)"
        )

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
        reads_none = attends and getattr(self._config, "_attn_implementation", None) in (
            "sdpa",
            "eager",
        )
        if mask is None and reads_none and "input_ids" in inputs:
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        if mask is not None and self._takes_positions and self.padding != "right":
            inputs["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0)
        return inputs

    def logits(self, o: Tensor) -> Tensor:
        """fp32 logits of o [..., D]: over the options if there are any, else over the vocabulary."""
        if self.options is None:
            return self._after_head(self.lm_head(o).float())
        if self._option_ids is None or self._option_ids.device != self._device:
            self._option_ids = torch.tensor(self.options, device=self._device)
        if not self._has_rows:
            return self._after_head(self.lm_head(o).index_select(-1, self._option_ids).float())
        weight, bias = self.lm_head.weight, self.lm_head.bias
        rows = rows_of(self.model, weight, self._option_ids).float()
        bias = None if bias is None else bias.index_select(0, self._option_ids).float()
        return self._after_head(F.linear(o.float(), rows, bias))

    def _after_head(self, logits: Tensor) -> Tensor:
        """What the model does to the head's output."""
        found = self._found
        if self.options is None and found.columns < logits.shape[-1]:
            logits = logits[..., : found.columns]
        if found.factor != 1:
            logits = logits * found.factor
        return logits if found.cap is None else torch.tanh(logits / found.cap) * found.cap

    @torch.no_grad()
    def _verify(self, plan: Mapping[str, Tensor]) -> None:
        """Compares with the model's own logits and loss, on one row, without padding; not where none has a loss."""
        one, labels = self._one_row(plan)
        if bool(one["positions"][0, -1] < 0):
            return
        inputs = {k: v for k, v in one.items() if k not in NOT_INPUTS}
        if labels is not None and _takes(self.model, "labels"):
            inputs["labels"] = labels
        with frozen_mode(self.model):  # dropout would differ between the two passes
            o = self.hidden_states(one)
            if self.options is not None:
                self._check_options(self._found.columns)
            ours = self.logits(o)
            try:
                with _told_of_padding(self._config, False):
                    output = self.model(**inputs, use_cache=False)
            except (ValueError, IndexError) as error:
                if "labels" not in inputs:
                    raise
                raise ValueError(
                    f"CausalLMObjective: {type(self.model).__name__} makes no loss of labels by itself: "
                    f"{' '.join(str(error).split())}"
                ) from error
        logits = output.logits[
            :, -one["input_ids"].shape[1] :
        ].float()  # without those of a learned prompt
        theirs = logits[:, one["positions"][0]]
        if self.options is not None:
            theirs = theirs[..., self.options]
        # a matrix product of another shape may round differently: a few ulps of the largest logit
        limit = 32 * self._eps(o) * theirs.abs().max().clamp(min=1)
        if bool(theirs.isfinite().all()) and not bool(((ours - theirs).abs() <= limit).all()):
            raise self._not_its_own()
        loss = getattr(output, "loss", None)
        if "labels" in inputs and loss is not None:
            want = float(F.cross_entropy(logits[0, :-1], labels[0, 1:]))
            limit = max(32 * torch.finfo(loss.dtype).eps, 1e-5) * max(
                1.0, abs(want)
            )  # the same sum in another order
            if math.isfinite(want) and not abs(float(loss) - want) <= limit:
                raise ValueError(
                    f"CausalLMObjective: the loss of {type(self.model).__name__} is {float(loss):.6g} where the cross "
                    f"entropy of its logits with the next tokens is {want:.6g}: it takes labels for other tokens, or "
                    "adds a loss of its own (routers: set output_router_logits=False in the config; AdaLoRA: "
                    "orth_reg_weight=0); split it by hand: optimizer.step(forward, head)"
                )
        self._found.verified = True

    @torch.no_grad()
    def _verify_padding(self, plan: Mapping[str, Tensor]) -> None:
        """Finds where rows of this model may have padding: where that leaves the logits of a row as they are alone."""
        one, _ = self._one_row(plan)
        pads = min(PADS, plan["input_ids"].shape[1] // 2)
        length = min(FIRST_TOKENS, one["input_ids"].shape[1], plan["input_ids"].shape[1] - pads)
        if not pads or not length:
            return
        of_tokens = {k: one[k][:, :length] for k in _of_tokens(one)}
        at = torch.arange(length, device=one["positions"].device)[None]

        def states(left: int, right: int) -> Tensor:
            row = one | {
                k: F.pad(x, (0, 0) * (x.dim() - 2) + (left, right)) for k, x in of_tokens.items()
            }
            if left + right:
                row["attention_mask"] = F.pad(
                    torch.ones_like(of_tokens["input_ids"]), (left, right)
                )
            return self.hidden_states(row | {"positions": at + left})

        def logits(o: Tensor) -> Tensor:
            x = self.lm_head(o).float()
            return x - x.mean(-1, keepdim=True)

        def same(left: int, right: int, ulps: int) -> bool:
            try:
                changes = logits(states(left, right)) - alone
            except torch.OutOfMemoryError:
                raise
            except (
                Exception
            ):  # models fail in many ways on positions or a length that they do not expect
                return False
            limit = max(ulps * self._eps(o), 1e-4) ** 2 * alone.square().mean()
            return bool(changes.square().mean() <= limit) or not bool(alone.isfinite().all())

        # Layers round differently in another shape, and a token may even go to another expert: ulps of 16 bits are
        # many. A change by padding on the left that is only rounding does no harm; one on the right refuses a model.
        on_left, on_right = (pads, 0, 8), (0, pads, 32)
        found = self._found
        try:
            with frozen_mode(self.model):
                alone = logits(o := states(0, 0))
                for found.padding, sides in (
                    ("anywhere", (on_left, on_right)),
                    ("right", (on_right,)),
                ):
                    if all(same(*side) for side in sides):
                        return
                found.padding = "nowhere"
        except BaseException:
            found.padding = None
            raise

    def _eps(self, o: Tensor) -> float:
        """Of the precision that o was made in; the logits are in fp32, whatever the model is in."""
        exact = torch.get_float32_matmul_precision() == "highest" and not torch.is_autocast_enabled(
            o.device.type
        )
        exact = exact and not self._quantised
        return max(
            torch.finfo(o.dtype if exact else torch.bfloat16).eps, torch.finfo(torch.float32).eps
        )

    def _one_row(self, plan: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor | None]:
        """The plan of one row's last tokens up to its loss, if any has one, without padding, [1, T]; and labels [1, T],
        if the loss is that of language modelling."""
        ids, positions, mask = plan["input_ids"], plan["positions"], plan.get("attention_mask")
        row = int((positions >= 0).sum(1).argmax())
        at = positions[row][positions[row] >= 0].to(ids.device)
        labels = torch.full_like(ids[row], IGNORED)
        if self.options is None:
            labels[at + 1] = plan["targets"][row][positions[row] >= 0].to(ids.device)
            at = at + 1
        kept = torch.ones_like(labels) if mask is None else (mask[row] != 0) | (labels != IGNORED)
        kept = kept[: int(at[-1]) + 1 if len(at) else None].nonzero().flatten()[-MOST_TOKENS:]
        one = {k: x for k, x in plan.items() if k not in NOT_INPUTS and k != "attention_mask"}
        of_tokens = {k: one[k][row : row + 1, kept] for k in _of_tokens(one)}
        of_rows = {
            k: x[row : row + 1]
            for k, x in one.items()
            if isinstance(x, Tensor) and x.shape[:1] == ids.shape[:1]
        }
        one |= of_rows | of_tokens
        labels = labels[None, kept]
        last = torch.full_like(labels[:, :1], len(kept) - 1)
        one["positions"] = (loss_positions(labels)[0] if self.options is None else last).to(
            positions.device
        )
        return one, labels if self.options is None and "option_rows" not in plan else None


def _of_tokens(plan: Mapping[str, Tensor]) -> list[str]:
    """The names of the model's inputs that have an entry for each token."""
    shape = plan["input_ids"].shape
    return [
        k
        for k, x in plan.items()
        if k not in NOT_INPUTS and isinstance(x, Tensor) and x.shape[:2] == shape
    ]


def padded(plan: Mapping[str, Tensor], length: int, count: int) -> dict[str, Tensor]:
    """The plan of a batch with its length a multiple of `length` and its loss positions one of `count`, so that batches
    come in a few shapes. Filled up on the left; the loss is the same, to rounding."""
    ids, positions = plan["input_ids"], plan["positions"]
    several = plan["targets"].dim() == 2  # label words have one position a row
    more, more_positions = -ids.shape[1] % length, -positions.shape[1] % count if several else 0
    out = dict(plan)
    if more:
        out["attention_mask"] = plan.get("attention_mask", torch.ones_like(ids))
        for name in _of_tokens(out):
            out[name] = F.pad(out[name], (0, 0) * (out[name].dim() - 2) + (more, 0))
    out["positions"] = F.pad(
        torch.where(positions < 0, positions, positions + more), (more_positions, 0), value=-1
    )
    if several:
        out["targets"] = F.pad(plan["targets"], (more_positions, 0), value=IGNORED)
    return out


def padded_on_the_right(plan: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The plan with the padding that is on the left of its rows moved to the right. Waits for no device."""
    mask, positions = plan["attention_mask"] != 0, plan["positions"]
    rows, length = mask.shape
    left = (mask.cumsum(1) == 0).sum(1, keepdim=True) % length  # 0 of a row of padding alone
    at = (
        torch.arange(rows, device=mask.device)[:, None],
        (torch.arange(length, device=mask.device) + left) % length,
    )
    moved = {k: plan[k][at] for k in _of_tokens(plan)}
    moved["positions"] = torch.where(
        positions < 0, positions, positions - left.to(positions.device)
    )
    return {**plan, **moved}


# Transformers reads an attention mask to see whether any row is padded, which waits for the device, and if none is, it
# lets torch attend causally without one. While a CUDA graph is recorded it does not read, and always makes a mask:
# another kernel, other bits. Told, it does the same in both cases. Its registry of mask functions is made for that.

_forward = (
    threading.local()
)  # told: the configuration of the model whose forward runs in this thread, and padded


def _listen_in_sdpa_mask() -> None:
    from transformers.masking_utils import (  # 2 s
        ALL_MASK_ATTENTION_FUNCTIONS,
        AttentionMaskInterface,
        sdpa_mask,
    )

    def sdpa_mask_of_known_padding(**kwargs: Any) -> Tensor | None:
        config, padded = getattr(_forward, "told", (None, None))
        if (
            config is None or kwargs.get("config") is not config
        ):  # of another model, it may be inside of that one
            return sdpa_mask(**kwargs)
        local_size = kwargs.get("local_size")
        causal = kwargs["q_length"] == kwargs["kv_length"] and (
            local_size is None or kwargs["kv_length"] < local_size
        )
        if causal and not padded and kwargs.get("allow_is_causal_skip", True):
            return None
        mask = sdpa_mask(**kwargs | {"allow_is_causal_skip": False})
        return _seeing_itself(mask) if padded and mask is not None else mask

    if ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] is sdpa_mask:  # neither done nor somebody else's
        AttentionMaskInterface.register("sdpa", sdpa_mask_of_known_padding)


def _seeing_itself(mask: Tensor) -> Tensor:
    """mask [..., queries, keys], True where a key is seen; a query that sees none, of a pad, then sees its own key.

    Some backends make NaN of such a query, and in the next layer a NaN reaches all others, since zero times NaN is NaN.
    """
    queries, keys = (torch.arange(n, device=mask.device) for n in mask.shape[-2:])
    own = queries[:, None] + (len(keys) - len(queries)) == keys  # keys of a prefix come first
    return mask | (own & ~mask.any(-1, keepdim=True))


@contextmanager
def _told_of_padding(config: Any, padded: bool) -> Iterator[None]:
    before = getattr(_forward, "told", (None, None))
    _forward.told = config, padded
    try:
        yield
    finally:
        _forward.told = before


def _takes(model: nn.Module, name: str) -> bool:
    """Does its forward take this argument? With a learned prompt before the text, peft allows no position_ids, except
    that it shifts them by the length of a prefix of keys and values."""
    config = getattr(model, "active_peft_config", None)
    learned = getattr(config, "is_prompt_learning", False) and config.peft_type != "PREFIX_TUNING"
    if learned and name == "position_ids":
        return False
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return name in inspect.signature(base.forward).parameters
