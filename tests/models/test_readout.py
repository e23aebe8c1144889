"""The readout: the head's rows solve the regularised logistic regression of the outputs kept."""

import numpy as np
import pytest
import torch
from pseuzo import CausalLMObjective
from pseuzo.models.readout import Readout, head_to_fit
from torch.nn import functional as F
from transformers import BertConfig, BertForSequenceClassification, OPTConfig, OPTForCausalLM

DECAY = 0.3


def causal(tied: bool = True) -> OPTForCausalLM:
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=50,
        hidden_size=12,
        word_embed_proj_dim=12,
        ffn_dim=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=tied,
    )
    return OPTForCausalLM(config).eval()


def classifier() -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50,
        hidden_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=32,
        num_labels=3,
    )
    return BertForSequenceClassification(config).eval()


def batch(rows: int, classes: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 50, (rows, 7), generator=generator)
    return {"input_ids": ids, "labels": torch.randint(classes, (rows,), generator=generator)}


def fitted(model, options, *batches) -> Readout:
    head_to_fit(model, options)
    readout = Readout(CausalLMObjective(model, options), DECAY)
    for inputs in batches:
        forward, head = readout.objective(inputs)
        with readout.listening(), torch.no_grad():
            head(forward())
    return readout


def gradient_at_solution(readout: Readout) -> tuple[float, float]:
    """The largest entries of the gradient of what is minimised, in float64 and by its formula, at
    the solution and at the start."""
    s = {k: v.double() if v.is_floating_point() else v for k, v in readout.state.items()}
    o, y, w = s["outputs"].numpy(), s["classes"].numpy(), s["weight"].numpy()
    one = np.eye(len(w))[y]

    def largest(moved: np.ndarray, of_bias: np.ndarray) -> float:
        logits = o @ (w + moved).T
        if len(of_bias):
            logits = logits + s["bias"].numpy() + of_bias
        p = np.exp(logits - logits.max(1, keepdims=True))
        error = p / p.sum(1, keepdims=True) - one
        of_weight = error.T @ o / len(o) + DECAY / len(o) * (o**2).sum(1).mean() * moved
        both = [np.abs(of_weight).max()] + [np.abs(error.mean(0)).max()] * bool(len(of_bias))
        return max(both)

    moved, of_bias = s["moved"].numpy(), s["moved_bias"].numpy()
    return largest(moved, of_bias), largest(0 * moved, 0 * of_bias)


@pytest.mark.parametrize("kind", ["tied head", "own head", "classifier"])
def test_the_head_solves_the_regression(kind):
    model = classifier() if kind == "classifier" else causal(kind == "tied head")
    options = [0, 1, 2] if kind == "classifier" else [11, 7, 30]
    readout = fitted(model, options, *(batch(9, 3, seed) for seed in range(3)))
    assert len(readout.state["classes"]) == 27
    for _ in range(20):  # L-BFGS goes on from where the last fit ended
        readout.fit()
    found, start = gradient_at_solution(readout)
    # fp32 sums of 27 terms of size |o| <= 4 are known to about 27 * 4 * 2^-24 = 6e-6.
    assert found < 1e-4 < 0.02 < start
    head = readout.objective.lm_head
    moved = readout.state["weight"] + readout.state["moved"]
    assert torch.equal(head.weight.detach()[options], moved)


def test_other_rows_and_the_embedding_stay():
    model = causal()
    embedding = model.get_input_embeddings().weight.detach().clone()
    readout = fitted(model, [11, 7], batch(16, 2))
    head = readout.objective.lm_head.weight
    others = [i for i in range(50) if i not in (11, 7)]
    assert torch.equal(model.get_input_embeddings().weight, embedding)
    assert torch.equal(head[others], embedding[others])
    assert not torch.equal(head[[11, 7]], embedding[[11, 7]])
    assert not head.requires_grad and model.get_input_embeddings().weight.requires_grad


def test_the_loss_falls_by_the_fit():
    model, inputs = causal(), batch(16, 2)
    readout = fitted(model, [11, 7], inputs)
    logits = model(input_ids=inputs["input_ids"]).logits[:, -1, [11, 7]]
    start = causal()(input_ids=inputs["input_ids"]).logits[:, -1, [11, 7]]
    of = lambda x: F.cross_entropy(x, inputs["labels"])  # noqa: E731
    assert of(logits) < of(start)
    forward, head = readout.objective(inputs)
    torch.testing.assert_close(head(forward()), of(logits))


def test_passes_of_a_batch_are_averaged_and_parts_are_not():
    head_to_fit(model := causal(), [11, 7])
    readout = Readout(CausalLMObjective(model, [11, 7]))
    a, b = batch(4, 2, 1), batch(4, 2, 2)
    (first, _), (second, _) = readout.objective(a), readout.objective(b)
    with readout.listening(), torch.no_grad():
        plain = torch.cat([first(), second()])[:, -1]
        model.model.decoder.final_layer_norm.bias += 1  # as a perturbed pass would move the outputs
        first()
        model.model.decoder.final_layer_norm.bias -= 1
    torch.testing.assert_close(readout.state["outputs"][:4], plain[:4] + 0.5)
    assert torch.equal(readout.state["outputs"][4:], plain[4:])
    assert readout.state["classes"].tolist() == [*a["labels"].tolist(), *b["labels"].tolist()]


def test_the_newest_outputs_are_kept_and_those_not_finite_left_out():
    readout = fitted(model := causal(), [11, 7], batch(4, 2, 1))
    readout.kept = 6
    last = readout.state["outputs"].clone()
    forward, _ = readout.objective(batch(4, 2, 2))
    with readout.listening(), torch.no_grad():
        forward()
    assert torch.equal(readout.state["outputs"][:2], last[2:])
    before = {k: v.clone() for k, v in readout.state.items()}
    model.model.decoder.final_layer_norm.bias.data.fill_(float("nan"))
    with readout.listening(), torch.no_grad():
        forward()
    assert all(torch.equal(before[k], v) for k, v in readout.state.items())


def test_what_cannot_be_fitted_is_refused():
    with pytest.raises(ValueError, match="readout=fit: the answers are not single tokens"):
        head_to_fit(causal(), None)
    model = causal()
    model.lm_head = torch.nn.Sequential(model.lm_head)
    with pytest.raises(ValueError, match="the output head of OPTForCausalLM is no plain"):
        head_to_fit(model, [11, 7])
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(causal(), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="readout=fit: an adapter is saved without the head"):
        head_to_fit(adapted, [11, 7])
