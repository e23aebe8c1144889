"""The positions of a batch with a loss are found, and the model gets the right parts of the
batch."""

import pickle

import pytest
import torch
from helpers import Waits
from objective_cases import OPTIONS, option_batch
from pseuzo import CausalLMObjective
from pseuzo.models.positions import loss_positions, rows_of_options, with_positions
from tiny_models import batch_of, causal_lm
from transformers import (
    BatchEncoding,
)


def test_the_model_gets_its_inputs_alone():
    model = causal_lm("opt").eval()
    seen = []
    handle = model.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(set(kwargs)), with_kwargs=True
    )
    batch = option_batch()
    positions, targets = loss_positions(batch["labels"])
    option_rows = rows_of_options(batch["examples"], 3)
    assert option_rows.tolist() == [[1, 2, -1], [0, 3, 4], [5, 6, -1]]
    more = {
        "groups": torch.arange(7),
        "rows": torch.arange(3),
        "positions": positions,
        "targets": targets,
        "option_rows": option_rows,
    }
    forward, head = CausalLMObjective(model)({**batch, **more})
    with_them = head(forward())
    forward, head = CausalLMObjective(model)(batch)
    assert torch.equal(with_them, head(forward()))
    handle.remove()
    assert set().union(*seen) == {"input_ids", "attention_mask", "position_ids", "use_cache"}


def test_a_planned_batch_makes_nothing_wait():
    """The objective itself waits for nothing, although the forward of a model may."""
    batch = option_batch()
    positions, targets = loss_positions(batch["labels"])
    batch |= {
        "positions": positions,
        "targets": targets,
        "option_rows": rows_of_options(batch["examples"], 3),
    }
    words = {**batch_of(), "labels": torch.tensor([0, 2, 1, 2])}
    for options, one in ((None, batch), (OPTIONS, words)):
        objective = CausalLMObjective(causal_lm("gpt2"), options)
        o = objective(one)[0]().detach()
        for reduction in ("mean", "none"):
            with Waits() as waits:
                _, head = objective(one, reduction)
                head(o)
            assert waits.seen == []
    with Waits() as waits:
        CausalLMObjective(causal_lm("gpt2"), verify=False)(option_batch())
    assert waits.seen, "the counter saw no wait"


@pytest.mark.parametrize("collated", [False, True])
def test_the_first_token_of_a_padded_text_is_not_predicted(collated):
    """The token has no loss, as in a row alone, although its label says that it has one."""
    model = causal_lm("llama").eval()
    batch = batch_of()
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    alone = [
        ids[None, mask == 1]
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    with torch.no_grad():
        want = sum(model(input_ids=ids, labels=ids).loss * (ids.shape[1] - 1) for ids in alone)
        want /= sum(ids.shape[1] - 1 for ids in alone)
        forward, head = CausalLMObjective(model)(with_positions(dict)(batch) if collated else batch)
        # The fp32 sums have another order.
        torch.testing.assert_close(head(forward()), want, rtol=1e-5, atol=0)


def test_a_collator_with_positions():
    labels = batch_of()["input_ids"].clone()
    labels[0, :7] = -100
    objective = CausalLMObjective(causal_lm("opt").eval())
    for kind in (dict, BatchEncoding):
        plain = {**batch_of(), "labels": labels}
        batch = with_positions(lambda rows: rows)(kind({k: v[[2, 0]] for k, v in plain.items()}))
        assert type(batch) is kind and set(batch) == {*plain, "positions", "targets"}
        mask = plain["attention_mask"][[2, 0]]
        for got, want in zip(
            (batch["positions"], batch["targets"]),
            loss_positions(labels[[2, 0]], mask),
            strict=True,
        ):
            assert torch.equal(got, want)
        # The attention of this row begins at 2.
        assert (batch["labels"] != labels[[2, 0]]).nonzero().tolist() == [
            [0, 1],
            [0, 2],
        ]
        with Waits() as waits:
            objective(batch)
        assert kind is dict or waits.seen == []  # the first batch is verified
    unpadded = {k: v[:1] for k, v in plain.items()}
    assert set(with_positions(lambda rows: rows)(dict(unpadded))) == {
        "input_ids",
        "labels",
        "positions",
        "targets",
    }
    for other in ({"labels": torch.tensor([0, 1])}, {"input_ids": labels}, option_batch()):
        assert with_positions(lambda rows: rows)(other) is other and "positions" not in other

    assert pickle.loads(pickle.dumps(with_positions(dict)))({"a": 1}) == {"a": 1}


def test_garbage_at_positions_without_loss_stays_there():
    """An infinity in the states of a padded position must not reach o."""
    model = causal_lm("opt").eval()
    labels = batch_of()["input_ids"].clone()
    labels[0, :9] = labels[1, :11] = -100
    objective = CausalLMObjective(model)
    forward, _ = objective({**batch_of(), "labels": labels})
    norm = model.model.decoder.final_layer_norm
    handle = norm.register_forward_hook(
        lambda m, a, out: out.index_fill(1, torch.tensor([0]), float("inf"))
    )
    o = forward()[:2]  # the other rows have a loss there
    handle.remove()
    assert o.isfinite().all()
