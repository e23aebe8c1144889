"""The methods, and what a step of each costs.

METHODS has one row per method. The choices and the help of the command line, the defaults of the
arguments and the number of forward passes derive from it. This module imports neither torch nor
Transformers: the command line lists the methods before it imports either.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from pseuzo.models.modes import MODES as MODES
from pseuzo.models.modes import by_mode

# Options that every zeroth-order method takes and no first-order method does.
PERTURBING = ("eps", "noise", "rounding", "two_sided", "journal", "capture")
ZEROTH_ORDER_RATES = by_mode("lr")


@dataclass(frozen=True)
class Method:
    help: str
    options: tuple[str, ...]  # which options it takes, of those that not every method takes
    passes: Callable[[int, bool | None], int]  # (directions, two_sided) -> forward passes per step
    rates: Mapping[str, float]  # the default learning rate by tuning mode
    momentum: float = 0.0  # the default of the option
    zeroth_order: bool = True


def _mezo_passes(directions: int, two_sided: bool | None) -> int:
    return 1 + directions if two_sided is False else 2 * directions


def _pseuzo_passes(directions: int, two_sided: bool | None) -> int:
    return 3 if two_sided else 2


def _first_order_passes(directions: int, two_sided: bool | None) -> int:
    return 3  # one forward pass and one backward pass, which costs two


METHODS = {
    "pseuzo": Method(
        help="PseuZO: the difference of two outputs times the exact gradient there, and a window.",
        options=(*PERTURBING, "window", "momentum", "schedule", "groups", "head", "head_lr"),
        passes=_pseuzo_passes,
        rates=ZEROTH_ORDER_RATES,
        momentum=1.0,
    ),
    "mezo": Method(
        help="MeZO: the difference of the loss at two perturbed points.",
        options=(*PERTURBING, "directions", "objective"),
        passes=_mezo_passes,
        rates=ZEROTH_ORDER_RATES,
    ),
    "mezo-momentum": Method(
        help="MeZO with momentum over the last perturbations.",
        options=(*PERTURBING, "directions", "objective", "window", "momentum"),
        passes=_mezo_passes,
        rates=ZEROTH_ORDER_RATES,
        momentum=0.9,
    ),
    "fo-sgd": Method(
        help="SGD with backpropagation, to compare.",
        options=("momentum",),
        passes=_first_order_passes,
        rates=by_mode("sgd_lr"),
        zeroth_order=False,
    ),
    "fo-adam": Method(
        help="AdamW with backpropagation, to compare.",
        options=(),
        passes=_first_order_passes,
        rates=by_mode("adam_lr"),
        zeroth_order=False,
    ),
}
ZEROTH_ORDER = tuple(name for name, method in METHODS.items() if method.zeroth_order)


def methods_with(option: str) -> tuple[str, ...]:
    """The methods that take an option; all of them if no row names it."""
    return tuple(n for n, method in METHODS.items() if option in method.options) or tuple(METHODS)


def forwards_per_step(method: str, directions: int = 1, two_sided: bool | None = None) -> int:
    """Forward passes per step; a backward pass counts as two. two_sided=None is the method's
    default."""
    return METHODS[method].passes(directions, two_sided)


def default_rate(method: str, mode: str) -> float:
    """The learning rate of a method in a tuning mode where none is given."""
    return METHODS[method].rates[mode]
