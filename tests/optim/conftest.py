import pytest
from rank_pool import RankPool

# The second rank runs the plainest kernels, of pseuzo and of torch.
PLAIN = {"PSEUZO_CPU_ISA": "plain", "ATEN_CPU_CAPABILITY": "default"}


@pytest.fixture(scope="session")
def rank_pool(tmp_path_factory):
    """Three processes that form process groups, for tests of several ranks."""
    pool = RankPool(tmp_path_factory.mktemp("ranks"), [{}, PLAIN, {}])
    yield pool
    pool.close()
