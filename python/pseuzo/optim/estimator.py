"""What an estimator adds to `ZeroOrder`: what a step measures, and which update follows from it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pseuzo.optim.update import Direction
from pseuzo.perturb.masks import Masks


@dataclass(frozen=True)
class Measured:
    """What the passes of a step measured. Only its numbers depend on the data.

    loss: [] fp32, which the step returns. kind: the name of this kind of perturbed pass; `Passes`
    keeps the weights that passes used by kind. An estimator's subclass adds what its coefficients
    are computed from.
    """

    loss: Tensor
    kind: str


class Estimator:
    """The seam of `ZeroOrder`: an estimator overrides `measure` and `coefficients`, and the rest
    where it keeps something from step to step."""

    in_ranks = True  # whether several processes can share its steps
    offloads = True  # whether it can train a model whose weights are uploaded, see perturb.offload
    needs_data = False  # whether step also takes batches, the losses of all the training data
    recordable = True  # whether a journal's seeds and coefficients describe all of its updates
    curvature_window: int = 0  # if more, rates are in units of 1 / T, see pseuzo.optim.curvature
    parts: int = 1  # if more, step takes a closure for each part of a batch, and the parts' sizes
    masks: Masks | None = None  # which elements take noise in the present step; None: all
    own_settings: tuple[str, ...] = ()  # attributes that an estimator's state sets

    def measure(self, *inputs: Any, **options: Any) -> Measured:
        """Run the passes of a step on what step() was given; change nothing that lasts."""
        raise NotImplementedError

    def coefficients(self, measured: Any) -> Direction:
        """Return the seeds and coefficients of the update, and the state for `keep` to store."""
        raise NotImplementedError

    def keep(self, state: Any) -> None:
        """Keep Direction.state. Called after the weights have moved; must be idempotent."""

    @property
    def history(self) -> int | None:
        """How many steps must be measured again before a step has the state that it had: 0 if
        nothing measured is kept from step to step, None if the state cannot be had in this way.

        A run that follows its journal makes all recorded steps before these from their records
        alone. An estimator that overrides `keep` overrides this, too.
        """
        return 0 if type(self).keep is Estimator.keep else None

    def recall(self, seeds: Tensor, coefs: Tensor, state: Any) -> Any:
        """The state for `keep` after a recorded step. state: that of its passes, None without."""
        return state

    def kind_of_step(self) -> str:
        """The kind of the perturbed passes of the next step; see `Measured`."""
        return "loss"

    def check_own_state(self, own: Mapping[str, Any]) -> None:
        """Raise ValueError if what the estimator added cannot be loaded."""

    def load_own_state(self, own: Mapping[str, Any]) -> None:
        """Load what the estimator added."""
