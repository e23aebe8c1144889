"""Checkpoints may be damaged, cut short or missing, and the right weights are kept at the end."""

import os
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from helpers import SMALL, ZERO_ORDER, pseuzo
from pseuzo.train import checkpoints
from pseuzo.train.arguments import PseuZOTrainingArguments
from pseuzo.train.checkpoints import MANIFEST, flaw, last_checkpoint, step_of
from pseuzo.train.journal_file import JournalError, owner
from pseuzo.train.replay import replay
from pseuzo.train.trainer import PseuZOTrainer
from torch.nn import functional as F
from transformers import TrainerCallback

pytestmark = pytest.mark.slow


def trainer_of(folder: Path, **changes) -> PseuZOTrainer:
    """Return a trainer of a module so small that a checkpoint takes milliseconds.

    The loss on the dev row falls at every step.
    """
    torch.manual_seed(0)
    model, x = torch.nn.Linear(5, 1), torch.randn(8, 5)
    batch = {"x": x, "y": x.sum(1)}

    def objective(batch):
        return lambda: model(batch["x"]), lambda o: F.mse_loss(o[:, 0], batch["y"])

    settings = dict(
        output_dir=str(folder),
        method="mezo",
        max_steps=6,
        learning_rate=1e-2,
        use_cpu=True,
        report_to="none",
        save_strategy="steps",
        save_steps=2,
        disable_tqdm=True,
        label_names=["y"],
        per_device_train_batch_size=8,
    )
    args = PseuZOTrainingArguments(**(settings | changes))
    rows = list(range(8))
    return PseuZOTrainer(model, args, lambda _: dict(batch), rows, rows, objective=objective)


BEST = dict(
    eval_strategy="steps", eval_steps=2, load_best_model_at_end=True, metric_for_best_model="loss"
)


def weights(trainer: PseuZOTrainer) -> list[torch.Tensor]:
    return [p.detach().clone() for p in trainer.model.parameters()]


def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return all(torch.equal(p, q) for p, q in zip(left, right, strict=True))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return the folder of a run with checkpoints 2, 4 and 6, and its final weights."""
    folder = tmp_path_factory.mktemp("run")
    trainer = trainer_of(folder)
    trainer.train()
    return folder, weights(trainer)


@pytest.fixture
def copy(run, tmp_path):
    shutil.copytree(run[0], tmp_path / "run")
    return tmp_path / "run"


def flipped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :]


DAMAGES = {
    "first bit": lambda b: flipped(b, 0),
    "a bit in the middle": lambda b: flipped(b, len(b) // 2),
    "last bit": lambda b: flipped(b, len(b) - 1),
    "cut": lambda b: b[: len(b) // 2],
    "zeros": lambda b: bytes(len(b)),
    "empty": lambda b: b"",
    "gone": None,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_any_damage_to_any_file_falls_back_to_the_checkpoint_before(copy, damage, capsys):
    assert last_checkpoint(copy) == str(copy / "checkpoint-6") and not capsys.readouterr().out
    names = {f.name for f in (copy / "checkpoint-6").iterdir()}
    assert names > {
        "model.safetensors",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "trainer_state.json",
        MANIFEST,
    }
    for name in sorted(names - {MANIFEST}):
        file = copy / "checkpoint-6" / name
        content = file.read_bytes()
        file.unlink() if damage == "gone" else file.write_bytes(DAMAGES[damage](content))
        assert last_checkpoint(copy) == str(copy / "checkpoint-4"), name
        said = capsys.readouterr().out
        assert said.count("\n") == 1 and f"checkpoint-6 is skipped: its {name} is " in said
        file.write_bytes(content)
    assert flaw(copy / "checkpoint-6") is None


def test_a_run_goes_on_from_the_last_whole_checkpoint_to_the_same_bits(copy, run, capsys):
    file = copy / "checkpoint-6" / "model.safetensors"
    file.write_bytes(flipped(file.read_bytes(), file.stat().st_size - 3))
    with pytest.raises(
        ValueError,
        match=r"checkpoint-6 is not a whole checkpoint: its model\.safetensors is damaged",
    ):
        trainer_of(copy).train(resume_from_checkpoint=str(copy / "checkpoint-6"))
    trainer = trainer_of(copy)
    trainer.train(resume_from_checkpoint=True)
    assert "checkpoint-6 is skipped" in capsys.readouterr().out
    assert same(weights(trainer), run[1]) and flaw(copy / "checkpoint-6") is None


@pytest.mark.parametrize(
    "content, sentence",
    [
        ("", "it was not written to its end"),
        ("{", "its checksums.json is damaged"),
        ("[1]", "its checksums.json is damaged"),
        ('{"a": 1}', "its checksums.json is damaged"),
    ],
)
def test_checksums_that_are_not_there(copy, content, sentence, capsys):
    (copy / "checkpoint-6" / MANIFEST).write_text(content)
    assert flaw(copy / "checkpoint-6") == sentence
    assert last_checkpoint(copy) == str(copy / "checkpoint-4")
    for folder in copy.iterdir():
        (folder / MANIFEST).unlink()
    assert last_checkpoint(copy) == str(copy / "checkpoint-6"), "as the stock Trainer writes them"
    for name in ("trainer_state.json", "model.safetensors", "optimizer.pt"):
        file = copy / "checkpoint-6" / name
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        assert last_checkpoint(copy) == str(copy / "checkpoint-4"), name
        file.write_bytes(whole)


def test_no_checkpoint_is_removed_before_the_next_one_is_sealed(tmp_path, monkeypatch):
    synced, real = [], os.fsync
    monkeypatch.setattr(
        os,
        "fsync",
        lambda number: (synced.append(os.readlink(f"/proc/self/fd/{number}")), real(number)),
    )
    trainer = trainer_of(tmp_path, save_total_limit=1)

    def killed(folder):
        assert (folder / "trainer_state.json").exists()
        if folder.name == "checkpoint-4":
            raise KeyboardInterrupt
        seal(folder)

    seal = checkpoints.seal
    monkeypatch.setattr(checkpoints, "seal", killed)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    there = {str(f) for f in (tmp_path / "checkpoint-2").iterdir() if f.name != MANIFEST}
    assert there <= set(synced[: synced.index(str(tmp_path / "checkpoint-2" / MANIFEST) + ".new")])
    monkeypatch.setattr(checkpoints, "seal", seal)
    trainer_of(tmp_path, save_total_limit=1).train(resume_from_checkpoint=True)
    assert [f.name for f in tmp_path.iterdir()] == ["checkpoint-6"]


class Spoil(TrainerCallback):
    """Calls a function with a run's folder when step 4 is saved, and makes later steps worse."""

    def __init__(self, spoil):
        self.spoil = spoil

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == 4:
            self.spoil(Path(args.output_dir))

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        optimizer.param_groups[0]["maximize"] = state.global_step >= 4


