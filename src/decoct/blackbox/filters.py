"""Which answers are worth learning from; every rule has a name, and what it takes out is counted."""

from collections import Counter
from dataclasses import dataclass, field

from decoct.blackbox.client import Answer

_REFUSALS = ("i'm sorry", "i am sorry", "i cannot", "i can't", "as an ai", "i'm unable", "i am unable")


@dataclass
class Filter:
    """Takes out answers; knows those that it has let pass.

    Attributes:
        min_characters: of an answer.
        max_characters: of an answer.
        refusals: whether answers that begin with a refusal may pass.
        taken_out: how many, by reason.
    """

    min_characters: int = 1
    max_characters: int = 20_000
    refusals: bool = False
    taken_out: Counter[str] = field(default_factory=Counter)
    _seen: set[tuple[str, str]] = field(default_factory=set)

    def passes(self, prompt: str, answer: Answer) -> bool:
        """Whether to keep it; if not, it is counted."""
        reason = self._reason(prompt, answer)
        if reason is not None:
            self.taken_out[reason] += 1
        return reason is None

    def _reason(self, prompt: str, answer: Answer) -> str | None:
        text = answer.text.strip()
        plain = _plain(text)
        if not answer.whole:
            return "cut off"
        if len(text) < self.min_characters or not plain:
            return "too short"
        if len(text) > self.max_characters:
            return "too long"
        if not self.refusals and plain.replace("\u2019", "'").startswith(_REFUSALS):
            return "refusal"
        if plain == _plain(prompt):
            return "repeats the prompt"
        if (_plain(prompt), plain) in self._seen:
            return "duplicate"
        self._seen.add((_plain(prompt), plain))
        return None


def similarity(one: str, other: str) -> float:
    """ROUGE-L F1 of two texts' words (arXiv 2212.10560 compares instructions by it): 1 if they are the same."""
    a, b = one.lower().split(), other.lower().split()
    if not a or not b:
        return 0.0
    row = [0] * (len(b) + 1)
    for word in a:
        before = row[:]
        for j, each in enumerate(b, start=1):
            row[j] = before[j - 1] + 1 if word == each else max(before[j], row[j - 1])
    return 2 * row[-1] / (len(a) + len(b))


def _plain(text: str) -> str:
    return " ".join(text.lower().split())
