"""`pseuzo train` under torchrun: one run of several processes, of which one speaks and writes."""

import json
import os
import subprocess
import sys

import pytest
import rank_commands
from helpers import assert_same_weights
from pseuzo.cli.commands import main
from rank_pool import RankPool

TRAIN = ["train", "--model", "demo", "--task", "demo", "--device", "cpu", "--quiet"]
SIZES = ["--train-size", 48, "--dev-size", 16, "--test-size", 16, "--batch-size", 16]
SHORT = [*TRAIN, *SIZES, "--method", "mezo", "--lr", 2e-4, "--eval-every", 2, "--keep", "last"]


@pytest.fixture
def launched(monkeypatch):
    """Return as_rank(rank, world), which sets what torchrun would."""

    def as_rank(rank, world):
        for name, value in rank_commands.launched_as(rank, world).items():
            monkeypatch.setenv(name, value)

    return as_rank


def ended(args, capsys):
    with pytest.raises(SystemExit) as end:
        main([str(arg) for arg in args])
    captured = capsys.readouterr()
    return end.value.code, captured.out, captured.err


@pytest.mark.parametrize(
    "world, more, sentence",
    [
        (3, [], "--batch-size 16 is for all processes together, and 3 of them cut it into 3 parts"),
        (4, ["--direction-ranks", 3], "--direction-ranks must divide the number of launched"),
        (1, ["--direction-ranks", 2], "launched processes, 1, got 2"),
        (2, ["--method", "fo-adam"], "method fo-adam is for one process, but 2 were launched"),
        (2, ["--method", "mezo-svrg"], "method mezo-svrg is for one process"),
        (2, ["--method", "fzoo", "--split-batch"], "split_batch is for one process"),
        (
            2,
            ["--method", "pseuzo", "--lr", "auto"],
            "find_lr (--lr auto) of method pseuzo is for one process",
        ),
        (2, ["--device", "cuda:0"], "each launched process takes a GPU of its own"),
    ],
)
def test_what_cannot_be_shared_is_refused_before_anything_is_loaded(
    tmp_path, launched, capsys, world, more, sentence
):
    launched(0, world)
    code, out, err = ended([*SHORT, *more, "--output", tmp_path / "run"], capsys)
    assert (code, out) == (2, "") and sentence in err and len(err.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()
    launched(1, world)
    if world > 1:
        assert ended([*SHORT, *more, "--output", tmp_path / "run"], capsys) == (2, "", "")


@pytest.mark.parametrize(
    "args",
    [
        ["eval", "--model", "demo", "--task", "demo"],
        ["compare", "--model", "demo", "--task", "demo", "--output", "out"],
        ["demo", "--output", "out"],
        ["replay", "--base", "demo", "--journal", __file__, "--output", "out"],
    ],
    ids=lambda args: args[0],
)
def test_other_commands_run_in_one_process(launched, capsys, args):
    launched(0, 2)
    code, _, err = ended(args, capsys)
    assert code == 2 and f"pseuzo {args[0]} runs in one process, but 2 were launched" in err


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    pool = RankPool(tmp_path_factory.mktemp("ranks"), [{}] * 2, ("pseuzo.cli.run",))
    yield pool
    pool.close()


def rows(path, word):
    lines = [
        {"prompt": f"{word} {i}", "options": ["yes", "no"], "answer": i % 2} for i in range(99)
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


@pytest.mark.slow
def test_a_run_of_two_ranks(tmp_path, pool, capsys):
    out, journal = tmp_path / "run", tmp_path / "run.pzj"
    command = [*SHORT, "--steps", 4, "--output", out, "--journal", journal]
    (code, printed, _), other = pool.run(2, rank_commands.run, 2, [command, command])
    assert code == 0 and printed.startswith("test: ") and other == (0, "", "")
    results = json.loads((out / "results.json").read_text())
    assert results["ranks"] == 2 and results["steps"] == 4
    assert {path.name for path in out.iterdir()} >= {"config.yaml", "model", "checkpoint-4"}
    assert not list(out.rglob("rng_state_*"))

    # Another run may not begin in the folder: rank 0 finds that, and all end.
    again = [*SHORT, "--steps", 4, "--output", out]
    (code, printed, err), other = pool.run(2, rank_commands.run, 2, [again, again])
    assert (code, printed) == (2, "") and "is not empty" in err and other == (2, "", "")
    assert len(err.strip().splitlines()) == 1

    # One process goes on, and ends with what the journal says.
    main([str(arg) for arg in [*command, "--resume", "--steps", 6]], standalone_mode=False)
    replay = ["replay", "--base", "demo", "--journal", journal, "--output", tmp_path / "replayed"]
    main([str(arg) for arg in replay], standalone_mode=False)
    assert "6 steps replayed" in capsys.readouterr().out
    assert_same_weights(out / "model", tmp_path / "replayed")


@pytest.mark.slow
def test_a_rank_with_other_data_or_settings_is_named(tmp_path, pool):
    theirs = [rows(tmp_path / f"{word}.jsonl", word) for word in ("same", "other")]
    commands = [
        [*SHORT, "--task", tmp_path / "same.jsonl", "--data", path, "--output", tmp_path / "run"]
        for path in theirs
    ]
    (code, _, err), other = pool.run(2, rank_commands.run, 2, commands)
    assert code == 2 and "rank 1 has train rows 48 rows, hash" in err and other == (2, "", "")
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir())
    commands = [[*SHORT, "--seed", seed, "--output", tmp_path / "run"] for seed in (0, 1)]
    (code, _, err), other = pool.run(2, rank_commands.run, 2, commands)
    assert code == 2 and "rank 1 has seed 1, and rank 0 has 0" in err and other == (2, "", "")


@pytest.mark.slow
def test_torchrun_starts_a_run(tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command = [*launcher, "--standalone", "-m", "pseuzo", *SHORT]
    command += ["--steps", 2, "--eval-every", 0, "--direction-ranks", 2, "--output", tmp_path / "a"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=300, env=env
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("test: ") == 1
    assert json.loads((tmp_path / "a" / "results.json").read_text())["ranks"] == 2
