"""A journal is owned by one run, one optimizer and one process."""

import copy
import multiprocessing
import os
import signal

import pytest
import torch
from journal_cases import MAKERS, journal_of, resumed, train, unchanged_after
from pseuzo import Journal, replay
from pseuzo.train import journal_file
from pseuzo.train.journal_file import JournalError, read_journal
from tiny_models import causal_lm


def hold(path, opened):
    with Journal(path, MAKERS["mezo"](causal_lm("opt"))) as journal:
        train(journal.optimizer, journal.optimizer.model, [0])
        opened.set()
        signal.pause()


def test_one_optimizer_and_one_file_have_one_journal(tmp_path):
    path, base, model, opt = journal_of(tmp_path)
    with Journal(path, opt) as first:
        whole = path.read_bytes()
        with pytest.raises(ValueError, match=r"the optimizer writes .*run.pzj already; close"):
            Journal(tmp_path / "second.pzj", opt)
        other = MAKERS["pseuzo"](copy.deepcopy(model))
        other.load_state_dict(opt.state_dict())
        with pytest.raises(
            JournalError, match=r"run.pzj is in use by another run; choose a new file, or"
        ):
            Journal(path, other)
        assert opt.journal is first and other.journal is None
        assert path.read_bytes() == whole and not (tmp_path / "second.pzj").exists()
        assert replay(path, copy.deepcopy(base)) == 4, "the lock keeps readers out"
        inherited = os.dup(first._file.fileno())  # like a forked data loader
    with Journal(path, other) as second:
        first.close()
        assert other.journal is second and opt.journal is None
        train(other, other.model, [4])
    os.close(inherited)
    assert replay(path, base) == 5


@pytest.mark.slow
def test_a_journal_is_free_again_after_a_crash(tmp_path):
    path, context = tmp_path / "run.pzj", multiprocessing.get_context("spawn")
    opened = context.Event()
    process = context.Process(target=hold, args=(path, opened))
    process.start()
    assert opened.wait(120)
    model = causal_lm("opt")
    opt = MAKERS["mezo"](model)
    with pytest.raises(JournalError, match="in use by another run"):
        Journal(path, opt)
    assert replay(path, copy.deepcopy(model)) == 1
    process.kill()
    process.join()
    resumed(path, opt, model, [0])
    with Journal(path, opt):
        train(opt, model, [1])
    assert replay(path, causal_lm("opt")) == 2


def test_a_run_from_its_beginning_does_not_overwrite_another(tmp_path):
    path, base, _, _ = journal_of(tmp_path)
    whole = path.read_bytes()
    for fresh in (copy.deepcopy(base), causal_lm("opt")):
        with pytest.raises(
            JournalError, match=r"run.pzj holds 4 step\(s\) already, .*; choose a new file"
        ):
            Journal(path, MAKERS["pseuzo"](fresh))
    assert path.read_bytes() == whole
    # A file without records is continued by the run that began it, and by no other.
    empty = whole[: 20 + int.from_bytes(whole[8:12], "little")]
    for tail in (b"", whole[len(empty) : len(empty) + 20]):
        path.write_bytes(empty + tail)
        other = copy.deepcopy(base)
        with torch.no_grad():
            next(other.parameters()).view(-1)[3] += 1
        with pytest.raises(
            JournalError, match="is the journal of a run from other weights; choose a new file"
        ):
            Journal(path, MAKERS["pseuzo"](other))
        assert path.read_bytes() == empty + tail
        model = copy.deepcopy(base)
        opt = MAKERS["pseuzo"](model)
        with Journal(path, opt):
            train(opt, model, range(4))
        assert path.read_bytes() == whole


def test_a_journal_of_another_run_is_not_continued(tmp_path):
    """The runs have the same model, settings and number of steps: only the identifier differs."""
    path, base, _, opt = journal_of(tmp_path)
    whole, sentence = path.read_bytes(), "run.pzj is the journal of another run"
    model = copy.deepcopy(base)
    without = MAKERS["pseuzo"](model)  # a run without a journal
    train(without, model, range(4))
    model = copy.deepcopy(base)
    other = MAKERS["pseuzo"](model)
    with Journal(tmp_path / "other.pzj", other):
        train(other, model, range(4))
    for another in (without, other):
        with pytest.raises(JournalError, match=sentence):
            Journal(path, another)
    with pytest.raises(JournalError, match=sentence):
        Journal(path, opt, run="mine")
    # The state of the other run, at the same step, is loaded while the journal is open.
    with Journal(path, opt):
        opt.load_state_dict(other.state_dict())
        unchanged_after(lambda: train(opt, opt.model, [4]), opt.model, JournalError, sentence)
    assert path.read_bytes() == whole and replay(path, base) == 4


def test_the_identifier_is_in_the_header_and_in_the_state(tmp_path):
    model, path = causal_lm("opt"), tmp_path / "a.pzj"
    opt = MAKERS["pseuzo"](model)
    assert journal_file.owner(path) == (None, 0)
    with Journal(path, opt, run="mine") as first:
        train(opt, model, [0])
        assert first.run == read_journal(path)[0]["run"] == "mine"
    state = opt.state_dict()
    assert state["state"]["zero_order"]["journal"] == "mine" and journal_file.owner(path) == (
        "mine",
        1,
    )
    del state["state"]["zero_order"]["journal"]  # states without identifiers can also be loaded
    opt.load_state_dict(state)
    assert opt.journal_run is None


def test_a_file_that_was_replaced_before_it_was_locked(tmp_path, monkeypatch):
    path, real, calls = tmp_path / "run.pzj", journal_file.lock, []

    def slow(file):
        calls.append(1)
        if len(calls) == 1:
            path.rename(tmp_path / "aside")
            path.touch()
        return real(file)

    monkeypatch.setattr(journal_file, "lock", slow)
    model = causal_lm("opt")
    opt = MAKERS["pseuzo"](model)
    with Journal(path, opt):
        train(opt, model, [0])
    assert (
        len(calls) == 2
        and len(list(read_journal(path)[1])) == 1
        and not (tmp_path / "aside").stat().st_size
    )
    # On some file systems, file numbers change.
    monkeypatch.setattr(os.path, "samestat", lambda *files: False)
    with pytest.raises(JournalError, match="choose a file on another disk"):
        journal_file.hold(path)
