"""How often a model is right: by the scores of the options, or by what it writes.

Accuracy: the model chooses the option whose tokens have the largest mean log-likelihood, as in
MeZO. The choice is right if it is one of those that count as right, and never where a score is not
finite, as after training has diverged. With sfc, the score of an option is lessened by its score
after the domain's prompt, which lacks what the row asks: surface forms of an answer then compete
less (Holtzman et al. 2021, domain-conditional PMI). F1 and exact match compare the normalised words
that the model writes greedily with each accepted answer and take the best, as SQuAD defines it
(torchmetrics).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from pseuzo.models.objective import CausalLMObjective
from pseuzo.models.positions import IGNORED
from pseuzo.optim.together import Together
from pseuzo.perturb.contexts import frozen_mode
from pseuzo.perturb.offloaded import device_of
from pseuzo.tasks.data import Row, TaskData


@dataclass(frozen=True)
class Batches:
    """How rows are put into batches, and which of them this rank computes.

    size: rows of a batch. together: the ranks that share the batches.
    """

    size: int
    progress: bool = False
    together: Together = field(default_factory=Together)

    def of(
        self, rows: Sequence[Row], what: str, one_length: bool = False
    ) -> Iterator[tuple[list[int], list[Row]]]:
        """Yield (numbers, rows) of similar length. The longest come first, so that rows that do not
        fit into memory fail at once. one_length: all rows of a batch have the same length, so that
        there is no padding."""
        from tqdm import tqdm

        order = sorted(range(len(rows)), key=lambda i: -len(rows[i].tokens))
        parts = groupby(order, key=lambda i: len(rows[i].tokens) if one_length else None)
        some = [
            part[first : first + self.size]
            for part in (list(p) for _, p in parts)
            for first in range(0, len(part), self.size)
        ]
        some = some[self.together.rank :: self.together.size]
        for numbers in tqdm(some, desc=what, unit="batch", leave=False, disable=not self.progress):
            yield numbers, [rows[i] for i in numbers]

    def complete(self, found: dict[int, Any]) -> dict[int, Any]:
        """Return what all ranks found, by number of the row. found: what this one did."""
        ranks = self.together.all_of(list(found.items()))
        return {number: value for items in ranks for number, value in items}


@torch.no_grad()
def evaluate(
    model: nn.Module,
    data: TaskData,
    *,
    batch_size: int = 16,
    progress: bool = False,
    sfc: bool = False,
    together: Together | None = None,
    outcomes: bool = False,
) -> dict[str, Any]:
    """{"accuracy"}, or for a generation {"f1", "em"}, from 0 to 1; "loss", the one that is trained
    on; "examples", how many there are.

    batch_size: rows of a forward; an option is a row. Each module keeps its train or eval mode.
    sfc: choose by calibrated scores; the loss is of those that are not. ValueError if the task has
    no sfc template. together: ranks that share the batches, which are those of a single process,
    and get the same figures. outcomes: also return "outcomes", what each example adds to the metric
    of the task, from 0 to 1, in the order of the data.
    """
    domain = data.of_domain() if sfc else None
    batches = Batches(batch_size, progress, together or Together())
    every: list[float] | None = [] if outcomes else None
    figures = _measure(model, data, range(len(data)), batches, True, domain, every)
    return figures if every is None else figures | {"outcomes": every}


@torch.no_grad()
def nondiff_loss(model: nn.Module, data: TaskData, batch_rows: Sequence[int] | Tensor) -> Tensor:
    """The loss of these examples for MeZO's closure, without a gradient: 1 - mean F1 of what the
    model writes (generation) or 1 - accuracy (options).

    A scalar, fp32, on the model's device."""
    index = batch_rows.tolist() if isinstance(batch_rows, Tensor) else list(batch_rows)
    figures = _measure(model, data, index, Batches(16), loss=False)
    value = figures["f1" if data.task.kind == "generation" else "accuracy"]
    return torch.tensor(1.0 - value, device=device_of(model))


