"""A journal follows its optimizer to later and earlier steps, and refuses what it cannot record."""

import copy
import json

import pytest
import torch
from journal_cases import LABELS, MAKERS, journal_of, resumed, train, unchanged_after, without_head
from pseuzo import CausalLMObjective, Journal, MeZO, replay
from pseuzo.train import journal_file
from pseuzo.train.journal_file import JournalError, read_journal
from tiny_models import batch_of, causal_lm


def test_a_torn_tail_loses_one_step_and_is_cut_off_on_reopening(tmp_path):
    path, base, _, _ = journal_of(tmp_path)
    whole = path.read_bytes()
    ends = []
    for size in range(len(whole) - 1, len(whole) - 150, -7):
        path.write_bytes(whole[:size])
        ends.append(len(list(read_journal(path)[1])))
    assert set(ends) == {3, 2}
    path.write_bytes(whole[:-5])
    # A run that was killed in its 4th step continues from its checkpoint of 3 steps.
    model = copy.deepcopy(base)
    opt = resumed(path, MAKERS["pseuzo"](model), model, range(3))
    with Journal(path, opt):
        train(opt, model, [3])
    assert path.read_bytes() == whole


def test_going_back_to_a_checkpoint_cuts_what_came_after(tmp_path):
    path, base, _, _ = journal_of(tmp_path)
    model = copy.deepcopy(base)
    opt = resumed(path, MAKERS["pseuzo"](model), model, range(2))
    with Journal(path, opt):
        train(opt, model, [10, 11, 12])  # other batches than before
    assert replay(path, base) == 5
    assert all(
        torch.equal(p, q) for p, q in zip(model.parameters(), base.parameters(), strict=True)
    )


def test_going_back_while_the_journal_is_open_cuts_it_as_well(tmp_path):
    model, path, states = causal_lm("opt"), tmp_path / "run.pzj", []
    base, opt = copy.deepcopy(model), MAKERS["pseuzo"](model)

    def back_to(step):
        for part, state in zip((model, opt), states[step], strict=True):
            part.load_state_dict(state)

    with Journal(path, opt):
        for t in range(4):
            states.append(copy.deepcopy((model.state_dict(), opt.state_dict())))
            train(opt, model, [t])
        for step in (3, 1):
            back_to(step)
            train(opt, model, [10, 11])  # other batches than before
    assert [r.step for r in read_journal(path)[1]] == [0, 1, 2]
    rebuilt, whole = copy.deepcopy(base), path.read_bytes()
    assert replay(path, rebuilt) == 3
    assert all(
        torch.equal(p, q) for p, q in zip(model.parameters(), rebuilt.parameters(), strict=True)
    )
    assert any(
        not torch.equal(p, q) for p, q in zip(model.parameters(), base.parameters(), strict=True)
    )

    later = copy.deepcopy(opt.state_dict())
    later["state"]["zero_order"]["step"] = 7
    with Journal(path, opt):  # refuses what reopening refuses
        opt.load_state_dict(later)
        unchanged_after(
            lambda: train(opt, model, [12]),
            model,
            JournalError,
            "ends before step 3, .* continues with step 7",
        )
        back_to(0)
        unchanged_after(
            lambda: train(opt, model, [12]),
            model,
            JournalError,
            r"run.pzj holds 3 step\(s\) already",
        )
        assert opt.steps == 0 and path.read_bytes() == whole


CHANGES = {
    "a group": lambda opt: opt.add_param_group({"params": [opt.model.lm_head.weight]}),
    "exact": lambda opt: opt.param_groups[0].update(exact_gradient=True),
    "noise": lambda opt: setattr(opt, "noise", "rademacher"),
    "rounding": lambda opt: setattr(opt, "rounding", "nearest"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_cannot_be_recorded_is_not_made(change, tmp_path):
    model, path = causal_lm("llama"), tmp_path / "run.pzj"
    opt = without_head(model)
    with Journal(path, opt):
        train(opt, model, [0])
        whole, window = path.read_bytes(), opt.window.state_dict()
        opt.estimate(
            *CausalLMObjective(model, [17, 4])({**batch_of(), "labels": LABELS}), groups=LABELS
        )
        CHANGES[change](opt)
        unchanged_after(
            opt.step,
            model,
            RuntimeError,
            "groups, noise or rounding were changed since it was opened",
        )
    assert opt.steps == 1 and path.read_bytes() == whole
    assert torch.equal(opt.window.state_dict()["seeds"], window["seeds"])


def test_bare_parameters_are_put_back_where_a_record_is_refused(tmp_path):
    x = torch.nn.Parameter(torch.randn(50).bfloat16())
    opt = MeZO([x], 1e-2, 1e-2)
    before = x.detach().clone()
    with Journal(tmp_path / "run.pzj", opt):
        opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(3).bfloat16())]})
        with pytest.raises(RuntimeError, match="groups, noise or rounding were changed"):
            opt.step(lambda: x.float().square().sum())
    assert torch.equal(x, before)


def test_what_is_refused(tmp_path):
    path, base, trained, _ = journal_of(tmp_path)
    whole = path.read_bytes()
    unchanged_after(
        lambda: replay(path, trained), trained, JournalError, "not those that the run started from"
    )
    llama = causal_lm("llama")
    unchanged_after(lambda: replay(path, llama), llama, JournalError, "the base model lacks")
    half = copy.deepcopy(base).to(torch.bfloat16)
    unchanged_after(
        lambda: replay(path, half), half, JournalError, "is .* bfloat16 in the base model"
    )
    foreign = tmp_path / "foreign"
    foreign.write_bytes(b"PK\x03\x04" + bytes(100))
    unchanged_after(lambda: replay(foreign, base), base, JournalError, "is not a journal")
    for at in (len(whole) - 20, len(whole) - 200):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        unchanged_after(lambda: replay(path, base), base, JournalError, "damaged")
    length = int.from_bytes(whole[8:12], "little")
    payload = whole[20 : 20 + length].replace(
        b'"version": %d' % journal_file.VERSION, b'"version": 9'
    )
    path.write_bytes(whole[:8] + journal_file.framed(payload) + whole[20 + length :])
    unchanged_after(lambda: replay(path, base), base, JournalError, "has version 9")
    path.write_bytes(whole)
    other = MAKERS["mezo"](causal_lm("opt"))
    with pytest.raises(JournalError, match="of another model or of other settings"):
        Journal(path, other)
    late = resumed(path, MAKERS["pseuzo"](copy.deepcopy(base)), base, [])
    late._steps = 9
    with pytest.raises(JournalError, match=r"ends before step 4, .* continues with step 9"):
        Journal(path, late)
    header = read_journal(path)[0] | {"first_step": 7}
    early = tmp_path / "early"
    early.write_bytes(journal_file.MAGIC + journal_file.framed(json.dumps(header).encode()))
    with pytest.raises(JournalError, match=r"begins with step 7, .* continues with step 0"):
        Journal(early, MAKERS["pseuzo"](copy.deepcopy(base)))
    with pytest.raises(ValueError, match="bare fp32 parameters"):
        Journal(tmp_path / "new", MeZO(base.parameters()))
    assert path.read_bytes() == whole and not (tmp_path / "new").exists()
