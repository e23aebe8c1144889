"""Several ranks make the steps of one process that has the whole batch."""

from pathlib import Path
from unittest import mock

import pytest
import rank_cases
import torch
from pseuzo.optim.wire import packed, unpacked
from rank_pool import RankPool

from pseuzo_kernels import _C

HALVES, QUARTERS = (slice(0, 4), slice(4, 8)), (slice(0, 4), slice(4, 6), slice(6, 8))
WHOLE = (slice(0, 8),)


def capability(rank):
    return torch.backends.cpu.get_cpu_capability(), _C.cpu_isa()


def test_ranks_of_these_tests_run_different_instruction_sets(rank_pool):
    first, second, third = rank_pool.run(3, capability)
    assert second == ("DEFAULT", "plain")
    assert first == third == capability(0)


@pytest.mark.parametrize(
    "world, parts, directions, scalar",
    [(2, HALVES, 1, True), (3, QUARTERS, 1, False), (2, WHOLE, 2, True), (3, WHOLE, 3, False)],
    ids=["2 parts", "3 parts", "2 directions", "3 directions"],
)
def test_ranks_make_the_steps_of_one_process(rank_pool, world, parts, directions, scalar):
    """All losses are exact here, so losses and weights have the same bits after every step, on
    ranks that run different instruction sets. With 3 directions, some steps leave a rank idle."""
    every = rank_pool.run(world, rank_cases.run_all, parts, directions, scalar)
    for name in rank_cases.CASES:
        alone = rank_cases.run(name)
        for rank, found in enumerate(every):
            assert found[name] == alone, (name, rank)
        assert alone[0][1] != alone[-1][1], name


def test_losses_that_are_rounded(rank_pool):
    """Rows and lengths are ragged here. eps is large, so the changes of outputs, of about 0.5, keep
    the roundings of outputs of about 1 to some 2^-22 of them; weights move by about 0.05 a step."""
    alone = rank_cases.ragged(0, WHOLE)
    for scalar in (False, True):
        every = rank_pool.run(2, rank_cases.ragged, (slice(0, 3), slice(3, 8)), scalar)
        for name, steps in alone.items():
            for found in every:
                for (loss, weights), (want, want_weights) in zip(found[name], steps, strict=True):
                    assert loss == pytest.approx(want, rel=2e-5), name
                    torch.testing.assert_close(weights, want_weights, rtol=0, atol=1e-5)


def test_bytes_on_the_network(rank_pool):
    """They do not depend on the model's size, and are what docs/scale.md says."""
    up = {  # the tensors of a rank with 4 or 2 rows
        "mezo, 3 directions": lambda rows, groups: 6 * (16 + 4 * rows),
        "pseuzo": lambda rows, groups: (
            8 + 4 + 16 + 2 * (32 + 4 * groups * 2 * 4) + 2 * (16 + 8 * groups)
        ),
        "pseuzo, by row": lambda rows, groups: 8 + 4 + 16 + 2 * (32 + 4 * rows * 2 * 4),
    }
    for name, tensors in up.items():
        small, large = (
            rank_pool.run(3, rank_cases.bytes_of_steps, name, QUARTERS, hidden)
            for hidden in (16, 256)
        )
        assert small == large
        first, *others = small
        assert first == [sum(step) for step in zip(*others, strict=True)]  # no rank meets another
        q = 3 if "directions" in name else 1
        for rank, found in enumerate(others, 1):
            for step in range(1, 3):
                n = q if "mezo" in name else min(step + 1, 3)
                labels = rank_cases.batch(step)[2][QUARTERS[rank]]
                sent = 48 + tensors(len(labels), len(labels.unique()))
                assert found[step] == sent + 152 + 12 * n + 4 * q, (name, rank, step)


@pytest.mark.parametrize("name", ["mezo, momentum", "pseuzo", "zo-adam"])
def test_a_state_of_two_ranks_continues_on_one_and_three(rank_pool, name):
    alone = rank_cases.run(name, steps=6)[3:]
    (state, weights), (other, _) = rank_pool.run(2, rank_cases.begun, name, HALVES)
    assert rank_cases.continued(0, name, state, weights, WHOLE) == alone
    every = rank_pool.run(3, rank_cases.continued, name, state, weights, QUARTERS)
    assert all(found == alone for found in every)
    with pytest.raises(ValueError, match="the state is of rank 1, but only rank 0 keeps a window"):
        rank_cases.continued(0, name, other, weights, WHOLE)


def run_example(rank, code):
    """Run the example, whose process group is there already; return its weights and its loss."""
    names = {}
    with mock.patch("torch.distributed.init_process_group"):
        exec(code, names)
    return rank_cases.flat(names["model"]).tolist(), float(names["loss"])


def test_the_example_of_the_page(rank_pool, tmp_path):
    """Its random weights need ranks of the same instruction set."""
    page = (
        (Path(__file__).parents[2] / "docs" / "scale.md").read_text().split("## Several processes")
    )
    code = page[1].split("```python\n")[1].split("```")[0]
    pool = RankPool(tmp_path, [{}, {}])
    (weights, loss), other = pool.run(2, run_example, code)
    pool.close()
    assert (weights, loss) == other
    (first, _), *_ = rank_pool.run(1, run_example, code)
    # Outputs of about 1 are rounded by 2^-24, so their changes, of about eps, by 1e-4 of their
    # size, and weights move by less than 1 in all.
    assert first == pytest.approx(weights, abs=1e-3)


def run_own(rank, code, parts):
    """Run four steps of the estimator that the code defines; return what it found."""
    names = {"torch": torch}
    exec(code, names)
    model = rank_cases.Exact()
    optimizer, found = names["Normalized"](model, lr=2**-6, eps=2**-2), []
    for step in range(4):
        x, y, _ = (part[parts[rank]] for part in rank_cases.batch(step))
        loss = optimizer.step(lambda x=x, y=y: rank_cases.losses(model(x), y))
        found.append((float(loss), rank_cases.flat(model).tolist()))
    return found


def test_an_estimator_of_ones_own(rank_pool):
    """That of docs/extending.md knows nothing of ranks."""
    page = (Path(__file__).parents[2] / "docs" / "extending.md").read_text()
    code = next(part for part in page.split("```python\n") if "class Normalized" in part)
    code = code.split("```")[0]
    every = rank_pool.run(2, run_own, code, HALVES)
    assert every == [run_own(0, code, WHOLE)] * 2


def test_tensors_as_bytes():
    tensors = [
        torch.randn(()),
        torch.zeros(0, 3),
        torch.randn(3, 4).bfloat16().t(),
        torch.arange(4, dtype=torch.int32),
        torch.tensor([float("nan"), -0.0], dtype=torch.float64),
    ]
    body = packed(*tensors)
    assert len(body) == sum(8 + 8 * x.dim() + x.numel() * x.element_size() for x in tensors)
    for got, want in zip(unpacked(body), tensors, strict=True):
        assert got.dtype is want.dtype
        assert torch.equal(got.nan_to_num(3), want.nan_to_num(3))
    for damaged in (body[:-1], b"abc", b"\xff" * 16):
        with pytest.raises(ValueError, match="a message of another rank is damaged"):
            unpacked(damaged)
