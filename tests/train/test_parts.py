"""A batch is split into parts of whole examples. The mean of their losses, weighted by size, is the
loss of the batch."""

from types import SimpleNamespace

import pytest
import torch
from pseuzo import CausalLMObjective
from pseuzo.models.positions import loss_positions, rows_of_options
from pseuzo.train.losses import Losses
from pseuzo.train.parts import cut
from pseuzo.train.trainer import PseuZOTrainer
from tiny_models import batch_of, causal_lm
from trainer_cases import Rows, arguments


def of_labels():
    return {**batch_of(7), "labels": torch.arange(7) % 2, "rows": torch.arange(7)}, [17, 4]


def of_answers():
    """Return rows with a loss at 1, 2, 3 or 4 tokens."""
    batch = batch_of(7)
    last = torch.arange(12)[None] >= 11 - torch.arange(7)[:, None] % 4
    labels = torch.where(last, batch["input_ids"], -100)
    positions, targets = loss_positions(labels)
    return {**batch, "labels": labels, "positions": positions, "targets": targets}, None


def of_options(examples=(2, 3, 1, 2, 2, 3, 2)):
    """Return seven examples with 1 to 3 options each, whose rows are mixed."""
    batch, counts = batch_of(15), torch.tensor(examples)
    order = torch.randperm(15, generator=torch.Generator().manual_seed(1))
    of = torch.repeat_interleave(torch.arange(7), counts)[order]
    labels = torch.where(torch.arange(12)[None] >= 10, batch["input_ids"], -100)
    answers = torch.stack([(of == i).nonzero()[-1, 0] for i in range(7)])
    more = {"option_rows": rows_of_options(of, 7), "groups": torch.arange(15)}
    return {**batch, "labels": labels, "examples": of, "answers": answers} | more, None


@pytest.mark.parametrize("each", [False, True], ids=["means", "losses of examples"])
@pytest.mark.parametrize("make", [of_labels, of_answers, of_options])
def test_the_parts_make_the_loss_of_the_batch(make, each):
    batch, options = make()
    model = causal_lm("opt").eval()
    objective = CausalLMObjective(model, options)
    args = SimpleNamespace(objective="loss", clip_examples=2.0 if each else None, capture=False)
    losses = Losses(model, args, objective, None)
    optimizer = SimpleNamespace(parts=3, has_gradient=False, ranks=None, curvature_window=0)
    (closures,), given = losses.step_inputs(batch, optimizer)
    shares = torch.as_tensor(given["sizes"]) / sum(given["sizes"])
    examples = [len(b.get("answers", b["labels"])) for b in cut(batch, 3)]
    assert sorted(examples) == [2, 2, 3]
    with torch.no_grad():
        parts = torch.stack([closure().mean() for closure in closures])
        forward, head = objective(batch)
        torch.testing.assert_close((shares * parts).sum(), head(forward()), rtol=1e-6, atol=0)


def test_what_cannot_be_cut(tmp_path):
    with pytest.raises(ValueError, match="each of the 8 directions, and this batch has 7"):
        cut(of_labels()[0], 8)
    with pytest.raises(ValueError, match=r"by its 7 rows, but planes has shape \(3, 7\)"):
        cut(of_labels()[0] | {"planes": torch.zeros(3, 7)}, 2)
    args = arguments(tmp_path, method="evolution", split_batch=True, directions=6)
    with pytest.raises(ValueError, match="the last batch of the 12 has 5: choose a batch size"):
        PseuZOTrainer(causal_lm("opt"), args, train_dataset=Rows(12))
