"""Label words as tokens, for a training loop of your own; TaskData finds them for its tasks."""

from collections.abc import Sequence
from typing import Any


def label_token_ids(tokenizer: Any, words: Sequence[str]) -> list[int]:
    """The token of each label word. ValueError for a word that is not exactly one known token."""
    ids = []
    for word in words:
        tokens = tokenizer(word, add_special_tokens=False)["input_ids"]
        if len(tokens) != 1 or tokens[0] == tokenizer.unk_token_id:
            raise ValueError(
                f"label word {word!r} is not one token of this tokenizer but {len(tokens)}: "
                f"{tokenizer.convert_ids_to_tokens(tokens)}; choose a shorter word (mind the "
                "leading space)"
            )
        ids.append(tokens[0])
    if len(set(ids)) != len(ids):
        raise ValueError(f"label words {list(words)} are not different tokens: {ids}")
    return ids
