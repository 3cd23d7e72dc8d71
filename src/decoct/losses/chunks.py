"""Losses on predictions without ever holding all logits: a few tokens, and a part of the vocabulary, at a time.

For 2048 tokens and a vocabulary of 262 144 entries, one array of logits in float32 takes 2 GiB, and a loss written with
them holds several. Here the gradient by hidden states and head is made together with the loss, chunk by chunk; what is
kept for the way back has the size of the states and of the head (the idea of arXiv 2410.10989).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from decoct.losses.compiled import Compiled
from decoct.losses.distribution import Distribution, Projected, Targets, exact

AT_ONCE = 1 << 23
"""Entries of logits that are held at a time by default; a handful of float32 arrays have that size. (The kernels hold
`BYTES` for each of them, fewer arrays of more tokens.)"""

_FEWEST_TOKENS = 16  # in a chunk: with fewer, reading the head takes longer than multiplying with it

Measure = Callable[
    [Int[Tensor, " some"], Distribution, Sequence[slice]],
    tuple[Float[Tensor, " some"], Callable[[slice], Tensor]],
]


@dataclass(frozen=True, slots=True)
class Work:
    """What a sweep does with each chunk of tokens.

    Attributes:
        measure: from the rows' numbers, the student's distributions and the parts of the vocabulary to each row's
            loss, and to the gradient by the student's logits for a part.
        temperature: at which the student's distributions are wanted.
        whole_vocabulary: whether it must not be parted.
        compiled: the loss as the kernels know it, if they do; they are preferred.
    """

    measure: Measure
    temperature: float = 1.0
    whole_vocabulary: bool = False
    compiled: Compiled | None = None


@dataclass(slots=True)
class _Gradients:
    """What is gathered; None where no gradient is wanted."""

    hidden: Tensor | None
    matrix: Tensor | None
    bias: Tensor | None

    @property
    def wanted(self) -> bool:
        """Whether any is."""
        return any(each is not None for each in (self.hidden, self.matrix, self.bias))


def weighted_sum(
    work: Work, student: Projected, weights: Float[Tensor, " tokens"], at_once: int = AT_ONCE
) -> Float[Tensor, ""]:
    """The sum over rows of weight times loss, differentiable by the student's states, matrix and bias.

    Raises:
        ValueError: the loss is not finite.
    """
    head = student.head
    bias = torch.zeros(0) if head.bias is None else head.bias
    found: Tensor = _WeightedSum.apply(student.hidden, head.matrix, bias, (work, student, weights, at_once))  # type: ignore[no-untyped-call]
    if not torch.isfinite(found.detach()):
        raise ValueError(f"the loss is not finite ({float(found):g}); lower the learning rate, or mend the checkpoint")
    return found


@torch.no_grad()
def row_losses(
    work: Work, student: Projected, weights: Float[Tensor, " tokens"], at_once: int = AT_ONCE
) -> Float[Tensor, " tokens"]:
    """Each row's loss, without gradients; 0 where the weight is 0."""
    found = torch.zeros_like(weights, dtype=exact(student.head.matrix[:0]).dtype)
    if work.compiled is not None and work.compiled.serves(student, at_once):
        for rows in _counted(weights, work.compiled.count(student, at_once)):
            found[rows] = work.compiled.measure(student, rows, None)[0]
        return found
    for rows, parts in _chunks(work, student, weights, at_once):
        found[rows] = work.measure(rows, student.rows(rows, parts, work.temperature), parts)[0]
    return found


@torch.no_grad()
def label_log_probs(model: Targets, labels: Int[Tensor, " tokens"], at_once: int = AT_ONCE) -> Float[Tensor, " tokens"]:
    """The log-probability (nats) that a model gives to each row's label, without gradients."""
    known = Compiled(None, labels.clamp(0, model.vocab - 1))
    if isinstance(model, Projected) and known.serves(model, at_once):
        chunks = torch.split(torch.arange(model.num_tokens), known.count(model, at_once))
        found = torch.cat([-known.measure(model, rows, None)[0] for rows in chunks])
        return found.masked_fill_((labels < 0) | (labels >= model.vocab), 0.0)
    count, parts = _sizes(model.num_tokens, model.vocab, at_once, whole=False)
    chunks = torch.split(torch.arange(model.num_tokens, device=labels.device), count)
    return torch.cat([at_labels(model.rows(rows, parts), labels[rows], parts) for rows in chunks])


def at_labels(model: Distribution, labels: Int[Tensor, " tokens"], parts: Sequence[slice]) -> Float[Tensor, " tokens"]:
    """The log-probability of each row's label; rows whose label lies in none of the parts get 0."""
    found: Tensor | None = None
    for part in parts:
        columns = model.columns(part)
        inside = (labels >= part.start) & (labels < part.stop)
        local = (labels - part.start).clamp(0, columns.shape[1] - 1)
        each = torch.where(inside, columns.gather(1, local[:, None])[:, 0], 0.0)
        found = each if found is None else found + each
    assert found is not None
    return found


