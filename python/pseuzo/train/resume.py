"""The hooks of Transformers' Trainer for saving and resuming a run, and its journal."""

import json
import logging
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState, TrainerState
from transformers.trainer_utils import (
    PREFIX_CHECKPOINT_DIR,
    SaveStrategy,
    TrainOutput,
    rotate_checkpoints,
)

from pseuzo.files import check_saving
from pseuzo.models.loading import quantised
from pseuzo.models.readout import Readout
from pseuzo.optim import PseuZO
from pseuzo.optim.base import ZeroOrder
from pseuzo.sentences import one_line
from pseuzo.train import checkpoints
from pseuzo.train.arguments import PseuZOTrainingArguments
from pseuzo.train.following import share_records
from pseuzo.train.journal import Journal
from pseuzo.train.journal_file import JournalError, owner
from pseuzo.train.logs import AtBeginning
from pseuzo.train.ranked import whole_run
from pseuzo.train.reporting import ReportingTrainer

READOUT_FILE = "readout.safetensors"  # the state of a Readout, in a checkpoint

_log = logging.getLogger(__name__)


def settings(
    optimizer: torch.optim.Optimizer, zero_order: ZeroOrder | None, scheduler: Any
) -> dict[str, Any]:
    """Return the arguments that the states of the optimizer and the scheduler hold.

    zero_order: the optimizer without Transformers' wrapper; None for a first-order one.
    """
    found: dict[str, Any] = {"learning_rate": getattr(scheduler, "base_lrs", None)}
    for name in ("weight_decay", "noise_scale", "momentum", "betas"):
        found[name] = [group[name] for group in optimizer.param_groups if name in group]
    if zero_order is not None:
        names = ("eps", "seed", "noise", "rounding", *zero_order.own_settings)
        found |= {name: getattr(zero_order, name) for name in names}
    if isinstance(zero_order, PseuZO):
        found["window"] = zero_order.window.capacity
    for name, value in found.items():
        if isinstance(value, list) and len(set(value)) == 1:
            found[name] = value[0]
    return found


def warn_of_changes(given: dict[str, Any], loaded: dict[str, Any], seed: int) -> None:
    """Warn of each argument for which a checkpoint has another value, which is then used."""
    for name, value in loaded.items():
        if value != given[name]:
            also = f"; the order of the batches is that of seed {seed}" if name == "seed" else ""
            _log.warning(
                "resumed with %s %s of the checkpoint, not %s%s", name, value, given[name], also
            )


def check_checkpoints(
    model: nn.Module,
    args: PseuZOTrainingArguments,
    save: Callable[[str, dict[str, Any] | None], None],
    scheduler: Any,
    callbacks: list[Any],
) -> None:
    """Raise ValueError if a checkpoint could not be written; warn, if args ask for none.

    save: writes the weights to a folder.
    """
    if not args.should_save:
        return
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    moments = {"fo-adam": 2, "fo-sgd": bool(args.momentum), "mezo-svrg": 1}.get(args.method, 0)

    def save_all(folder: Path, state_dict: dict[str, Any] | None) -> None:
        save(str(folder), state_dict)
        torch.save(scheduler.state_dict(), folder / SCHEDULER_NAME)
        json.dumps([c.state() for c in callbacks if isinstance(c, ExportableState)])

    more = 0 if args.save_only_model else trained * moments
    try:
        check_saving(save_all, model, Path(args.output_dir), more)
    except ValueError as error:
        if args.save_strategy != "no":
            raise
        _log.warning("save_model() would fail after the training: %s", error)


def checkpoint_of(
    wanted: str | bool | None, output_dir: str, found_whole: str | None, journal: str | None
) -> str | bool | None:
    """Return the checkpoint to resume from; True is the newest whole one, or None where there is
    none but a journal that can be followed from its beginning.

    ValueError if it is not whole. found_whole: a checkpoint that last_checkpoint returned, which
    need not be read again.
    """
    if wanted is True:
        newest = checkpoints.last_checkpoint(output_dir)
        if newest is None and (journal is None or owner(journal)[1] == 0):
            raise ValueError(f"no whole checkpoint in {output_dir}")
        return newest
    if isinstance(wanted, str) and wanted != found_whole:
        if wrong := checkpoints.flaw(Path(wanted)):
            raise ValueError(f"{wanted} is not a whole checkpoint: {wrong}")
    return wanted


def state_of(checkpoint: str) -> TrainerState:
    return TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))


def load_trained(model: nn.Module, folder: Path) -> bool:
    """Load the trained weights of a quantised model, whose quantised ones may not load after use.

    Return False, with nothing loaded, for other models and for adapters.
    """
    if hasattr(model, "peft_type") or not quantised(model):
        return False
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for file in folder.glob("model*.safetensors"):
        with safe_open(file, "pt") as weights, torch.no_grad():
            for name in trained.keys() & set(weights.keys()):
                trained.pop(name).copy_(weights.get_tensor(name))
    if trained:
        raise ValueError(
            f"{folder} lacks {len(trained)} of the trained weights, the first being {min(trained)}"
        )
    return True


