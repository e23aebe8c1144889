"""A rank may keep its weights in host memory while another does not."""

import pytest
import torch
from pseuzo import CausalLMObjective, PseuZO, offload
from pseuzo.optim import fingerprints
from pseuzo.perturb.offload import flush
from rank_pool import RankPool
from tiny_models import batch_of, causal_lm


def train(rank, offloads):
    """Make three steps of a language model, and return losses and weights."""
    fingerprints.CHUNK = 1 << 9  # of many, so that it lies in one layer or another
    model = causal_lm("opt")
    if offloads and rank == 1:
        offload(model, torch.device("cpu"))
    optimizer = PseuZO(model, lr=1e-3, eps=1e-2, window=2)
    objective, losses = CausalLMObjective(model), []
    for step in range(3):
        batch = batch_of(2 + rank, seed=10 * step + rank)
        batch["labels"] = batch["input_ids"].clone()
        forward, head = objective(batch)
        losses.append(float(optimizer.step(forward, head, size=2 + rank)))
    flush(model)
    return losses, torch.cat([p.detach().flatten() for p in model.parameters()]).tolist()


@pytest.mark.slow
def test_one_of_two_ranks_is_offloaded(tmp_path):
    pool = RankPool(tmp_path, [{}, {}])
    first, second = pool.run(2, train, False)
    assert first == second
    assert pool.run(2, train, True) == [first, first]
    pool.close()
