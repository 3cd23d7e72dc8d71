"""KL from a teacher whose likeliest tokens alone were kept (what that biases: arXiv 2503.16870)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import override

from decoct.losses.base import Slope, TokenLoss
from decoct.losses.chunks import AT_ONCE
from decoct.losses.distribution import Distribution, Projected, Targets, exact
from decoct.native.divergence import LEAST


@dataclass(frozen=True, slots=True)
class TopK(Targets):
    """The likeliest tokens of each distribution; all others are one bucket.

    Attributes:
        indices: the tokens, each of them once in a row.
        log_probs: theirs (nats), in the whole vocabulary: they do not sum to 1.
        log_tail: log-probability of all others together.
        size: entries of the vocabulary.
    """

    indices: Int[Tensor, "tokens k"]
    log_probs: Float[Tensor, "tokens k"]
    log_tail: Float[Tensor, " tokens"]
    size: int

    @property
    @override
    def num_tokens(self) -> int:
        return self.indices.shape[0]

    @property
    @override
    def vocab(self) -> int:
        return self.size

    @override
    def rows(self, tokens: Int[Tensor, " some"], parts: Sequence[slice], temperature: float = 1.0) -> "TopKRows":
        if temperature != 1.0:
            raise ValueError("a cached teacher teaches at temperature 1: what it left out has no logits")
        tail = exact(self.log_tail[tokens])[:, None].clamp(min=LEAST)
        return TopKRows(self.indices[tokens].long(), exact(self.log_probs[tokens]), tail)


@dataclass(frozen=True, slots=True)
class TopKRows:
    """The same of some tokens."""

    indices: Int[Tensor, "tokens k"]
    log_probs: Float[Tensor, "tokens k"]
    log_tail: Float[Tensor, "tokens 1"]

    def columns(self, part: slice) -> Tensor:  # noqa: ARG002 - a Distribution's
        """Refuse: the tail is one number.

        Raises:
            ValueError: always.
        """
        raise ValueError("a cached teacher has no whole distributions; take the loss cached_kl, or the teacher itself")


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedKL(TokenLoss):
    """KL(teacher ‖ student) where the teacher's top k tokens are known, and all others are one bucket.

    It is the exact KL divergence of the two models' distributions over k + 1 events. So it is 0 where the full one is,
    and never more than it. What is missing is the teacher's share of the tail times the KL divergence within the tail:
    how the student spreads the tail is not taught. Without the bucket, or with the top k brought to a sum of 1, the
    least loss would be at other distributions than the teacher's: the tail would starve.
    """

    @override
    def check_teacher(self, student: Projected, teacher: Targets) -> None:
        if not isinstance(teacher, TopK):
            raise ValueError(  # noqa: TRY004 - the user chose another kind of teacher
                "cached_kl learns from cached logits; with a teacher at hand take forward_kl"
            )
        super(CachedKL, self).check_teacher(student, teacher)

    @override
    def measure(
        self,
        student: Distribution,
        teacher: Distribution | None,
        labels: Int[Tensor, " tokens"],
        parts: Sequence[slice],
    ) -> tuple[Float[Tensor, " tokens"], Slope]:
        assert isinstance(teacher, TopKRows)
        picked = [_picked(student.columns(part), teacher.indices, part) for part in parts]
        tails = [_log_rest(student.columns(part), teacher.indices, part) for part in parts]
        own, own_tail = torch.stack(picked).sum(0), torch.stack(tails).logsumexp(0).clamp(min=LEAST)
        p, log_tail = teacher.log_probs.exp(), teacher.log_tail
        losses = (p * (teacher.log_probs - own)).sum(-1) + (log_tail.exp() * (log_tail - own_tail))[:, 0]
        total = p.sum(-1, keepdim=True) + log_tail.exp()

        def slope(part: slice) -> Tensor:
            """What is known: q · total - p; the tail: q · total - q · (teacher's tail / student's)."""
            q = student.columns(part).exp()
            found = q * (total - torch.exp(log_tail - own_tail))
            row, which = _inside(teacher.indices, part).nonzero(as_tuple=True)
            column = teacher.indices[row, which] - part.start
            found[row, column] = q[row, column] * total[row, 0] - p[row, which]
            return found

        return losses, slope


def _inside(indices: Tensor, part: slice) -> Tensor:
    inside: Tensor = (indices >= part.start) & (indices < part.stop)
    return inside


@torch.no_grad()
def keep_top(model: Targets, k: int, at_once: int = AT_ONCE) -> TopK:
    """The k likeliest tokens of each of a model's distributions.

    Raises:
        ValueError: k is not between 1 and the vocabulary's size less one.
    """
    if not 0 < k < model.vocab:
        raise ValueError(f"k must be between 1 and {model.vocab - 1}, the vocabulary less one, not {k}")
    whole = slice(0, model.vocab)
    indices, log_probs, tails = [], [], []
    for rows in torch.split(torch.arange(model.num_tokens), max(1, at_once // model.vocab)):
        columns = model.rows(rows, [whole]).columns(whole)
        top = columns.topk(k, dim=-1)
        indices.append(top.indices)
        log_probs.append(top.values)
        tails.append(_log_rest(columns, top.indices, whole)[:, 0])
    return TopK(torch.cat(indices), torch.cat(log_probs), torch.cat(tails), model.vocab)


def _picked(columns: Tensor, indices: Tensor, part: slice) -> Tensor:
    """Entries at these indices of the vocabulary; 0 for those of other parts."""
    local = (indices - part.start).clamp(0, columns.shape[1] - 1)
    zero = torch.zeros((), dtype=columns.dtype, device=columns.device)
    return torch.where(_inside(indices, part), columns.gather(1, local), zero)


def _log_rest(columns: Tensor, indices: Tensor, part: slice) -> Tensor:
    """Log of the probability of the part's entries that are not among these, [tokens, 1]."""
    row, which = _inside(indices, part).nonzero(as_tuple=True)
    rest = columns.clone()
    rest[row, indices[row, which] - part.start] = -torch.inf
    return rest.logsumexp(-1, keepdim=True)
