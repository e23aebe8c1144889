"""A padded batch runs without its padding on a CPU, and gives what it gives with it."""

import pytest
import torch
from objective_cases import OPTIONS
from pseuzo import CausalLMObjective, MeZO
from pseuzo.models import split
from pseuzo.models.packing import Packing
from tiny_models import ALL_KINDS, VOCAB, causal_lm

LENGTHS = (12, 3, 7, 1, 12)  # 35 tokens
TOKENS = sum(LENGTHS)


@pytest.fixture(autouse=True)
def narrow_models(monkeypatch):
    monkeypatch.setattr(split, "LEAST_WIDTH", 0)


def batch(kind: str, side: str = "left") -> dict[str, torch.Tensor]:
    """Return a padded batch with the loss of label words, of all next tokens, or of options."""
    place = torch.arange(12).expand(len(LENGTHS), -1)
    lengths = torch.tensor(LENGTHS)[:, None]
    mask = place >= 12 - lengths if side == "left" else place < lengths
    ids = torch.randint(3, VOCAB, mask.shape, generator=torch.Generator().manual_seed(1))
    made = {"input_ids": ids.where(mask, 0), "attention_mask": mask.long()}
    if kind == "label words":
        return made | {"labels": torch.tensor([0, 1, 2, 0, 1])}
    kept = slice(None) if kind == "next tokens" else [0, 1, 2, 4]  # one token predicts nothing
    made = {name: x[kept] for name, x in made.items()}
    made["labels"] = made["input_ids"].masked_fill(made["attention_mask"] == 0, -100)
    if kind == "options":
        made |= {"examples": torch.tensor([0, 1, 1, 0]), "answers": torch.tensor([3, 1])}
    return made


def tokens_run(model) -> list[int]:
    """Return the list that gets the number of tokens of each forward pass from now on."""
    seen = []
    model.get_input_embeddings().register_forward_pre_hook(lambda _, a: seen.append(a[0].numel()))
    return seen


def loss_of(model, kind: str, side: str, packs: bool):
    """Return the losses, their gradient, and how many tokens ran."""
    objective = CausalLMObjective(model, OPTIONS if kind == "label words" else None)
    forward, head = objective(batch(kind, side), reduction="none")
    assert objective._split.known.packs
    objective._split.known.packs = packs
    seen = tokens_run(model)
    losses = head(forward())
    gradients = torch.autograd.grad(losses.mean(), list(model.parameters()))
    return losses.detach(), gradients, list(seen)


@pytest.mark.parametrize("kind", ["label words", "next tokens", "options"])
@pytest.mark.parametrize("name", [kind for kind in ALL_KINDS if kind != "mistral"])
def test_padding_costs_nothing_and_changes_nothing(name, kind):
    model = causal_lm(name).double().eval()
    for side in ("left", "right"):
        got, gradients, seen = loss_of(model, kind, side, packs=True)
        want, wanted, padded = loss_of(model, kind, side, packs=False)
        assert seen == [TOKENS - (kind == "options")] and padded == [60 - 12 * (kind == "options")]
        # The losses are computed in fp32 from states in float64.
        torch.testing.assert_close(got, want, rtol=2e-7, atol=2e-6)
        for g, w in zip(gradients, wanted, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-6 * float(w.abs().max()) + 1e-12)


def test_steps_are_the_same():
    """Perturbed passes of a module run without padding, too."""
    moved = []
    for packs in (True, False):
        model = causal_lm("llama").eval()
        objective = CausalLMObjective(model, OPTIONS)
        optimizer = MeZO(model, lr=1e-3, eps=1e-2, seed=3)
        forward, head = objective(batch("label words"))
        objective._split.known.packs, seen = packs, tokens_run(model)
        for _ in range(2):
            optimizer.step(lambda forward=forward, head=head: head(forward()))
        assert seen == 4 * [TOKENS if packs else 60]
        moved.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    start = torch.cat([p.detach().flatten() for p in causal_lm("llama").parameters()])
    change = (moved[1] - start).norm()
    # Losses of about 1 differ by some 2^-22 and their slope over 2 eps by 2e-5.
    assert change > 0.05 and (moved[0] - moved[1]).norm() < 1e-2 * change


def test_a_window_that_no_row_reaches_is_no_obstacle():
    def packing_of(**changes):
        model = causal_lm("mistral").eval()
        for name, value in changes.items():
            setattr(model.config, name, value)
        objective = CausalLMObjective(model, OPTIONS)
        plan = objective.plan(batch("label words"))
        return objective._split.known.packs and objective._split.packing(plan)

    # The tokens of all rows are more than the window.
    assert packing_of(sliding_window=13)
    assert not packing_of(sliding_window=12)
    assert not packing_of(sliding_window=None, _attn_implementation="eager")


def test_little_padding_stays(monkeypatch):
    model = causal_lm("opt").eval()
    objective = CausalLMObjective(model, OPTIONS)
    full = batch("label words")
    packing = objective._split.packing
    assert packing(objective.plan(full)).tokens == TOKENS
    full["attention_mask"][:, 1:] = 1
    assert packing(objective.plan(full)) is None
    del full["attention_mask"]
    assert packing(objective.plan(full)) is None
    monkeypatch.setattr(split, "LEAST_WIDTH", 65)
    assert packing(objective.plan(batch("label words"))) is None


def test_layers_that_mix_neighbours_are_found():
    """A layer that reads the token before it would read another row's."""
    model = causal_lm("llama").eval()

    def mix(module, args):
        return (args[0] + torch.nn.functional.pad(args[0], (0, 0, 1, -1)), *args[1:])

    model.model.layers[1].register_forward_pre_hook(mix)
    objective = CausalLMObjective(model, OPTIONS)
    scores = objective.scores(batch("label words"))
    assert objective._split.known.packs is False and objective.padding == "right"
    made = batch("label words")
    rows = zip(made["input_ids"], made["attention_mask"], made["labels"], strict=True)
    alone = [
        objective.scores({"input_ids": ids[mask != 0][None], "labels": label[None]})
        for ids, mask, label in rows
    ]
    torch.testing.assert_close(scores, torch.cat(alone), rtol=0, atol=1e-5)


def test_rows_with_holes():
    mask = torch.tensor([[0, 1, 1, 0], [1, 0, 1, 1]])
    packing = Packing.of(mask)
    assert packing.places.tolist() == [0, 1, 4, 5, 6]
    ids = torch.arange(8).view(2, 4)
    inputs = packing.inputs({"input_ids": ids}, ["input_ids"])
    assert inputs["input_ids"].tolist() == [[1, 2, 4, 6, 7]]
    assert inputs["position_ids"].tolist() == [[0, 1, 0, 1, 2]]
    states = inputs["input_ids"][..., None]
    assert packing.at(states, torch.tensor([[2], [3]])).flatten().tolist() == [2, 7]
    heads = torch.stack([states[0], 10 * states[0]])[None]  # [1, H, S, d]
    rows = packing.spread(heads)
    assert rows[..., 0].tolist() == [
        [[1, 2, 0, 0], [10, 20, 0, 0]],
        [[4, 6, 7, 0], [40, 60, 70, 0]],
    ]
