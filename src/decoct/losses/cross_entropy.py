"""Cross-entropy with the text itself (hard labels beside soft ones, arXiv 1503.02531): what plain training uses."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import override

from decoct.losses.base import Batch, Slope, TokenLoss
from decoct.losses.chunks import at_labels
from decoct.losses.compiled import Compiled
from decoct.losses.distribution import Distribution, Targets


@dataclass(frozen=True, slots=True, kw_only=True)
class CrossEntropy(TokenLoss):
    """The negative log-probability of the text's own next token; needs no teacher."""

    needs_teacher: ClassVar[bool] = False

    @override
    def compiled(self, teacher: Targets | None, batch: Batch) -> Compiled:
        return Compiled(None, batch.labels)

    @override
    def measure(
        self,
        student: Distribution,
        teacher: Distribution | None,
        labels: Int[Tensor, " tokens"],
        parts: Sequence[slice],
    ) -> tuple[Float[Tensor, " tokens"], Slope]:
        rows = torch.arange(len(labels), device=labels.device)

        def slope(part: slice) -> Tensor:
            found = student.columns(part).exp()
            inside = (labels >= part.start) & (labels < part.stop)
            found[rows[inside], labels[inside] - part.start] -= 1.0
            return found

        return -at_labels(student, labels, parts), slope
