"""Examples as token rows and batches for CausalLMObjective, and the order in which they are drawn.

Three kinds of batch, all on the CPU and padded on the left:

    label words  input_ids, attention_mask [B, T]; labels [B], the class
    options      one row for each option: input_ids, attention_mask, labels [R, T], -100 outside the option's tokens;
                 examples [R], whose option it is; answers [B], the row of the right one
    answer       input_ids, attention_mask, labels [B, T], -100 outside the answer's tokens

with rows [B], the numbers of the examples in the data; groups for PseuZO's window where examples have classes: of each
row of the batch, the class (label words, answer) or class * n_options + option (options); and option_rows, positions
and targets, as the objective would make them from the rest, so that no step has to wait for the device to learn them.
A batch without any padding has no attention_mask: the objective takes one as the sign of padding.
"""

import os
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from pseuzo.models.objective import IGNORED, loss_positions, rows_of_options
from pseuzo.tasks.task import Example, Task

TRAIN_ON = ("auto", "label-words", "options", "answer")
SHOT_SEPARATOR = "\n\n"
TEMPLATE_SECONDS, TEMPLATE_MEMORY = (
    10,
    1 << 30,
)  # of a chat template: and a second more for 100 examples


@dataclass(frozen=True)
class Row:
    """The tokens of a prompt, and those after it that are scored, if any; what of it fits into max_length."""

    prompt: list[int]
    answer: list[int]
    shots: int  # that are put before it
    lost: int  # tokens of its beginning

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.answer


