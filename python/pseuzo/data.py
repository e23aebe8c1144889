"""Prompts with label words as batches: tokens, classes, stratified draws."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def label_token_ids(tokenizer: Any, words: Sequence[str]) -> list[int]:
    """The token of each label word. Raises ValueError for a word that is not exactly one known token."""
    ids = []
    for word in words:
        tokens = tokenizer(word, add_special_tokens=False)["input_ids"]
        if len(tokens) != 1 or tokens[0] == tokenizer.unk_token_id:
            raise ValueError(
                f"label word {word!r} is not one token of this tokenizer but {len(tokens)}: "
                f"{tokenizer.convert_ids_to_tokens(tokens)}; choose a shorter word (mind the leading space)"
            )
        ids.append(tokens[0])
    if len(set(ids)) != len(ids):
        raise ValueError(f"label words {list(words)} are not different tokens: {ids}")
    return ids


@dataclass
class Prompts:
    """Tokenised prompts and their classes."""

    tokens: list[list[int]]
    labels: Tensor  # [N] int64
    pad: int

    @classmethod
    def encode(
        cls, tokenizer: Any, rows: Sequence[dict], template: str, labels: Sequence[str], max_length: int
    ) -> "Prompts":
        """template.format(**row), cut on the left to max_length tokens, so that the end of the prompt stays."""
        if not rows:
            raise ValueError("no rows: the data set is empty")
        try:
            texts = [template.format(**row) for row in rows]
            classes = [row["label"] for row in rows]
        except KeyError as error:
            raise ValueError(f"a row lacks the field {error} that the template or the label needs") from None
        for label in classes:
            if label not in labels:
                raise ValueError(f"label {label!r} has no label word; known: {', '.join(map(repr, labels))}")
        tokens = [ids[-max_length:] for ids in tokenizer(texts)["input_ids"]]
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        return cls(tokens, torch.tensor([list(labels).index(c) for c in classes]), pad)

    def __len__(self) -> int:
        return len(self.tokens)

    def batch(self, index: Sequence[int], device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """input_ids and attention_mask [B, T], padded on the left, and labels [B]."""
        longest = max(len(self.tokens[i]) for i in index)
        ids = torch.full((len(index), longest), self.pad)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(index):
            ids[row, longest - len(self.tokens[i]) :] = torch.tensor(self.tokens[i])
            mask[row, longest - len(self.tokens[i]) :] = 1
        batch = {"input_ids": ids, "attention_mask": mask, "labels": self.labels[list(index)]}
        return {k: v.to(device) for k, v in batch.items()}

    def by_length(self, size: int) -> Iterator[list[int]]:
        """All rows once, in batches of like length: for evaluation."""
        order = sorted(range(len(self)), key=lambda i: len(self.tokens[i]))
        for first in range(0, len(order), size):
            yield order[first : first + size]

    def stratified(self, size: int, seed: int) -> Iterator[list[int]]:
        """Batches without end, each with as equal a share of the classes as size allows; a function of seed alone."""
        generator = torch.Generator().manual_seed(seed)
        classes = self.labels.unique().tolist()
        queues: dict[int, list[int]] = {c: [] for c in classes}
        turn = 0
        while True:
            index = []
            for _ in range(size):
                c = classes[turn % len(classes)]
                turn += 1
                if not queues[c]:
                    rows = (self.labels == c).nonzero()[:, 0]
                    queues[c] = rows[torch.randperm(len(rows), generator=generator)].tolist()
                index.append(queues[c].pop())
            # in random order: else row i would always have the same class, and pairing by row would be pairing by class
            yield [index[i] for i in torch.randperm(size, generator=generator).tolist()]
