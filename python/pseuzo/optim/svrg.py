"""MeZO-SVRG: minibatch estimates, corrected by an estimate over all the data at an anchor.

Source: Gautam et al., "Variance-reduced zeroth-order methods for fine-tuning language models"
(2024), Algorithm 2. Their published code uses the weights' own tensors as the anchor, so its two
minibatch estimates are always equal; here the anchor is a copy.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pseuzo.optim.base import ZeroOrder
from pseuzo.optim.groups import trained
from pseuzo.optim.mezo import Slopes, check_closure, mean_direction, measure_slopes
from pseuzo.optim.passes import without_autograd
from pseuzo.optim.update import Direction, Update
from pseuzo_kernels.checks import check_count

Batches = Callable[[], Iterable[Callable[[], Any]]]  # () -> the loss of one batch after another


@dataclass(frozen=True)
class Anchored(Slopes):
    """at_anchor: [q] fp32, the slopes on the same batch at the anchor. None: this step sets the
    anchor, and its slopes are measured on all the data."""

    at_anchor: Tensor | None


class MeZOSVRG(ZeroOrder):
    """x <- x - lr (g_B(x) - g_B(a) + g(a)); the anchor a is the weights of some steps ago.

    g_B(x) = mean_j c_j z_j is MeZO's estimate on the batch of the step. g_B(a) is the estimate on
    the same batch along the same z_j at the anchor. g(a) is an estimate over all the data, made by
    the step that set the anchor. Every `anchor_every` steps, from the first on, a step sets a to x,
    measures g(a) on batches(), which step() takes, and moves by x <- x - lr anchor_scale g(a). The
    update is a sum of seeded noise, like MeZO's.

    anchor_every: q in the paper. anchor_scale: eta_1 / eta_2 in the paper, the rate of a step that
    sets the anchor over the rate of other steps. A batch is left out of g(a) if its loss is not
    finite. If no batch is left, the step is skipped, and the weights stay until the next step that
    sets the anchor. A step also sets the anchor if a trained weight has no copy, for example after
    it was unfrozen.
    params: a module, or its parameters together with model=. The state of the optimizer holds their
    copy at the anchor, in their dtype; no other memory is used beyond MeZO's. capture is refused,
    because the passes differ from step to step. lr, eps, two_sided, directions and other options:
    see MeZO.
    """

    offloads = False
    needs_data = True
    in_ranks = False
    own_settings = ("anchor_every", "anchor_scale", "directions")

    def __init__(
        self,
        params: nn.Module | Iterable,
        lr: float = 1e-6,
        eps: float = 1e-3,
        *,
        anchor_every: int = 10,
        anchor_scale: float = 1.0,
        two_sided: bool = True,
        directions: int = 1,
        **options: Any,
    ):
        for key, value in (("directions", directions), ("anchor_every", anchor_every)):
            check_count("MeZOSVRG", key, value)
        if not 0 < anchor_scale < float("inf"):
            raise ValueError(f"MeZOSVRG: anchor_scale must be positive, got {anchor_scale}")
        if options.get("capture"):
            raise ValueError(
                "MeZOSVRG: capture records the passes of one batch, and a step that sets the "
                "anchor has those of all the data; leave capture off"
            )
        self.anchor_every, self.anchor_scale = anchor_every, float(anchor_scale)
        self.two_sided, self.directions = two_sided, directions
        # Seeds [q] and coefficients [q] of g(a), once the anchor is set.
        self._full: tuple[Tensor, Tensor] | None = None
        super().__init__(params, lr=lr, eps=eps, **options)
        if self.model is None:
            raise ValueError(
                "MeZOSVRG: needs the model, to run it with the weights of the anchor; give it the "
                "module, or model="
            )

    @property
    def sets_anchor(self) -> bool:
        """Whether the next step sets the anchor, for which it needs batches."""
        return self.steps % self.anchor_every == 0 or self._full is None or self._anchor() is None

    def step(  # type: ignore[override]  # torch's closure returns a float
        self,
        closure: Callable[[], Any] | None = None,
        batches: Batches | None = None,
        *,
        size: float | None = None,
    ) -> Tensor | None:
        """closure() -> the loss of the step's batch, see MeZO.step; called four times.

        batches() -> an iterable of closures, each for the loss of one batch; together the batches
        are all the training data, or a large part of it. They have equal weight, and each closure
        is called before the next is asked for. A step that sets the anchor (`sets_anchor`) calls
        them in place of closure, twice each, and returns their mean loss. Other steps need no
        batches.
        """
        return super().step() if closure is None else super().step(closure, batches, size=size)

    def measure(self, closure: Callable[[], Any], batches: Batches | None = None) -> Anchored:
        """Run the passes of a step; see step."""
        check_closure(self, closure)
        if self.sets_anchor:
            return self._measure_all(batches)
        now, anchor = self._slopes(closure), self._anchor()
        assert anchor is not None  # as sets_anchor says
        then = self.passes.based_on(anchor, partial(self._slopes, closure))
        with without_autograd():
            finite = now.finite & then.finite
            slopes, at_anchor = (torch.where(finite, s.slopes, 0.0) for s in (now, then))
        found = vars(now) | {"slopes": slopes, "finite": finite}
        return Anchored(**found, at_anchor=at_anchor)

    def _slopes(self, closure: Callable[[], Any]) -> Slopes:
        return measure_slopes(self, (closure,), closure, self.two_sided, self.directions)

    def _measure_all(self, batches: Batches | None) -> Anchored:
        """The mean over the batches whose losses and slopes are finite."""
        if not callable(batches):
            raise TypeError(
                f"MeZOSVRG.step: step {self.steps} sets the anchor and needs batches, a function "
                "that returns closures, each of the loss of one batch of the training data"
            )
        measured = None
        total = torch.zeros(self.directions + 2, dtype=torch.float64, device=self.device)
        for closure in batches():
            measured = self._slopes(closure)
            with without_autograd():
                numbers = [measured.loss.view(1), measured.slopes, measured.finite.view(1)]
                found = torch.cat([x.double() for x in numbers])
                total = total + torch.where(measured.finite, found, 0.0)
        if measured is None:
            raise ValueError("MeZOSVRG.step: batches() gave no batch")
        with without_autograd():
            finite = total[-1] > 0
            means = (total[:-1] / total[-1]).float()
            slopes = torch.where(finite, means[1:], 0.0)
        found_all = {"loss": means[0], "slopes": slopes, "finite": finite}
        return Anchored(**vars(measured) | found_all, at_anchor=None)

    def coefficients(self, measured: Anchored) -> Direction:
        direction = mean_direction(self, measured)
        if measured.at_anchor is None:
            full = direction.seeds, direction.coefs
            return replace(direction, coefs=self.anchor_scale * direction.coefs, state=full)
        assert self._full is not None
        seeds, full_coefs = self._full
        changes = (measured.slopes - measured.at_anchor) / self.directions
        coefs = torch.where(measured.finite, torch.cat([changes, full_coefs]), 0.0)
        return replace(direction, seeds=torch.cat([direction.seeds, seeds]), coefs=coefs)

    def prepare(self, direction: Direction) -> Update:
        update = super().prepare(direction)
        if direction.state is None:
            return update
        launches = []
        for p in self._trained():
            if not _fits(self.state.get(p, {}).get("anchor"), p):
                self.state[p]["anchor"] = p.detach().clone()
            launches.append(partial(self.state[p]["anchor"].copy_, p.detach()))
        return update.after(launches)

    def keep(self, state: tuple[Tensor, Tensor] | None) -> None:
        if state is None:
            return
        self._full = state
        for p in self.state.keys() - self._trained():  # frozen since then: their copies are old
            del self.state[p]

    def _trained(self) -> list[Tensor]:
        groups = trained("MeZOSVRG.step", self.param_groups)
        return [p for _, params in groups for p in params]

    def _anchor(self) -> dict[Any, Tensor] | None:
        """The trained weights at the anchor; None if one has no copy."""
        copies = {p: self.state.get(p, {}).get("anchor") for p in self._trained()}
        return copies if all(_fits(x, p) for p, x in copies.items()) else None

    def own_state(self) -> dict[str, Any]:
        seeds, coefs = self._full or (None, None)
        settings = {name: getattr(self, name) for name in self.own_settings}
        return super().own_state() | {"svrg": {"seeds": seeds, "coefs": coefs, **settings}}

    def load_own_state(self, own: Mapping[str, Any]) -> None:
        settings, self._full = own["svrg"], None
        for name in self.own_settings:
            setattr(self, name, settings[name])
        if settings["seeds"] is not None:
            self._full = settings["seeds"].to(self.device), settings["coefs"].to(self.device)
        # An anchor is written in place, and torch keeps the loaded state's own tensors.
        for of_weight in self.state.values():
            of_weight["anchor"] = of_weight["anchor"].clone()


def _fits(copy: Tensor | None, p: Tensor) -> bool:
    return copy is not None and (copy.device, copy.dtype, copy.shape) == (
        p.device,
        p.dtype,
        p.shape,
    )
