"""A rank that differs is named, and a rank that fails stops the step on all; nothing is changed."""

import os

import pytest
import rank_cases
import torch
from pseuzo import MeZO
from pseuzo.optim import fingerprints
from pseuzo.optim.base import ZeroOrder
from pseuzo.optim.estimator import Measured
from pseuzo.optim.ranks import RanksDiffer
from pseuzo.optim.seeds import HASH_DOMAIN, step_seed
from pseuzo.optim.state import KEY
from rank_cases import OPTIONS, Exact, arguments, flat, make
from rank_pool import RankPool

HALVES, WHOLE = (slice(0, 4), slice(4, 8)), (slice(0, 8),)
CHUNK, AT = 16, 100  # of 132 weights; the one in which a bit flips


def caught(step):
    """Return the name and the message of what step() raises."""
    try:
        step()
    except Exception as error:
        return type(error).__name__, str(error)
    return None


def disturbed(rank, disturb):
    """Step until an error; `disturb` changes rank 1 after two steps. Return the step of the error,
    the error, and whether it left weights and count of steps as they were."""
    fingerprints.CHUNK = CHUNK
    optimizer, model = make("mezo")
    for step in range(100):
        if step == 2 and rank == 1:
            disturb(optimizer, model)
        before = flat(model)
        inputs, options = arguments("mezo", optimizer, model, step, HALVES[rank])
        if error := caught(lambda i=inputs, o=options: optimizer.step(*i, **o)):
            fingerprints.CHUNK = 1 << 14
            return step, error, torch.equal(flat(model), before) and optimizer.steps == step
    raise AssertionError("no step has failed")


def flip_a_bit(optimizer, model):
    parts = [p.data.view(-1) for p in model.parameters()]
    bits = torch.cat(parts).view(torch.int32)
    bits[AT] ^= 1
    for part, new in zip(parts, bits.view(torch.float32).split(list(map(len, parts))), strict=True):
        part.copy_(new)


def change_the_rate(optimizer, model):
    optimizer.param_groups[0]["lr"] *= 2


def change_the_seed(optimizer, model):
    optimizer.seed += 1


def load_a_state(optimizer, model):
    state = optimizer.state_dict()
    state["state"][KEY]["rank"] = 0
    optimizer.load_state_dict(state)


