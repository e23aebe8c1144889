"""After an interrupt at any line of the journal, the repeated call records each step exactly
once."""

import os

import pytest
import torch
from journal_cases import interrupted
from pseuzo import Journal, MeZO
from pseuzo.train.journal_file import read_journal

pytestmark = pytest.mark.slow

OURS = f"pseuzo{os.sep}train{os.sep}journal"


def opened(path, late):
    torch.manual_seed(0)
    journal = Journal(path, MeZO(torch.nn.Linear(2, 2), 1e-3, 1e-2), run="this run")
    journal._late = late
    return journal


def record(journal, step):
    journal._sync_at = 0.0  # the interrupted call includes a sync
    skipped = torch.tensor([float(step == 1)])
    journal.record(step, 7 * step, set(), torch.tensor([step]), torch.tensor([0.5]), skipped)


def make(journal, steps, *, interrupt=None, line=0):
    """Record steps without updates. One call is interrupted and repeated; return whether it was."""
    optimizer, came = journal.optimizer, False
    for step in steps:
        for name, call in (
            ("prepare", journal.prepare),
            ("record", lambda step=step: record(journal, step)),
        ):
            if interrupt == (name, step) and interrupted(line, call, OURS):
                came = True
                call()
            elif interrupt != (name, step):
                call()
        optimizer._steps = step + 1
    return came


@pytest.mark.parametrize("late", [0, 1])
@pytest.mark.parametrize("call", ["record", "prepare"])
def test_an_interrupted_call_is_made_again(call, late, tmp_path):
    path = tmp_path / "undisturbed.pzj"
    with opened(path, late) as journal:
        make(journal, range(4))
    want, line = path.read_bytes(), 1
    while True:
        path = tmp_path / f"{line}.pzj"
        with opened(path, late) as journal:
            came = make(journal, range(4), interrupt=(call, 2), line=line)
        assert path.read_bytes() == want, f"interrupted before line {line}"
        if not came:
            break
        line += 1
    assert line > 8
    assert [r.skipped for r in read_journal(path)[1]] == [False, True, False, False]


@pytest.mark.parametrize("late", [0, 1])
@pytest.mark.parametrize("back", [0, 2])
def test_an_interrupt_as_the_journal_goes_back_with_the_optimizer(back, late, tmp_path):
    """A state is loaded while the journal is open: the next prepare() cuts the file."""
    path, line, came, want = tmp_path / "run.pzj", 0, True, b""
    while came:
        path.unlink(missing_ok=True)
        with opened(path, late) as journal:
            optimizer = journal.optimizer
            state = optimizer.state_dict()
            make(journal, range(4))
            journal.sync()
            state["state"]["zero_order"] |= {"step": back, "journal": "this run"}
            optimizer.load_state_dict(state)
            if back == 0:  # only a file without records may be continued from there
                path.write_bytes(path.read_bytes()[: empty(path)])
                journal._written = empty(path), 4
            came = make(journal, range(back, 3), interrupt=("prepare", back), line=line)
            came |= line == 0  # line 0 interrupts nothing
        want = path.read_bytes() if line == 0 else want
        assert path.read_bytes() == want, f"interrupted before line {line}"
        line += 1
    assert line > 20 and [r.step for r in read_journal(path)[1]] == [0, 1, 2]


def empty(path):
    return 20 + int.from_bytes(path.read_bytes()[8:12], "little")


@pytest.mark.parametrize("at", ["the first byte", "half of it", "all of it"])
def test_a_write_that_is_interrupted(at, tmp_path):
    class File:
        def __init__(self, file):
            self.file = file

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, part):
            if at != "the first byte":
                self.file.write(part[: len(part) // 2] if at == "half of it" else part)
            raise KeyboardInterrupt

    paths = tmp_path / "undisturbed.pzj", tmp_path / "run.pzj"
    for path in paths:
        with opened(path, 0) as journal:
            make(journal, range(2))
            if path == paths[1]:
                real, journal._file = journal._file, File(journal._file)
                with pytest.raises(KeyboardInterrupt):
                    record(journal, 2)
                journal._file = real
            make(journal, [2, 3])
    assert paths[0].read_bytes() == paths[1].read_bytes()
