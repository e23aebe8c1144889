"""Batches of the objective's tests, and their losses by a model's full logits."""

import torch
from tiny_models import batch_of

OPTIONS = [17, 4, 900]


def full_logits(model, batch):
    """Return the model's own logits, with positions counted from the first token with attention."""
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    return model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], position_ids=positions
    ).logits.float()


def head_input(model, batch):
    """Return the hidden states before the output head, which keep their gradient, and all
    logits."""
    seen = []
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda _, a: seen.append(a[0]))
    logits = full_logits(model, batch)
    handle.remove()
    seen[0].retain_grad()
    return seen[0], logits


# Example 1 has three rows of options, 0 and 2 have two, in mixed order. Rows 2, 0 and 6 are right.
RAGGED = {"examples": torch.tensor([1, 0, 0, 1, 1, 2, 2]), "answers": torch.tensor([2, 0, 6])}


OPTION_TOKENS = (3, 1, 2, 5, 1, 4, 4)


def option_batch():
    batch = batch_of(rows=7, seed=3)
    labels = torch.full_like(batch["input_ids"], -100)
    for row, n in enumerate(OPTION_TOKENS):
        labels[row, -n:] = batch["input_ids"][row, -n:]
    return {**batch, "labels": labels, **RAGGED}


def plain_option_losses(model, batch):
    """Return the losses [B] in float64 and the scores [R], from the model's full logits, one row
    and token at a time."""
    logp = full_logits(model, batch).double().log_softmax(-1)
    scores = []
    for row, n in enumerate(OPTION_TOKENS):
        places = range(12 - n, 12)
        scores.append(sum(logp[row, t - 1, batch["input_ids"][row, t]] for t in places) / n)
    rows = [[1, 2], [0, 3, 4], [5, 6]]
    losses = [
        torch.stack([scores[r] for r in mine]).logsumexp(0) - scores[right]
        for mine, right in zip(rows, (2, 0, 6), strict=True)
    ]
    return torch.stack(losses), torch.stack(scores)


def plain_option_losses_of(model, states, batch):
    """Return the same losses, in float64, as a function of the head's input."""
    logp = model.get_output_embeddings()(states).log_softmax(-1)
    token = logp[:, :-1].gather(2, batch["input_ids"][:, 1:, None])[..., 0]
    scores = torch.stack([token[row, -n:].mean() for row, n in enumerate(OPTION_TOKENS)])
    rows = [[1, 2], [0, 3, 4], [5, 6]]
    losses = [
        scores[mine].logsumexp(0) - scores[right]
        for mine, right in zip(rows, (2, 0, 6), strict=True)
    ]
    return torch.stack(losses)
