"""When records reach the file, and when they reach the disk."""

import copy
import os

import pytest
import torch
from journal_cases import MAKERS, same, train, unchanged_after
from pseuzo import Journal, replay
from pseuzo.train import journal, journal_file
from tiny_models import causal_lm


def test_records_reach_the_disk_for_less_than_a_hundredth_of_the_time(tmp_path, monkeypatch):
    """By a fake clock, a step takes 0.07 s and a sync 0.03 s, but every tenth sync takes 0.3 s."""
    now, syncs = [0.0], []

    def fsync(number):
        syncs.append(number)
        now[0] += 0.3 if len(syncs) % 10 == 0 else 0.03

    opt = MAKERS["mezo"](causal_lm("opt"))
    monkeypatch.setattr(journal.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(os, "fsync", fsync)
    with Journal(tmp_path / "run.pzj", opt) as opened:
        began, opening = now[0], len(syncs)
        for step in range(5000):
            now[0] += 0.07
            opened.record(
                step, 0, set(), torch.zeros(1, dtype=torch.int64), torch.zeros(1), torch.zeros(1)
            )
        spent = now[0] - began - 5000 * 0.07
        assert 0 < spent < 0.01 * (now[0] - began) and len(syncs) - opening > 30
        done = len(syncs)
        opened.sync()
        assert len(syncs) == done + 1
    monkeypatch.undo()


@pytest.mark.parametrize("how", ["removed", "renamed", "replaced"])
def test_a_journal_that_is_not_there_any_more_is_said(how, tmp_path, recwarn):
    path, model = tmp_path / "run.pzj", causal_lm("opt")
    base, opt = copy.deepcopy(model), MAKERS["mezo"](model)
    with Journal(path, opt) as opened:
        train(opt, model, [0])
        opened.sync()
        assert not recwarn.list
        path.unlink() if how == "removed" else path.rename(tmp_path / "moved.pzj")
        if how == "replaced":
            path.touch()
        train(opt, model, [1])
        with pytest.warns(UserWarning, match="run.pzj is not there any more"):
            opened.sync()
    if how != "removed":
        assert replay(tmp_path / "moved.pzj", base) == 2 and same(base, model)


class Full:
    """The file of a disk that has ten bytes left."""

    def __init__(self, file):
        self.file, self.left = file, 10

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, part):
        if not self.left:
            raise OSError(28, "No space left on device")
        n = self.file.write(part[: self.left])
        self.left -= n
        return n


@pytest.mark.parametrize("late", [0, 1])
def test_a_record_that_could_not_be_written_is_written_before_the_next_step(tmp_path, late):
    """late: how many records wait for the next step. On a GPU one does."""
    path, model = tmp_path / "run.pzj", causal_lm("opt")
    base, opt = copy.deepcopy(model), MAKERS["pseuzo"](model)
    opened = Journal(path, opt)
    opened._late = late
    train(opt, model, range(2))
    assert journal_file.owner(path)[1] == 2 - late
    size, real = path.stat().st_size, opened._file
    opened._file = Full(real)
    with pytest.raises(OSError, match="No space left"):
        train(opt, model, [2])
    assert opt.steps == 3 and path.stat().st_size == size, (
        "half a record was not removed from the file"
    )
    opened._file.left = 10
    unchanged_after(lambda: train(opt, model, [3]), model, OSError, "No space left")
    assert opt.steps == 3 and path.stat().st_size == size
    opened._file = real
    train(opt, model, [3])
    opened.sync()
    assert journal_file.owner(path)[1] == 4
    opened.close()
    assert replay(path, base) == 4 and same(base, model)