@pytest.mark.parametrize(
    "disturb, message",
    [
        (flip_a_bit, "rank 1 of 2 differs from the others in weights before step {}"),
        (change_the_rate, "rank 1 of 2 differs from the others in settings before step 2"),
        (change_the_seed, "rank 1 of 2 differs from the others in settings before step 2"),
        (load_a_state, "rank 1 begins from a new state, and rank 0 does not"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_a_rank_that_differs_is_named(rank_pool, disturb, message):
    """A bit that flips is found at the first step that compares its part of the weights."""
    found = rank_pool.run(2, disturbed, disturb)
    step = 2
    if disturb is flip_a_bit:
        parts = -(-132 // CHUNK)
        while step_seed(OPTIONS["seed"], step, HASH_DOMAIN) % parts != AT // CHUNK:
            step += 1
    for failed_at, (_, text), unchanged in found:
        assert failed_at == step
        assert unchanged
        assert message.format(step) in text
    assert found[0][1] == found[1][1]


def started(rank, what):
    """Return the error of the first step, where rank 2 (or 1 of 2) starts otherwise."""
    other = rank == torch.distributed.get_world_size() - 1
    model, more = Exact(), {}
    if other and what == "weights":
        model.bias.data[3] = 1.0
    if other and what == "parameters":
        model.bias.requires_grad_(False)
    if other and what == "settings":
        more["momentum"] = 0.5
    if other and what == "direction_ranks":
        more["direction_ranks"] = 3
    version = fingerprints.__version__
    if other and what == "version":
        fingerprints.__version__ = "0.0.1"
    optimizer, _ = make("mezo", model, **more)
    optimizer.check = "abc" if other and what == "data" else "abd"
    before = flat(model)
    inputs, options = arguments("mezo", optimizer, model, 0, slice(0, 4))
    error = caught(lambda: optimizer.step(*inputs, **options))
    fingerprints.__version__ = version
    return error, torch.equal(flat(model), before)


@pytest.mark.parametrize(
    "what", ["weights", "parameters", "settings", "direction_ranks", "version", "data"]
)
def test_ranks_compare_what_they_start_from(rank_pool, what):
    named = "settings" if what == "direction_ranks" else what
    for error, unchanged in rank_pool.run(3, started, what):
        assert error[0] == "RanksDiffer"
        assert f"rank 2 of 3 differs from the others in {named} before step 0" in error[1]
        assert unchanged
    assert issubclass(RanksDiffer, RuntimeError)


def failing(rank, name, where, parts, direction_ranks):
    """Make 4 steps, at the second of which something fails first on one rank; return the errors,
    and the losses and weights of the steps."""
    optimizer, model = make(name, direction_ranks=direction_ranks)
    errors, found = [], []
    for step in range(4):
        inputs, options = arguments(
            name, optimizer, model, step, parts[rank // direction_ranks], scalar=True
        )
        if step == 1:
            broken, before = inputs, flat(model)
            if where == rank:
                broken = (fail, *inputs[1:])
            elif where == "coefficients" and rank == 0:
                optimizer.coefficients = fail
            elif where == "journal" and rank == 0:
                optimizer.journal = BrokenJournal()
            errors.append(caught(lambda b=broken, o=options: optimizer.step(*b, **o)))
            assert torch.equal(flat(model), before)
            vars(optimizer).pop("coefficients", None)
            optimizer.journal = None
        loss = optimizer.step(*inputs, **options)
        found.append((float(loss), flat(model).tolist()))
    return errors, found


class BrokenJournal:
    def prepare(self):
        raise OSError("the disk is full")


def fail(*_):
    raise ZeroDivisionError("of this rank")


@pytest.mark.parametrize(
    "name, where, parts, direction_ranks",
    [
        ("mezo", 1, HALVES, 1),
        ("mezo", 0, HALVES, 1),
        ("mezo", "coefficients", HALVES, 1),
        ("mezo", "journal", HALVES, 1),
        ("pseuzo", 1, WHOLE, 2),
        ("pseuzo", 0, WHOLE, 2),
        ("zo-conservative", 1, WHOLE, 2),
    ],
)
def test_a_step_that_fails_on_one_rank_fails_on_all(rank_pool, name, where, parts, direction_ranks):
    """All can then make the step again."""
    every = rank_pool.run(2, failing, name, where, parts, direction_ranks)
    failed = where if isinstance(where, int) else 0
    reason = (
        "OSError: the disk is full" if where == "journal" else "ZeroDivisionError: of this rank"
    )
    for rank, ((error,), found) in enumerate(every):
        kind, text = error
        if rank == failed:
            assert f"{kind}: {text}" == reason
        else:
            assert kind == "RankFailed"
            assert f"rank {failed}: {reason}" in text
        assert found == rank_cases.run(name)


def interrupted(rank, name):
    """The root is interrupted in a pass and goes on, while the other waits."""
    optimizer, model = make(name)
    for step in range(3):
        inputs, options = arguments(name, optimizer, model, step, HALVES[rank])
        if step == 1 and rank == 0:
            with pytest.raises(KeyboardInterrupt):
                optimizer.step(interrupt, *inputs[1:], **options)
        optimizer.step(*inputs, **options)
    return flat(model).tolist()


def interrupt():
    raise KeyboardInterrupt


def test_an_interrupted_root_may_go_on(rank_pool):
    first, second = rank_pool.run(2, interrupted, "pseuzo")
    assert first == second == rank_cases.run("pseuzo", steps=3)[-1][1]


def not_finite(rank, name, size):
    """Make 3 steps, of which rank 1 has NaN in the second; size: of its part there."""
    optimizer, model = make(name)
    weights, losses = [flat(model)], []
    for step in range(3):
        rows = slice(0, 8) if size == 0 and rank == 0 else HALVES[rank]
        inputs, options = arguments(name, optimizer, model, step, rows, scalar=True)
        if rank == 1 and size == 0:
            options["size"] = 0
        if rank == 1 and step == 1:
            *_, last = inputs[:2]
            bad = nan_after(last)
            inputs = (bad,) if len(inputs) == 1 else (inputs[0], bad, *inputs[2:])
        losses.append(float(optimizer.step(*inputs, **options)))
        weights.append(flat(model))
    return losses, [w.tolist() for w in weights], optimizer.skipped_steps


def nan_after(call):
    return lambda *o: call(*o) * float("nan")


@pytest.mark.filterwarnings("ignore:.*skipped so far")
@pytest.mark.parametrize("name", ["mezo", "pseuzo", "pseuzo, by row"])
def test_a_loss_that_is_not_finite(rank_pool, name):
    """All ranks skip the step. The loss of a rank without rows is ignored."""
    for losses, weights, skipped in rank_pool.run(2, not_finite, name, None):
        assert skipped == 1
        assert weights[1] == weights[2] != weights[3]
        assert losses[1] != losses[1]
    for losses, weights, skipped in rank_pool.run(2, not_finite, name, 0):
        assert skipped == 0
        assert list(zip(losses, weights[1:], strict=True)) == rank_cases.run(name, steps=3)


def no_examples(rank, name):
    optimizer, model = make(name)
    losses, weights = [], []
    for step in range(3):
        rows = slice(0, 0 if rank else 8)
        inputs, _ = arguments(name, optimizer, model, step, rows)
        losses.append(float(optimizer.step(*inputs, size=rows.stop)))
        weights.append(flat(model).tolist())
    return list(zip(losses, weights, strict=True))


@pytest.mark.parametrize("name", ["mezo", "pseuzo"])
def test_losses_of_no_examples_are_ignored(rank_pool, name):
    for steps in rank_pool.run(2, no_examples, name):
        assert steps == rank_cases.run(name, steps=3)


def without_rows(rank):
    optimizer, model = make("mezo")
    (closure,), _ = arguments("mezo", optimizer, model, 0, HALVES[rank])
    errors = [caught(lambda: optimizer.step(closure, size=0))]
    errors.append(caught(lambda: optimizer.step(closure, size=-rank)))
    mixed = closure if rank else lambda: closure().mean()
    errors.append(caught(lambda: optimizer.step(mixed)))
    return errors


class Unmerged(ZeroOrder):
    def measure(self, closure):
        return Measured(closure(), "loss")


def unmerged(rank):
    model = Exact()
    optimizer = Unmerged(model, lr=0.1, eps=0.1)
    return caught(lambda: optimizer.step(lambda: model(torch.ones(1, 1, 4)).mean()))


def test_parts_that_cannot_be_merged(rank_pool):
    for no_rows, size, mixed in rank_pool.run(2, without_rows):
        assert "no rank has rows, since all gave size 0; give one of them a batch" in no_rows[1]
        assert "size must be a number of rows or tokens, got -1.0" in size[1]
        assert "some ranks gave the losses of their examples, and others one number" in mixed[1]
    for kind, text in rank_pool.run(2, unmerged):
        assert (kind, text[:54]) in (
            ("NotImplementedError", "Unmerged: its measure() merges nothing over the ranks;"),
            ("RankFailed", text[:54]),
        )


def dying(rank, which):
    """A rank ends in its second step; return the error of the other, what moved and its steps."""
    model = Exact()
    optimizer = MeZO(model, **OPTIONS)
    x, y, _ = (part[HALVES[rank]] for part in rank_cases.batch(0))

    def closure():
        if rank == which and optimizer.steps == 1:
            os._exit(1)
        return rank_cases.losses(model(x), y)

    optimizer.step(closure)
    before = flat(model)
    error = caught(lambda: optimizer.step(closure))
    return error, float((flat(model) - before).abs().max()), optimizer.steps


@pytest.mark.parametrize("which", [0, 1])
def test_a_rank_that_dies(tmp_path, which):
    pool = RankPool(tmp_path, [{}, {}])
    pool.start(2, dying, which)
    results = pool.results(2)
    pool.close()
    assert isinstance(results.pop(which), EOFError)
    (((kind, text), moved, steps),) = results
    assert kind == "RankFailed"
    assert f"rank {which} cannot be heard" in text
    assert (moved, steps) == (0.0, 1)
