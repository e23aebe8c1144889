"""The loss of a causal language model in the two parts that PseuZO needs, g(h(x)).

    objective = CausalLMObjective(model)
    forward, head = objective(batch)            # o = forward(); loss = head(o)
    loss = optimizer.step(forward, head)

h is everything up to the input of the output head, g is the head and the loss. o holds the hidden
states at only the positions that have a loss: [R, P, D] for the R rows of a batch. The head runs
only on those, and only in the clean pass (PseuZO's perturbed pass never calls it). For a choice
between label words, only the head's rows for those words are multiplied. Module `split` has the
model in two parts, `positions` finds where the loss is, `verify` compares with the model itself.
"""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pseuzo.models.positions import (
    IGNORED,
    NOT_INPUTS,
    last_positions,
    loss_positions,
    padded_on_the_right,
    rows_of_options,
)
from pseuzo.models.split import SplitModel
from pseuzo.models.verify import find_packing, find_padding, verify_loss


class CausalLMObjective:
    """The loss of a Transformers causal LM: the same for a row alone and in a padded batch.

    model: any model whose output head is one module (`get_output_embeddings()`): a Linear, tied or
    not, or one that peft has wrapped. options: token ids of label words, one per class; the loss is
    then the cross entropy over their logits alone, at the last token of the prompt. Without
    options, it is the cross entropy over options of any number of tokens if the batch has
    `examples`, and else the language-modelling loss of `labels`.

    A masked language model (...ForMaskedLM) and a classifier (...ForSequenceClassification) need
    options: the tokens of the label words for the former, whose batches hold the position of the
    mask token in positions [B, 1]; the classes, range(n), for the latter. Their rows are padded on
    the right.

    The first forward shows what a model does to the output of its head (a factor, a soft cap). On
    first use its logits of one row, and its loss if that is the one that is trained, are compared
    with those computed here: RuntimeError if the logits differ, ValueError if the loss does.
    verify="once" verifies only what no objective of this model has verified yet, False nothing.

    Positions are counted from the first token with attention, so that padding on the left changes
    nothing. The first batch with an attention mask verifies this as well, with a row alone and
    padded. If padding on the left does change the numbers of a model (recurrent ones read it, some
    models count columns), rows are padded on the right; if that changes them too, batches with
    padding are refused with a ValueError.

    On a CPU, padding is left out where that is faster, see `packing`. The first batch of this kind
    is computed with and without it, and a model that gives other states keeps it.

    A batch without padding should leave the attention mask out: it then attends causally, with
    torch's fastest kernel. A batch with a mask counts as padded. The mask is not read to check
    this, since that would wait for the device. (This holds for SDPA and eager attention;
    Transformers' flash attention and recurrent layers read it anyway.)
    """

    def __init__(
        self, model: nn.Module, options: list[int] | None = None, *, verify: bool | str = True
    ):
        self._split = SplitModel(model, options, anew=verify is True)
        self._verifies = bool(verify)
        self.model, self.lm_head, self.options = model, self._split.head, options
        # Told of the outputs of every forward with options, and of their classes.
        self.listener: Callable[[Tensor, Tensor], None] | None = None

    @property
    def padding(self) -> str | None:
        """Where rows of this model may have padding: "anywhere", "right" or "nowhere"; None if it
        is not known yet."""
        return self._split.known.padding

    @property
    def after_head(self) -> Callable[[Tensor], Tensor]:
        """What the model does to the logits [..., n] of some rows of its head, known from the first
        forward on."""
        after = self._split.known.after_head
        assert after is not None
        return partial(after, cut=False)

    def __call__(
        self, batch: Mapping[str, Tensor], reduction: str = "mean"
    ) -> tuple[Callable[[], Tensor], Callable[[Tensor], Tensor]]:
        """Return forward() -> o [R, P, D] and head(o) -> loss, fp32, for a batch.

        batch: input_ids [R, T], attention_mask [R, T] (padding on either side; without a mask there
        is none), and

        - with options, labels [B], the class of each row, and for a masked language model
          positions [B, 1]; P is 1;
        - with `examples` in the batch: labels [R, T], token ids with -100 outside the option's
          tokens; examples [R], for each row the example 0 to B - 1 that it is an option of; answers
          [B], the row of each example's right option. The loss of an example is the cross entropy
          over the mean log-likelihoods of its options' tokens;
        - else labels [B, T], token ids with -100 where there is no loss.

        Labels are not shifted, as in Transformers. P is the largest number of loss positions of a
        row; rows with fewer are filled up on the left with zeros that have no loss. If no row has
        any, the loss is NaN, as in Transformers, and the optimizers skip the step. Nothing waits
        for the device if labels and examples are on the CPU, or if the batch also has `positions`
        and `targets` (loss_positions) and `option_rows` (rows_of_options). All other entries go to
        the model.

        reduction="none": head(o) -> [B], a loss for each example, whose mean is the loss (so an
        example with more tokens in its answer has a larger one). "tokens": the same, but where the
        loss is a mean over tokens, head(o) -> [B, P], those of each position, whose sums over P are
        the losses of the examples.
        """
        return self.functions(self.plan(batch), reduction)

    def functions(
        self, plan: Mapping[str, Tensor], reduction: str = "mean"
    ) -> tuple[Callable[[], Tensor], Callable[[Tensor], Tensor]]:
        """Return forward and head for a plan of plan(batch). They read its tensors at every
        call."""
        if reduction not in ("mean", "none", "tokens"):
            raise ValueError(
                "CausalLMObjective: reduction must be 'mean', 'none' or 'tokens', got "
                f"{reduction!r}"
            )
        each = "none" if reduction == "tokens" else reduction
        targets, option_rows = plan["targets"], plan.get("option_rows")
        answers = plan.get("answers")

        def forward() -> Tensor:
            o = self.hidden_states(plan)
            if self.listener is not None and self.options is not None:
                self.listener(o, targets)
            return o

        def head(o: Tensor) -> Tensor:
            if option_rows is not None:
                right = (option_rows == answers[:, None]).to(torch.int8).argmax(1)
                scores = self._option_scores(o, targets, option_rows)
                return F.cross_entropy(scores, right, reduction=each)
            logits = self.logits(o)
            if self.options is not None:
                return F.cross_entropy(logits[:, -1], targets, reduction=each)
            losses = F.cross_entropy(
                logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction=each
            )
            if reduction == "mean":
                return losses
            losses, share = losses.view(targets.shape), len(targets) / (targets != IGNORED).sum()
            return losses * share if reduction == "tokens" else losses.sum(1) * share

        return forward, head

    @torch.no_grad()
    def scores(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return scores [B, n] fp32, larger if likelier: the logits of label words (their
        log-likelihoods up to a constant per example), or the mean log-likelihoods of the tokens of
        options, with -inf where an example has fewer."""
        plan = self.plan(batch)
        o = self.hidden_states(plan)
        if "option_rows" in plan:
            return self._option_scores(o, plan["targets"], plan["option_rows"])
        if self.options is None:
            raise ValueError(
                "CausalLMObjective.scores: the batch has no options: give options, or a batch with "
                "examples"
            )
        return self.logits(o)[:, -1]

    @torch.no_grad()
    def row_scores(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return [R] fp32: the mean log-likelihood of the tokens of each row whose labels [R, T]
        are not -100."""
        plan = self.plan({k: v for k, v in batch.items() if k != "examples"})
        return self._mean_log_likelihood(self.hidden_states(plan), plan["targets"])

    def plan(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what forward and head need of a batch: the model's inputs and, on the head's
        device, positions, targets and, if the batch has options, option_rows and answers."""
        inputs = {k: v for k, v in batch.items() if k not in NOT_INPUTS}
        device, labels, plan = self._split.device, batch["labels"], {}
        if self.options is not None:
            masked = self._split.kind == "masked"
            if masked and "positions" not in batch:
                raise ValueError(
                    "CausalLMObjective: a batch for a masked language model must have positions "
                    "[B, 1], where each row has its mask token"
                )
            positions = batch["positions"] if masked else last_positions(inputs)
            targets = labels
            if "examples" in batch or targets.shape != positions.shape[:1]:
                also = " and examples" if "examples" in batch else ""
                raise ValueError(
                    "CausalLMObjective: with options, labels must be [B] classes, got shape "
                    f"{tuple(targets.shape)}{also}"
                )
        elif "positions" in batch and "targets" in batch:
            positions, targets = batch["positions"], batch["targets"]
        else:
            if labels.shape != inputs["input_ids"].shape:
                raise ValueError(
                    "CausalLMObjective: without options, labels must be token ids in the shape of "
                    f"input_ids, {tuple(inputs['input_ids'].shape)}, got {tuple(labels.shape)}"
                )
            positions, targets = loss_positions(labels, inputs.get("attention_mask"))
            if "examples" in batch and bool((targets == IGNORED).all(1).any()):
                raise ValueError(
                    "CausalLMObjective: a row of the batch has no token of its option (all are "
                    "-100)"
                )
        if "examples" in batch:
            option_rows = batch.get("option_rows")
            if option_rows is None:
                option_rows = rows_of_options(batch["examples"], len(batch["answers"]))
            plan = {"option_rows": option_rows, "answers": batch["answers"]}
        plan |= {"positions": positions, "targets": targets}
        plan = {k: v.to(device, non_blocking=True) for k, v in plan.items()}
        return self.checked(plan | inputs)

    def checked(self, plan: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the plan, with its padding moved to where the model may have it.

        The first plans verify the model, as the class describes.
        """
        if self._verifies and not self._split.known.verified:
            verify_loss(self._split, plan)
        if "attention_mask" not in plan:
            return plan
        if self._verifies and self.padding is None:
            find_padding(self._split, plan)
        if self.padding == "nowhere" and not bool(plan["attention_mask"].all()):
            failed = self._split.known.padding_error
            raise ValueError(
                "CausalLMObjective: padding on either side changes the numbers of "
                f"{type(self.model).__name__}"
                + (f", or fails ({failed})" if failed else "")
                + "; make batches of rows of one length, or of one row"
            )
        plan = padded_on_the_right(plan) if self.padding == "right" else plan
        if self._verifies and self._split.known.packs is None:
            find_packing(self._split, plan)
        return plan

    def hidden_states(self, plan: Mapping[str, Tensor]) -> Tensor:
        """Return o, the head's input at positions [R, P], as [R, P, D]; zeros at position -1."""
        return self._split.hidden_states(plan)

    def logits(self, o: Tensor) -> Tensor:
        """Return fp32 logits of o [..., D], over the options if there are any, else over the
        vocabulary."""
        return self._split.logits(o)

    def model_inputs(self, plan: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the model's inputs of a plan, with positions if padding would shift its own."""
        return self._split.model_inputs(plan)

    def _mean_log_likelihood(self, o: Tensor, targets: Tensor) -> Tensor:
        """Return [R]: the mean over those of the targets [R, P] that are not -100."""
        losses = F.cross_entropy(
            self.logits(o).flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none"
        )
        return -losses.view(targets.shape).sum(1) / (targets != IGNORED).sum(1)

    def _option_scores(self, o: Tensor, targets: Tensor, option_rows: Tensor) -> Tensor:
        scores = self._mean_log_likelihood(o, targets)
        return scores[option_rows.clamp(min=0)].masked_fill(option_rows < 0, -torch.inf)
