"""A method that measures all of the training data has the right batches, passes and runs."""

import json
import random
from itertools import chain

import pytest
import torch
from helpers import SMALL, assert_same_weights, pseuzo
from pseuzo.train.arguments import PseuZOTrainingArguments
from pseuzo.train.batches import even_batches
from pseuzo.train.methods import forwards_of_steps, forwards_per_step
from pseuzo.train.trainer import PseuZOTrainer
from tiny_models import causal_lm
from torch.utils.data import IterableDataset
from trainer_cases import Rows, arguments

SVRG = "--method mezo-svrg --lr 2e-4 --eps 1e-3 --anchor-every 3 --anchor-lr 4e-4".split()


@pytest.mark.parametrize("n, size, most, sizes", [
    (10, 4, None, [3, 3, 4]), (8, 4, None, [4, 4]), (3, 16, None, [3]), (10, 4, 5, [3, 3, 4]),
    (10, 4, 2, [4, 4]), (9, 4, 1, [4]),
])  # fmt: skip
def test_every_row_is_in_one_batch(n, size, most, sizes):
    batches = [list(rows) for rows in even_batches(n, size, most, seed=-3)]
    assert [len(rows) for rows in batches] == sizes
    rows = [row for batch in batches for row in batch]
    assert len(set(rows)) == len(rows) and set(rows) <= set(range(n))
    if sum(sizes) < n:
        others = [{*chain(*even_batches(n, size, most, seed))} for seed in range(8)]
        assert set().union(*others) == set(range(n)), "the seeds together do not draw all rows"
    else:
        assert rows == list(range(n))


def test_passes():
    options = {"train_size": 50, "batch_size": 8, "anchor_every": 4}
    # Steps 0, 4 and 8 measure 7 batches of all rows, with two passes each. Other steps have 4
    # passes.
    assert forwards_of_steps("mezo-svrg", 9, options) == 3 * 14 + 6 * 4
    assert forwards_per_step("mezo-svrg", options) == (14 + 3 * 4) / 4
    more = options | {"anchor_batches": 2, "directions": 3, "two_sided": False}
    assert forwards_of_steps("mezo-svrg", 2, more) == 2 * 4 + 2 * 4


def test_operations_are_counted_for_an_average_step(tmp_path):
    model, rows = causal_lm("opt"), Rows(10)
    counts = {}
    for method in ("fo-sgd", "mezo-svrg", "deepzero"):
        args = arguments(tmp_path, method=method, per_device_train_batch_size=5)
        trainer = PseuZOTrainer(model, args, train_dataset=rows)
        counts[method] = trainer.floating_point_ops(trainer.data_collator([rows[0]]))
    # An anchor every 10 steps takes 2 batches with 2 passes, and the other steps 4 passes.
    assert counts["mezo-svrg"] == int(counts["fo-sgd"] * 4 // 3)
    assert counts["deepzero"] == counts["fo-sgd"] * 33 // 3, "the scores are made once, in the run"


def test_the_anchor_is_measured_on_every_row(tmp_path):
    """The mean of the batches' losses is that of all rows, and torch's random state does not
    change."""
    model, rows = causal_lm("opt"), Rows(10)
    for row in rows.rows:  # equal lengths, for the mean over tokens
        row["labels"] = torch.cat([torch.full((9,), -100), row["labels"][-1:].clamp(min=1)])
    args = arguments(tmp_path, method="mezo-svrg", per_device_train_batch_size=5, max_steps=1)
    trainer = PseuZOTrainer(model, args, train_dataset=rows)
    trainer.create_optimizer()
    model.eval()  # as steps do
    states = torch.get_rng_state(), random.getstate()
    with torch.no_grad():
        losses = [loss() for loss in trainer.data_losses()]
        batch = trainer.data_collator([rows[i] for i in range(10)])
        want = trainer.losses.closure(batch)()
    assert len(losses) == 2
    torch.testing.assert_close(torch.stack(losses).mean(), want)
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]


def test_data_of_unknown_length_are_refused(tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(Rows().rows)

    args = arguments(tmp_path, method="mezo-svrg", per_device_train_batch_size=4)
    trainer = PseuZOTrainer(causal_lm("opt"), args, train_dataset=Stream())
    with pytest.raises(ValueError, match="mezo-svrg measures the loss of all the training data"):
        trainer.train()


@pytest.mark.parametrize("option", [{"anchor_every": 3}, {"anchor_batches": 2}, {"anchor_lr": 1.0}])
def test_options_of_an_anchor_are_mezo_svrgs(option, tmp_path):
    with pytest.raises(ValueError, match="needs method mezo-svrg, not mezo"):
        PseuZOTrainingArguments(output_dir=str(tmp_path), use_cpu=True, method="mezo", **option)


@pytest.mark.slow
def test_a_run_resumes_to_the_bit(tmp_path):
    """The run resumes within a cycle, so that the anchor comes from the checkpoint."""
    settings = dict(method="mezo-svrg", per_device_train_batch_size=4, max_steps=8, anchor_every=4)
    settings |= dict(anchor_batches=2, save_strategy="steps", save_steps=6)
    models = [causal_lm("opt"), causal_lm("opt")]
    for model, checkpoint in zip(models, (None, str(tmp_path / "checkpoint-6")), strict=True):
        trainer = PseuZOTrainer(model, arguments(tmp_path, **settings), train_dataset=Rows())
        trainer.train(resume_from_checkpoint=checkpoint)
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(p, q)


@pytest.mark.slow
def test_a_run_of_the_command_line_is_recorded(tmp_path):
    out, journal = tmp_path / "run", tmp_path / "run.pzj"
    train = ["train", *SMALL, *SVRG, *"--steps 4 --eval-every 0 --keep last".split()]
    pseuzo(*train, "--output", out, "--journal", journal)
    results = json.loads((out / "results.json").read_text())
    # Steps 0 and 3 measure 8 batches of 6 of the 48 rows. The other steps have 4 passes.
    assert results["method"] == "mezo-svrg" and results["forwards"] == 2 * 16 + 2 * 4
    pseuzo("replay", "--base", "demo", "--journal", journal, "--output", tmp_path / "replayed")
    assert_same_weights(out / "model", tmp_path / "replayed")
