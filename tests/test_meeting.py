"""Processes find those of their own start in a store that has traces of earlier starts."""

import itertools
import time
from datetime import timedelta
from threading import Thread
from types import SimpleNamespace

import pytest
from pseuzo import meeting
from pseuzo.meeting import meet
from torch.distributed import HashStore


def start(store, world, absent=(), met=None):
    """The stores of the ranks that come, which all of them do but those that are absent. They are
    put into met as they come."""
    met = {} if met is None else met

    def come(rank):
        try:
            met[rank] = meet(store, rank, world, 20)
        except Exception as error:
            met[rank] = error

    ranks = [Thread(target=come, args=(r,)) for r in reversed(range(world)) if r not in absent]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
    return met


def test_each_start_has_a_part_of_the_store_for_itself():
    store = HashStore()
    store.set_timeout(timedelta(seconds=20))
    for world in (3, 2, 3, 3):  # ranks come and go, and leave their words
        met = start(store, world)
        assert not any(own.check([f"address {r}"]) for own in met.values() for r in range(world))
        for rank, own in met.items():
            own.set(f"address {rank}", "here")
        assert all(own.check([f"address {r}"]) for own in met.values() for r in range(world))


def test_a_rank_that_does_not_come(monkeypatch):
    store, found, looks = HashStore(), {}, itertools.count()
    store.set_timeout(timedelta(seconds=20))
    assert start(store, 3).keys() == {0, 1, 2}
    # Time passes as rank 0 looks for the others, once rank 1 has been there.
    clock = SimpleNamespace(
        monotonic=lambda: 7 * next(looks) if 1 in found else 0, sleep=time.sleep
    )
    monkeypatch.setattr(meeting, "time", clock)
    start(store, 3, absent=(2,), met=found)
    assert isinstance(found[0], RuntimeError) and "rank 2 did not come" in str(found[0])
    store.set_timeout(timedelta(seconds=0.2))
    with pytest.raises(RuntimeError):
        meet(store, 1, 3, 0.2)