def flip_best(folder):
    file = folder / "checkpoint-4" / "model.safetensors"
    file.write_bytes(flipped(file.read_bytes(), file.stat().st_size - 2))


@pytest.mark.parametrize(
    "spoil, why",
    [
        (lambda folder: shutil.rmtree(folder / "checkpoint-4"), "it is not there"),
        (flip_best, "its model.safetensors is damaged"),
        # step 6 is not the best
        (
            lambda folder: (folder / "checkpoint-4" / "optimizer.pt").unlink(),
            None,
        ),
    ],
    ids=["gone", "a bit", "its optimizer"],
)
def test_best_checkpoint_that_is_gone_is_not_said_to_be_kept(tmp_path, spoil, why, capsys):
    trainer = trainer_of(tmp_path, **BEST)
    last = []
    trainer.add_callback(Spoil(spoil))
    monitor = TrainerCallback()
    monitor.on_step_end = lambda args, state, control, **kw: last.append(weights(trainer))
    trainer.add_callback(monitor)
    trainer.train()
    losses = {
        row["step"]: row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row
    }
    assert min(losses, key=losses.get) == 4 and not same(last[3], last[5])
    said = capsys.readouterr().err
    if why is None:
        assert (
            trainer.kept_step == 4
            and same(weights(trainer), last[3])
            and "best checkpoint" not in said
        )
        return
    assert trainer.kept_step is None and same(weights(trainer), last[5])
    assert trainer.state.best_model_checkpoint is None
    assert (
        f"checkpoint-4, the best checkpoint, cannot be loaded: {why}; the weights are those of the "
        "last step, 6" in said
    )
    # The run is complete, so a second resume prints the same.
    again = trainer_of(tmp_path, **BEST)
    again.train(resume_from_checkpoint=True)
    assert again.kept_step is None and same(weights(again), last[5])
    assert "the weights are those of the last step, 6" in capsys.readouterr().err


