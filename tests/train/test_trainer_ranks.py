"""Ranks of a process group train together as one process does on the same global batches."""

import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import rank_runs
import torch
from pseuzo.tasks import evaluate
from pseuzo.train.parts import examples_in, part_of
from pseuzo.train.ranked import digest
from pseuzo.train.replay import replay
from rank_pool import RankPool
from test_parts import of_answers, of_labels, of_options
from trainer_cases import arguments, fresh

# The loss is 1 - accuracy of parts of 8 or 16 rows: multiples of 1/16, whose sums are exact.
EXACT = dict(method="mezo", objective="metric", learning_rate=2e-3, eps=0.05, directions=2)
EXACT |= dict(eval_strategy="steps", eval_steps=5, max_steps=7)
# In batches of 22 the last one has 1 row, so that rank 0 has none, or 3 rows.
UNEVEN = dict(method="mezo", rows=45, max_steps=4, eval_strategy="steps", eval_steps=2)
RACE = dict(method="mezo", rows=48, max_steps=70, noise_on=["auto"], find_lr=True)
RACE |= dict(weight_decay=0.0, search_share=0.8)
PSEUZO = UNEVEN | dict(method="pseuzo", rows=47, window=3, momentum=0.9)


def per_rank(size, parts):
    return {"per_device_train_batch_size": size // parts}


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    pool = RankPool(tmp_path_factory.mktemp("ranks"), [{}] * 4, ("pseuzo.train.trainer",))
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process finds, and its journal of the exact run."""
    folder = tmp_path_factory.mktemp("alone")
    journal = folder / "run.pzj"
    exact = rank_runs.train(folder / "exact", **EXACT, **per_rank(16, 1), journal=str(journal))
    uneven, pseuzo = (
        rank_runs.train(folder / "uneven", **settings, **per_rank(22, 1))
        for settings in (UNEVEN, PSEUZO)
    )
    return SimpleNamespace(exact=exact, uneven=uneven, pseuzo=pseuzo, journal=journal)


@pytest.fixture(scope="module")
def two(tmp_path_factory, pool):
    """What each of two ranks finds, and the folder of the exact run, which ends after 5 steps."""
    folder = tmp_path_factory.mktemp("two")
    saved = dict(save_strategy="steps", save_steps=2, journal=str(folder / "run.pzj"))
    cases = {
        "exact": dict(
            folder=folder / "exact", **EXACT | saved | {"max_steps": 5}, **per_rank(16, 2)
        ),
        "uneven": dict(folder=folder / "uneven", **UNEVEN, **per_rank(22, 2)),
        "pseuzo": dict(folder=folder / "uneven", **PSEUZO, **per_rank(22, 2)),
        "race": dict(folder=folder / "race", **RACE, **per_rank(8, 2)),
    }
    return folder, pool.run(2, rank_runs.run, cases)


def replayed(journal, until=None):
    model = fresh()
    replay(journal, model, until=until)
    return rank_runs.bits(model)


@pytest.mark.slow
def test_two_ranks_find_what_one_process_finds(alone, two):
    folder, every = two
    for name in ("exact", "uneven", "pseuzo"):
        one, (root, other) = getattr(alone, name), (found[name] for found in every)
        for key in ("bits", "losses", "metrics"):
            assert other[key] == root[key], (name, key)
        assert root["printed"] and not other["printed"], name
        assert all(b > 0 for b in root["network"]) and not any(one["network"]), name
        assert not root["gradients"] and not root["wrapped"], name
    exact = every[0]["exact"]
    assert exact["bits"] == replayed(alone.journal, until=5) == replayed(folder / "run.pzj")
    assert exact["bits"] != rank_runs.bits(fresh())
    assert exact["losses"] == alone.exact["losses"][:5]
    assert exact["metrics"] == alone.exact["metrics"][:1]
    for name in ("uneven", "pseuzo"):
        one, root = getattr(alone, name), every[0][name]
        assert root["flos"] == one["flos"], name
        # Losses of different shapes round to 2^-18 or better, and |z| < 8.
        most = 4 * 2e-4 * 8 * 2**-18 / 1e-3
        for ours, theirs in zip(root["weights"], one["weights"], strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=most)
        moved = max(
            np.abs(x - p.detach().numpy()).max()
            for x, p in zip(root["weights"], fresh().parameters(), strict=True)
        )
        assert moved > 10 * most, name


@pytest.mark.slow
def test_ranks_race_as_one(two):
    """Each rank measures a part of the dev rows and of the batches, and all decide the same."""
    folder, every = two
    root, other = (found["race"] for found in every)
    assert root["bits"] == other["bits"] != rank_runs.bits(fresh())
    assert "the best of" in root["printed"] and not other["printed"]
    found = json.loads((folder / "race" / "found.json").read_text())
    assert len(root["losses"]) == (140 - found["forwards"]) // 2 < 70
    assert all(math.isfinite(loss) for row in found["table"] for loss in row["losses"].values())


@pytest.mark.slow
def test_a_run_is_resumed_with_any_number_of_ranks(tmp_path, pool, alone, two):
    folder, _ = two
    shutil.copytree(folder / "exact", tmp_path / "one")
    from_checkpoint = rank_runs.train(
        tmp_path / "one", str(tmp_path / "one" / "checkpoint-2"), **EXACT, **per_rank(16, 1)
    )
    assert from_checkpoint["bits"] == alone.exact["bits"]
    assert from_checkpoint["losses"] == alone.exact["losses"]
    # With the last checkpoints gone, steps 2 to 4 are those of the journal.
    for step in (4, 5):
        shutil.rmtree(folder / "exact" / f"checkpoint-{step}", ignore_errors=True)
    journal = str(folder / "run.pzj")
    case = dict(folder=folder / "exact", resume=True, **EXACT, journal=journal, direction_ranks=2)
    every = pool.run(4, rank_runs.run, {"four": case | per_rank(16, 2)})
    for rank, found in enumerate(found["four"] for found in every):
        assert found["bits"] == alone.exact["bits"], rank
        assert found["losses"] == alone.exact["losses"][:2] + alone.exact["losses"][5:], rank
        assert ("steps 2 to 4 are made again" in found["printed"]) == (rank == 0)
    assert replayed(journal) == alone.exact["bits"]


@pytest.mark.slow
def test_a_rank_with_other_data_is_named(tmp_path, pool):
    for error in pool.run(2, rank_runs.run_with_other_data, tmp_path):
        assert error.startswith(
            "RanksDiffer: MeZO.step: rank 1 of 2 differs from the others in data"
        )


@pytest.mark.parametrize("make", [of_labels, of_answers, of_options])
def test_ranks_cut_a_batch_into_parts(make):
    batch, _ = make()
    parts = [part_of(batch, i, 3) for i in range(3)]
    assert [examples_in(part) for part, _ in parts] == [2, 2, 3]
    assert all(has_examples for _, has_examples in parts)
    ids = torch.cat([part["input_ids"] for part, _ in parts])
    assert sorted(ids.tolist()) == sorted(batch["input_ids"].tolist())
    few, has_examples = part_of(batch, 0, 100)
    assert examples_in(few) == 1 and not has_examples


def test_ranks_share_the_batches_of_an_evaluation(demo):
    data, _ = demo
    model, found = fresh(), []
    ranks = [SimpleNamespace(rank=r, size=3, ranks=True, all_of=found.append) for r in range(3)]
    for together in ranks:
        with pytest.raises(TypeError):  # as nobody answers
            evaluate(model, data["dev"], batch_size=4, together=together)
    for together in ranks:
        together.all_of = lambda mine: found
        assert evaluate(model, data["dev"], batch_size=4, together=together) == evaluate(
            model, data["dev"], batch_size=4
        )
    assert [len(part) for part in found] == [8, 8, 4]


@pytest.mark.parametrize(
    "settings, sentence",
    [
        (
            {"method": "mezo-svrg"},
            "method mezo-svrg is for one process, but this is one of 4 ranks",
        ),
        ({"method": "fo-adam"}, "method fo-adam is for one process"),
        ({"method": "pseuzo", "head": "exact"}, "head=exact is for one process"),
        (
            {"method": "pseuzo", "find_lr": True, "weight_decay": 0.0},
            "of method pseuzo is for one process",
        ),
        (
            {"method": "fzoo", "split_batch": True, "directions": 2},
            "split_batch is for one process",
        ),
        ({"method": "mezo", "direction_ranks": 3}, "must divide the number of ranks, 4, got 3"),
    ],
)
def test_what_ranks_cannot_share_is_refused(tmp_path, settings, sentence):
    args = arguments(tmp_path, **settings | {"direction_ranks": 1})
    args.direction_ranks = settings.get("direction_ranks", 1)
    args.distributed_state = SimpleNamespace(num_processes=4, process_index=0)
    with pytest.raises(ValueError, match=sentence):
        args.refuse()


def test_the_hash_of_data_is_that_of_its_rows(demo):
    data, _ = demo
    assert digest(data["train"]).startswith("50 rows, hash ")
    assert digest(data["dev"]) != digest(data["test"])
    rows = [{"ids": torch.arange(3) + i, "n": np.float32(i), "what": [object()]} for i in range(9)]
    again = [row | {"what": [object()]} for row in rows]
    assert digest(rows) == digest(again) != digest(rows[::-1])
    assert digest(iter(rows)) == ""