def _measure(
    model: nn.Module,
    data: TaskData,
    index: Sequence[int],
    batches: Batches,
    loss: bool,
    domain: TaskData | None = None,
    every: list[float] | None = None,
) -> dict[str, float]:
    """every: gets the outcome of each example."""
    with frozen_mode(model):
        if data.task.kind == "generation":
            figures = _generated(model, data, index, batches, every)
            if loss:
                figures["loss"] = _answer_loss(model, data, index, batches)
        elif data.options is not None:
            figures = _by_label_words(model, data, domain, index, batches, every)
        else:
            figures = _by_options(model, data, domain, index, batches, every)
    return figures | ({"examples": len(index)} if loss else {})


def _moved(batch: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    device = device_of(model)
    return {k: v.to(device) for k, v in batch.items()}


def _by_label_words(model, data, domain, index, batches, every) -> dict[str, float]:
    def scores_of(data: TaskData, rows: Sequence[Row]) -> Tensor:
        assert data.options is not None  # evaluate() calls this for label words alone
        objective = CausalLMObjective(model, data.options, verify="once")
        found: dict[int, list[float]] = {}
        for numbers, some in batches.of(rows, "evaluating"):
            batch = data.pad_rows(some)
            batch["labels"] = torch.zeros(len(some), dtype=torch.long)
            scores = objective.scores(_moved(batch, model)).float()
            found |= zip(numbers, scores.tolist(), strict=True)
        found = batches.complete(found)
        return torch.tensor([found[i] for i in range(len(rows))])

    scores = scores_of(data, [data.token_rows(i, "label-words")[0] for i in index])
    answers = torch.tensor([data.examples[i].answer for i in index])
    losses = nn.functional.cross_entropy(scores, answers, reduction="none")
    if domain is not None:
        rows, places = _once([domain.token_rows(i, "label-words")[0] for i in index])
        # The logits are log-likelihoods up to a number for each row, which the choice is free of.
        scores = scores - scores_of(domain, rows)[places]
    right = (scores.argmax(1) == answers) & scores.isfinite().all(1)
    if every is not None:
        every += right.double().tolist()
    return {"accuracy": float(right.double().mean()), "loss": float(losses.double().mean())}


def _once(rows: Sequence[Row]) -> tuple[list[Row], list[int]]:
    """The rows that differ, and for each row its place among them."""
    found: dict[tuple, int] = {}
    places = [found.setdefault((*row.prompt, None, *row.answer), len(found)) for row in rows]
    return [rows[places.index(place)] for place in range(len(found))], places


def _row_scores(model, data, rows, batches) -> tuple[Tensor, Tensor]:
    """Return the mean log-likelihood of each row's scored tokens, and their number; [R], on CPU."""
    objective = CausalLMObjective(model, verify="once")
    found: dict[int, tuple[float, float]] = {}
    for numbers, some in batches.of(rows, "evaluating"):
        batch = data.pad_rows(some)
        scores = objective.row_scores(_moved(batch, model)).double()
        counts = (batch["targets"] != IGNORED).sum(1).double()
        found |= zip(numbers, zip(scores.tolist(), counts.tolist(), strict=True), strict=True)
    found = batches.complete(found)
    table = torch.tensor([found[i] for i in range(len(rows))], dtype=torch.float64)
    return table[:, 0], table[:, 1]


def _by_options(model, data, domain, index, batches, every) -> dict[str, float]:
    rows, bounds = [], [0]
    for i in index:
        rows += data.token_rows(i, "options")
        bounds.append(len(rows))
    scores, counts = _row_scores(model, data, rows, batches)
    chosen_by = scores
    if domain is not None:
        some, places = _once([row for i in index for row in domain.token_rows(i, "options")])
        chosen_by = scores - _row_scores(model, data, some, batches)[0][places]
    right, losses, tokens = 0, 0.0, 0.0
    for i, first, end in zip(index, bounds, bounds[1:], strict=False):
        example, mine, by = data.examples[i], scores[first:end], chosen_by[first:end]
        choice = example.options[int(by.argmax())]
        correct = bool(by.isfinite().all()) and choice in example.golds
        right += correct
        if every is not None:
            every.append(float(correct))
        if data.train_on == "options":
            losses += float(mine.logsumexp(0) - mine[example.answer])
            tokens += 1
        else:
            losses -= float(mine[example.answer] * counts[first + example.answer])
            tokens += float(counts[first + example.answer])
    return {"accuracy": right / len(index), "loss": losses / tokens}


def _answer_loss(model, data, index, batches) -> float:
    rows = [data.token_rows(i, "answer")[0] for i in index]
    scores, counts = _row_scores(model, data, rows, batches)
    return -float((scores * counts).sum() / counts.sum())


def _generated(model, data, index, batches, every) -> dict[str, float]:
    from torchmetrics.functional.text import squad

    texts = _texts(model, data, index, batches)
    written: list[Any] = [{"prediction_text": text, "id": str(i)} for i, text in enumerate(texts)]
    golds = [list(data.examples[i].golds) for i in index]
    wanted: list[Any] = [
        {"answers": {"text": accepted, "answer_start": [0] * len(accepted)}, "id": str(i)}
        for i, accepted in enumerate(golds)
    ]
    figures = squad(written, wanted)
    if every is not None:
        pairs = zip(written, wanted, strict=True)
        of_task = "f1" if data.task.metric == "f1" else "exact_match"
        every += [float(squad([text], [gold])[of_task]) / 100 for text, gold in pairs]
    return {"f1": float(figures["f1"]) / 100, "em": float(figures["exact_match"]) / 100}


@torch.no_grad()
def generate(
    model: nn.Module,
    data: TaskData,
    index: Sequence[int],
    batch_size: int = 16,
    progress: bool = False,
) -> list[str]:
    """Return the text that the model writes greedily after the prompts of these examples, up to the
    task's stop or max_new_tokens."""
    return _texts(model, data, index, Batches(batch_size, progress))


def _texts(model: nn.Module, data: TaskData, index: Sequence[int], batches: Batches) -> list[str]:
    from transformers import GenerationConfig, StoppingCriteriaList

    writer: Any = model  # nn.Module does not declare generate()
    tokenizer, stop = data.tokenizer, data.task.stop
    rows = [data.token_rows(i, "prompt")[0] for i in index]
    texts: dict[int, str] = {}
    model_ends = _as_list(getattr(model.generation_config, "eos_token_id", None))
    ends = data.end_tokens() | {tokenizer.eos_token_id, *model_ends} - {None}
    config = GenerationConfig(
        max_new_tokens=data.task.max_new_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        pad_token_id=data.pad,
        eos_token_id=sorted(ends) or None,
        use_cache=True,
    )
    one_length = _padding_counts(model, data, rows)
    for numbers, some in batches.of(rows, "writing", one_length):
        batch = _moved(data.pad_rows(some), model)
        start = batch["input_ids"].shape[1]
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))

        def stopped(ids: Tensor, scores: Tensor, start: int = start, **kwargs: object) -> Tensor:
            new = tokenizer.batch_decode(ids[:, start:], skip_special_tokens=True)
            return torch.tensor([bool(stop) and stop in text for text in new], device=ids.device)

        with frozen_mode(model):
            out = writer.generate(
                input_ids=batch["input_ids"],
                attention_mask=mask,
                generation_config=config,
                stopping_criteria=StoppingCriteriaList([stopped]),
            )
        written = tokenizer.batch_decode(out[:, start:], skip_special_tokens=True)
        for number, text in zip(numbers, written, strict=True):
            texts[number] = (text.split(stop)[0] if stop else text).strip()
    texts = batches.complete(texts)
    return [texts[i] for i in range(len(rows))]


def _padding_counts(model: nn.Module, data: TaskData, rows: Sequence[Row]) -> bool:
    """Whether padding on the left might change what the model writes; then the rows of a batch
    must be of one length."""
    ends = sorted(rows, key=lambda row: len(row.tokens))
    batch = _moved(data.pad_rows([ends[0], ends[-1]]), model)
    if "attention_mask" not in batch:
        return False
    try:
        objective = CausalLMObjective(model, [0, 1], verify="once")
        objective.plan(batch | {"labels": batch["input_ids"][:, 0]})
    except (TypeError, ValueError, RuntimeError):
        return True  # a model that the objective refuses may be able to write
    return objective.padding != "anywhere"


def _as_list(value: object) -> list:
    return list(value) if isinstance(value, list | tuple) else [value]
