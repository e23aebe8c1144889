"""Threads may call the ops at the same time, each on its own tensors."""

import sys
import threading
import time
import warnings

import pytest
import torch

import pseuzo_kernels as pk
from pseuzo_kernels import lists, streams
from pseuzo_kernels.api import NoiseApi

THREADS, CALLS, LISTS = 4, 60, 5


class Yielding(lists.CheckedLists):
    """Lets other threads run in the middle of each count."""

    _count = 0

    @property
    def _n_tensors(self) -> int:
        count = self._count
        time.sleep(0)
        return count

    @_n_tensors.setter
    def _n_tensors(self, count: int) -> None:
        self._count = count


def work(api: NoiseApi, i: int) -> list[torch.Tensor]:
    """Run calls on lists of thread i, whose noise depends on the thread, and return them all."""
    models = [[torch.full((3 + j,), float(i)) for j in range(4)] for _ in range(LISTS)]
    for call in range(CALLS):
        xs = models[call * (i + 1) % LISTS]
        seed = THREADS * call + i
        api.perturb_(xs, seed, 0.5)
        moved = api.perturb(xs[::-1], seed, 1.0, streams=[9, 8, 7, 6], mask=pk.RandomMask(0.5, i))
        api.update_(xs, [seed, seed + 1], [0.1, float(i)], lr=0.1)
        xs[0].copy_(moved[3])
    return [x for model in models for x in model]


@pytest.fixture
def small_memory(monkeypatch):
    """Threads change often, and all caches evict all the time."""
    monkeypatch.setattr(lists, "MAX_TENSORS", 12)
    monkeypatch.setattr(streams, "MAX_SEEDS", 3)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("small_memory")
@pytest.mark.filterwarnings("ignore::pseuzo_kernels.StreamWarning")
def test_threads_give_the_bits_of_one_thread():
    ops = torch.ops.pseuzo
    api = NoiseApi(
        ops.add_noise_list_,
        ops.add_noise_list_out,
        (ops.add_noise_masked_list_, ops.add_noise_masked_list_out),
    )
    api._lists = Yielding()
    want = [work(api, i) for i in range(THREADS)]
    got: dict[int, list[torch.Tensor]] = {}
    failures: list[BaseException] = []

    def run(i: int) -> None:
        try:
            got[i] = work(api, i)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not failures and sorted(got) == list(range(THREADS))
    for i in range(THREADS):
        assert all(map(torch.equal, got[i], want[i]))
    known = api._lists
    assert known._n_tensors == sum(len(entry.ptrs) for entry in known._known.values()) <= 12 + 8


def test_one_of_many_threads_warns_of_slow_ops(monkeypatch):
    from pseuzo_kernels import implementations

    monkeypatch.setattr(implementations, "_said", set())
    start = threading.Barrier(THREADS, timeout=60)

    def run() -> None:
        start.wait()
        implementations.say_slow("op", torch.device("cpu"), "mine")

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        threads = [threading.Thread(target=run) for _ in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
    assert len(said) == 1
