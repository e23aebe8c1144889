"""Each part of a journal holds the right bytes, and damage to any part is noticed."""

import copy
import json
from itertools import pairwise

import pytest
import torch
from journal_cases import MAKERS, journal_of, parts, resumed, same, train, unchanged_after
from pseuzo import Journal, MeZO, PseuZO, replay
from pseuzo.train import journal_file
from pseuzo.train.journal_file import JournalError, read_journal
from tiny_models import causal_lm

from pseuzo_kernels import reference


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


def test_the_header_says_what_is_needed(tmp_path):
    path, base, _, _ = journal_of(tmp_path)
    header, records = read_journal(path)
    assert json.loads(json.dumps(header)) == header
    assert [e["name"] for e in header["params"]] == [n for n, _ in base.named_parameters()]
    assert [r.step for r in records] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "header, sentence",
    [
        (b"\xff{", "the header cannot be read"),
        (b'{"version": 1', "the header cannot be read"),
        (b"[1]", "the header cannot be read"),
        (b"{}", "the header cannot be read"),
        (b'{"version": %d}' % journal_file.VERSION, "the header lacks 'noise'"),
    ],
)
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
        with pytest.raises(JournalError, match="bytes, but needs"):
            journal_file.Record.unpack(payload)


@pytest.mark.parametrize(
    "dtype, rounding",
    [(torch.bfloat16, "stochastic"), (torch.bfloat16, "nearest"), (torch.float32, "stochastic")],
)
@pytest.mark.parametrize("written", [None, 99])
def test_a_journal_of_another_rounding_rule(dtype, rounding, written, tmp_path):
    """Another rule would change the bits of stochastic 16-bit updates, and no others."""
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
    # Journals of the first rule do not name their rule.
    header |= {} if written is None else {"rounding_version": written}
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
    sentence = f"16-bit weights were rounded stochastically by version {written or 1} of the rule, "
    sentence += "but this pseuzo has vers"
    unchanged_after(lambda: replay(path, base), base, JournalError, sentence)
    with pytest.raises(JournalError, match=sentence):
        Journal(path, again)
    assert path.read_bytes() == old


def test_a_damaged_length_is_no_torn_tail(tmp_path):
    """A bit is flipped in each byte of a length and its checksums, in the header, in a record in
    the middle, and in the last record."""
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


DAMAGES = {
    "zeros": lambda part: bytes(len(part)),
    "a bit of its length": lambda part: bytes([part[0] ^ 1]) + part[1:],
    "a bit of its content": lambda part: part[:40] + bytes([part[40] ^ 8]) + part[41:],
    "another step": lambda part: journal_file.framed((9).to_bytes(8, "little") + part[20:]),
}


@pytest.mark.parametrize("rest", ["whole", "zeros"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_what_precedes_damage_can_be_used(damage, rest, tmp_path):
    """The record of step 5 of 8 is damaged. The rest is whole, or zeros, as after a loss of
    power."""
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
    lost = f"run.pzj: damaged from byte {at} on: step 5 and all after it are lost "
    lost += rf"\({len(whole) - at} bytes\)"
    with pytest.warns(UserWarning, match=lost):
        assert replay(path, rebuilt, salvage=True) == 5
    assert same(rebuilt, want) and journal_file.owner(path)[1] == 5

    # A resume from a later step is refused, and the error says from which step one is possible.
    late = copy.deepcopy(base)
    with pytest.raises(
        JournalError, match="continues with step 7; resume from a checkpoint of step 5 or before"
    ):
        Journal(path, resumed(path, MAKERS["pseuzo"](late), late, range(7)))
    assert path.read_bytes() == damaged
    with Journal(path, opt):
        train(opt, want, range(5, 8))
    assert path.read_bytes() == whole
