"""Compares the outputs of a split model with those of the model itself, on one row.

`verify_loss` compares the logits and the loss, `find_padding` a row alone with the same row padded.
Both store what they found in `split.known`.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from pseuzo.models.attention import padding_known
from pseuzo.models.positions import IGNORED, NOT_INPUTS, loss_positions, token_inputs
from pseuzo.models.split import BY_HAND, SplitModel, takes_argument
from pseuzo.perturb.contexts import frozen_mode
from pseuzo.sentences import first_line, one_line

MAX_TOKENS = 64  # the most tokens of the row that is compared
# Padding changes the first tokens most, so only those are compared, with so many pads beside them.
PADDED_TOKENS, PADS = 8, 7


@torch.no_grad()
def verify_loss(split: SplitModel, plan: Mapping[str, Tensor]) -> None:
    """Compare with the model's own logits and loss, on one row without padding.

    RuntimeError if the logits differ, ValueError if the loss does. Nothing is compared if no row
    has a loss.
    """
    kind = type(split.model).__name__
    row, labels = _one_row(split, plan)
    if bool(row["positions"][0, -1] < 0):
        return
    inputs = {k: v for k, v in row.items() if k not in NOT_INPUTS}
    if labels is not None and takes_argument(split.model, "labels"):
        inputs["labels"] = labels
    with frozen_mode(split.model):  # dropout would differ between the two passes
        o = split.hidden_states(row)
        split.check_options(split.known.after_head.columns)
        ours = split.logits(o)
        try:
            with padding_known(split.config, False):
                output = split.run(inputs)
        except (ValueError, IndexError) as error:
            if "labels" not in inputs:
                raise
            raise ValueError(
                f"CausalLMObjective: {kind} computes no loss for labels by itself: "
                f"{one_line(error)}"
            ) from error
    # A model on several devices may return its logits on that of its inputs.
    logits = output.logits.to(o.device)
    if split.kind == "classifier":
        logits = theirs = logits[:, None].float()
    else:
        # The slice leaves out logits of a learned prompt.
        logits = logits[:, -row["input_ids"].shape[1] :].float()
        theirs = logits[:, row["positions"][0]]
    if split.options is not None:
        theirs = theirs[..., split.options]
    # A matrix product of another shape may round differently: a few ulps of the largest logit.
    limit = 32 * _eps(split, o) * theirs.abs().max().clamp(min=1)
    if bool(theirs.isfinite().all()) and not bool(((ours - theirs).abs() <= limit).all()):
        raise split.does_more()
    loss = getattr(output, "loss", None)
    if "labels" in inputs and loss is not None:
        want = float(F.cross_entropy(logits[0, :-1], labels[0, 1:].to(o.device)))
        # The limit allows for a different order of the same sum.
        limit = max(32 * torch.finfo(loss.dtype).eps, 1e-5) * max(1.0, abs(want))
        if math.isfinite(want) and not abs(float(loss) - want) <= limit:
            raise ValueError(
                f"CausalLMObjective: the loss of {kind} is {float(loss):.6g}, but the cross "
                f"entropy of its logits with the next tokens is {want:.6g}: it uses labels for "
                "other tokens, or adds a loss of its own (routers: set output_router_logits=False "
                f"in the config; AdaLoRA: orth_reg_weight=0); {BY_HAND}"
            )
    split.known.verified = True


@torch.no_grad()
def find_padding(split: SplitModel, plan: Mapping[str, Tensor]) -> None:
    """Find where rows may have padding: where it does not change the logits of a row."""
    one, _ = _one_row(split, plan)
    pads = min(PADS, plan["input_ids"].shape[1] // 2)
    length = min(PADDED_TOKENS, one["input_ids"].shape[1], plan["input_ids"].shape[1] - pads)
    if not pads or not length:
        return
    tokens = {k: one[k][:, :length] for k in token_inputs(one)}
    places = torch.arange(length, device=one["positions"].device)[None]

    def states(left: int, right: int) -> Tensor:
        row = one | {k: F.pad(x, (0, 0) * (x.dim() - 2) + (left, right)) for k, x in tokens.items()}
        if left + right:
            row["attention_mask"] = F.pad(torch.ones_like(tokens["input_ids"]), (left, right))
        return split.hidden_states(row | {"positions": places + left})

    def centred_logits(o: Tensor) -> Tensor:
        x = split.head(o).float()
        return x - x.mean(-1, keepdim=True)

    def same(left: int, right: int, ulps: int) -> bool:
        try:
            changes = centred_logits(states(left, right)) - alone
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # models fail in many ways on a length that they do not expect
            known.padding_error = first_line(error)
            return False
        limit = max(ulps * _eps(split, o), 1e-4) ** 2 * alone.square().mean()
        return bool(changes.square().mean() <= limit) or not bool(alone.isfinite().all())

    # Layers round differently in another shape, and a token may even go to another expert, so a
    # change may be many ulps of 16 bits. Accepting a change on the left that is only rounding does
    # no harm, but one on the right would have the model refused.
    on_left, on_right = (pads, 0, 8), (0, pads, 32)
    known = split.known
    try:
        with frozen_mode(split.model):
            alone = centred_logits(o := states(0, 0))
            # The model's inputs depend on known.padding, so it is set before the passes.
            choices = ("anywhere", (on_left, on_right)), ("right", (on_right,))
            # Models that see the whole text are made for padding on the right.
            for known.padding, sides in choices if split.kind == "causal" else choices[1:]:
                if all(same(*side) for side in sides):
                    return
            known.padding = "nowhere"
    except BaseException:
        known.padding = None
        raise


@torch.no_grad()
def find_packing(split: SplitModel, plan: Mapping[str, Tensor]) -> None:
    """Find whether a batch gives the same states without its padding, on a few of its rows.

    Nothing is found from a batch that would not run without it."""
    if split.packing(plan) is None:
        return
    order = plan["attention_mask"].sum(1).argsort()
    rows = order[[0, len(order) // 2, -1]]
    few = {k: x[rows] for k, x in plan.items() if k in ("input_ids", "attention_mask", "positions")}
    try:
        with frozen_mode(split.model):
            split.known.packs = False
            want = split.hidden_states(few).float()
            split.known.packs = True
            change = split.hidden_states(few).float() - want
        limit = max(8 * _eps(split, want), 1e-4) ** 2 * want.square().mean()
        split.known.packs = bool(change.square().mean() <= limit)
    except torch.OutOfMemoryError:
        split.known.packs = None
        raise
    except Exception:  # models fail in many ways on a mask that they do not expect
        split.known.packs = False
    except BaseException:
        split.known.packs = None
        raise


def _eps(split: SplitModel, o: Tensor) -> float:
    """Return the relative rounding error of the precision in which o was computed.

    The logits are in fp32 whatever the dtype of the model.
    """
    exact = torch.get_float32_matmul_precision() == "highest" and not torch.is_autocast_enabled(
        o.device.type
    )
    dtype = o.dtype if exact and not split.quantised else torch.bfloat16
    return max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)


def _one_row(
    split: SplitModel, plan: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Return the plan of one row [1, T], and its labels [1, T] if the loss is language modelling.

    It is the row with the most loss positions, without its padding. For a causal model it ends at
    the last of them, and keeps the last MAX_TOKENS tokens up to there.
    """
    ids, positions, mask = plan["input_ids"], plan["positions"], plan.get("attention_mask")
    row = int((positions >= 0).sum(1).argmax())
    at = positions[row][positions[row] >= 0].to(ids.device)
    labels = torch.full_like(ids[row], IGNORED)
    if split.options is None:
        labels[at + 1] = plan["targets"][row][positions[row] >= 0].to(ids.device)
        at = at + 1
    kept = torch.ones_like(labels) if mask is None else (mask[row] != 0) | (labels != IGNORED)
    cut = split.kind == "causal"
    kept = kept[: int(at[-1]) + 1 if cut and len(at) else None].nonzero().flatten()
    kept = kept[-MAX_TOKENS:] if cut else kept
    one = {k: x for k, x in plan.items() if k not in NOT_INPUTS and k != "attention_mask"}
    by_token = {k: one[k][row : row + 1, kept] for k in token_inputs(one)}
    by_row = {
        k: x[row : row + 1]
        for k, x in one.items()
        if isinstance(x, Tensor) and x.shape[:1] == ids.shape[:1]
    }
    one |= by_row | by_token
    labels = labels[None, kept]
    last = torch.full_like(labels[:, :1], len(kept) - 1)
    if split.kind == "masked":
        last = torch.searchsorted(kept, at[None, -1:])
    one["positions"] = (loss_positions(labels)[0] if split.options is None else last).to(
        positions.device
    )
    return one, labels if split.options is None and "option_rows" not in plan else None
