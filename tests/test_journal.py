"""Base weights + journal = the weights of the run, to the bit; and what a journal refuses."""

import copy
import json
import multiprocessing
import os
import signal
from itertools import pairwise

import pytest
import torch
from click.testing import CliRunner
from models import batch_of, causal_lm
from pseuzo import CausalLMObjective, CyclicHyperbola, Journal, MeZO, PseuZO, journal, replay
from pseuzo.cli import main
from pseuzo.journal import JournalError, read_journal
from transformers import AutoModelForCausalLM

from pseuzo_kernels import reference

LABELS = torch.tensor([0, 1, 1, 0])
MAKERS = {
    "pseuzo": lambda m: PseuZO(m, 1e-3, 1e-2, 3, 0.9, 0.1, seed=2),
    "fp16 sums": lambda m: PseuZO(m, 1e-3, 1e-2, 3, 0.9, 0.1, noise="hadamard-fp16", seed=2),
    "mezo": lambda m: MeZO(m, 1e-3, 1e-2, weight_decay=0.1, seed=2, noise="rademacher", maximize=True),
    "groups": lambda m: PseuZO(
        [{"params": list(m.parameters())[:3], "lr": 1e-2, "noise_scale": 0.5}, {"params": list(m.parameters())[3:]}],
        1e-3,
        1e-2,
        3,
        CyclicHyperbola(8),
        seed=2,
        rounding="nearest",
        model=m,
    ),
}


def train(opt, model, steps, poison=()):
    objective = CausalLMObjective(model, [17, 4])
    for t in steps:
        forward, head = objective({**batch_of(seed=t), "labels": LABELS})
        factor = float("nan") if t in poison else 1.0
        if isinstance(opt, PseuZO):
            opt.step(forward, lambda o, h=head, c=factor: h(o) * c, groups=LABELS)
        else:
            opt.step(lambda f=forward, h=head, c=factor: h(f()) * c)


@pytest.mark.filterwarnings("ignore:.*skipped")
@pytest.mark.parametrize("kind", ["opt", "llama"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", MAKERS)
def test_replay_gives_the_bits_of_the_run(method, dtype, kind, tmp_path, monkeypatch):
    model = causal_lm(kind).to(dtype)
    base, half, whole = copy.deepcopy(model), copy.deepcopy(model), copy.deepcopy(model)
    opt = MAKERS[method](model)
    with Journal(tmp_path / "run.pzj", opt):
        train(opt, model, range(4))
        halfway = copy.deepcopy(model)
        torch.optim.lr_scheduler.ConstantLR(opt, 0.3)  # the rate changes in mid-run
        train(opt, model, range(4, 8), poison=(5,))
    train(opt, copy.deepcopy(model), [])
    assert opt.journal is None and opt.skipped_steps == 1
    bars = []
    assert replay(tmp_path / "run.pzj", half, until=4) == 4
    assert replay(tmp_path / "run.pzj", whole) == 8
    # again on another backend, the reference in the place of C++, and in batches
    monkeypatch.setattr(torch.ops.pseuzo, "add_noise_steps_", reference.add_noise_steps_)
    monkeypatch.setattr(journal, "STEPS_AT_ONCE", 3)
    assert replay(tmp_path / "run.pzj", base, progress=bars.append) == 8 and len(bars) == 8
    for want, got in ((halfway, half), (model, whole), (model, base)):
        assert all(torch.equal(p, q) for p, q in zip(want.parameters(), got.parameters(), strict=True))
    assert any(not torch.equal(p, q) for p, q in zip(halfway.parameters(), model.parameters(), strict=True))


def journal_of(tmp_path, steps=4):
    model = causal_lm("opt")
    base = copy.deepcopy(model)
    opt = MAKERS["pseuzo"](model)
    with Journal(tmp_path / "run.pzj", opt):
        train(opt, model, range(steps))
    return tmp_path / "run.pzj", base, model, opt


def unchanged_after(call, model, error, sentence):
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(error, match=sentence):
        call()
    assert all(torch.equal(p, was) for p, was in zip(model.parameters(), before, strict=True))


def test_a_torn_tail_loses_one_step_and_is_cut_off_on_reopening(tmp_path):
    path, base, _, _ = journal_of(tmp_path)
    whole = path.read_bytes()
    ends = []
    for size in range(len(whole) - 1, len(whole) - 150, -7):
        path.write_bytes(whole[:size])
        ends.append(len(list(read_journal(path)[1])))
    assert set(ends) == {3, 2}
    path.write_bytes(whole[:-5])
    # a run that was killed in its 4th step goes on from its checkpoint of 3 steps
    model = copy.deepcopy(base)
    opt = MAKERS["pseuzo"](model)
    train(opt, model, range(3))
    with Journal(path, opt):
        train(opt, model, [3])
    assert path.read_bytes() == whole


def test_going_back_to_a_checkpoint_cuts_what_came_after(tmp_path):
    path, base, _, _ = journal_of(tmp_path)
    model = copy.deepcopy(base)
    opt = MAKERS["pseuzo"](model)
    train(opt, model, range(2))
    with Journal(path, opt):
        train(opt, model, [10, 11, 12])  # other batches than before
    assert replay(path, base) == 5
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), base.parameters(), strict=True))


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
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), rebuilt.parameters(), strict=True))
    assert any(not torch.equal(p, q) for p, q in zip(model.parameters(), base.parameters(), strict=True))

    later = copy.deepcopy(opt.state_dict())
    later["state"]["zero_order"]["step"] = 7
    with Journal(path, opt):  # what reopening refuses is refused here, too
        opt.load_state_dict(later)
        unchanged_after(
            lambda: train(opt, model, [12]), model, JournalError, "ends before step 3, .* goes on with step 7"
        )
        back_to(0)
        unchanged_after(lambda: train(opt, model, [12]), model, JournalError, r"run.pzj holds 3 step\(s\) already")
        assert opt._step == 0 and path.read_bytes() == whole


