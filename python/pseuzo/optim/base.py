"""What zeroth-order optimizers share: parameters, seeds, the perturbed passes and the fused update.

A step has three parts. `measure` runs the passes and changes nothing that lasts; `coefficients`
says along which seeds to move, and how far; `apply` moves the weights, and then counts the step,
tells the journal and keeps the estimator's state, as one. An estimator is one file that overrides
the first two, and one row of `pseuzo.train.methods.METHODS`.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pseuzo.interrupts import cleanly, uninterrupted
from pseuzo.optim import groups
from pseuzo.optim.estimator import Estimator, Measured
from pseuzo.optim.exchange import Agreed, Exchange
from pseuzo.optim.passes import Passes, without_autograd
from pseuzo.optim.ranks import present_ranks
from pseuzo.optim.repeating import repeat
from pseuzo.optim.seeds import ROUNDING_DOMAIN, step_seed
from pseuzo.optim.skips import Skips
from pseuzo.optim.state import KEY, read_state, update_rms
from pseuzo.optim.update import Direction, Update, prepare
from pseuzo.perturb.offload import flush
from pseuzo_kernels.checks import check_noise, check_rounding, signed64
from pseuzo_kernels.reference import ROUNDING_VERSION


class ZeroOrder(Estimator, groups.Streamed):
    """x <- (1 - lr wd) x - lr sum_k c_k z(s_k). A subclass says which seeds and coefficients."""

    state: Any  # torch's, by parameter, and KEY while a state_dict is made

    def __init__(
        self,
        params: nn.Module | Iterable,
        *,
        lr: float,
        eps: float,
        weight_decay: float = 0.0,
        noise: str = "hadamard",
        noise_scale: float = 1.0,
        clip_examples: float | None = None,
        rounding: str = "stochastic",
        seed: int = 0,
        maximize: bool = False,
        model: nn.Module | None = None,
        capture: bool = False,
        direction_ranks: int = 1,
    ):
        name = type(self).__name__
        self.ranks = present_ranks(name, direction_ranks)  # None: this is the only process
        check_noise(name, noise)
        check_rounding(name, rounding)
        numbers = {"lr": lr, "weight_decay": weight_decay, "noise_scale": noise_scale}
        groups.check_numbers(name, **numbers, eps=eps, clip_examples=clip_examples)
        self.eps, self.noise, self.rounding = float(eps), noise, rounding
        self.clip_examples, self.seed = clip_examples, signed64(name, seed)
        if isinstance(params, nn.Module):
            model = params
            params = [p for p in model.parameters() if p.requires_grad]
            if not params:
                raise ValueError(
                    f"{name}: no parameter of the model requires grad; there is nothing to train"
                )
        self.model = model
        self._steps, self._skips = 0, Skips()
        # What estimate() has found, until step() applies it.
        self._measured: Measured | Agreed | None = None
        self._last: tuple[Tensor, list[tuple[list[Tensor], float]]] | None = None  # coefs, moved
        self.journal: Any = None  # a pseuzo.train.journal.Journal, told of every update
        self.journal_run: str | None = None  # the run whose journal records the steps so far
        self.followed: Any = None  # a pseuzo.train.following.Followed: steps to make again
        self.recorded_weights: Any = None  # a journal's marks of the weights after the last step
        self.stats: dict[str, Any] = {}  # of the last step: tensors on the device and numbers
        super().__init__(params, numbers | {"maximize": maximize, "exact_gradient": False}, model)
        groups.check_trains(name, self.param_groups)
        self.passes = Passes(self, capture)
        self.check = ""  # all ranks must have the same, such as a hash of their data
        self.exchange = None if self.ranks is None else Exchange(self, self.ranks)

    # Steps

    def apply(self, direction: Direction | None) -> None:
        """Move the weights, then keep the state, count the step and record it, as one.

        Everything that can be refused is refused before a weight is written. After the first write,
        an interrupt waits, and an exception is raised only after the rest is done. A step that a
        journal has recorded makes that update; direction: what was measured now, None for a step
        that `repeats`.
        """
        uninterrupted(self._apply, direction)

    def estimate(self, *inputs: Any, size: float | None = None, **options: Any) -> Tensor:
        """Run the passes of a step, which step() without arguments then applies; return the loss.
        The weights do not change. The next estimate replaces one that was not applied. size: of
        this rank's part of the batch, see pseuzo.optim.ranks; one process needs none. NaN, with no
        passes, if the next step `repeats`."""
        self._measured = None
        if self.repeats:
            return torch.full((), float("nan"), device=self.device)
        measure = partial(self._measure, inputs, size, options)
        self._measured = cleanly(measure, self.passes.restore)
        return self._measured.loss

    def _measure(self, inputs: tuple, size: float | None, options: dict) -> Measured | Agreed:
        measure = partial(self.measure, *inputs, **options)
        return measure() if self.exchange is None else self.exchange.agree(measure, size)

    def step(  # type: ignore[override]  # torch's takes a closure alone
        self, *inputs: Any, size: float | None = None, **options: Any
    ) -> Tensor | None:
        """Estimate and apply; without arguments, apply the last estimate. Returns the loss, or None
        after a step that `repeats`, which makes no passes.

        size: see estimate. RuntimeError if there is no estimate to apply.
        """
        return cleanly(partial(self._step, inputs, size, options), self.passes.restore)

    def _step(self, inputs: tuple, size: float | None, options: dict[str, Any]) -> Tensor | None:
        last, self._measured = self._measured, None
        # Schedulers and wrappers of optimizers call step(None), as torch's closure is optional.
        given = any(x is not None for x in (*inputs, *options.values()))
        if self.repeats:
            self.apply(None)
            return None
        measured = self._measure(inputs, size, options) if given else last
        if measured is None:
            raise RuntimeError(
                f"{type(self).__name__}.step: there is no estimate to apply; call estimate(...) "
                "first, or give step what estimate takes"
            )
        with without_autograd():
            if isinstance(measured, Agreed):
                direction = measured.direction
            else:
                direction = self.coefficients(measured)
        self.apply(direction)
        return measured.loss if given else None

    def _apply(self, direction: Direction | None) -> None:
        with without_autograd():
            if self.journal is not None:
                self.journal.prepare()  # fail before touching the weights if it cannot be recorded
            record = None if self.followed is None else self.followed.at(self._steps)
            if record is not None:
                direction, update = repeat(self, record, direction)
            else:
                assert direction is not None  # as only a recorded step needs none
                update = self.prepare(direction)
            skipped = self._skips.after(direction.found_inf)
            commit = partial(self._commit, direction, update, self._steps, skipped)
            try:
                update.run()
                commit()
            except BaseException:
                if update.begun:
                    update.run()
                    commit()
                raise

    def prepare(self, direction: Direction) -> Update:
        """Prepare the update of the weights. An estimator with another update overrides this."""
        op = f"{type(self).__name__}.step"
        return prepare(
            self,
            groups.trained(op, self.param_groups),
            direction,
            step_seed(self.seed, self._steps, ROUNDING_DOMAIN),
            self.passes.unused(op, direction.kind),
            self.param_groups if direction.gradients else (),
        )

    def _commit(self, direction: Direction, update: Update, step: int, skipped: Tensor) -> None:
        """Update everything that must change with the weights. Idempotent, for an interrupt."""
        self.passes.forget()
        self._steps, self._last = step + 1, (direction.coefs, update.moved)
        self._skips.count, self._skips.reason = skipped, direction.skip_reason
        self.stats = dict(direction.stats) | {"skipped_steps": skipped}
        self.keep(direction.state)
        if self.journal is not None:
            frozen = {p for g in self.param_groups for p in g["params"] if groups.is_frozen(p)}
            numbers = direction.seeds, direction.coefs, direction.found_inf
            self.journal.record(step, update.rounding_seed, update.unused | frozen, *numbers)
        self._skips.tell()

    # What was done

    @property
    def repeats(self) -> bool:
        """Whether the next step is made from its record in a journal, without passes."""
        return self.followed is not None and self.followed.skips_passes(self._steps)

    @property
    def steps(self) -> int:
        """The number of steps that were made, including skipped ones."""
        return self._steps

    @property
    def skipped_steps(self) -> int:
        """The number of steps skipped because something was not finite. Waits for the device."""
        return self._skips.total()

    def update_rms(self) -> dict[str, Tensor]:
        """Root mean square of the last update over an ulp of the root mean square weight, by dtype
        ("float32", ...). Empty before a step.

        Below about 1, rounding to nearest would lose most of the update. The size of the update is
        known without reading it: z has mean 0 and variance 1, so it is lr * noise_scale *
        sqrt(sum_k coefs[k]^2). The size of the weights takes one reading of those that the update
        moved, so log it every N steps. Nothing waits for the device.
        """
        flush(self.model)
        return {} if self._last is None else update_rms(*self._last)

    # State

    def __getstate__(self) -> dict[str, Any]:
        name = type(self).__name__
        raise TypeError(
            f"{name} cannot be copied or pickled, as it belongs to its weights; make a new {name} "
            "of the other weights, and give it state_dict()"
        )

    def state_dict(self) -> dict[str, Any]:
        """Return torch's state, and all that the bits of the next step depend on: the step, the run
        seed, the window. An estimate that step() has not applied yet is left out."""
        self.state[KEY] = self.own_state()
        try:
            return super().state_dict()
        finally:
            del self.state[KEY]  # a second copy of the window

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue as the saved optimizer would have. ValueError, with nothing changed, if another
        optimizer made the state, or if another version of the rule rounded 16-bit weights."""
        trained = (p for g in self.param_groups for p in groups.not_frozen(g["params"]))
        sixteen_bits = any(p.dtype is not torch.float32 for p in trained)
        op = f"{type(self).__name__}.load_state_dict"
        own = read_state(op, state_dict, self.own_state(), sixteen_bits)
        self.check_own_state(own)
        super().load_state_dict(state_dict)
        self.state.pop(KEY, None)
        self.eps, self.noise, self.seed = own["eps"], own["noise"], own["seed"]
        self.rounding, self._steps = own["rounding"], own["step"]
        self._measured = self._last = self.followed = None
        self.journal_run, self.recorded_weights = own["journal"], None
        self.passes.load(own["used"])
        self._skips = Skips(own["skipped"], self.device)
        if self.exchange is not None:
            self.exchange.restart()
        self.load_own_state(own)

    def own_state(self) -> dict[str, Any]:
        """Return what a state_dict holds besides torch's state; an estimator adds to it."""
        settings = {"seed": self.seed, "eps": self.eps, "noise": self.noise}
        settings |= {"rounding": self.rounding, "rounding_version": ROUNDING_VERSION}
        so_far = {"step": self._steps, "skipped": self.skipped_steps, "used": self.passes.used()}
        rank = 0 if self.ranks is None else self.ranks.rank  # others lack what rank 0 keeps
        return settings | so_far | {"journal": self.journal_run, "rank": rank}