class _WeightedSum(torch.autograd.Function):
    """Loss and gradients in one sweep; the way back only multiplies."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, matrix: Tensor, bias: Tensor, todo: tuple[Any, ...]) -> Tensor:
        """Sweep over all chunks."""
        work, student, weights, at_once = todo
        wanted = ctx.needs_input_grad
        kinds = [
            torch.zeros(each.shape, dtype=exact(each[:0]).dtype, device=each.device) if want else None
            for each, want in zip((hidden, matrix, bias), wanted[:3], strict=True)
        ]
        total = _sweep(work, student, weights, at_once, _Gradients(*kinds))
        dtypes = (hidden.dtype, matrix.dtype, bias.dtype)
        ctx.found = [None if each is None else each.to(d) for each, d in zip(kinds, dtypes, strict=True)]
        return total

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        """Multiply with the gradient by the sum."""
        return (*(None if each is None else each * outer[0].to(each.dtype) for each in ctx.found), None)


def _sweep(work: Work, student: Projected, weights: Tensor, at_once: int, gradients: _Gradients) -> Tensor:
    """The weighted sum; adds to the gradients."""
    if work.compiled is not None and work.compiled.serves(student, at_once):
        return _compiled_sweep(work.compiled, student, weights, at_once, gradients)
    kind = exact(student.head.matrix[:0]).dtype
    total = torch.zeros((), dtype=kind, device=student.hidden.device)
    for rows, parts in _chunks(work, student, weights, at_once):
        own = student.rows(rows, parts, work.temperature)
        losses, slope = work.measure(rows, own, parts)
        each = weights[rows].to(kind)
        total += (losses * each).sum()
        for part in parts if gradients.wanted else ():
            _collect(student, own.slope(slope(part).mul_(each[:, None]), part), rows, part, gradients)
    return total


def _compiled_sweep(work: Compiled, student: Projected, weights: Tensor, at_once: int, gradients: _Gradients) -> Tensor:
    """The same by the kernels, with the whole vocabulary at once."""
    total = torch.zeros((), dtype=torch.float32)
    for rows in _counted(weights, work.count(student, at_once)):
        each = weights[rows].float()
        losses, slope = work.measure(student, rows, each if gradients.wanted else None)
        total += (losses * each).sum()
        if gradients.wanted:
            _collect(student, slope, rows, slice(0, student.vocab), gradients)
        del slope  # before the next rows' are made
    return total


def _collect(student: Projected, slope: Tensor, rows: Tensor, part: slice, gradients: _Gradients) -> None:
    """Add what the gradient by a part of some rows' products with the matrix means for states, matrix and bias."""
    head = student.head
    matrix = head.matrix[part]
    rounded = slope.to(matrix.dtype)
    if gradients.hidden is not None:
        gradients.hidden[rows] += (rounded @ matrix).to(gradients.hidden.dtype)
    if gradients.matrix is not None:
        states = student.hidden.detach()[rows].to(matrix.dtype)
        if gradients.matrix.dtype == matrix.dtype:
            gradients.matrix[part].addmm_(rounded.T, states)
        else:
            gradients.matrix[part] += rounded.T @ states
    if gradients.bias is not None and head.bias is not None:
        gradients.bias[part] += slope.sum(0, dtype=gradients.bias.dtype)


def _chunks(work: Work, student: Projected, weights: Tensor, at_once: int) -> list[tuple[Tensor, list[slice]]]:
    """Numbers of the rows that count, a chunk at a time, and the parts of the vocabulary to go through for each."""
    count, parts = _sizes(int((weights != 0).sum()), student.vocab, at_once, whole=work.whole_vocabulary)
    return [(rows, parts) for rows in _counted(weights, count)]


def _counted(weights: Tensor, count: int) -> list[Tensor]:
    """Numbers of the rows that count, so many at a time; none where no row does."""
    return [rows for rows in torch.split(weights.nonzero()[:, 0], count) if len(rows)]


def _sizes(num_tokens: int, vocab: int, at_once: int, *, whole: bool) -> tuple[int, list[slice]]:
    """Tokens in a chunk and parts of the vocabulary, so that no array has more than `at_once` entries.

    Few tokens at a time are avoided where the vocabulary may be parted instead.
    """
    count = max(1, min(num_tokens, at_once // vocab))
    if not whole:
        count = max(count, min(num_tokens, _FEWEST_TOKENS, at_once), 1)
    width = vocab if whole else min(vocab, max(1, at_once // count))
    return count, [slice(start, min(start + width, vocab)) for start in range(0, vocab, width)]
