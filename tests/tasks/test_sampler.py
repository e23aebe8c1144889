"""Each epoch draws every row once, with the classes spread evenly."""

import pytest
import torch
from pseuzo.tasks import Example, StratifiedSampler, Task, TaskData
from task_examples import CODE, examples_of


@pytest.mark.parametrize("counts", [(500, 500), (30, 10), (7, 8, 9), (100, 3, 20, 1)])
def test_the_sampler(counts):
    classes = [c for c, n in enumerate(counts) for _ in range(n)]
    n, size = len(classes), 16
    sampler = StratifiedSampler(classes, size, seed=5)
    order = list(sampler)
    assert sorted(order) == list(range(n)) and len(sampler) == n
    assert list(sampler) == order == list(StratifiedSampler(classes, size, seed=5))
    sampler.set_epoch(1)
    assert sorted(sampler) == list(range(n)) and list(sampler) != order
    assert list(StratifiedSampler(classes, size, seed=6)) != order
    batches = [torch.tensor(order[i : i + size]) for i in range(0, n, size)]
    for batch in batches:
        share = torch.tensor(classes)[batch].bincount(minlength=len(counts))
        fair = torch.tensor(counts) * len(batch) / n
        # Each class is spread evenly from its own start, so that a batch is off by less than one
        # row of a class at each of its ends.
        assert (share - fair).abs().max() < 2
        if counts == (500, 500):
            assert share.tolist() in ([8, 8], [4, 4])
    if counts == (500, 500):
        firsts = {classes[batch[0]] for batch in batches}
        assert firsts == {0, 1}, "the order within a batch is not random"


def test_the_sampler_in_a_data_loader(tokenizer):
    data = TaskData(examples_of(CODE), CODE, tokenizer, max_length=100)
    loader = torch.utils.data.DataLoader(
        data, 2, sampler=data.sampler(2, seed=0), collate_fn=data.collate
    )
    batches = list(loader)
    assert sorted(i for b in batches for i in b["rows"].tolist()) == [0, 1, 2, 3]
    assert all(sorted(b["labels"].tolist()) == [0, 1] for b in batches)
    free = Task(name="g", kind="generation", prompt="{{ q }}", answers="a")
    data = TaskData([Example("?", (), None, ("x",))] * 40, free, tokenizer, max_length=100)
    assert sorted(data.sampler(7, seed=2)) == list(range(40)) != list(data.sampler(7, seed=2))
    with pytest.raises(ValueError, match="batch_size must be 1"):
        data.sampler(0, seed=2)
