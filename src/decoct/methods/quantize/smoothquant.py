"""SmoothQuant (arXiv 2211.10438): move outliers of the activations into the weights, by channel, before quantizing."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from decoct.methods.base import EdgeScaling
from decoct.stats import AbsMax


@dataclass(frozen=True, slots=True, kw_only=True)
class SmoothQuant(EdgeScaling):
    """Divide each channel by max|x|^a / max|w|^(1 - a): inputs become easier to round, weights a little harder.

    Attributes:
        alpha: how much of the difficulty moves to the weights, 0 to 1; the paper uses 0.5, and up to 0.85 for models
            with larger outliers.
    """

    stat: ClassVar[type[AbsMax]] = AbsMax

    alpha: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must lie between 0 and 1, not {self.alpha}")

    @override
    def scale(
        self, readers: Sequence[Float[Tensor, "out in"]], stat: AbsMax, tie: Callable[[Tensor], Tensor]
    ) -> Float[Tensor, "in"]:
        x = stat.maximum
        w = torch.stack([matrix.abs().amax(0) for matrix in readers]).amax(0)
        if not (torch.isfinite(x).all() and torch.isfinite(w).all()):
            raise ValueError("weights or inputs hold NaN or infinite values; the checkpoint or the text is damaged")
        scale = x.pow(self.alpha) / w.pow(1.0 - self.alpha)
        usable = (x > 0) & (w > 0)
        return tie(torch.where(usable, scale, 1.0).clamp(1e-4, 1e4))
