"""Ranks that are started again follow the journal of a run, whatever number of ranks wrote it."""

import pytest
import rank_cases
from pseuzo import Journal

NAMES = ("mezo, momentum", "pseuzo", "pseuzo, schedule", "evolution", "sparse-mezo", "zo-blocks")
HALF = (slice(0, 4), slice(4, 8))


def first_records(content, n):
    """The bytes of the header, of the first n records, and of a torn one."""
    end = 8
    for _ in range(1 + n):
        end += 12 + int.from_bytes(content[end : end + 4], "little")
    return content[: end + 9]


@pytest.mark.parametrize("recorded", [2, 5])
def test_ranks_follow_the_journal_of_one_process(rank_pool, tmp_path, recorded):
    """All losses are exact, so that every bit is that of the run which nothing stopped."""
    alone = {}
    for name in NAMES:
        optimizer, model = rank_cases.make(name)
        path = tmp_path / f"{name}.pzj"
        with Journal(path, optimizer):
            for step in range(6):
                inputs, options = rank_cases.arguments(name, optimizer, model, step)
                optimizer.step(*inputs, **options)
        alone[name] = optimizer.history, path.read_bytes(), rank_cases.flat(model).tolist()
        path.write_bytes(first_records(path.read_bytes(), recorded))
    every = rank_pool.run(2, rank_cases.followed, NAMES, tmp_path, HALF)
    for name, (history, journal, weights) in alone.items():
        for rank, found in enumerate(every):
            measured = list(range(max(0, recorded - history), 6))
            assert found[name] == (measured, weights), (name, rank)
        assert (tmp_path / f"{name}.pzj").read_bytes() == journal