class TaskData(Dataset):
    """The examples of a task as the tokens of one model; data[i] is what collate makes batches of.

    max_length: the most tokens of a row; longer prompts lose their beginning (after the tokens that the tokenizer puts
    before every text), so that the end of the question and the whole option stay. A prompt that begins with those
    tokens does not get them again. If the task is a chat, the prompt is the user's turn in the tokenizer's chat
    template, which brings all special tokens itself, shots are turns before it, what is scored is the assistant's, and
    of what is too long the user's text loses its beginning, not the template. train_on: "label-words", the cross
    entropy over the label words' logits, one row an example: they must be single tokens; "options", over the mean
    log-likelihoods of the options' tokens; "answer", the tokens of the right answer, as in language modelling. "auto"
    is, for a classification, label-words if its label words are single tokens (then the same as options) and else
    options; for a choice or a generation, answer. shots: examples put before each prompt with their answers; as many as
    fit, the last ones.

    Attributes: options, the tokens of the label words, or None if train_on is not that; labels, the class of each
    example, or None for tasks without; train_on, what auto came to.
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
    ):
        if not examples:
            raise ValueError(f"task {task.name}: no examples: the data set is empty")
        if train_on not in TRAIN_ON:
            raise ValueError(f"train_on must be one of {', '.join(TRAIN_ON)}, got {train_on!r}")
        if train_on == "label-words" and task.kind != "classification":
            raise ValueError(
                f"task {task.name}: train_on 'label-words' is for classifications, this is a {task.kind}"
            )
        if train_on == "options" and task.kind == "generation":
            raise ValueError(
                f"task {task.name}: train_on 'options' needs options, and a generation has none"
            )
        if max_length < 2:
            raise ValueError(f"max_length must be 2 tokens or more, got {max_length}")
        self.examples, self.task, self.tokenizer, self.max_length = (
            list(examples),
            task,
            tokenizer,
            max_length,
        )
        self.shots = [(shot.prompt, shot.golds[0]) for shot in shots]
        pads = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        self.pad = next(i for i in pads if i is not None)
        self._before = [] if task.chat else _special_tokens_before(tokenizer)
        if task.chat:
            self._check_template()
        self._lead, self._end = self._around_answers() if task.chat else ("", task.stop)
        self._rows: dict[tuple[int, str], list[Row]] = {}
        self.labels = [e.answer for e in self.examples] if task.kind == "classification" else None
        self.options: list[int] | None = None
        self.train_on = train_on
        if train_on == "label-words" or (train_on == "auto" and task.kind == "classification"):
            why_not = self._find_label_words()
            if train_on == "label-words" and why_not:
                raise ValueError(
                    f"task {task.name}: {why_not}; choose shorter words, or train_on 'options'"
                )
            self.train_on = "options" if why_not else "label-words"
        elif train_on == "auto":
            self.train_on = "answer"

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, i: int) -> dict[str, Any]:
        """{"row": i, "tokens": [Row], "answer": class or option}: what collate takes."""
        i = range(len(self))[i]
        return {
            "row": i,
            "tokens": self.token_rows(i, self.train_on),
            "answer": self.examples[i].answer,
        }

    def token_rows(self, i: int, what: str) -> list[Row]:
        """The rows of example i for a batch of what: label-words (the prompt), options, answer, or prompt, which
        leaves room for max_new_tokens."""
        if (i, what) not in self._rows:
            self._rows[i, what] = self._encode(self.examples[i], what)
        return self._rows[i, what]

    def fit(self, what: str | None = None) -> dict[str, float]:
        """What of the examples fits into max_length, in rows of what (None: those that the metric is computed from):
        cut_prompts, how many prompts lost their beginning; shots_mean and shots_least, the shots before a prompt.
        ValueError for an example that cannot be asked, or whose answer the loss cannot be computed of."""
        for i in range(len(self)):
            self.token_rows(i, self.train_on)
        if what is None:
            labels = "label-words" if self.options is not None else "options"
            what = "prompt" if self.task.kind == "generation" else labels
        rows = [self.token_rows(i, what) for i in range(len(self))]
        shots = [some[0].shots for some in rows]
        cut = sum(any(row.lost for row in some) for some in rows)
        return {
            "cut_prompts": cut,
            "shots_mean": sum(shots) / len(shots),
            "shots_least": min(shots),
        }

    def collate(self, items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """The batch of these items, see the module."""
        batch = self.pad_rows([row for item in items for row in item["tokens"]])
        batch["rows"] = torch.tensor([item["row"] for item in items])
        answers = [item["answer"] for item in items]
        classes = self.task.kind == "classification"
        if self.train_on == "label-words":
            batch["labels"] = torch.tensor(answers)
            batch["groups"] = batch["labels"].clone()
        elif self.train_on == "answer":
            if classes:
                batch["groups"] = torch.tensor(answers)
        else:
            counts = torch.tensor([len(item["tokens"]) for item in items])
            first = counts.cumsum(0) - counts
            batch["examples"] = torch.repeat_interleave(torch.arange(len(items)), counts)
            batch["answers"] = first + torch.tensor(answers)
            batch["option_rows"] = rows_of_options(batch["examples"], len(items))
            if classes:
                option = torch.arange(len(batch["examples"])) - first[batch["examples"]]
                batch["groups"] = torch.tensor(answers)[batch["examples"]] * int(counts[0]) + option
        return batch

    def pad_rows(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """input_ids, attention_mask (if there is any padding), labels [R, T], and the positions and targets [R, P] of
        the loss."""
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
        return batch

    def sampler(self, batch_size: int, seed: int) -> "StratifiedSampler":
        return StratifiedSampler(
            self.labels if self.labels is not None else [0] * len(self), batch_size, seed
        )

    def end_tokens(self) -> set[int]:
        """The tokens, besides the model's own, that end an answer: that of the end of the assistant's turn."""
        ids = (
            self.tokenizer(self._end, add_special_tokens=False)["input_ids"]
            if self.task.chat
            else []
        )
        return set(ids[:1]) & set(self.tokenizer.all_special_ids)

    def _rendered(
        self, shots: Sequence[tuple[str, str]], prompt: str, answer: str | None = None
    ) -> str:
        """The conversation in the tokenizer's chat template: up to where the assistant answers, or with its answer."""
        turns = [
            part
            for shot in (*shots, (prompt, answer))
            for part in zip(("user", "assistant"), shot, strict=True)
        ]
        messages = [{"role": role, "content": text} for role, text in turns if text is not None]
        if not getattr(self.tokenizer, "chat_template", None):
            raise ValueError(
                f"task {self.task.name}: to ask as in a chat takes a tokenizer with a chat template, and this model's "
                "has none; leave out --chat (in a task: chat: true), or take an instruction-tuned model"
            )
        try:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=answer is None
            )
        except Exception as error:  # whatever a template may raise
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(
                f"task {self.task.name}: the tokenizer's chat template cannot be filled in: {reason}"
            ) from None

    def _check_template(self) -> None:
        """ValueError if the chat template takes too much time or memory for these examples. It comes with the model,
        whoever made that: it is first rendered in a process of its own, which the system ends at its limits."""
        memory = Path("/proc/self/statm")
        if not memory.is_file():  # no Linux
            return
        used = int(memory.read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        seconds = TEMPLATE_SECONDS + len(self.examples) // 100
        child = os.fork()
        if not child:
            try:
                os._exit(self._try_template(seconds, used + TEMPLATE_MEMORY))
            finally:
                os._exit(1)
        _, status = os.waitpid(child, 0)
        if status:
            raise ValueError(
                f"task {self.task.name}: the tokenizer's chat template takes more than {seconds} s or "
                f"{TEMPLATE_MEMORY >> 20} MB for these examples; do not use it"
            )

    def _try_template(self, seconds: int, memory: int) -> int:
        """The exit code of the process that tries it."""
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        resource.setrlimit(resource.RLIMIT_CPU, (seconds,) * 2)
        for example in self.examples:
            for answer in (None, "answer."):
                try:
                    self._rendered(self.shots, example.prompt, answer)
                except ValueError as error:  # what else it raises is said where it is used
                    if isinstance(error.__context__, MemoryError):
                        return 1
        return 0

    def _around_answers(self) -> tuple[str, str]:
        """What the chat template writes between where the assistant begins and its answer (a space, or an empty
        thought), and after that (the end of its turn)."""
        question, answer = "question?", "answer."
        before, whole = self._rendered((), question), self._rendered((), question, answer)
        lead, found, end = whole.removeprefix(before).partition(answer)
        if not found or not whole.startswith(before):  # then the answer just follows
            return "", self.tokenizer.eos_token or self.task.stop
        return lead, end.rstrip() or self.task.stop

    def _ids(self, texts: list[str], place: str) -> list[list[int]]:
        """The tokens of each text, without those that come before every text."""
        try:
            rows = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        except Exception as error:  # each tokenizer raises its own
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(
                f"{self._at(place)}: the tokenizer does not take the text of this row: {reason}"
            ) from None
        n = len(self._before)
        return [row[n:] if n and row[:n] == self._before else row for row in rows]

    def _at(self, place: str) -> str:
        return f"task {self.task.name}" + (f", {place}" if place else "")

    def _question(self, shots: Sequence[tuple[str, str]], prompt: str) -> str:
        """The text up to the answer, without white space at its end that belongs to the answer."""
        begin = (
            self.tokenizer.bos_token or ""
        )  # which a task's prompt may write, and which is there once
        if self.task.chat:
            turns = [(asked.removeprefix(begin), answer) for asked, answer in shots]
            return self._rendered(turns, prompt.removeprefix(begin)) + self._lead.rstrip(" ")
        first, *more = [
            *(_joined(*shot, self.task.separator) for shot in shots),
            prompt.rstrip(" "),
        ]
        return SHOT_SEPARATOR.join([first, *(text.removeprefix(begin) for text in more)])

    def _answered(self, question: str, answer: str) -> str:
        if self.task.chat:
            return question + self._lead[len(self._lead.rstrip(" ")) :] + answer
        return _joined(question, answer, self.task.separator)

    def _encode(self, example: Example, what: str) -> list[Row]:
        at = self._at(example.place)
        if what == "prompt":
            answers, room = [""], self.max_length - self.task.max_new_tokens
            if room < 1 + len(self._before):
                raise ValueError(
                    f"task {self.task.name}: max_new_tokens {self.task.max_new_tokens} leaves no room for a prompt in "
                    f"max_length, {self.max_length} tokens"
                )
        elif what == "options":
            answers, room = example.options, self.max_length
        elif what == "label-words":
            answers, room = (
                [""],
                self.max_length - 1,
            )  # as for options of one token: the same prompt, so the same loss
        else:
            end = (
                self._end if self.task.kind == "generation" else ""
            )  # else it would not learn to stop
            answers, room = [example.golds[0] + end], self.max_length

        def rows_with(
            shots: list[tuple[str, str]], prompt: str
        ) -> list[tuple[list[int], list[int]]]:
            question = self._question(shots, prompt)
            whole = [self._answered(question, answer) if answer else question for answer in answers]
            alone, *ids = self._ids([question, *whole], example.place)
            for answer, tokens in zip(answers, ids, strict=True):
                if answer and tokens == alone:
                    raise ValueError(f"{at}: the answer {answer!r} has no token of this tokenizer")
            return [
                _split(alone, tokens) if answer else (tokens, [])
                for answer, tokens in zip(answers, ids, strict=True)
            ]

        def fits(shots: list[tuple[str, str]], prompt: str) -> bool:
            return all(
                len(self._before) + len(tokens) + len(option) <= room
                for tokens, option in rows_with(shots, prompt)
            )

        dropped = bisect_left(
            range(len(self.shots)), True, key=lambda n: fits(self.shots[n:], example.prompt)
        )
        shots, prompt, lost = self.shots[dropped:], example.prompt, 0
        found = rows_with(shots, prompt)
        if self.task.chat and not fits(shots, prompt):
            characters = bisect_left(
                range(len(prompt)), True, key=lambda n: fits(shots, prompt[n:])
            )
            if characters == len(prompt):
                raise ValueError(
                    f"{at}: the chat template leaves no room for a prompt in {self.max_length} tokens"
                )
            whole, found = found, rows_with(shots, prompt[characters:])
            lost = len(whole[0][0]) - len(found[0][0])
        rows = []
        for prompt, option in found:
            left = room - len(self._before) - len(option)
            if left < 1:
                what_is_long = f"an answer of {len(option)} tokens, beginning {self.tokenizer.decode(option[:8])!r},"
                raise ValueError(
                    f"{at}: {what_is_long if option else 'that'} leaves no room for a prompt in max_length, "
                    f"{self.max_length} tokens"
                )
            tokens = self._before + prompt[-left:]
            if not tokens:
                raise ValueError(
                    f"{at}: a prompt is empty, so that nothing predicts the first token of its answer"
                )
            if rows and rows[-1].prompt == tokens:
                tokens = rows[-1].prompt  # kept once, not for each option
            rows.append(
                Row(tokens, option, len(self.shots) - dropped, lost or max(0, len(prompt) - left))
            )
        return rows

    def _find_label_words(self) -> str | None:
        """Set self.options to the tokens of the label words; or say why they are not usable as single tokens."""
        words = list(self.examples[0].options)
        found: list[int] | None = None
        for i in range(len(self)):
            rows = self.token_rows(i, "options")
            for word, row in zip(words, rows, strict=True):
                tokens = row.answer
                if len(tokens) != 1 or tokens[0] == self.tokenizer.unk_token_id:
                    names = self.tokenizer.convert_ids_to_tokens(tokens)
                    return f"the label word {word!r} is not one token of this tokenizer but {len(tokens)}: {names}"
            ids = [row.answer[0] for row in rows]
            if len(set(ids)) < len(ids):
                return f"the label words {words} are not different tokens: {ids}"
            prompt = self.token_rows(i, "label-words")[0].prompt
            if (found or ids) != ids or any(row.prompt != prompt for row in rows):
                return f"the label words {words} are not the same tokens after every prompt"
            found = ids
        self.options = found
        for i in range(len(self)):
            del self._rows[i, "options"]  # the prompt's row is all that is needed
        return None


class StratifiedSampler(Sampler[int]):
    """Every row once an epoch, so ordered that consecutive batches of batch_size have near equal shares of the classes.

    Within a batch the order is random: were row i always of the same class, pairing by row would be pairing by class.
    The order is a function of seed and epoch (set_epoch) alone.
    """

    def __init__(self, classes: Sequence[int], batch_size: int, seed: int):
        if batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
        self.classes, self.batch_size, self.seed, self.epoch = (
            torch.as_tensor(classes),
            batch_size,
            seed,
            0,
        )

    def __len__(self) -> int:
        return len(self.classes)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed((self.seed * 0x9E3779B1 + self.epoch) % 2**63)
        place = torch.empty(len(self), dtype=torch.float64)
        for c in (
            self.classes.unique()
        ):  # the n rows of a class, shuffled, at even distances 1/n from a random start
            rows = (self.classes == c).nonzero()[:, 0]
            start = torch.rand((), generator=generator, dtype=torch.float64)
            place[rows] = (torch.randperm(len(rows), generator=generator) + start) / len(rows)
        for batch in place.argsort(stable=True).split(self.batch_size):
            yield from batch[torch.randperm(len(batch), generator=generator)].tolist()


def _joined(prompt: str, answer: str, separator: str) -> str:
    """The text of a prompt with its answer: no separator after a prompt that ends in white space."""
    prompt = prompt.rstrip(" ")
    return prompt + ("" if not prompt or prompt[-1].isspace() else separator) + answer


def _split(prompt: list[int], whole: list[int]) -> tuple[list[int], list[int]]:
    """The tokens of the whole text up to where the prompt's own end, or change by what follows; and the rest."""
    same = 0
    while same < min(len(prompt), len(whole) - 1) and prompt[same] == whole[same]:
        same += 1
    return whole[:same], whole[same:]


def _special_tokens_before(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before every text, such as a token for its beginning."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    dressed = tokenizer("a")["input_ids"]
    places = [i for i in range(len(dressed)) if dressed[i : i + len(plain)] == plain]
    return dressed[: places[0]] if places and plain else []
