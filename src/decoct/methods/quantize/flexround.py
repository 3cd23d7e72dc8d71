"""FlexRound (arXiv 2306.00317): learn which way to round by dividing each weight by a number of its own."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from decoct.methods.block_learning import BlockLearning
from decoct.methods.learned_division import Division
from decoct.methods.learned_grid import Latent, Start
from decoct.weights import GroupInt


@dataclass(frozen=True, slots=True, kw_only=True)
class FlexRound(BlockLearning):
    """Learn a divisor for each weight and each row, and scales, so that a block's output changes least.

    A weight's code is round(w / (scale · d_row · d)). So a large weight, which matters more, may move several codes,
    and a small one hardly at all. Works on what an earlier step quantized, whatever its bits, and starts from its
    codes; slots that no earlier step quantized are rounded first if `bits` is given.

    Attributes:
        bits: 2 to 8, for slots that are not quantized yet; None leaves those alone.
        group_size: input features that share a scale, or "channel", for the same.
        symmetric: no zero points, for the same.
        num_steps: gradient steps.
        batch_size: sequences in each.
        learning_rate: first step size, relative to a divisor; None is 1 / num_steps. It decays to zero.
        seed: of the order in which sequences are seen.
    """

    key: ClassVar[str] = "flexround"
    path: ClassVar[float] = 1.0
    state_bytes: ClassVar[int] = 16
    step_operations: ClassVar[float] = 90.0

    @override
    def latent(self, weight: GroupInt, wanted: Float[Tensor, "out in"]) -> Latent:
        return _Divided.of(Start.of(weight), wanted)


class _Divided(Division):
    """Divisors of entries and rows."""

    @classmethod
    def of(cls, begun: Start, wanted: Float[Tensor, "out in"]) -> "_Divided":
        """Begin at divisors of one."""
        return cls(begun, wanted, {"entries": torch.zeros(begun.shape), "rows": torch.zeros(begun.shape[0], 1, 1)})

    @override
    def log_divisor(self) -> Float[Tensor, "out groups size"]:
        return self.learned["entries"] + self.learned["rows"]

    @override
    def pull(self, gradient: Float[Tensor, "out groups size"]) -> dict[str, Tensor]:
        return {"entries": gradient, "rows": gradient.sum_to_size(self.learned["rows"].shape)}
