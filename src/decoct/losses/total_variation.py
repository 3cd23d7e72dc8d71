"""Total variation (f-DISTILL, arXiv 2307.15190): half the sum of absolute differences of probabilities."""

from dataclasses import dataclass

from torch import Tensor
from typing_extensions import override

from decoct.losses.base import Divergence


@dataclass(frozen=True, slots=True, kw_only=True)
class TotalVariation(Divergence):
    """Half the sum of |teacher - student| over the vocabulary, between 0 and 1; robust against noise in the tail."""

    @override
    def terms(self, teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
        p, q = teacher.exp(), student.exp()
        return 0.5 * (p - q).abs(), 0.5 * (q - p).sign() * q
