"""Choosing the next token from logits: penalty, temperature, top-k, top-p, min-p, in this order; or the likeliest."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        temperature: logits are divided by it; 0: always the likeliest token.
        top_k: only the k likeliest; 0: all.
        top_p: only the likeliest whose probabilities add up to this (arXiv 1904.09751); 1: all.
        min_p: only those at least this times as likely as the likeliest (arXiv 2407.01082); 0: all.
        repetition_penalty: logits of tokens that were there are divided by it where positive, multiplied where
            negative (arXiv 1909.05858); 1: left.
        seed: of the draws; None: another every time.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        """Check.

        Raises:
            ValueError: a value out of its range.
        """
        limits = {
            "temperature": (self.temperature >= 0, "0 or more"),
            "top_k": (self.top_k >= 0, "0 or more"),
            "top_p": (0 < self.top_p <= 1, "more than 0, at most 1"),
            "min_p": (0 <= self.min_p <= 1, "from 0 to 1"),
            "repetition_penalty": (self.repetition_penalty > 0, "more than 0"),
        }
        for name, (fits, wanted) in limits.items():
            if not fits:
                raise ValueError(f"{name} must be {wanted}")


class Sampler:
    """Draws the tokens of one sequence."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int]) -> None:
        """Begin after a prompt, whose tokens count as repeated too."""
        self._sampling = sampling
        self._seen = set(prompt) if sampling.repetition_penalty != 1 else None
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)

    def draw(self, logits: Float[Tensor, " vocab"]) -> int:
        """The next token."""
        if self._seen is not None:
            logits = penalised(logits, self._seen, self._sampling.repetition_penalty)
        if self._sampling.temperature == 0:
            token = int(logits.argmax())
        else:
            shares = shares_of(logits, self._sampling)
            token = int(torch.multinomial(shares, 1, generator=self._generator))
        if self._seen is not None:
            self._seen.add(token)
        return token


def penalised(logits: Float[Tensor, " vocab"], seen: set[int], penalty: float) -> Float[Tensor, " vocab"]:
    """Logits with those of tokens that were there made smaller."""
    index = torch.tensor(sorted(seen))
    chosen = logits[index]
    return logits.index_copy(0, index, torch.where(chosen > 0, chosen / penalty, chosen * penalty))


def shares_of(logits: Float[Tensor, " vocab"], sampling: Sampling) -> Float[Tensor, " vocab"]:
    """The probabilities that tokens are drawn with."""
    scores = logits.float() / sampling.temperature
    if sampling.top_k and sampling.top_k < len(scores):
        least = scores.topk(sampling.top_k).values[-1]
        scores = scores.masked_fill(scores < least, -torch.inf)
    if sampling.top_p < 1:
        ordered, index = scores.sort(descending=True)
        shares = ordered.softmax(-1)
        beyond = shares.cumsum(-1) - shares >= sampling.top_p  # what likelier tokens add up to already
        scores = scores.masked_fill(torch.zeros_like(beyond).index_copy(0, index, beyond), -torch.inf)
    if sampling.min_p:
        shares = scores.softmax(-1)
        scores = scores.masked_fill(shares < sampling.min_p * shares.max(), -torch.inf)
    return scores.softmax(-1)
