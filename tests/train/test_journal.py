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
from pseuzo import CausalLMObjective, CyclicHyperbola, Journal, MeZO, PseuZO, replay
from pseuzo.cli.commands import main
from pseuzo.train import journal, journal_file
from pseuzo.train import replay as replaying
from pseuzo.train.journal_file import JournalError, read_journal
from tiny_models import batch_of, causal_lm
from transformers import AutoModelForCausalLM

from pseuzo_kernels import reference

LABELS = torch.tensor([0, 1, 1, 0])


def same(left, right):
    return all(
        torch.equal(p, q) for p, q in zip(left.parameters(), right.parameters(), strict=True)
    )


MAKERS = {
    "pseuzo": lambda m: PseuZO(m, 1e-3, 1e-2, 3, 0.9, 0.1, seed=2),
    "fp16 sums": lambda m: PseuZO(m, 1e-3, 1e-2, 3, 0.9, 0.1, noise="hadamard-fp16", seed=2),
    "mezo": lambda m: MeZO(
        m, 1e-3, 1e-2, weight_decay=0.1, seed=2, noise="rademacher", maximize=True
    ),
    "groups": lambda m: PseuZO(
        [
            {"params": list(m.parameters())[:3], "lr": 1e-2, "noise_scale": 0.5},
            {"params": list(m.parameters())[3:]},
        ],
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


@pytest.mark.slow
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
    monkeypatch.setattr(replaying, "add_noise_steps_", reference.add_noise_steps_)
    monkeypatch.setattr(replaying, "STEPS_AT_ONCE", 3)
    assert replay(tmp_path / "run.pzj", base, progress=bars.append) == 8 and len(bars) == 8
    for want, got in ((halfway, half), (model, whole), (model, base)):
        assert all(
            torch.equal(p, q) for p, q in zip(want.parameters(), got.parameters(), strict=True)
        )
    assert any(
        not torch.equal(p, q) for p, q in zip(halfway.parameters(), model.parameters(), strict=True)
    )


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_group_whose_update_overflows_is_left_alone_in_the_replay_too(order, tmp_path):
    model = causal_lm("opt")
    base, before = copy.deepcopy(model), copy.deepcopy(model)
    params = list(model.parameters())
    groups = [
        {"params": params[:3], "lr": 1e-12},
        {"params": params[3:], "lr": 1e30},
    ]  # times a slope of 1e11
    opt = MeZO([groups[i] for i in order], 1e-3, 1e-2, weight_decay=1e-31, model=model)
    losses = iter([1e9, -1e9, 1e9, -1e9])
    with Journal(tmp_path / "run.pzj", opt):
        for _ in range(2):
            opt.step(lambda: model(**batch_of()).logits.sum() * 0 + next(losses))
    for p, was in zip(params, before.parameters(), strict=True):
        assert torch.equal(p, was) == any(p is q for q in groups[1]["params"])
    assert opt.skipped_steps == 0 and replay(tmp_path / "run.pzj", base) == 2
    assert all(torch.equal(p, q) for p, q in zip(params, base.parameters(), strict=True))


def journal_of(tmp_path, steps=4):
    model = causal_lm("opt")
    base = copy.deepcopy(model)
    opt = MAKERS["pseuzo"](model)
    with Journal(tmp_path / "run.pzj", opt):
        train(opt, model, range(steps))
    return tmp_path / "run.pzj", base, model, opt


def resumed(path, opt, model, steps):
    """opt and model as after a resume from a checkpoint that the run of this journal saved after these steps."""
    train(opt, model, steps)
    state = copy.deepcopy(opt.state_dict())
    state["state"]["zero_order"]["journal"] = read_journal(path)[0]["run"]
    opt.load_state_dict(state)
    return opt


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
    with Journal(path, opt):  # what reopening refuses is refused here, too
        opt.load_state_dict(later)
        unchanged_after(
            lambda: train(opt, model, [12]),
            model,
            JournalError,
            "ends before step 3, .* goes on with step 7",
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
    opt = PseuZO(
        [p for n, p in model.named_parameters() if n != "lm_head.weight"],
        1e-3,
        1e-2,
        3,
        model=model,
    )
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
    # without a record: gone on with by the run that began it, and by no other
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


@pytest.mark.parametrize("header, sentence", [
    (b"\xff{", "the header cannot be read"), (b'{"version": 1', "the header cannot be read"),
    (b"[1]", "the header cannot be read"), (b"{}", "the header cannot be read"),
    (b'{"version": %d}' % journal_file.VERSION, "the header lacks 'noise'"),
])  # fmt: skip
def test_a_header_that_cannot_be_read(header, sentence, tmp_path):
    path = tmp_path / "x.pzj"
    path.write_bytes(journal_file.MAGIC + journal_file.framed(header))
    model = causal_lm("opt")
    for call in (
        lambda: read_journal(path),
        lambda: replay(path, model),
        lambda: Journal(path, MeZO(model)),
    ):
        with pytest.raises(JournalError, match=f"x.pzj: {sentence}"):
            call()
    for payload in (
        b"short",
        journal_file.Record(3, 0, False, [], [7], torch.tensor([1]), torch.ones(1)).pack()[:-1],
    ):
        with pytest.raises(JournalError, match="bytes where"):
            journal_file.Record.unpack(payload)


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
    resumed(tmp_path / "run.pzj", again, twin, range(2))
    path = tmp_path / "old.pzj"
    with open(tmp_path / "run.pzj", "rb") as file:
        header, rest = journal_file.read_header(file), file.read()
    assert header.pop("rounding_version") == reference.ROUNDING_VERSION
    header |= (
        {} if written is None else {"rounding_version": written}
    )  # the first rule was not written down
    old = journal_file.MAGIC + journal_file.framed(json.dumps(header).encode()) + rest
    path.write_bytes(old)
    if (
        (written is None and reference.ROUNDING_VERSION == 1)
        or dtype is torch.float32
        or rounding == "nearest"
    ):
        assert replay(path, base) == 2
        assert all(
            torch.equal(p, q) for p, q in zip(model.parameters(), base.parameters(), strict=True)
        )
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
    unchanged_after(
        lambda: replay(path, trained), trained, JournalError, "not those that the run began with"
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
    with pytest.raises(JournalError, match="ends before step 4, the optimizer goes on with step 9"):
        Journal(path, late)
    header = read_journal(path)[0] | {"first_step": 7}
    early = tmp_path / "early"
    early.write_bytes(journal_file.MAGIC + journal_file.framed(json.dumps(header).encode()))
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
        starts.append(
            starts[-1] + 12 + int.from_bytes(whole[starts[-1] : starts[-1] + 4], "little")
        )
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
        dict(other.named_parameters())[next(n for n, p in model.named_parameters() if p is frozen)][
            0, 0
        ] += 1
    unchanged_after(
        lambda: replay(tmp_path / "run.pzj", other),
        other,
        JournalError,
        "weights that the run did not train are not",
    )
    with torch.no_grad():
        frozen[0, 0] += 1
    with pytest.raises(JournalError, match="another model or of other settings"):
        Journal(tmp_path / "run.pzj", opt)
    assert replay(tmp_path / "run.pzj", base) == 2
    frozen.data[0, 0] -= 1
    assert all(
        torch.equal(p, q)
        for p, q in zip(model.parameters(), base.parameters(), strict=True)
        if p is not frozen
    )


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
    assert all(
        torch.equal(p, q) for p, q in zip(trained.parameters(), rebuilt.parameters(), strict=True)
    )
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
    result = run("cut", "--base", str(tmp_path / "base"))
    assert result.exit_code == 0 and "3 steps replayed" in result.output
    assert "run.pzj: the last record is cut short, as by a crash; it is left out" in result.output
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


# whose a journal is


def test_a_journal_of_another_run_is_not_continued(tmp_path):
    """Of the same model and settings, and of as many steps: nothing but the identifier tells the runs apart."""
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
    with Journal(
        path, opt
    ):  # the other's state, of the same step, is loaded while the journal is open
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
    del state["state"]["zero_order"]["journal"]  # it was saved before there were identifiers
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
    monkeypatch.setattr(
        os.path, "samestat", lambda *files: False
    )  # a file system that makes up its numbers
    with pytest.raises(JournalError, match="choose one on another disk"):
        journal_file.hold(path)


# damage


def parts(path):
    """Where the header and the records begin, and where the file ends."""
    whole, starts = path.read_bytes(), [8]
    while starts[-1] < len(whole):
        starts.append(
            starts[-1] + 12 + int.from_bytes(whole[starts[-1] : starts[-1] + 4], "little")
        )
    return starts


DAMAGES = {
    "zeros": lambda part: bytes(len(part)),
    "a bit of its length": lambda part: bytes([part[0] ^ 1]) + part[1:],
    "a bit of its content": lambda part: part[:40] + bytes([part[40] ^ 8]) + part[41:],
    "another step": lambda part: journal_file.framed((9).to_bytes(8, "little") + part[20:]),
}


@pytest.mark.parametrize("rest", ["whole", "zeros"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_what_precedes_damage_can_be_used(damage, rest, tmp_path):
    """The record of step 5 of 8 is damaged, and what follows it is whole, or zeros, as after a loss of power."""
    path, base, _, _ = journal_of(tmp_path, steps=8)
    whole, (at, after) = path.read_bytes(), parts(path)[6:8]
    tail = whole[after:] if rest == "whole" else bytes(len(whole) - after)
    path.write_bytes(whole[:at] + DAMAGES[damage](whole[at:after]) + tail)
    damaged, want = path.read_bytes(), copy.deepcopy(base)
    opt = resumed(path, MAKERS["pseuzo"](want), want, range(5))

    for until in (6, None):
        sentence = "what precedes step 5 can be replayed: --until 5, or --salvage"
        unchanged_after(lambda n=until: replay(path, base, until=n), base, JournalError, sentence)
    rebuilt = copy.deepcopy(base)
    assert replay(path, rebuilt, until=5) == 5 and same(rebuilt, want)
    rebuilt = copy.deepcopy(base)
    lost = rf"run.pzj: damaged from byte {at} on: step 5 and all after it are lost \({len(whole) - at} bytes\)"
    with pytest.warns(UserWarning, match=lost):
        assert replay(path, rebuilt, salvage=True) == 5
    assert same(rebuilt, want) and journal_file.owner(path)[1] == 5

    # a resume from after the damage is refused, and told from where it is possible
    late = copy.deepcopy(base)
    with pytest.raises(
        JournalError, match="goes on with step 7; resume from a checkpoint of step 5 or before"
    ):
        Journal(path, resumed(path, MAKERS["pseuzo"](late), late, range(7)))
    assert path.read_bytes() == damaged
    with Journal(path, opt):
        train(opt, want, range(5, 8))
    assert path.read_bytes() == whole


def test_salvage_of_a_whole_journal_loses_nothing(tmp_path, recwarn):
    path, base, model, _ = journal_of(tmp_path)
    assert replay(path, base, salvage=True) == 4 and same(base, model) and not recwarn.list


def test_salvage_on_the_command_line(tmp_path):
    path, base, _, _ = journal_of(tmp_path)
    base.save_pretrained(tmp_path / "base")
    whole, at = path.read_bytes(), parts(path)[3]
    path.write_bytes(whole[:at] + bytes(len(whole) - at))
    arguments = ["replay", "--journal", str(path), "--base", str(tmp_path / "base"), "--output"]
    run = lambda out, *rest: CliRunner().invoke(main, [*arguments, str(tmp_path / out), *rest])  # noqa: E731
    result = run("out")
    assert (
        result.exit_code == 2
        and "what precedes step 2 can be replayed: --until 2, or --salvage" in result.output
    )
    result = run("out", "--salvage")
    assert result.exit_code == 0 and "2 steps replayed, up to step 2" in result.output, (
        result.output
    )
    assert result.output.count(f"damaged from byte {at} on: step 2 and all after it are lost") == 1
    assert "Warning" not in result.output
    result = run("until", "--until", "2")
    assert result.exit_code == 0 and "lost" not in result.output
    assert replay(path, base, until=2) == 2
    for out in ("out", "until"):
        assert same(AutoModelForCausalLM.from_pretrained(tmp_path / out), base)


# what is on the disk, and when


def test_records_reach_the_disk_for_less_than_a_hundredth_of_the_time(tmp_path, monkeypatch):
    """By a clock of our own: a sync takes 0.03 s, every tenth one 0.3 s, and a step 0.07 s."""
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
    """late: a record waits for the next step, as those of a GPU do."""
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
        "the step is made, and half a record is taken back"
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


def test_more_seeds_than_65535_an_update(tmp_path):
    model = torch.nn.Linear(2, 2, bias=False)
    base = copy.deepcopy(model)
    opt = MeZO(model, 1e-3, 1e-2, directions=70, momentum=0.9, window=1000)
    opt._past = torch.arange(999 * 70).view(999, 70), torch.randn(999, 70) * 1e-3
    with Journal(tmp_path / "run.pzj", opt):
        for _ in range(2):
            opt.step(lambda: model(torch.ones(1, 2)).square().mean())
    assert [len(r.seeds) for r in read_journal(tmp_path / "run.pzj")[1]] == [70_000, 70_000]
    assert replay(tmp_path / "run.pzj", base) == 2
    assert torch.equal(model.weight, base.weight)


# weights that somebody else writes


@torch.no_grad()
def add_one(model):
    next(model.parameters()).view(-1)[3] += 1


WRITES = {
    "in place": (add_one, "were written"),
    "loaded": (lambda m: m.load_state_dict(m.state_dict()), "were written"),
    "converted": (lambda m: m.to(torch.float16), "were moved or converted"),
    "there and back": (lambda m: m.half().float(), "were moved or converted"),
    "replaced": (
        lambda m: setattr(m.lm_head.weight, "data", m.lm_head.weight.clone()),
        "were moved or converted",
    ),
    "frozen": (
        lambda m: torch.nn.init.zeros_(m.model.layers[0].mlp.up_proj.weight),
        "were written",
    ),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("steps", [0, 2])
def test_a_weight_that_somebody_else_wrote_is_noticed(write, steps, tmp_path):
    model, path = causal_lm("llama"), tmp_path / "run.pzj"
    frozen = model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    opt = PseuZO([p for p in model.parameters() if p is not frozen], 1e-3, 1e-2, 3, model=model)
    opened = Journal(path, opt)
    train(opt, model, range(steps))
    size = path.stat().st_size
    WRITES[write][0](model)
    unchanged_after(
        lambda: train(opt, model, [steps]),
        model,
        JournalError,
        f"run.pzj: weights {WRITES[write][1]}",
    )
    assert opt.steps == steps and path.stat().st_size == size
    opened.close()
    if steps:  # nor is it forgotten when the journal is opened again
        with pytest.raises(
            JournalError, match=r"load a checkpoint|of another model or of other settings"
        ):
            Journal(path, opt)
    base = copy.deepcopy(model)
    with Journal(tmp_path / "new.pzj", opt):
        train(opt, model, [steps])
    replay(tmp_path / "new.pzj", base)
    assert same(base, model)


def test_no_other_weights_get_the_addresses_of_the_watched_ones(tmp_path):
    """Else weights that were converted there and back could pass for those that were left alone."""
    model = causal_lm("opt")
    places = {p.data_ptr() for p in model.parameters()}
    opened = Journal(tmp_path / "run.pzj", MAKERS["mezo"](model))
    model.half().float()
    assert {storage.data_ptr() for storage in opened._weights._storages} == places
    opened.close()
    assert not opened._weights._storages, "their memory is free again"


@pytest.mark.parametrize("between", ["steps", "estimate and step"])
def test_a_write_to_bare_parameters_is_noticed(between, tmp_path):
    """Though the optimizer itself writes them, to perturb them and to put them back."""
    x, path = torch.nn.Parameter(torch.randn(50).bfloat16()), tmp_path / "run.pzj"
    base = {"parameter 0": x.detach().clone()}
    opt = MeZO([x], 1e-2, 1e-2)
    loss = lambda: x.float().square().sum()  # noqa: E731

    def fails():
        raise RuntimeError("no loss")

    with Journal(path, opt):
        opt.step(loss)
        opt.estimate(loss)
        opt.estimate(loss)
        opt.step()
        with pytest.raises(RuntimeError, match="no loss"):
            opt.step(fails)
        opt.step(loss)
        before = x.detach().clone()
        if between == "estimate and step":
            opt.estimate(loss)
        with torch.no_grad():
            x[7] += 1
        with pytest.raises(JournalError, match="weights were written since the last step"):
            opt.step() if between == "estimate and step" else opt.step(loss)
        changed = x.detach() != before
        assert changed.sum() == 1 and changed[7] and opt.steps == 3
    assert replay(path, base) == 3 and torch.equal(base["parameter 0"], before)


def test_what_leaves_the_weights_alone_is_no_write(tmp_path):
    path, model = tmp_path / "run.pzj", causal_lm("llama")
    base = copy.deepcopy(model)
    opt = PseuZO(
        [p for n, p in model.named_parameters() if n != "lm_head.weight"],
        1e-3,
        1e-2,
        3,
        model=model,
    )
    with Journal(path, opt):
        for step in range(3):
            train(opt, model, [step])
            model.to("cpu").float().train().eval()
            model.requires_grad_(False).requires_grad_(True)
            model(**batch_of(), labels=batch_of()["input_ids"]).loss.backward()
            model.zero_grad()
            model.save_pretrained(tmp_path / "saved")
            copy.deepcopy(model)
            with torch.inference_mode():
                model(**batch_of())
    assert replay(path, base) == 3 and same(base, model)
