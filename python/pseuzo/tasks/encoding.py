"""Examples as rows of at most max_length tokens: shots, the prompt, the answer."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pseuzo.sentences import one_line
from pseuzo.tasks.chat import Chat, Turn
from pseuzo.tasks.task import Example, Task

SHOT_SEPARATOR = "\n\n"
Tokens = list[int]


@dataclass(frozen=True)
class Row:
    """The tokens of a prompt, as far as they fit, and those after it that are scored, if any."""

    prompt: Tokens
    answer: Tokens
    shots: int  # the number of shots before the prompt
    lost: int  # the number of tokens cut off the beginning of the prompt

    @property
    def tokens(self) -> Tokens:
        return self.prompt + self.answer


class Encoder:
    """Makes the rows of a task's examples with one tokenizer.

    shots: examples put before each prompt with their answers. An example gets as many as fit, the
    last ones. kind: of the model; after the prompt of a masked language model comes its mask token,
    where the answer would be, and that and the prompt of a classifier end as the tokenizer ends
    every text. ValueError for a chat template that cannot be used for these examples."""

    def __init__(
        self,
        task: Task,
        tokenizer: Any,
        max_length: int,
        shots: Sequence[Example],
        examples: Sequence[Example],
        kind: str = "causal",
    ):
        self.task, self.tokenizer, self.max_length = task, tokenizer, max_length
        # after: the tokens after every text of a model that sees them all; mask: that of the answer
        self.after = [] if kind == "causal" else special_tokens_around(tokenizer)[1]
        self.mask = [tokenizer.mask_token_id] if kind == "masked" else []
        self.shots: list[Turn] = [(s.prompt, s.golds[0] + s.continuation) for s in shots]
        self.chat = Chat(tokenizer, task.name) if task.chat else None
        # before: the tokens before every text; lead, end: the text before an answer and after it.
        if self.chat is None:
            self.before, self.lead, self.end = special_tokens_around(tokenizer)[0], "", task.stop
        else:
            self.chat.check(self.shots, [example.prompt for example in examples])
            self.before = []  # the template writes all special tokens itself
            self.lead, self.end = self.chat.around_answers(task.stop)

    def encode(self, example: Example, what: str) -> list[Row]:
        """The rows of an example for a batch of what: label-words (the prompt), options, answer,
        or prompt, which leaves room for max_new_tokens."""
        answers, room = self._answers_and_room(example, what)
        prompt, lost = example.prompt, 0

        def fits(shots: Sequence[Turn], prompt: str) -> bool:
            pairs = self._pairs(example, shots, prompt, answers)
            return all(len(self.before) + len(p) + len(a) <= room for p, a in pairs)

        dropped = bisect_left(
            range(len(self.shots)), True, key=lambda n: fits(self.shots[n:], prompt)
        )
        shots = self.shots[dropped:]
        pairs = self._pairs(example, shots, prompt, answers)
        if self.chat is not None and not fits(shots, prompt):
            # The user's text loses its beginning, so that the template stays whole.
            characters = bisect_left(
                range(len(prompt)), True, key=lambda n: fits(shots, prompt[n:])
            )
            if characters == len(prompt):
                raise ValueError(
                    f"{self._where(example)}: the chat template leaves no room for a prompt in "
                    f"{self.max_length} tokens"
                )
            whole, pairs = pairs, self._pairs(example, shots, prompt[characters:], answers)
            lost = len(whole[0][0]) - len(pairs[0][0])
        rows: list[Row] = []
        for asked, answer in pairs:
            tokens, cut = self._cut(example, asked, answer, room)
            tokens += self.tail(what)
            if rows and rows[-1].prompt == tokens:
                tokens = rows[-1].prompt  # keep one list for all options
            rows.append(Row(tokens, answer, len(shots), lost or cut))
        return rows

    def tail(self, what: str) -> Tokens:
        """What comes after the prompt of a row whose class is asked for."""
        return self.mask + self.after if what == "label-words" else []

    def token_ids(self, texts: list[str], example: Example | None = None) -> list[Tokens]:
        """The tokens of each text, without those that come before every text."""
        try:
            rows = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        except Exception as error:  # each tokenizer raises errors of its own
            raise ValueError(
                f"{self._where(example)}: the tokenizer does not take the text of this row: "
                f"{one_line(error)}"
            ) from None
        n = len(self.before)
        return [row[n:] if n and row[:n] == self.before else row for row in rows]

    def _where(self, example: Example | None) -> str:
        place = example.place if example is not None else ""
        return f"task {self.task.name}" + (f", {place}" if place else "")

    def _answers_and_room(self, example: Example, what: str) -> tuple[Sequence[str], int]:
        """The texts that are scored after the prompt ("" for none) and the most tokens of a row."""
        room = self.max_length - len(self.after)
        if what == "options":
            return example.options, room
        if what == "label-words":
            # Room for a word, as if it were an option: the same prompt, and so the same loss.
            return [""], room - 1
        if what == "prompt":
            room -= self.task.max_new_tokens
            if room < 1 + len(self.before):
                raise ValueError(
                    f"task {self.task.name}: max_new_tokens {self.task.max_new_tokens} leaves no "
                    f"room for a prompt in max_length, {self.max_length} tokens"
                )
            return [""], room
        # A model that generates must learn to stop.
        end = self.end if self.task.kind == "generation" else ""
        return [example.golds[0] + end], room

    def _pairs(
        self, example: Example, shots: Sequence[Turn], prompt: str, answers: Sequence[str]
    ) -> list[tuple[Tokens, Tokens]]:
        """The tokens of the prompt and of what is scored after it, for each answer: the answer, or
        what continues it, and then the answer is the end of the prompt."""
        question, rest = self._question(shots, prompt), example.continuation
        whole = [self._answered(question, answer) if answer else question for answer in answers]
        asked = whole if rest else [question]
        ids = self.token_ids([*asked, *(text + rest for text in whole)], example)
        befores = ids[: len(asked)] * (len(answers) // len(asked))
        pairs = []
        for answer, alone, tokens in zip(answers, befores, ids[len(asked) :], strict=True):
            if answer and tokens == alone:
                raise ValueError(
                    f"{self._where(example)}: the answer {answer + rest!r} has no token of this "
                    "tokenizer"
                )
            pairs.append(_split(alone, tokens) if answer else (tokens, []))
        return pairs

    def _question(self, shots: Sequence[Turn], prompt: str) -> str:
        """The text up to the answer, without white space at its end that belongs to the answer."""
        begin = self.tokenizer.bos_token or ""  # a task's prompt may write it; it is kept once
        if self.chat is not None:
            turns = [(asked.removeprefix(begin), answer) for asked, answer in shots]
            return self.chat.render(turns, prompt.removeprefix(begin)) + self.lead.rstrip(" ")
        first, *more = [_joined(*shot, self.task.separator) for shot in shots] + [
            prompt.rstrip(" ")
        ]
        return SHOT_SEPARATOR.join([first, *(text.removeprefix(begin) for text in more)])

    def _answered(self, question: str, answer: str) -> str:
        if self.chat is not None:
            return question + self.lead[len(self.lead.rstrip(" ")) :] + answer
        return _joined(question, answer, self.task.separator)

    def _cut(
        self, example: Example, prompt: Tokens, answer: Tokens, room: int
    ) -> tuple[Tokens, int]:
        """The prompt with the tokens before every text, without the beginning that does not fit
        beside the answer; and the number of tokens that it lost."""
        left = room - len(self.before) - len(answer)
        if left < 1:
            begin = self.tokenizer.decode(answer[:8])
            long = f"an answer of {len(answer)} tokens, beginning {begin!r}," if answer else "that"
            raise ValueError(
                f"{self._where(example)}: {long} leaves no room for a prompt in max_length, "
                f"{self.max_length} tokens"
            )
        tokens = self.before + prompt[-left:]
        if not tokens:
            raise ValueError(
                f"{self._where(example)}: a prompt is empty, so that nothing predicts the first "
                "token of its answer"
            )
        return tokens, max(0, len(prompt) - left)


def special_tokens_around(tokenizer: Any) -> tuple[Tokens, Tokens]:
    """What the tokenizer puts before every text, such as a token for its beginning, and after."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    dressed = tokenizer("a")["input_ids"]
    places = [i for i in range(len(dressed)) if dressed[i : i + len(plain)] == plain]
    if not places or not plain:
        return [], []
    return dressed[: places[0]], dressed[places[0] + len(plain) :]


def _joined(prompt: str, answer: str, separator: str) -> str:
    """Join a prompt and its answer. A prompt that ends in white space needs no separator."""
    prompt = prompt.rstrip(" ")
    return prompt + ("" if not prompt or prompt[-1].isspace() else separator) + answer


def _split(prompt: Tokens, whole: Tokens) -> tuple[Tokens, Tokens]:
    """The whole text's tokens, split where the prompt's end, or where what follows changes them."""
    same = 0
    while same < min(len(prompt), len(whole) - 1) and prompt[same] == whole[same]:
        same += 1
    return whole[:same], whole[same:]