def best_folder(best_checkpoint: str, output_dir: str) -> str | None:
    """Return the folder of the best checkpoint, also if the run was moved; None if it is not
    whole."""
    folder = Path(best_checkpoint)
    if not folder.is_dir():
        folder = Path(output_dir) / folder.name
    return None if checkpoints.flaw(folder, weights_alone=True) else str(folder)


def warn_of_last_weights(folder: Path, wrong: str, last: int, journal: str | None) -> None:
    """Say on stderr that the best checkpoint cannot be loaded, and which weights stay."""
    best = checkpoints.step_of(folder)
    replay = f" (pseuzo replay --until {best} makes those of the best)" if journal else ""
    print(
        f"{folder}, the best checkpoint, cannot be loaded: {wrong}; the weights are those of the "
        f"last step, {last}{replay}",
        file=sys.stderr,
        flush=True,
    )


def remove_earlier(folder: Path) -> None:
    """Remove a checkpoint of an earlier try, no part of which may be taken for the next one's."""
    if folder.exists():
        # The state is removed first, since without it the rest is not taken for a checkpoint.
        (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
        shutil.rmtree(folder)


class ResumableTrainer(ReportingTrainer):
    """Writes checkpoints that are known to be whole, resumes from those, and keeps a journal.

    run_id: an identifier for the header of the journal; None means a random one. found_whole: a
    checkpoint that last_checkpoint returned, which train() need not read again. follows: whether
    train() makes the steps again that its journal holds beyond the checkpoint, or from the first
    one on if it resumes from none. kept_step: the step of the checkpoint that train() loaded at the
    end; None if it kept the last weights.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.run_id: str | None = None
        self.found_whole: str | None = None
        self.follows = False
        self.kept_step: int | None = None
        self._journal: Journal | None = None
        self.readout: Readout | None = None
        self.add_callback(AtBeginning(self._begin))

    def planned_steps(self) -> int:
        """The number of steps of the whole run."""
        if self.args.max_steps > 0:
            return self.args.max_steps
        return math.ceil(self.args.num_train_epochs * self.steps_per_epoch())

    def steps_per_epoch(self) -> int:
        if not hasattr(self.train_dataset, "__len__"):
            raise ValueError(
                f"schedule {self.args.schedule} counts epochs: it needs a train_dataset of a known "
                "length"
            )
        n, size = len(self.train_dataset), self.args.global_batch_size
        return max(1, n // size if self.args.dataloader_drop_last else -(-n // size))

    def _begin(self) -> None:
        """Check that checkpoints can be written, and open the journal, before the first step."""
        self.together.of_root(self._begin_files)
        self._follow()
        self.step_log.begin(self.state.log_history)

    def _begin_files(self) -> None:
        save = lambda folder, weights: self._save(folder, state_dict=weights)  # noqa: E731
        callbacks = self.callback_handler.callbacks
        check_checkpoints(self.model, self.args, save, self.lr_scheduler, callbacks)
        if self.args.journal and self.zero_order is not None:
            if self.zero_order.journal_run and owner(self.args.journal) == (None, 0):
                raise JournalError(
                    f"{self.args.journal}, where the steps so far should be recorded, is not "
                    "there, or empty: name the file of the run's journal, or leave out journal to "
                    "continue without one"
                )
            self._journal = Journal(
                self.args.journal, self.zero_order, run=self.run_id, follow=self.follows
            )

    def _follow(self) -> None:
        """Say which recorded steps are made again, and which states their checkpoints need. Rank 0
        has read the records, and gives them to the others."""
        if self.zero_order is None:
            return
        followed = share_records(self.zero_order, self.together)
        if followed is None:
            return
        strategy, state = self.args.save_strategy, self.state
        every = {SaveStrategy.NO: 0, SaveStrategy.STEPS: state.save_steps}.get(strategy, 1)
        followed.plan_states(every, state.max_steps if every else 0)
        if self.together.is_root:
            print(
                f"steps {followed.first} to {followed.end - 1} are made again as recorded in "
                f"{self.args.journal}",
                flush=True,
            )

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Train as Transformers does. True resumes from the newest whole checkpoint of output_dir,
        and makes the steps again that the journal holds beyond it: see pseuzo.train.following.

        A checkpoint that is damaged or incomplete is skipped, and a line says so.
        """
        self.kept_step = None
        self.follows = self.follows or resume_from_checkpoint is True
        checkpoint = self.together.of_root(
            lambda: checkpoint_of(
                resume_from_checkpoint,
                self.args.output_dir,
                self.found_whole,
                self.args.journal,
            )
        )
        self._check_seen(checkpoint)
        if checkpoint and state_of(checkpoint).global_step >= self.planned_steps():
            return self._finished(checkpoint)
        try:
            outcome = super().train(checkpoint, *args, **kwargs)
        finally:
            if self._journal is not None:
                self._journal.close()
                self._journal = None
            if self.zero_order is not None:
                self.zero_order.followed = None
        self._settle()
        self.step_log.end()
        return outcome

    def _finished(self, checkpoint: str) -> TrainOutput:
        """Restore the end of a finished run, of which Transformers would make one more step."""
        self._load_from_checkpoint(checkpoint)
        self.state = state_of(checkpoint)
        self.create_optimizer_and_scheduler(self.planned_steps())
        self._load_optimizer_and_scheduler(checkpoint)
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
            self._load_best_model()
        self._settle()
        return TrainOutput(self.state.global_step, 0.0, {})

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load as Transformers does, and warn of each argument that the checkpoint overrides."""
        given = settings(self.optimizer, self.zero_order, self.lr_scheduler)
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except ValueError as error:
            raise ValueError(
                f"{checkpoint} cannot be resumed: {one_line(error)}; a run is "
                "resumed with the method, noise_on, head and kind of weight decay that it began "
                "with"
            ) from error
        if checkpoint and self.readout is not None:
            self.readout.load(load_file(Path(checkpoint) / READOUT_FILE))
        loaded = settings(self.optimizer, self.zero_order, self.lr_scheduler)
        if self.together.is_root:
            warn_of_changes(given, loaded, self.args.seed)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        if not load_trained(self.model, Path(resume_from_checkpoint)):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        """Load as Transformers does if the best checkpoint is whole; else keep the last weights."""
        best = self.state.best_model_checkpoint
        found = self.together.of_root(lambda: best_folder(best, self.args.output_dir))
        self.state.best_model_checkpoint = found
        if found is None:
            return
        self._check_seen(found)
        folder = Path(found)
        if not load_trained(self.model, folder):
            super()._load_best_model()
        self.kept_step = checkpoints.step_of(folder)

    def _settle(self) -> None:
        """Load the best checkpoint where Transformers did not, or say which weights stay."""
        best, last = self.state.best_global_step, self.state.global_step
        if not self.args.load_best_model_at_end or best is None or self.kept_step is not None:
            return
        if best == last:
            self.kept_step = last
            return
        folder = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{best}"
        if wrong := self.together.of_root(lambda: checkpoints.flaw(folder, weights_alone=True)):
            if self.together.is_root:
                warn_of_last_weights(folder, wrong, last, self.args.journal)
            return
        # Transformers forgets where the best is when a run that was moved is resumed.
        self.state.best_model_checkpoint = str(folder)
        self._load_best_model()

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Decide as Transformers does, but ignore steps without a checkpoint if the best one is to
        be loaded."""
        saved = self.args.save_strategy == SaveStrategy.BEST or self.control.should_save
        if self.args.load_best_model_at_end and not saved:
            return False
        return super()._determine_best_metric(metrics, trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save as Transformers does, and seal it with checksums before older ones are removed.

        Rank 0 writes all of it, as the only process of a run would, since the others have the same
        state. They wait.
        """
        with self.step_log.paused():
            self.state.best_model_checkpoint = self.together.of_root(
                lambda: self._write_checkpoint(model, trial)
            )

    def _write_checkpoint(self, model: nn.Module, trial: Any) -> str | None:
        """Write a checkpoint; return the best one of the run."""
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        folder = Path(self._get_output_dir(trial)) / name
        remove_earlier(folder)
        limit = self.args.save_total_limit
        if self._journal is not None:
            self._journal.sync()
        checkpoints.begin(folder)
        try:
            self.args.save_total_limit = None
            with whole_run(self.args):
                super()._save_checkpoint(model, trial)
            if self.readout is not None and not self.args.save_only_model:
                save_file(self.readout.state, folder / READOUT_FILE)
        finally:
            self.args.save_total_limit = limit
        checkpoints.seal(folder)
        best = self.state.best_model_checkpoint
        rotate_checkpoints(str(folder.parent), limit, best, use_mtime=True)
        return best

    def _check_seen(self, checkpoint: str | bool | None) -> None:
        """Raise ValueError if a rank, which may be on another machine, does not see the folder."""

        def check() -> None:
            if isinstance(checkpoint, str) and not Path(checkpoint).is_dir():
                raise ValueError(
                    f"{checkpoint} is not there for rank {self.together.rank}: all ranks read it, "
                    "so the folder of the run must be on a disk that all machines share"
                )

        self.together.agreed(check)
