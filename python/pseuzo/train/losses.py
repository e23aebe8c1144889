"""The loss of a batch, in the forms that the optimizers and Transformers' Trainer need."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pseuzo.models.objective import CausalLMObjective
from pseuzo.models.positions import IGNORED, NOT_INPUTS, padded
from pseuzo.optim.base import ZeroOrder
from pseuzo.optim.clip import row_factors
from pseuzo.perturb.graphs import MAX_GRAPHS
from pseuzo.tasks import TaskData, nondiff_loss
from pseuzo.train.arguments import PseuZOTrainingArguments
from pseuzo.train.parts import cut, examples_in, part_of, rows_in

# Under capture, lengths are padded to multiples of the first, loss positions to multiples of the
# second.
SHAPES = (64, 8)

Forward = Callable[[], Tensor]
Head = Callable[[Tensor], Tensor]


class Losses:
    """Turns a batch into the functions that a step of args.method needs.

    objective: a callable batch -> (forward, head). data: the training data.
    """

    def __init__(
        self, model: nn.Module, args: PseuZOTrainingArguments, objective: Callable, data: Any
    ):
        self.model, self.args, self.objective, self.data = model, args, objective, data
        self._recorded: OrderedDict[tuple, tuple] = OrderedDict()  # by the shapes of a batch

    @property
    def of_model(self) -> bool:
        """Whether the objective is ours, made of the labels in a batch."""
        return isinstance(self.objective, CausalLMObjective)

    @property
    def reduction(self) -> str:
        """That of a batch's losses, where no curvature is measured: clipping needs those of
        examples."""
        return "mean" if self.args.clip_examples is None else "none"

    def split(self, inputs: dict[str, Any], reduction: str = "mean") -> tuple[Forward, Head]:
        """Return forward and head. reduction: see CausalLMObjective; not every objective has
        others than "mean"."""
        own = {} if reduction == "mean" else {"reduction": reduction}
        return self.objective(inputs, **own)

    def closure(self, inputs: dict[str, Any], reduction: str = "mean") -> Forward:
        """Return a function that gives the loss, or under objective=metric 1 - the metric."""
        if self.args.objective == "metric":
            if not isinstance(self.data, TaskData):
                raise ValueError(
                    "objective=metric needs a TaskData as train_dataset: it knows the metric"
                )
            rows = inputs["rows"].tolist()
            return lambda: nondiff_loss(self.model, self.data, rows)
        forward, head = self.split(inputs, reduction)
        return lambda: head(forward())

    def recorded(self, inputs: dict[str, Any], reduction: str) -> tuple[Forward, Head, Forward]:
        """Return forward, head and both in one, for CUDA graphs.

        All batches of a shape share these functions, which read the tensors that this copies the
        batch to.
        """
        plan = self.objective.checked(padded(self.objective.plan(inputs), *SHAPES))
        shape = tuple((name, x.shape, x.dtype) for name, x in plan.items())
        if shape not in self._recorded:
            own = {name: x.clone() for name, x in plan.items()}
            forward, head = self.objective.functions(own, reduction)
            self._recorded[shape] = own, (forward, head, lambda: head(forward()))
            if len(self._recorded) > MAX_GRAPHS:
                self._recorded.popitem(last=False)
        self._recorded.move_to_end(shape)
        own, functions = self._recorded[shape]
        for name, x in plan.items():
            own[name].copy_(x)
        return functions

    def step_inputs(
        self, inputs: dict[str, Any], optimizer: ZeroOrder
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of optimizer.estimate: a closure; a closure for each part of the
        batch, and the sizes of the parts; or forward and head with the groups and examples of their
        rows.

        inputs: the global batch. Each of several ranks measures on its part, and gives its size.
        """
        ranks = optimizer.ranks
        reduction = self.reduction
        if optimizer.curvature_window:
            reduction = "tokens" if self.of_model else "none"
        if optimizer.parts > 1:
            batches = cut(inputs, optimizer.parts)
            closures = [self.closure(batch, reduction) for batch in batches]
            return (closures,), {"sizes": self._sizes(batches)}
        if ranks is None:
            return self._of_batch(inputs, optimizer, reduction)
        part, has_rows = part_of(inputs, ranks.row, ranks.rows)
        functions, more = self._of_batch(part, optimizer, reduction)
        size = self._sizes([part])[0]
        if reduction != "mean":  # these losses have the scale that they have in the global batch
            n, whole = examples_in(part), self._sizes([inputs])[0]
            scaled = _scaled(functions[-1], examples_in(inputs) / whole * (size / n))
            if not float(size) and float(whole):  # its losses are NaN
                scaled = _without_loss(functions[-1])
            functions, size = (*functions[:-1], scaled), n
        return functions, more | {"size": float(size) if has_rows else 0.0}

    def _of_batch(
        self, inputs: dict[str, Any], optimizer: ZeroOrder, reduction: str
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args = self.args
        if not optimizer.has_gradient:
            if args.capture:
                return self.recorded(inputs, reduction)[2:], {}
            return (self.closure(inputs, reduction),), {}
        split = self.recorded if args.capture else self.split
        functions = split(inputs, reduction)[:2]
        return functions, {"groups": self._groups(inputs), "examples": inputs.get("examples")}

    def _sizes(self, batches: list[dict[str, Any]]) -> Tensor | list[int]:
        """What the losses of the batches are means over: tokens with a loss, or examples."""
        if self.args.objective == "loss" and "targets" in batches[0]:
            if "examples" not in batches[0]:
                return torch.stack([(b["targets"] != IGNORED).sum() for b in batches])
        return [examples_in(b) for b in batches]

    def _groups(self, inputs: dict[str, Any]) -> Tensor | None:
        """Return the group of each row, for PseuZO's window; None if each row is its own group."""
        if self.args.groups == "label":
            return inputs.get("groups")
        if self.args.groups == "row":
            return None
        return torch.zeros(rows_in(inputs), dtype=torch.int64, device=self.args.device)

    def loss(self, inputs: dict[str, Any]) -> Tensor:
        """Return the loss; its gradient is clipped if autograd records one."""
        # Clipping changes only the gradient.
        clip = self.args.clip_examples if torch.is_grad_enabled() else None
        forward, head = self.split(inputs, "mean" if clip is None else "none")
        o = forward()
        loss = head(o) if clip is None else clipped_mean(head, o, clip, inputs.get("examples"))
        if torch.is_grad_enabled() and not loss.requires_grad:
            raise ValueError(
                f"method {self.args.method}: no gradient reaches the weights that are trained "
                "(some layers, such as quantised ones, pass none on); use mezo or pseuzo, which "
                "need none"
            )
        return loss

    @staticmethod
    def share(inputs: dict[str, Any], items: Any, accumulated: int) -> Any:
        """Return the factor of a batch's loss in the loss of the batches that are accumulated."""
        if "targets" in inputs and "examples" not in inputs:
            return (inputs["targets"] != IGNORED).sum() / items
        return 1 / accumulated

    def comes_with_logits(self, inputs: dict[str, Any]) -> bool:
        """Return whether the model itself gives this loss of a batch with its logits."""
        return self.of_model and self.objective.options is None and "examples" not in inputs

    def model_inputs(self, inputs: dict[str, Any], labels: list[str], *more: str) -> dict[str, Any]:
        """Return the inputs of the model: the batch without what only the objective uses, except
        for `more`, and with the objective's positions if rows are padded on the left."""
        kept = {k: v for k, v in inputs.items() if k in more or k not in (*NOT_INPUTS, *labels)}
        mask = inputs.get("attention_mask")
        if self.of_model and mask is not None and not bool(mask[:, 0].all()):
            kept |= self.objective.model_inputs(kept)
        return kept


def _scaled(loss: Callable[..., Tensor], factor: Any) -> Callable[..., Tensor]:
    return lambda *inputs: loss(*inputs) * factor


def _without_loss(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same of a part whose tokens have no loss, in a batch that has some: 0 for each."""
    return lambda *o: torch.zeros_like(loss(*o)).detach() + sum(0 * x.sum() for x in o)


def clipped_mean(head: Head, o: Tensor, ratio: float, examples: Tensor | None) -> Tensor:
    """Return the mean of the losses head(o) [B], but with the gradient of the mean of w_i loss_i.

    w_i = min(1, ratio * median of the |e| / |e_i|) is a constant, where e_i is the gradient of
    loss_i at all rows of o [R, ...] of example i. examples [R]: the number, 0 to B - 1, of each
    row's example; None: row i is example i.
    """
    losses = head(o.requires_grad_())
    if losses.dim() != 1 or (examples is None and len(losses) != len(o)):
        raise ValueError(
            "clip_examples needs the loss of each example, [B], and got shape "
            f"{tuple(losses.shape)}"
        )
    (e,) = torch.autograd.grad(losses.sum(), o, retain_graph=True)
    squares = e.float().square().flatten(1).sum(1)
    weights = row_factors(squares, ratio**2, examples).sqrt().to(losses.dtype)
    if examples is not None:
        weights = torch.ones_like(losses).scatter(0, examples, weights)
    losses.register_hook(lambda gradient: gradient * weights)
    return losses.mean()
