"""Methods that leave a mixture fewer experts: what they learn from the calibration text, and what they give."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from decoct.methods.base import ModelMethod


class ExpertStat(ABC):
    """What is noted of the answers of one block's experts.

    Attributes:
        num_sent: [experts], tokens that the router sent to each.
    """

    everywhere: ClassVar[bool]
    """Whether experts also answer the tokens that are not sent to them."""

    def __init__(self, num_experts: int, width: int) -> None:  # noqa: ARG002 - a subclass may need the width
        """Nothing seen yet; answers have `width` features."""
        self.num_sent: Int[Tensor, " experts"] = torch.zeros(num_experts, dtype=torch.int64)

    @abstractmethod
    def add(self, expert: int, answers: Float[Tensor, "tokens hidden"], gates: Float[Tensor, " tokens"]) -> None:
        """Take an expert's answers to a batch into account.

        Args:
            expert: its number.
            answers: what it puts out, before the gate.
            gates: what the model multiplies the answers with, 0 for tokens that are not sent there.
        """

    @staticmethod
    @abstractmethod
    def nbytes_for(num_experts: int, width: int) -> int:
        """Bytes that it takes; the planner counts with it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertMethod(ModelMethod, ABC):
    """Leaves as many experts in every block: the result is a plain, smaller checkpoint.

    A stage of its own in a recipe, before those that compress matrices.

    Attributes:
        keep: fraction of each block's experts that stays.
    """

    keep: float = 0.5

    stat: ClassVar[type[ExpertStat]]

    def __post_init__(self) -> None:
        if not 0 < self.keep < 1:
            raise ValueError(f"keep must be above 0 and below 1, not {self.keep}")

    def num_kept(self, num_experts: int, num_per_token: int) -> int:
        """How many of a block's experts stay.

        Raises:
            ValueError: fewer than answer each token, or all of them.
        """
        kept = round(self.keep * num_experts)
        if kept < num_per_token:
            least = num_per_token / num_experts
            raise ValueError(
                f"keep={self.keep} leaves {kept} of {num_experts} experts, and {num_per_token} answer each token; "
                + (f"keep at least {least:.3g}" if least < 1 else "there is none to take out")
            )
        if kept == num_experts:
            raise ValueError(f"keep={self.keep} takes out none of {num_experts} experts; keep less")
        return kept

    @abstractmethod
    def mixture(self, stat: ExpertStat, num_kept: int) -> Float[Tensor, "kept experts"]:
        """What each expert that is left consists of: the weights of the sum of experts that it is, float64.

        Rows of the router are summed with the same weights.

        Raises:
            ValueError: numbers that are not finite.
        """


def check_finite(values: Tensor) -> None:
    """Raise ValueError if statistics cannot be chosen by."""
    if not torch.isfinite(values).all():
        raise ValueError("weights or activations hold NaN or infinite values; the checkpoint or the text is damaged")
