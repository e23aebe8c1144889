"""Prompts as turns of a conversation, written with the tokenizer's chat template.

The template comes with the model, which anybody may have made. So it is first rendered in a process
of its own, which the system ends if it takes too much time or memory.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pseuzo.sentences import one_line

Turn = tuple[str, str]  # a question of the user, and the answer of the assistant

SECONDS = 10  # the time limit of a template, plus one second for each 100 prompts
MEMORY = 1 << 30  # the bytes that it may take beyond those of the process


@dataclass(frozen=True)
class Chat:
    """The chat template of a tokenizer; errors name the task."""

    tokenizer: Any
    task_name: str

    def render(self, shots: Sequence[Turn], prompt: str, answer: str | None = None) -> str:
        """Return the conversation up to where the assistant answers, or including its answer."""
        messages = []
        for asked, answered in (*shots, (prompt, answer)):
            messages.append({"role": "user", "content": asked})
            if answered is not None:
                messages.append({"role": "assistant", "content": answered})
        if not getattr(self.tokenizer, "chat_template", None):
            raise ValueError(
                f"task {self.task_name}: to ask as in a chat takes a tokenizer with a chat "
                "template, and this model's has none; leave out --chat (in a task: chat: true), "
                "or take an instruction-tuned model"
            )
        try:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=answer is None
            )
        except Exception as error:  # a template may raise anything
            raise ValueError(
                f"task {self.task_name}: the tokenizer's chat template cannot be filled in: "
                f"{one_line(error)}"
            ) from None

    def check(self, shots: Sequence[Turn], prompts: Sequence[str]) -> None:
        """Raise ValueError if the template takes too much time or memory for these prompts."""
        statm = Path("/proc/self/statm")
        if not statm.is_file():  # the limits below exist on Linux alone
            return
        used = int(statm.read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        seconds = SECONDS + len(prompts) // 100
        child = os.fork()
        if not child:
            try:
                os._exit(self._try(shots, prompts, seconds, used + MEMORY))
            finally:
                os._exit(1)
        _, status = os.waitpid(child, 0)
        if status:
            raise ValueError(
                f"task {self.task_name}: the tokenizer's chat template takes more than "
                f"{seconds} s or {MEMORY >> 20} MB for these examples; do not use it"
            )

    def _try(self, shots: Sequence[Turn], prompts: Sequence[str], seconds: int, memory: int) -> int:
        """Render every prompt within the limits. Return the exit code for the process."""
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        for prompt in prompts:
            for answer in (None, "answer."):
                try:
                    self.render(shots, prompt, answer)
                except ValueError as error:
                    # Other errors are reported where the prompt is used.
                    if isinstance(error.__context__, MemoryError):
                        return 1
        return 0

    def around_answers(self, stop: str) -> tuple[str, str]:
        """Return what the template writes before an answer and after it.

        Before: the text between the start of the assistant's turn and its answer, such as a space
        or an empty thought. After: the end of its turn, or stop if the template marks none."""
        question, answer = "question?", "answer."
        before, whole = self.render((), question), self.render((), question, answer)
        lead, found, end = whole.removeprefix(before).partition(answer)
        if not found or not whole.startswith(before):  # the answer just follows
            return "", self.tokenizer.eos_token or stop
        return lead, end.rstrip() or stop
