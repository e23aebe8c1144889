"""A run of the command line that is killed at any moment and started again with --resume follows
its journal, and ends as if it had never been killed."""

import json

import pytest
import yaml
from helpers import SMALL, ZERO_ORDER, assert_same_weights, killed, pseuzo, run
from pseuzo.train.journal_file import owner, read_journal

pytestmark = pytest.mark.slow

RECORD, STEPS = "pseuzo.train.journal.Journal.record", 12


def arguments(output, *more):
    own = f"--steps {STEPS} --eval-every 4 --log-every 2 --save-every 0 --keep last".split()
    places = ["--output", str(output), "--journal", str(output) + ".pzj"]
    return ["train", *SMALL, *ZERO_ORDER, *own, *places, *more]


def steps_of(journal):
    return [record.step for record in read_journal(journal)[1]]


def rows(output, key):
    """The steps that have a row with this key in the history of a run, and what it says."""
    history = json.loads((output / "results.json").read_text())["history"]
    return {row["step"]: row[key] for row in history if key in row}


def records(journal):
    """The bytes of all but the header, which has the identifier of its run."""
    content = journal.read_bytes()
    return content[8 + 12 + int.from_bytes(content[8:12], "little") :]


@pytest.mark.parametrize(
    "more, known",
    [
        ("--method pseuzo --window 3 --dtype bf16 --lr-scheduler linear", [8, 10, 12]),
        ("--method mezo-momentum --mode lora --save-every 8", [8, 12]),
    ],
)
def test_a_run_that_is_killed_again_and_again_goes_on_from_its_journal(tmp_path, more, known):
    """known: the steps with a row of the log. Row 8 is of step 7 alone, as step 6 was made from its
    record by the process that went on."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    run(arguments(whole, *more.split()))
    args, journal = arguments(out, *more.split(), "--resume"), tmp_path / "out.pzj"
    killed(args, "pseuzo.cli.run.write_atomically", 1)  # before config.yaml
    assert not (out / "config.yaml").exists() and journal.stat().st_size == 0
    killed(args, "pseuzo.train.journal.Journal._append", 1)  # before the header
    journal.write_bytes((tmp_path / "whole.pzj").read_bytes()[:100])  # a torn one
    killed(args, RECORD, 8)  # the weights of step 7 are updated, but not recorded
    assert steps_of(journal) == [*range(7)] and owner(journal)[1] == 7
    killed(args, RECORD, 6)  # while it makes the steps again
    assert steps_of(journal) == [*range(7)]
    with open(journal, "ab") as file:
        file.write(b"torn")
    killed(args, RECORD, 11)
    assert steps_of(journal) == [*range(10)]
    run(args)
    file = "adapter_model.safetensors" if "lora" in more else "model.safetensors"
    assert_same_weights(whole / "model", out / "model", file)
    assert records(journal) == records(tmp_path / "whole.pzj")
    assert not (tmp_path / "out.pzj.1").exists()
    for figure in ("eval_loss", "eval_accuracy"):
        assert rows(out, figure) == rows(whole, figure)
    losses, before = rows(out, "loss"), rows(whole, "loss")
    assert list(losses) == known and all(losses[step] == before[step] for step in known[1:])
    before = json.loads((whole / "results.json").read_text())
    after = json.loads((out / "results.json").read_text())
    assert after["test"] == before["test"] and after["forwards"] == before["forwards"]


def test_a_run_that_is_over_ends_again_from_its_journal(tmp_path):
    out, journal = tmp_path / "run", tmp_path / "run.pzj"
    args = arguments(out, "--method", "mezo")
    pseuzo(*args)
    recorded = journal.read_bytes()
    results = json.loads((out / "results.json").read_text())
    text = pseuzo(*args, "--resume")
    assert f"steps 0 to {STEPS - 1} are made again as recorded in {journal}" in text
    again = json.loads((out / "results.json").read_text())
    assert again["test"] == results["test"] and journal.read_bytes() == recorded
    assert not rows(out, "loss") and list(rows(out, "eval_loss")) == [0, 4, 8, 12]
    text = pseuzo(*args, "--steps", STEPS + 2, "--resume")
    assert steps_of(journal) == [*range(STEPS + 2)] and list(rows(out, "loss")) == [STEPS + 2]
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert config["steps"] == STEPS + 2