def test_best_checkpoint_of_a_run_that_was_moved(tmp_path):
    trainer = trainer_of(tmp_path / "a", **BEST)
    trainer.add_callback(Spoil(lambda folder: None))
    trainer.train()
    assert trainer.kept_step == 4
    (tmp_path / "a").rename(tmp_path / "b")
    again = trainer_of(tmp_path / "b", **BEST)
    again.train(resume_from_checkpoint=True)
    assert again.kept_step == 4 and same(weights(again), weights(trainer))
    # A run that continues and saves nothing more does not forget it either.
    (tmp_path / "b").rename(tmp_path / "c")
    longer = trainer_of(
        tmp_path / "c", **BEST | dict(max_steps=7, eval_steps=10, save_strategy="best")
    )
    longer.train(resume_from_checkpoint=True)
    assert longer.kept_step == 4 and same(weights(longer), weights(trainer))


def test_best_is_the_best_of_those_that_are_saved(tmp_path):
    """The run is evaluated at every step and saved at every second one.

    The best step is 5, and the best one that can be loaded is 4.
    """
    trainer = trainer_of(tmp_path, **BEST | dict(eval_steps=1))

    class Worse(TrainerCallback):
        def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
            # this makes steps 4 and 6 worse
            optimizer.param_groups[0]["maximize"] = state.global_step in (
                3,
                5,
            )

    trainer.add_callback(Worse())
    trainer.train()
    losses = {
        row["step"]: row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row
    }
    saved = {step: losses[step] for step in (2, 4, 6)}
    assert min(losses, key=losses.get) % 2 == 1
    assert trainer.kept_step == min(saved, key=saved.get)
    assert trainer.state.best_metric == min(saved.values())


def test_a_checkpoint_counts_when_its_steps_are_in_the_journal_on_the_disk(tmp_path, monkeypatch):
    path, seal, fsync, events = tmp_path / "run.pzj", checkpoints.seal, os.fsync, []

    def synced(number):
        if os.readlink(f"/proc/self/fd/{number}") == str(path):
            events.append(("journal", owner(path)[1]))
        fsync(number)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(
        checkpoints, "seal", lambda f: (events.append(("sealed", step_of(f))), seal(f))
    )
    trainer = trainer_of(tmp_path / "run", journal=str(path), **BEST)
    trainer.add_callback(Spoil(lambda folder: None))
    trainer.train()
    for step in (2, 4, 6):
        assert events[events.index(("sealed", step)) - 1] == ("journal", step)
    assert trainer.kept_step == 4, "loading its weights at the end was taken for another's write"
    fresh = trainer_of(tmp_path / "fresh").model
    assert replay(path, fresh, until=4) == 4 and same(list(fresh.parameters()), weights(trainer))
    # This also holds for a run that is resumed and continues.
    again = trainer_of(tmp_path / "run", journal=str(path), max_steps=8)
    again.train(resume_from_checkpoint=True)
    fresh = trainer_of(tmp_path / "fresh").model
    assert replay(path, fresh) == 8 and same(list(fresh.parameters()), weights(again))


def test_a_run_is_not_resumed_with_a_journal_that_is_not_its_own(tmp_path):
    path = tmp_path / "run.pzj"
    trainer_of(tmp_path / "run", journal=str(path)).train()
    whole = path.read_bytes()
    for content, sentence in (
        (None, "where the steps so far should be recorded, is not there, or empty"),
        (b"", "is not there, or empty"),
        (b"another", "is not a journal"),
        ("another", "is the journal of another run"),
    ):
        if content == "another":
            path.unlink()
            trainer_of(tmp_path / "another", journal=str(path)).train()
            content = path.read_bytes()
        elif content is None:
            path.unlink()
        else:
            path.write_bytes(content)
        with pytest.raises(JournalError, match=sentence):
            trainer_of(tmp_path / "run", journal=str(path), max_steps=8).train(
                resume_from_checkpoint=True
            )
        assert path.exists() == (content is not None) and (
            content is None or path.read_bytes() == content
        )
    path.write_bytes(whole)
    # it may continue without a journal
    trainer_of(tmp_path / "run", max_steps=7).train(resume_from_checkpoint=True)


def test_a_resume_reads_every_file_once(tmp_path, monkeypatch):
    args = [
        "train",
        *SMALL,
        *ZERO_ORDER,
        *"--steps 4 --save-every 2 --keep last".split(),
        "--output",
        tmp_path / "run",
    ]
    pseuzo(*args)
    read = Counter()
    checksum = checkpoints.checksum
    monkeypatch.setattr(
        checkpoints, "checksum", lambda file: (read.update([file.name]), checksum(file))[1]
    )
    pseuzo(*args, "--resume")
    assert {"model.safetensors", "optimizer.pt", "trainer_state.json"} <= read.keys() and set(
        read.values()
    ) == {1}
