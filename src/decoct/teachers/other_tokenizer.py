"""A teacher with another tokenizer (as in ULD, arXiv 2402.12030), brought into step with the student by characters.

Where both tokenizers have a boundary at the same character, both models predict what follows the same text. Only there
is the teacher's prediction used; the paper goes by position instead, which drifts apart with the first longer token.
"""

from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from decoct.losses import Aligned, Targets
from decoct.teachers.base import Teach


class OtherTokenizer:
    """A teacher for the loss `uld`."""

    def __init__(self, teach: Teach, own: Any, others: Any) -> None:
        """Wrap a teacher.

        Args:
            teach: the teacher, for its own tokens.
            own: the student's tokenizer.
            others: the teacher's.
        """
        self._teach, self._own, self._others = teach, own, others

    def __call__(self, tokens: Int[Tensor, "batch length"]) -> Targets:
        """What it predicts where the tokenizers' boundaries meet."""
        found = [self._one(row) for row in tokens]
        return Aligned(tuple(found))

    def _one(self, row: Int[Tensor, " length"]) -> tuple[Targets, Int[Tensor, " length"], Bool[Tensor, " length"]]:
        """The teacher's predictions of a text, and which of them, if any, belongs to each of the student's tokens."""
        ids = row.tolist()
        text = _decode(self._own, ids)
        theirs = list(self._others(text, add_special_tokens=False, verbose=False)["input_ids"])
        bos = self._others.bos_token_id
        begin = [] if bos is None else [bos]
        by_end = {end: number for number, end in enumerate(_ends(self._others, theirs, text), start=len(begin))}
        if begin:
            by_end[0] = 0
        places = [by_end.get(end, -1) if end is not None else -1 for end in _ends(self._own, ids, text)]
        known = torch.tensor([place >= 0 for place in places])
        given = torch.tensor([begin + theirs or [0]])
        return self._teach(given), torch.tensor(places).clamp(min=0), known


def same_tokenizer(one: Any, other: Any) -> bool:
    """Whether two tokenizers have the same tokens by the same numbers."""
    return bool(one.get_vocab() == other.get_vocab())


def _decode(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _ends(tokenizer: Any, ids: list[int], text: str) -> list[int | None]:
    """After each token the number of characters so far; None inside a character, or where decoding looks ahead."""
    found: list[int | None] = []
    for count in range(1, len(ids) + 1):
        prefix = _decode(tokenizer, ids[:count])
        found.append(len(prefix) if text.startswith(prefix) else None)
    return found
