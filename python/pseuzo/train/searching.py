"""The part of the trainer that finds what its arguments leave open, within the run's own budget."""

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from pseuzo.models.placement import param_groups, place
from pseuzo.models.readout import KEPT, KEPT_STILL
from pseuzo.optim.curvature import RELATIVE_LR
from pseuzo.optim.still import Still
from pseuzo.train import builders, noise_on
from pseuzo.train.builders import Setup
from pseuzo.train.contest import Contest
from pseuzo.train.losses import Losses
from pseuzo.train.methods import METHODS
from pseuzo.train.ranked import digest
from pseuzo.train.resume import ResumableTrainer
from pseuzo.train.track import Track

DEV_BATCHES = 4  # how many a dev loss is measured on


class Drawn:
    """Batches by number, drawn when they are first asked for; after the last comes the first."""

    def __init__(self, batches: Iterable[Any]):
        self._left, self._drawn = iter(batches), list[Any]()

    def __getitem__(self, number: int) -> Any:
        while number >= len(self._drawn):
            try:
                self._drawn.append(next(self._left))
            except StopIteration:
                if not self._drawn:
                    raise ValueError("the training data have no batch to search with") from None
                number %= len(self._drawn)
        return self._drawn[number]


class SearchingTrainer(ResumableTrainer):
    """Makes the optimizer, after a search for the placement of the noise if the arguments ask for
    one. Its forward passes are some of the run's, which has fewer steps for it.

    search_forwards: the passes that the search took; 0 without one.
    """

    losses: Losses

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._steps_left: int | None = None  # what the search leaves of the run

    @property
    def races(self) -> bool:
        """Whether a race decides where the noise goes, or whether there is any."""
        args = self.args
        return args.noise_on == ["auto"] or (args.find_lr and self.readout is not None)

    def listening(self) -> AbstractContextManager[None]:
        """A block whose passes the readout hears, if there is one."""
        return nullcontext() if self.readout is None else self.readout.listening()

    def planned_steps(self) -> int:
        return super().planned_steps() if self._steps_left is None else self._steps_left

    def train(self, *args: Any, **kwargs: Any) -> Any:
        given = self.args.max_steps
        try:
            if self.races:
                self.create_optimizer()
                self.args.max_steps = self.planned_steps()
            return super().train(*args, **kwargs)
        finally:
            self.args.max_steps = given  # other trainers may be made of the same arguments

    def create_optimizer(self, *unused: Any, **ignored: Any) -> torch.optim.Optimizer:
        if self.optimizer is None:
            args = self.args
            found = noise_on.decide(args, self.model, self._find, self.together, self.races)
            if self.races:
                whole = self.forwards(super().planned_steps())
                if found.forwards >= whole:
                    raise ValueError(
                        f"{noise_on.FOUND_FILE} in {args.output_dir} is of a search that took "
                        f"{found.forwards} forward passes, and this run has {whole} in all; choose "
                        "another output folder, or delete that file"
                    )
                self._take_from_run(found.forwards, still=found.lr == 0)
            if self.readout is not None:
                self.readout.kept = min(KEPT_STILL if self.still else KEPT, self._rows)
            self.optimizer = self._built(found.noise_on, found.lr, found.eps)
            self.zero_order = self.optimizer if args.zeroth_order else None
        return self.optimizer

    def calibrate(self) -> dict[str, Any]:
        """Measure the curvature T along the noise that args name, and what eps is if args scale it:
        {"curvature", "eps", "probed" (the forward passes that this took), ...}."""
        with torch.random.fork_rng(devices=[]):
            return noise_on.scaled(self.model, self.args, self._probe_losses)

    def _take_from_run(self, forwards: int, still: bool = False) -> None:
        """Leave the run as many steps as it has passes for, but at least one."""
        self._steps_left, self.search_forwards, self.still = None, 0, False
        steps = self.planned_steps()
        left, self.still = self.forwards(steps) - forwards, still
        if still:  # its steps take a pass each, and a row has the same outputs at each of them
            steps = max(1, math.ceil(min(left, self._rows / self.args.global_batch_size)))
        while steps > 1 and self.forwards(steps) > left:
            steps -= 1
        self._steps_left, self.search_forwards = steps, forwards

    @property
    def _rows(self) -> float:
        """How many training rows there are."""
        data = self.train_dataset
        return len(data) if hasattr(data, "__len__") else math.inf

    def _built(self, noise_on: Iterable[str], lr: float, eps: float) -> Any:
        """The optimizer of a method for this placement; a first-order one trains that alone."""
        args, where = self.args, place(self.model, noise_on)
        groups = param_groups(self.model, where, lr=lr, weight_decay=args.weight_decay)
        if not args.zeroth_order:
            for p in self.model.parameters():
                p.requires_grad_(p in where)
        steps = self.planned_steps, self.steps_per_epoch
        build = METHODS[args.method].build if lr or self.readout is None else builders.still
        optimizer = build(Setup(args, self.model, groups, lr, eps, *steps))
        if self.together.ranks is not None:
            optimizer.check = digest(self.train_dataset)
        return optimizer

    # The search

    def _find(self) -> dict[str, Any]:
        """What noise_on.decide asks for."""
        args = self.args
        if not self.races:
            return noise_on.scaled(self.model, args, self._probe_losses)
        captured, args.capture = args.capture, False  # candidates take turns too often for graphs
        steps = self.planned_steps()
        try:
            # What the method refuses of the run that is left is refused before any pass.
            self._take_from_run(int(args.search_share * self.forwards(steps)))
            where = ["all"] if args.noise_on == ["auto"] else args.noise_on
            self._built(where, RELATIVE_LR, args.eps)
            self._steps_left, self.search_forwards = None, 0
            return self._contest(steps).run()
        finally:
            args.capture, self.zero_order = captured, None
            self._steps_left, self.search_forwards = None, 0

    def _probe_losses(self, n: int) -> list[Callable[[], Tensor]]:
        # The loss of each example spares the curvature a difference of nearly equal numbers.
        reduction = "tokens" if self.losses.of_model else self.losses.reduction
        batches = islice(self.get_train_dataloader(), n)
        return [self.losses.closure(self._prepare_inputs(x), reduction) for x in batches]

    def _contest(self, steps: int) -> Contest:
        drawn, dev = Drawn(self.get_train_dataloader()), self._dev_batches()
        held_out = 0 if dev else DEV_BATCHES  # the first batches, which no candidate trains on

        def batch_of(number: int) -> dict[str, Any]:
            return self._prepare_inputs(drawn[held_out + number])

        def clean() -> Tensor:
            forward, head = self.losses.split(batch_of(0))
            return head(forward())

        dev = dev or [self._prepare_inputs(drawn[i]) for i in range(held_out)]
        track = Track(
            self.model,
            lambda runner: self._built(runner.where, runner.lr, runner.eps),
            lambda optimizer, i: self._step(optimizer, batch_of(i)),
            [lambda b=batch: self._loss_of(b) for batch in dev],
            self.forwards,
            self.together,
            self.readout,
        )
        return Contest(self.args, track, steps, clean)

    def _dev_batches(self) -> list[dict[str, Any]]:
        """The first rows of the evaluation data, in batches as large as those of a step; none if
        there are no rows that can be counted."""
        data = self.eval_dataset
        if isinstance(data, dict):
            data = next(iter(data.values()), None)
        if not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
            return []
        size = self.args.global_batch_size
        n = min(len(data), DEV_BATCHES * size)
        collate = self._get_collator_with_removed_columns(self.data_collator, "evaluation")
        parts = [range(i, min(i + size, n)) for i in range(0, n, size)]
        whole = [part for part in parts if len(part) == size] or parts
        return [self._prepare_inputs(collate([data[i] for i in part])) for part in whole]

    def _loss_of(self, inputs: dict[str, Any]) -> Tensor:
        with self.accelerator.autocast():
            return self.losses.loss(inputs)

    def _step(self, optimizer: Any, inputs: dict[str, Any]) -> None:
        """Make a step as the run would."""
        if not isinstance(optimizer, Still):  # which has no schedule to count passes by
            self.zero_order = optimizer
        functions, more = self.losses.step_inputs(inputs, optimizer)
        with self.listening():
            optimizer.estimate(*functions, **more)
        optimizer.step()
