"""Next-token distributions of which only a part is ever held: some tokens, and a part of the vocabulary, at a time."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from typing_extensions import override

from decoct.native.divergence import LEAST


@dataclass(frozen=True, slots=True)
class Head:
    """What makes logits of the final hidden states (those after the final norm).

    Attributes:
        matrix: the output projection, any float dtype, on whichever device the states are.
        bias: added to its product.
        scale: logits are multiplied with it.
        softcap: logits z become softcap · tanh(z / softcap), as Gemma 2 has it; None: they stay.
    """

    matrix: Float[Tensor, "vocab hidden"]
    bias: Float[Tensor, " vocab"] | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Float[Tensor, "tokens hidden"], part: slice) -> Float[Tensor, "tokens part"]:
        """Logits of a part of the vocabulary, in float32 (float64 if the matrix is)."""
        found = hidden.to(self.matrix.dtype) @ self.matrix[part].T
        if self.bias is not None:
            found = found + self.bias[part]
        found = exact(found)
        if self.scale != 1.0:
            found.mul_(self.scale)
        return found if self.softcap is None else found.div_(self.softcap).tanh_().mul_(self.softcap)

    def slope(self, slope: Float[Tensor, "tokens part"], logits: Float[Tensor, "tokens part"]) -> Tensor:
        """From the gradient by logits, which are given too, to that by the product with the matrix."""
        if self.softcap is not None:
            slope = slope * (1.0 - (logits / self.softcap).square())
        return slope * self.scale if self.scale != 1.0 else slope


class Distribution(Protocol):
    """The next-token distributions of some tokens."""

    def columns(self, part: slice) -> Float[Tensor, "tokens part"]:
        """Log-probabilities (nats) of a part of the vocabulary; not to be changed in place."""


class Targets(ABC):
    """What some model predicts for all tokens of a batch, in a form that takes little memory."""

    @property
    @abstractmethod
    def num_tokens(self) -> int:
        """Tokens in the batch."""

    @property
    @abstractmethod
    def vocab(self) -> int:
        """Entries of the vocabulary."""

    @abstractmethod
    def rows(self, tokens: Int[Tensor, " some"], parts: Sequence[slice], temperature: float = 1.0) -> Distribution:
        """The distributions of these tokens, at a temperature; it will be asked for these parts of the vocabulary."""


@dataclass(frozen=True, slots=True)
class Projected(Targets):
    """Predictions as final hidden states and the head that makes logits of them.

    Attributes:
        hidden: after the final norm, the batch's tokens in one dimension; gradients flow back to it.
        head: the rest of the model.
    """

    hidden: Float[Tensor, "tokens hidden"]
    head: Head

    @property
    @override
    def num_tokens(self) -> int:
        return self.hidden.shape[0]

    @property
    @override
    def vocab(self) -> int:
        return self.head.matrix.shape[0]

    @override
    def rows(self, tokens: Int[Tensor, " some"], parts: Sequence[slice], temperature: float = 1.0) -> "Projection":
        return Projection(self.hidden.detach()[tokens], self.head, parts, temperature)


class Projection:
    """The distributions of some tokens. Logits are kept if the vocabulary is one part, else computed again.

    Attributes:
        hidden: the tokens' states.
        head: what makes logits of them.
        temperature: logits are divided by it.
    """

    def __init__(self, hidden: Tensor, head: Head, parts: Sequence[slice], temperature: float) -> None:
        self.hidden, self.head, self.temperature = hidden, head, temperature
        self._kept: Tensor | None = None
        sums: list[Tensor] = []
        for part in parts:
            logits = self._logits(part)
            sums.append(logits.logsumexp(-1, keepdim=True))
        self._normaliser = torch.stack(sums).logsumexp(0)
        if len(parts) == 1:
            self._kept = logits.sub_(self._normaliser).clamp_(min=LEAST)

    def columns(self, part: slice) -> Float[Tensor, "tokens part"]:
        """Log-probabilities (nats) of a part of the vocabulary."""
        if self._kept is not None:
            return self._kept
        return self._logits(part).sub_(self._normaliser).clamp_(min=LEAST)

    def slope(self, slope: Float[Tensor, "tokens part"], part: slice) -> Tensor:
        """From the gradient by the logits of a part (at the temperature) to that by the product with the matrix."""
        if self.temperature != 1.0:
            slope = slope / self.temperature
        if self.head.softcap is None:
            return self.head.slope(slope, slope)
        return self.head.slope(slope, (self.columns(part) + self._normaliser) * self.temperature)

    def _logits(self, part: slice) -> Tensor:
        logits = self.head.logits(self.hidden, part)
        return logits.div_(self.temperature) if self.temperature != 1.0 else logits


@dataclass(frozen=True, slots=True)
class Logits(Targets):
    """Predictions as logits that somebody holds anyway.

    Attributes:
        logits: any float dtype.
    """

    logits: Float[Tensor, "tokens vocab"]

    @property
    @override
    def num_tokens(self) -> int:
        return self.logits.shape[0]

    @property
    @override
    def vocab(self) -> int:
        return self.logits.shape[1]

    @override
    def rows(self, tokens: Int[Tensor, " some"], parts: Sequence[slice], temperature: float = 1.0) -> Distribution:
        logits = exact(self.logits.detach()[tokens]) / temperature
        return _Held(torch.log_softmax(logits, -1).clamp(min=LEAST))


@dataclass(frozen=True, slots=True)
class Several(Targets):
    """What several models predict of the same tokens (one vocabulary).

    Attributes:
        members: what each predicts.
    """

    members: tuple[Targets, ...]

    def __post_init__(self) -> None:
        _check_members(self.members)

    @property
    @override
    def num_tokens(self) -> int:
        return self.members[0].num_tokens

    @property
    @override
    def vocab(self) -> int:
        return self.members[0].vocab


@dataclass(frozen=True, slots=True)
class Mixed(Several):
    """The weighted mean of several models' probabilities (one vocabulary).

    Attributes:
        weights: of each, positive; they are brought to a sum of 1.
    """

    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        Several.__post_init__(self)
        if len(self.weights) != len(self.members) or min(self.weights) <= 0:
            raise ValueError(f"{len(self.members)} teachers need as many positive weights, not {list(self.weights)}")

    @override
    def rows(self, tokens: Int[Tensor, " some"], parts: Sequence[slice], temperature: float = 1.0) -> Distribution:
        shares = torch.tensor(self.weights, dtype=torch.float64)
        found = [member.rows(tokens, parts, temperature) for member in self.members]
        return _Mixture(found, (shares / shares.sum()).log().tolist())


@dataclass(frozen=True, slots=True)
class MostConfident(Several):
    """Of several models the one whose likeliest token is likeliest, chosen for each token (one vocabulary)."""

    @override
    def rows(self, tokens: Int[Tensor, " some"], parts: Sequence[slice], temperature: float = 1.0) -> Distribution:
        found = [member.rows(tokens, parts, temperature) for member in self.members]
        tops = [torch.stack([each.columns(part).amax(-1) for part in parts]).amax(0) for each in found]
        return _Choice(found, torch.stack(tops).argmax(0))


@dataclass(frozen=True, slots=True)
class Aligned(Targets):
    """A teacher's predictions of several texts in its own tokens, and which of them belongs to each of the student's.

    Attributes:
        texts: for each text the predictions; for each of the student's tokens the number of one of them; and whether
            that means anything: where it does not, the teacher has nothing to say.
    """

    texts: tuple[tuple[Targets, Int[Tensor, " length"], Bool[Tensor, " length"]], ...]

    @property
    def known(self) -> Bool[Tensor, " tokens"]:
        """Tokens that the teacher has something to say about."""
        return torch.cat([known for _, _, known in self.texts])

    @property
    @override
    def num_tokens(self) -> int:
        return sum(len(places) for _, places, _ in self.texts)

    @property
    @override
    def vocab(self) -> int:
        return self.texts[0][0].vocab

    @override
    def rows(self, tokens: Int[Tensor, " some"], parts: Sequence[slice], temperature: float = 1.0) -> Distribution:
        whole, start, found = slice(0, self.vocab), 0, []
        for targets, places, _ in self.texts:
            mine = tokens[(tokens >= start) & (tokens < start + len(places))] - start
            if len(mine):
                found.append(targets.rows(places[mine], [whole], temperature).columns(whole))
            start += len(places)
        return _Held(torch.cat(found))


@dataclass(frozen=True, slots=True)
class _Held:
    """Distributions that are held whole."""

    log_probs: Float[Tensor, "tokens vocab"]

    def columns(self, part: slice) -> Tensor:
        return self.log_probs[:, part]


@dataclass(frozen=True, slots=True)
class _Mixture:
    """Weighted means of probabilities; the weights' logarithms."""

    members: Sequence[Distribution]
    log_weights: Sequence[float]

    def columns(self, part: slice) -> Tensor:
        found = self.members[0].columns(part) + self.log_weights[0]
        for member, log_weight in zip(self.members[1:], self.log_weights[1:], strict=True):
            found = torch.logaddexp(found, member.columns(part) + log_weight)
        return found


@dataclass(frozen=True, slots=True)
class _Choice:
    """For each token the distribution of one member."""

    members: Sequence[Distribution]
    chosen: Int[Tensor, " tokens"]

    def columns(self, part: slice) -> Tensor:
        found = self.members[0].columns(part)
        for number, member in enumerate(self.members[1:], start=1):
            found = torch.where((self.chosen == number)[:, None], member.columns(part), found)
        return found


def _check_members(members: Sequence[Targets]) -> None:
    if not members:
        raise ValueError("no teacher is given")
    shapes = [(each.num_tokens, each.vocab) for each in members]
    if len(set(shapes)) > 1:
        raise ValueError(
            f"teachers must share tokens and vocabulary, these have (tokens, vocabulary) {shapes}; "
            "a model with another tokenizer teaches alone, with the loss uld"
        )


def exact(tensor: Tensor) -> Tensor:
    """In float32, unless it is float64."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
