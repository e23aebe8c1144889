"""The ledger survives a torn end, and tells code and damage apart."""

import json

import pytest
from ledgers import CODE, final, plan
from pseuzo.compare.ledger import Ledger, code_version, digest, read_lines


def made(path, *lines):
    ledger = Ledger(path, CODE)
    for line in lines:
        ledger.append(line)
    return ledger


def test_lines_are_kept_whole_and_found_by_their_hash(tmp_path):
    path = tmp_path / "ledger.jsonl"
    first, second = plan(["mezo"]), final("mezo", 0, [0.5, float("nan")], [1.0, 0.0])
    ledger = made(path, first, second)
    assert ledger.get(second["hash"])["evaluations"][1][4] is None  # JSON has no nan
    again = Ledger(path, CODE)
    assert again.lines == ledger.lines and not again.torn
    assert again.get("another") is None and again.lines[0]["code"] == CODE


@pytest.mark.parametrize("tail", ['{"kind": "final", "hash": "x"', "\0\0\0\n", "{}\n"])
def test_a_torn_last_line_is_dropped_and_the_others_are_kept(tmp_path, tail):
    path = tmp_path / "ledger.jsonl"
    made(path, plan(["mezo"]))
    whole = path.read_bytes()
    path.write_bytes(whole + tail.encode())
    ledger = Ledger(path, CODE)
    assert ledger.torn and path.read_bytes() == whole and len(ledger.lines) == 1
    ledger.append(final("mezo", 0, [0.5], [1.0]))
    lines, size = read_lines(path)
    assert len(lines) == 2 and size == path.stat().st_size


def test_damage_in_the_middle_is_refused(tmp_path):
    path = tmp_path / "ledger.jsonl"
    made(path, plan(["mezo"]))
    path.write_text("not a line\n" + path.read_text())
    before = path.read_bytes()
    with pytest.raises(ValueError, match="line 1 is not a line of a ledger"):
        Ledger(path, CODE)
    assert path.read_bytes() == before


def test_lines_of_other_code_are_refused_unless_they_are_accepted(tmp_path):
    path = tmp_path / "ledger.jsonl"
    made(path, plan(["mezo"]))
    other = CODE | {"digest": "0ther"}
    with pytest.raises(ValueError, match=r"1 line\(s\) of another version .* --accept-code"):
        Ledger(path, other)
    ledger = Ledger(path, other, accept=True)
    ledger.append(final("mezo", 0, [0.5], [1.0]))
    assert [line["code"]["digest"] for line in ledger.lines] == ["c0de", "0ther"]


def test_digests_depend_on_content_alone():
    assert digest({"a": 1, "b": [2.0]}) == digest({"b": [2.0], "a": 1}) != digest({"a": 1})
    assert code_version() == code_version() and json.dumps(code_version())
