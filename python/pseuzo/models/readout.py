"""The readout: the output head, fitted exactly to the outputs of past steps.

F(x, W) = g(h(x), W): the loss is a cheap and convex function of the head's rows W for the options,
and an expensive one of all other weights x. So zeroth-order steps move x, and W is solved for. This
takes no forward pass, because the passes of a step have made the outputs already.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pseuzo.machine import holds_codes
from pseuzo.models.kinds import kind_of
from pseuzo.models.objective import CausalLMObjective
from pseuzo.models.split import output_head
from pseuzo.models.tuning import own_head

# How many outputs are kept, each [D] fp32: while the weights move, which old outputs do not know,
# and while they stay.
KEPT, KEPT_STILL = 1024, 8192
ITERATIONS = 20  # of L-BFGS in a fit, which starts from the last one
GROWN = 8  # a fit is made again once one in so many of the outputs is new


def no_readout(model: nn.Module, options: list[int] | None) -> str | None:
    """Say why the head of a model cannot be fitted; None if it can. options: see
    CausalLMObjective."""
    if options is None:
        return "the answers are not single tokens or classes, or the loss is your own"
    if hasattr(model, "peft_type") and kind_of(model) != "classifier":
        return "an adapter is saved without the head"
    head = output_head(model)
    if type(head) is not nn.Linear or holds_codes(head.weight):
        return f"the output head of {type(model).__name__} is no plain Linear"
    return None


def head_to_fit(model: nn.Module, options: list[int] | None) -> None:
    """Give the model an output head that is not the embedding's weight, and that takes no noise.
    ValueError if it cannot be fitted."""
    if why := no_readout(model, options):
        raise ValueError(f"readout=fit: {why}; use readout=none")
    own_head(model).requires_grad_(False)


class Readout:
    """Fits the head's rows for the options by logistic regression, with a penalty on the change:

        min over V, c  sum_i CE(after((W + V) o_i + b + c), y_i) + decay / 2 * s^2 |V|^2

    o_i [D]: the last outputs of training steps, each the mean over the passes of its step; y_i
    their classes; W, b: the head's rows as they were at first; s: the root mean square of |o_i|; c:
    only where the head has a bias; after: what the model does to its logits. Then the rows of the
    head are W + V, and b + c. (The outputs are not centred: along their mean, which is large, V
    serves as a bias at little cost.) The penalty is that of a normal prior of V, under which the
    logits change by about decay^-1/2, whatever D is and however many outputs there are.

    To fit the last layer alone first is known as linear probing (Kumar et al., "Fine-tuning can
    distort pretrained features and underperform out-of-distribution", ICLR 2022). Here the fit goes
    on with the steps, as in variable projection (Golub and Pereyra, 1973).

    objective: of a model whose head head_to_fit has prepared. kept: how many outputs; more than
    there are rows to learn from would count some of them more than once.
    """

    def __init__(self, objective: CausalLMObjective, decay: float = 0.01):
        assert objective.options is not None, "head_to_fit has refused other objectives"
        self.objective, self.decay, self.kept = objective, decay, KEPT
        self._head = cast(nn.Linear, objective.lm_head)
        weight, bias = self._head.weight, self._head.bias
        self._index = torch.tensor(objective.options, device=weight.device)
        rows = weight.detach()[self._index].float()
        of_bias = rows.new_zeros(0) if bias is None else bias.detach()[self._index].float()
        self.state = {
            "weight": rows,  # W, [C, D]
            "bias": of_bias,  # b, [C]; [0] if the head has none
            "moved": torch.zeros_like(rows),  # V
            "moved_bias": torch.zeros_like(of_bias),  # c
            "outputs": rows.new_zeros(0, rows.shape[1]),  # [n, D]
            "classes": torch.zeros(0, dtype=torch.int64, device=rows.device),  # [n]
            "new": torch.zeros((), dtype=torch.int64),  # how many came after the last fit
        }

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Keep the outputs of the objective's forwards inside, and fit the head to them at the end
        if enough are new."""
        heard: dict[int, list[Tensor]] = {}  # by batch: the mean of its outputs is kept

        def hear(o: Tensor, classes: Tensor) -> None:
            heard.setdefault(id(classes), [classes]).append(o.detach()[:, -1].float())

        self.objective.listener = hear
        try:
            yield
        finally:
            self.objective.listener = None
        for classes, *outputs in heard.values():
            self._keep(torch.stack(outputs).mean(0), classes)
        if int(self.state["new"]) * GROWN >= len(self.state["classes"]) > 0:
            self.fit()

    def _keep(self, outputs: Tensor, classes: Tensor) -> None:
        state, whole = self.state, outputs.isfinite().all(1)
        outputs, classes = outputs[whole], classes[whole]
        state["outputs"] = torch.cat([state["outputs"], outputs])[-self.kept :]
        state["classes"] = torch.cat([state["classes"], classes])[-self.kept :]
        state["new"] = (state["new"] + len(classes)).clamp(max=self.kept)

    def fit(self) -> None:
        """Solve for the head's rows, from where the last fit ended, and write them."""
        # In fp64: in fp32 the search along a line ends where losses no longer differ, which depends
        # on the order of their sums.
        state, outputs = self.state, self.state["outputs"].double()
        weight, bias = state["weight"].double(), state["bias"].double()
        scale = self.decay / 2 * outputs.square().sum(1).mean() / len(outputs)
        moved, of_bias = (state[name].double() for name in ("moved", "moved_bias"))
        free = [x.requires_grad_() for x in (moved, of_bias) if len(x)]
        solver = torch.optim.LBFGS(
            free, max_iter=ITERATIONS, tolerance_change=1e-9, line_search_fn="strong_wolfe"
        )

        def loss() -> Tensor:
            solver.zero_grad()
            linear = F.linear(outputs, weight + moved, bias + of_bias if len(of_bias) else None)
            fit = F.cross_entropy(self.objective.after_head(linear), state["classes"])
            found = fit + scale * moved.square().sum()
            found.backward()
            return found

        with torch.enable_grad():
            solver.step(loss)
        state["new"] = torch.zeros((), dtype=torch.int64)
        if all(bool(x.isfinite().all()) for x in free):
            state |= {"moved": moved.detach().float(), "moved_bias": of_bias.detach().float()}
            self.write()

    @torch.no_grad()
    def write(self) -> None:
        """Write the rows that the state holds into the head."""
        state, head = self.state, self._head
        for at, now in ((head.weight, "moved"), (head.bias, "moved_bias")):
            if at is not None:
                was = state["weight" if now == "moved" else "bias"]
                at[self._index] = (was + state[now]).to(at.dtype)

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Continue from the state of a Readout of the same model and classes."""
        device = self._index.device
        self.state = {name: state[name].to(device) for name in self.state}
        self.state["new"] = self.state["new"].cpu()
        self.write()
