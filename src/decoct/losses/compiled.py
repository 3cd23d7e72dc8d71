"""The commonest losses by the compiled kernels: gradients take the place of logits (as in arXiv 2410.10989)."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from decoct.losses.distribution import Head, Projected
from decoct.native.divergence import can_diverge, diverge

BYTES = 16
"""Of logits that are held at a time, both models' together, for each entry that `at_once` allows."""


@dataclass(frozen=True, slots=True)
class Compiled:
    """A loss that the kernels know: a weighted sum of forward and reverse KL, or cross-entropy.

    Attributes:
        teacher: its predictions; None: cross-entropy with the labels.
        labels: the token that follows each row's.
        shares: what KL(teacher ‖ student) and KL(student ‖ teacher) weigh.
        temperature: both models' logits are divided by it.
    """

    teacher: Projected | None
    labels: Int[Tensor, " tokens"]
    shares: tuple[float, float] = (1.0, 0.0)
    temperature: float = 1.0

    def serves(self, student: Projected, at_once: int) -> bool:
        """Whether the kernels are there for these models, and a row's logits may be held at once."""
        heads = [student.head] + ([] if self.teacher is None else [self.teacher.head])
        matrix = student.head.matrix
        return (
            can_diverge(matrix.dtype, matrix.device)
            and matrix.shape[0] <= at_once
            and all(_plain(head) and head.matrix.dtype == matrix.dtype for head in heads)
        )

    def count(self, student: Projected, at_once: int) -> int:
        """Tokens that are looked at together."""
        arrays = 1 if self.teacher is None else 2
        return max(1, BYTES * at_once // (arrays * student.head.matrix.element_size() * student.vocab))

    def measure(
        self, student: Projected, rows: Int[Tensor, " some"], weights: Float[Tensor, " some"] | None
    ) -> tuple[Float[Tensor, " some"], Float[Tensor, "some vocab"]]:
        """Some rows' losses, and the gradient of their weighted sum by the products with the head.

        Without weights, the second is of no meaning.
        """
        own = _products(student, rows)
        scale, teacher_scale = student.head.scale / self.temperature, 1.0
        wanted: Tensor = self.labels[rows]
        if self.teacher is not None:
            wanted, teacher_scale = _products(self.teacher, rows), self.teacher.head.scale / self.temperature
        factor = self.temperature**2
        scaled = None if weights is None else weights.float().mul(factor)
        losses = diverge(own, wanted, scales=(scale, teacher_scale), shares=self.shares, weights=scaled)
        return losses.mul_(factor).to(torch.float32), own


def _plain(head: Head) -> bool:
    """Whether logits are products, biased at most in the same dtype, times a positive number."""
    biased = head.bias is not None and head.bias.dtype != head.matrix.dtype
    return head.softcap is None and head.scale > 0 and not biased


def _products(model: Projected, rows: Int[Tensor, " some"]) -> Float[Tensor, "some vocab"]:
    """Hidden states times the head, as it stands."""
    head: Head = model.head
    found = model.hidden.detach()[rows].to(head.matrix.dtype) @ head.matrix.T
    return found if head.bias is None else found.add_(head.bias)
