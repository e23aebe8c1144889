"""Still: steps that move no weights, for what hears the outputs of their passes."""

from collections.abc import Callable
from typing import Any

from pseuzo.optim.mezo import MeZO, Point, Slopes, losses_at, slopes_of, unknown_slopes
from pseuzo.optim.passes import without_autograd
from pseuzo.optim.seeds import direction_seed


class Still(MeZO):
    """Leaves the weights as they are: a step is one pass at x.

    It is for training a readout alone, which hears that pass (see pseuzo.models.readout).
    """

    def measure(self, closure: Callable[[], Any]) -> Slopes:
        seeds = (direction_seed(self.seed, self.steps, 0),)
        losses = losses_at(self, (closure,), [Point(closure)])
        if losses is None:
            return unknown_slopes(self, "loss", seeds)
        with without_autograd():
            return slopes_of(self, seeds, [(losses[0], losses[0])], two_sided=False)