CHANGES = {
    "a group": lambda opt: opt.add_param_group({"params": [opt.model.lm_head.weight]}),
    "exact": lambda opt: opt.param_groups[0].update(exact_gradient=True),
    "noise": lambda opt: setattr(opt, "noise", "rademacher"),
    "rounding": lambda opt: setattr(opt, "rounding", "nearest"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_cannot_be_recorded_is_not_made(change, tmp_path):
    model, path = causal_lm("llama"), tmp_path / "run.pzj"
    opt = PseuZO([p for n, p in model.named_parameters() if n != "lm_head.weight"], 1e-3, 1e-2, 3, model=model)
    with Journal(path, opt):
        train(opt, model, [0])
        whole, window = path.read_bytes(), opt.window.state_dict()
        opt.estimate(*CausalLMObjective(model, [17, 4])({**batch_of(), "labels": LABELS}), groups=LABELS)
        CHANGES[change](opt)
        unchanged_after(opt.step, model, RuntimeError, "groups, noise or rounding were changed since it was opened")
    assert opt._step == 1 and path.read_bytes() == whole
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
        with pytest.raises(JournalError, match=r"run.pzj is in use by another run; choose a new file, or"):
            Journal(path, other)
        assert opt.journal is first and other.journal is None
        assert path.read_bytes() == whole and not (tmp_path / "second.pzj").exists()
        assert replay(path, copy.deepcopy(base)) == 4, "readers are let in"
        inherited = os.dup(first._file.fileno())  # as a forked data loader has it
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
    train(opt, model, [0])
    with Journal(path, opt):
        train(opt, model, [1])
    assert replay(path, causal_lm("opt")) == 2


def test_a_run_from_its_beginning_does_not_overwrite_another(tmp_path):
    path, base, _, _ = journal_of(tmp_path)
    whole = path.read_bytes()
    for fresh in (copy.deepcopy(base), causal_lm("opt")):
        with pytest.raises(JournalError, match=r"run.pzj holds 4 step\(s\) already, .*; choose a new file"):
            Journal(path, MAKERS["pseuzo"](fresh))
    assert path.read_bytes() == whole
    # without a record: gone on with by the run that began it, and by no other
    empty = whole[: 20 + int.from_bytes(whole[8:12], "little")]
    for tail in (b"", whole[len(empty) : len(empty) + 20]):
        path.write_bytes(empty + tail)
        other = copy.deepcopy(base)
        with torch.no_grad():
            next(other.parameters()).view(-1)[3] += 1
        with pytest.raises(JournalError, match="is the journal of a run from other weights; choose a new file"):
            Journal(path, MAKERS["pseuzo"](other))
        assert path.read_bytes() == empty + tail
        model = copy.deepcopy(base)
        opt = MAKERS["pseuzo"](model)
        with Journal(path, opt):
            train(opt, model, range(4))
        assert path.read_bytes() == whole


@pytest.mark.parametrize("header, sentence", [
    (b"\xff{", "the header cannot be read"), (b'{"version": 1', "the header cannot be read"),
    (b"[1]", "the header cannot be read"), (b"{}", "the header cannot be read"),
    (b'{"version": 2}', "the header lacks 'noise'"),
])  # fmt: skip
def test_a_header_that_cannot_be_read(header, sentence, tmp_path):
    path = tmp_path / "x.pzj"
    path.write_bytes(journal.MAGIC + journal._part(header))
    model = causal_lm("opt")
    for call in (lambda: read_journal(path), lambda: replay(path, model), lambda: Journal(path, MeZO(model))):
        with pytest.raises(JournalError, match=f"x.pzj: {sentence}"):
            call()
    for payload in (b"short", journal.Record(3, 0, False, [], [7], torch.tensor([1]), torch.ones(1)).pack()[:-1]):
        with pytest.raises(JournalError, match="bytes where"):
            journal.Record.unpack(payload)


@pytest.mark.parametrize("dtype, rounding", [(torch.bfloat16, "stochastic"), (torch.bfloat16, "nearest"),
                                             (torch.float32, "stochastic")])  # fmt: skip
@pytest.mark.parametrize("written", [None, 99])
def test_a_journal_of_another_rounding_rule(dtype, rounding, written, tmp_path):
    """Its stochastic 16-bit updates would be replayed to other bits; all others have the same bits under every rule."""
    model = causal_lm("opt").to(dtype)
    base, twin = copy.deepcopy(model), copy.deepcopy(model)
    make = lambda m: MeZO(m, 1e-3, 1e-2, rounding=rounding)  # noqa: E731
    opt, again = make(model), make(twin)
    with Journal(tmp_path / "run.pzj", opt):
        train(opt, model, range(2))
    train(again, twin, range(2))
    path = tmp_path / "old.pzj"
    with open(tmp_path / "run.pzj", "rb") as file:
        header, rest = journal._read_header(file), file.read()
    assert header.pop("rounding_version") == reference.ROUNDING_VERSION
    header |= {} if written is None else {"rounding_version": written}  # the first rule was not written down
    old = journal.MAGIC + journal._part(json.dumps(header).encode()) + rest
    path.write_bytes(old)
    if (written is None and reference.ROUNDING_VERSION == 1) or dtype is torch.float32 or rounding == "nearest":
        assert replay(path, base) == 2
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), base.parameters(), strict=True))
        with Journal(path, again):
            train(again, twin, [2])
        assert len(list(read_journal(path)[1])) == 3
        return
    sentence = f"16-bit weights were rounded stochastically by version {written or 1} of the rule, this pseuzo has vers"
    unchanged_after(lambda: replay(path, base), base, JournalError, sentence)
    with pytest.raises(JournalError, match=sentence):
        Journal(path, again)
    assert path.read_bytes() == old


