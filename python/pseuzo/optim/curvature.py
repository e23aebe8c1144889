"""Learning rates in units of 1 / T, where T is the curvature of the loss along the noise.

The largest stable rate along noise z is about 1 / T, T = E[z^T H z] with H the Hessian. T differs
by orders of magnitude from model to model and from one placement of the noise to another, and
changes while a model is trained; a rate in units of 1 / T need not. A step measures what T is
estimated from anyway: the slopes of the losses of its examples, along its noise.
"""

from dataclasses import replace

import torch
from torch import Tensor

from pseuzo.optim.update import Direction

RELATIVE_LR = 0.1  # in units of 1 / T; as good as a tuned rate in the comparisons
STEPS = 16  # over as many T is measured, where a run does not say


def of_examples(losses: Tensor) -> Tensor:
    """[B]: losses (or slopes) of examples, from those of their tokens [B, P], or as they are."""
    return losses.sum(1) if losses.dim() == 2 else losses


def terms_of(losses: Tensor) -> tuple[Tensor | int, Tensor | float]:
    """How many terms the loss is a mean of, and what times an entry of losses is such a term.

    Of losses [B] of examples: B and 1. Of their n tokens, [B, P]: n and n / B. The mean over B of
    the sums over P is the loss; a token without one has 0.
    """
    if losses.dim() < 2:
        return losses.numel(), 1.0
    n = (losses != 0).sum()
    return n, n / len(losses)


def square_of(slopes: Tensor, losses: Tensor) -> Tensor:
    """[]: the curvature of the mean loss along the noise, from slopes and losses of examples, [B],
    or of tokens, [B, P], see terms_of.

    A loss L = -log p of a label with slope s has the Gauss-Newton curvature s^2 p / (1 - p), if the
    other labels move alike. For p below 1/2 s^2 is taken, as they need not. Where L nears 0, this
    is s^2 / L, which is also right for squares of residuals, to a factor of 2.
    """
    n, factor = terms_of(losses)
    slopes, losses = slopes * factor, losses * factor
    odds = torch.where(losses > 0, 1 / losses.expm1(), 1.0).clamp(min=1.0)
    return torch.where(slopes == 0, 0.0, slopes.square() * odds).sum() / n  # odds may be inf


class Curvature:
    """T along the noise of the last `window` steps; of 0 steps, which scales nothing.

    squares: [window] fp32, what each of them measured, see square_of, the newest last; 0 for those
    that were skipped, or not made yet.
    """

    def __init__(self, window: int, device: torch.device) -> None:
        self.squares = torch.zeros(window, device=device)

    def scaled(
        self, direction: Direction, square: Tensor | None, terms: float = 1.0
    ) -> tuple[Direction, Tensor]:
        """The direction over T, and the squares with those of this step.

        square: [], that of this step; None if the window is 0. terms: the update is the sum of so
        many directions.
        While n of K squares are known, the direction is n / K of that: along few directions, T may
        seem far too small. It is 0 if T, or the square of this step, is unknown or overflows.
        """
        if square is None:
            return direction, self.squares
        known = (direction.found_inf == 0) & square.isfinite()
        squares = torch.cat([self.squares[1:], torch.where(known, square.view(1), 0.0)])
        n = (squares > 0).sum()
        t = squares.sum() / n.clamp(min=1)
        ok = (t > 0) & square.isfinite()
        factor = torch.where(ok, n / (len(squares) * terms * t), 0.0)
        stats = {**direction.stats, "curvature": t}
        return replace(direction, coefs=direction.coefs * factor, stats=stats), squares
