"""Examples as batches for CausalLMObjective.

Three kinds of batch, all on the CPU and padded on the left:

    label words  input_ids, attention_mask [B, T]; labels [B], the class
    options      one row for each option: input_ids, attention_mask, labels [R, T], which is -100
                 outside the option's tokens; examples [R], the example a row belongs to;
                 answers [B], the row of the right option
    answer       input_ids, attention_mask, labels [B, T], which is -100 outside the answer's tokens

All have rows [B], the numbers of the examples in the data. Where examples have classes they have
groups for PseuZO's window: for each row of the batch the class (label words, answer) or
class * n_options + option (options). option_rows, positions and targets are what the objective
would compute from the rest: given them, no step waits for the device to find them. A batch without
padding has no attention_mask, which tells the objective that there is padding.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from pseuzo.models.positions import IGNORED, loss_positions, rows_of_options
from pseuzo.tasks.encoding import Encoder, Row
from pseuzo.tasks.sampler import StratifiedSampler
from pseuzo.tasks.task import Example, Task

TRAIN_ON = ("auto", "label-words", "options", "answer")


class TaskData(Dataset):
    """The examples of a task as the tokens of one model; collate makes batches of data[i].

    max_length: the most tokens of a row. A longer prompt loses its beginning (after the tokens
    that the tokenizer puts before every text), so that the end of the question and the whole
    option stay. A prompt that begins with those tokens does not get them again. If the task is a
    chat, the prompt is the user's turn in the tokenizer's chat template, which writes all special
    tokens itself, shots are turns before it, and the assistant's turn is scored; then the user's
    text loses its beginning, and the template stays whole.

    train_on: "label-words", the cross entropy over the label words' logits, one row an example,
    for words that are single tokens; "options", over the mean log-likelihoods of the options'
    tokens; "answer", the tokens of the right answer, as in language modelling. "auto" means
    label-words for a classification whose label words are single tokens (then it is the same as
    options), options for other classifications, and answer for a choice or a generation.

    shots: examples put before each prompt with their answers; as many as fit, the last ones.

    kind: of the model, see pseuzo.models.kinds. A masked language model has its mask token where
    the label word would be, and its batches have positions [B, 1], where that is; a classifier
    needs no label words. Both are for classifications, and train on label-words, which for a
    classifier are its classes.

    Attributes: options, the tokens of the label words, or None if train_on is something else;
    labels, the class of each example, or None for tasks without classes; train_on, what "auto"
    meant.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        task: Task,
        tokenizer: Any,
        *,
        max_length: int,
        train_on: str = "auto",
        shots: Sequence[Example] = (),
        kind: str = "causal",
    ):
        _check_arguments(examples, task, max_length, train_on)
        if kind != "causal":
            _check_kind(kind, task, tokenizer, train_on)
        self.examples, self.task, self.tokenizer = list(examples), task, tokenizer
        self.max_length, self.shots, self.kind = max_length, shots, kind
        self.encoder = Encoder(task, tokenizer, max_length, shots, self.examples, kind)
        pads = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        self.pad = next(i for i in pads if i is not None)
        self._rows: dict[tuple[int, str], list[Row]] = {}
        is_classification = task.kind == "classification"
        self.labels = [e.answer for e in self.examples] if is_classification else None
        self.options: list[int] | None = None
        self.train_on = train_on
        if kind == "classifier":
            self.train_on, self.options = "label-words", list(range(len(task.labels)))
        elif train_on == "label-words" or (train_on == "auto" and is_classification):
            why_not = self._find_label_words()
            if (train_on == "label-words" or kind == "masked") and why_not:
                instead = "the kind classifier" if kind == "masked" else "train_on 'options'"
                raise ValueError(f"task {task.name}: {why_not}; choose shorter words, or {instead}")
            self.train_on = "options" if why_not else "label-words"
        elif train_on == "auto":
            self.train_on = "answer"

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, i: int) -> dict[str, Any]:
        """{"row": i, "tokens": [Row], "answer": class or option}: what collate takes."""
        i = range(len(self))[i]
        rows = self.token_rows(i, self.train_on)
        return {"row": i, "tokens": rows, "answer": self.examples[i].answer}

    def token_rows(self, i: int, what: str) -> list[Row]:
        """The rows of example i for a batch of what: label-words (the prompt), options, answer, or
        prompt, which leaves room for max_new_tokens."""
        if (i, what) not in self._rows:
            self._rows[i, what] = self.encoder.encode(self.examples[i], what)
        return self._rows[i, what]

    def fit(self, what: str | None = None) -> dict[str, float]:
        """How much of the examples fits into max_length, in rows of what (None: the rows that the
        metric is computed from).

        cut_prompts: how many prompts lost their beginning; shots_mean and shots_least: the shots
        before a prompt. ValueError for an example that cannot be asked, or whose loss cannot be
        computed."""
        for i in range(len(self)):
            self.token_rows(i, self.train_on)
        if what is None:
            labels = "label-words" if self.options is not None else "options"
            what = "prompt" if self.task.kind == "generation" else labels
        rows = [self.token_rows(i, what) for i in range(len(self))]
        shots = [some[0].shots for some in rows]
        return {
            "cut_prompts": sum(any(row.lost for row in some) for some in rows),
            "shots_mean": sum(shots) / len(shots),
            "shots_least": min(shots),
        }

    def collate(self, items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """The batch of these items; the module describes it."""
        batch = self.pad_rows([row for item in items for row in item["tokens"]])
        batch["rows"] = torch.tensor([item["row"] for item in items])
        answers = [item["answer"] for item in items]
        has_classes = self.task.kind == "classification"
        if self.train_on == "label-words":
            batch["labels"] = torch.tensor(answers)
            batch["groups"] = batch["labels"].clone()
        elif self.train_on == "answer":
            if has_classes:
                batch["groups"] = torch.tensor(answers)
        else:
            counts = torch.tensor([len(item["tokens"]) for item in items])
            first = counts.cumsum(0) - counts
            batch["examples"] = torch.repeat_interleave(torch.arange(len(items)), counts)
            batch["answers"] = first + torch.tensor(answers)
            batch["option_rows"] = rows_of_options(batch["examples"], len(items))
            if has_classes:
                option = torch.arange(len(batch["examples"])) - first[batch["examples"]]
                batch["groups"] = torch.tensor(answers)[batch["examples"]] * int(counts[0]) + option
        return batch

    def pad_rows(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """input_ids, attention_mask (if there is padding), labels [R, T], and the positions and
        targets [R, P] of the loss."""
        longest = max(len(row.prompt) + len(row.answer) for row in rows)
        ids = torch.full((len(rows), longest), self.pad)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
        for i, row in enumerate(rows):
            tokens = torch.tensor(row.tokens)
            ids[i, longest - len(tokens) :] = tokens
            mask[i, longest - len(tokens) :] = 1
            labels[i, longest - len(row.answer) :] = torch.tensor(row.answer, dtype=torch.long)
        batch = {"input_ids": ids, "labels": labels}
        if any(len(row.tokens) < longest for row in rows):
            batch["attention_mask"] = mask
        if any(row.answer for row in rows):
            batch["positions"], batch["targets"] = loss_positions(labels)
        if self.encoder.mask:  # all rows end alike
            at = longest - len(self.encoder.tail("label-words"))
            batch["positions"] = torch.full((len(rows), 1), at)
        return batch

    def of_domain(self) -> "TaskData":
        """The same options after the same shots and the task's sfc template instead of the prompt.

        ValueError if the task has none, for a classifier, or if the label words are other tokens
        after it."""
        if why_not := no_calibration(self.task, self.kind):
            raise ValueError(why_not)
        data = TaskData(
            [replace(example, prompt=example.domain) for example in self.examples],
            self.task,
            self.tokenizer,
            max_length=self.max_length,
            train_on=self.train_on,
            shots=self.shots,
            kind=self.kind,
        )
        if data.options != self.options:
            raise ValueError(
                f"task {self.task.name}: the label words are other tokens after the sfc template "
                "than after the prompt"
            )
        return data

    def sampler(self, batch_size: int, seed: int) -> StratifiedSampler:
        classes: list[Any] = self.labels if self.labels is not None else [0] * len(self)
        return StratifiedSampler(classes, batch_size, seed)

    def end_tokens(self) -> set[int]:
        """The tokens, besides the model's own, that end an answer: in a chat, the one that ends
        the assistant's turn."""
        if not self.task.chat:
            return set()
        ids = self.tokenizer(self.encoder.end, add_special_tokens=False)["input_ids"]
        return set(ids[:1]) & set(self.tokenizer.all_special_ids)

    def _find_label_words(self) -> str | None:
        """Set self.options to the tokens of the label words. The result is None, or why they
        cannot be used as single tokens."""
        words = list(self.examples[0].options)
        found: list[int] | None = None
        for i in range(len(self)):
            rows = self.token_rows(i, "options")
            for word, row in zip(words, rows, strict=True):
                tokens = row.answer
                if len(tokens) != 1 or tokens[0] == self.tokenizer.unk_token_id:
                    names = self.tokenizer.convert_ids_to_tokens(tokens)
                    return (
                        f"the label word {word!r} is not one token of this tokenizer but "
                        f"{len(tokens)}: {names}"
                    )
            ids = [row.answer[0] for row in rows]
            if len(set(ids)) < len(ids):
                return f"the label words {words} are not different tokens: {ids}"
            asked = self.token_rows(i, "label-words")[0].prompt
            prompt = asked[: len(asked) - len(self.encoder.tail("label-words"))]
            if (found or ids) != ids or any(row.prompt != prompt for row in rows):
                return f"the label words {words} are not the same tokens after every prompt"
            found = ids
        self.options = found
        for i in range(len(self)):
            del self._rows[i, "options"]  # from here on the prompt's row is enough
        return None


def no_calibration(task: Task, kind: str = "causal") -> str | None:
    """Why the scores of a task's options cannot be calibrated; None if they can."""
    if not task.sfc:
        return f"task {task.name}: it has no sfc template, by which scores are calibrated"
    if kind == "classifier":
        return f"task {task.name}: a classifier has no label words whose scores are calibrated"
    return None


def _check_kind(kind: str, task: Task, tokenizer: Any, train_on: str) -> None:
    what = {"masked": "a masked language model", "classifier": "a classifier"}[kind]
    if task.kind != "classification":
        raise ValueError(f"task {task.name}: {what} is for classifications, this is a {task.kind}")
    if task.chat:
        raise ValueError(f"task {task.name}: {what} cannot be asked as in a chat")
    if train_on not in ("auto", "label-words"):
        raise ValueError(
            f"task {task.name}: {what} is trained on its classes, not on {train_on!r}; leave "
            "train_on at auto"
        )
    if kind == "masked" and tokenizer.mask_token_id is None:
        raise ValueError(
            f"task {task.name}: a masked language model is asked by a mask token, and the "
            "tokenizer has none"
        )


def _check_arguments(
    examples: Sequence[Example], task: Task, max_length: int, train_on: str
) -> None:
    if not examples:
        raise ValueError(f"task {task.name}: no examples: the data set is empty")
    if train_on not in TRAIN_ON:
        raise ValueError(f"train_on must be one of {', '.join(TRAIN_ON)}, got {train_on!r}")
    if train_on == "label-words" and task.kind != "classification":
        raise ValueError(
            f"task {task.name}: train_on 'label-words' is for classifications, "
            f"this is a {task.kind}"
        )
    if train_on == "options" and task.kind == "generation":
        raise ValueError(
            f"task {task.name}: train_on 'options' needs options, and a generation has none"
        )
    if max_length < 2:
        raise ValueError(f"max_length must be 2 tokens or more, got {max_length}")