def test_what_is_refused(tmp_path):
    path, base, trained, _ = journal_of(tmp_path)
    whole = path.read_bytes()
    unchanged_after(lambda: replay(path, trained), trained, JournalError, "not those that the run began with")
    llama = causal_lm("llama")
    unchanged_after(lambda: replay(path, llama), llama, JournalError, "the base model lacks")
    half = copy.deepcopy(base).to(torch.bfloat16)
    unchanged_after(lambda: replay(path, half), half, JournalError, "is .* bfloat16 in the base model")
    foreign = tmp_path / "foreign"
    foreign.write_bytes(b"PK\x03\x04" + bytes(100))
    unchanged_after(lambda: replay(foreign, base), base, JournalError, "is not a journal")
    for at in (len(whole) - 20, len(whole) - 200):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        unchanged_after(lambda: replay(path, base), base, JournalError, "damaged")
    length = int.from_bytes(whole[8:12], "little")
    payload = whole[20 : 20 + length].replace(b'"version": 2', b'"version": 9')
    path.write_bytes(whole[:8] + journal._part(payload) + whole[20 + length :])
    unchanged_after(lambda: replay(path, base), base, JournalError, "has version 9")
    path.write_bytes(whole)
    other = MAKERS["mezo"](causal_lm("opt"))
    with pytest.raises(JournalError, match="of another model or of other settings"):
        Journal(path, other)
    late = MAKERS["pseuzo"](copy.deepcopy(base))
    late._step = 9
    with pytest.raises(JournalError, match="ends before step 4, the optimizer goes on with step 9"):
        Journal(path, late)
    header = read_journal(path)[0] | {"first_step": 7}
    early = tmp_path / "early"
    early.write_bytes(journal.MAGIC + journal._part(json.dumps(header).encode()))
    with pytest.raises(JournalError, match="begins with step 7, the optimizer goes on with step 0"):
        Journal(early, MAKERS["pseuzo"](copy.deepcopy(base)))
    with pytest.raises(ValueError, match="bare fp32 parameters"):
        Journal(tmp_path / "new", MeZO(base.parameters()))
    assert path.read_bytes() == whole and not (tmp_path / "new").exists()


