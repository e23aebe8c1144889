"""Several ranks make the steps of one process that has the whole batch."""

import pytest
import rank_cases
from rank_pool import RankPool

# Ranks of different instruction sets, of pseuzo's kernels and of torch's.
PLAIN = {"PSEUZO_CPU_ISA": "plain", "ATEN_CPU_CAPABILITY": "default"}
HALF, QUARTERS = (slice(0, 4), slice(4, 8)), (slice(0, 4), slice(4, 6), slice(6, 8))


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    pool = RankPool(tmp_path_factory.mktemp("ranks"), [{}, PLAIN, {}])
    yield pool
    pool.close()


@pytest.mark.parametrize(
    "world, parts, directions, scalar",
    [(2, HALF, 1, True), (3, QUARTERS, 1, False), (2, (slice(0, 8),), 2, True)],
    ids=["2 parts", "3 parts", "2 directions"],
)
def test_ranks_make_the_steps_of_one_process(pool, world, parts, directions, scalar):
    """All losses are exact here, so losses and weights have the same bits, on every rank."""
    every = pool.run(world, rank_cases.run_all, parts, directions, scalar)
    for name in rank_cases.CASES:
        alone = rank_cases.run(name)
        for rank, found in enumerate(every):
            assert found[name] == alone, (name, rank)
        assert alone[0][1] != alone[-1][1], name