def test_a_damaged_length_is_no_torn_tail(tmp_path):
    """A bit flipped in any byte of a length and its checksums: of the header, a record in the middle, the last one."""
    path, base, _, _ = journal_of(tmp_path)
    whole, starts = path.read_bytes(), [8]
    while starts[-1] < len(whole):
        starts.append(starts[-1] + 12 + int.from_bytes(whole[starts[-1] : starts[-1] + 4], "little"))
    assert len(starts) == 1 + 4 + 1 and starts[-1] == len(whole)
    for start in (starts[0], starts[2], starts[4]):
        for at in range(start, start + 12):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << at % 8)]) + whole[at + 1 :])
            unchanged_after(lambda: replay(path, base), base, JournalError, "damaged")


@pytest.mark.parametrize("where", ["a frozen layer", "an untied head"])
def test_other_frozen_weights_are_another_base(where, tmp_path):
    """They are no part of the updates, but without them the model is another one."""
    model = causal_lm("llama")
    if where == "a frozen layer":
        frozen = model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    else:
        frozen = model.lm_head.weight
    base = copy.deepcopy(model)
    opt = PseuZO([p for p in model.parameters() if p is not frozen], 1e-3, 1e-2, 3, model=model)
    with Journal(tmp_path / "run.pzj", opt):
        train(opt, model, range(2))
    other = copy.deepcopy(base)
    with torch.no_grad():
        dict(other.named_parameters())[next(n for n, p in model.named_parameters() if p is frozen)][0, 0] += 1
    unchanged_after(
        lambda: replay(tmp_path / "run.pzj", other), other, JournalError, "weights that the run did not train are not"
    )
    with torch.no_grad():
        frozen[0, 0] += 1
    with pytest.raises(JournalError, match="another model or of other settings"):
        Journal(tmp_path / "run.pzj", opt)
    assert replay(tmp_path / "run.pzj", base) == 2
    frozen.data[0, 0] -= 1
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), base.parameters(), strict=True) if p is not frozen)


def test_records_are_small_and_in_the_file_after_each_step(tmp_path):
    model = causal_lm("opt")
    opt = PseuZO(model, 1e-3, 1e-2)
    journal = Journal(tmp_path / "run.pzj", opt)
    sizes = []
    for t in range(20):
        train(opt, model, [t])
        sizes.append((tmp_path / "run.pzj").stat().st_size)
    journal.close()
    assert all(b > a for a, b in pairwise(sizes))
    assert (sizes[-1] - sizes[-2]) * 10_000 < 2.5e6


def test_replay_on_the_command_line(tmp_path):
    path, base, trained, _ = journal_of(tmp_path)
    base.save_pretrained(tmp_path / "base")
    trained.save_pretrained(tmp_path / "wrong")
    arguments = ["replay", "--journal", str(path), "--output"]
    run = lambda out, *rest: CliRunner().invoke(main, [*arguments, str(tmp_path / out), *rest])  # noqa: E731
    result = run("out", "--base", str(tmp_path / "base"))
    assert result.exit_code == 0 and "4 steps replayed" in result.output, result.output
    rebuilt = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(p, q) for p, q in zip(trained.parameters(), rebuilt.parameters(), strict=True))
    assert {p.suffix for p in (tmp_path / "out").iterdir()} <= {".json", ".safetensors"}
    whole = path.read_bytes()
    for damaged, sentence in (
        (b"PK" + whole, "is not a journal of pseuzo"),
        (whole[:-30] + b"?" + whole[-29:], "is damaged"),
        (whole[:8] + bytes([whole[8] ^ 64]) + whole[9:], "is damaged"),
    ):
        path.write_bytes(damaged)
        result = run("new", "--base", str(tmp_path / "base"))
        assert result.exit_code == 2 and sentence in result.output, result.output
    path.write_bytes(whole[:-30])
    with pytest.warns(UserWarning, match="run.pzj: the last record is cut short"):
        result = run("cut", "--base", str(tmp_path / "base"))
    assert result.exit_code == 0 and "3 steps replayed" in result.output
    path.write_bytes(whole)
    for out, base_folder, sentence in (
        ("out", "base", "is not empty"),
        ("new", "wrong", "not those that the run began with"),
        ("new", "nowhere", "there is no folder"),
    ):
        result = run(out, "--base", str(tmp_path / base_folder))
        assert result.exit_code == 2 and sentence in result.output, result.output
    assert not (tmp_path / "new").exists()


def test_the_header_says_what_is_needed(tmp_path):
    path, base, _, _ = journal_of(tmp_path)
    header, records = read_journal(path)
    assert json.loads(json.dumps(header)) == header
    assert [e["name"] for e in header["params"]] == [n for n, _ in base.named_parameters()]
    assert [r.step for r in records] == [0, 1, 2, 3]
