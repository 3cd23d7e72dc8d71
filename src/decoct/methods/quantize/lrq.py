"""LRQ (arXiv 2407.11534): learn which way to round by dividing weights by low-rank divisors."""

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

_SHARE = 4  # the rank is this part of the smaller side by default: the paper's 1024 of 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class LRQ(BlockLearning):
    """Learn low-rank divisors of weights, and scales, so that a block's output changes least.

    A weight's code is round(w / (scale · exp(L·U + r + c))), with a row vector r and a column vector c. It is FlexRound
    with fewer numbers to learn, which fit the calibration text less closely and other texts more. Works on what an
    earlier step quantized, and starts from its codes; slots that no earlier step quantized are rounded first if `bits`
    is given.

    Attributes:
        bits: 2 to 8, for slots that are not quantized yet; None leaves those alone.
        group_size: input features that share a scale, or "channel", for the same.
        symmetric: no zero points, for the same.
        num_steps: gradient steps.
        batch_size: sequences in each.
        learning_rate: first step size, relative to a divisor; None is 1 / num_steps. It decays to zero.
        seed: of the order in which sequences are seen, and of U, which begins at random (L begins at zero).
        rank: of L·U, at most half of the smaller side of every matrix, where L and U hold as many numbers as it; None:
            a quarter of each one's.
    """

    key: ClassVar[str] = "lrq"
    path: ClassVar[float] = 1.0
    state_bytes: ClassVar[int] = 20
    step_operations: ClassVar[float] = 90.0

    rank: int | None = None

    def __post_init__(self) -> None:
        BlockLearning.__post_init__(self)
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank must be at least 1, not {self.rank}; leave it out for a quarter of the width")

    @override
    def check_learned(self, shape: tuple[int, int]) -> None:
        most = min(shape) // 2
        if self.rank is not None and self.rank > most:
            raise ValueError(
                f"lrq: rank {self.rank} is too much for a {shape[0]}x{shape[1]} matrix; give at most {most}, half of "
                "its smaller side, or leave it out for a quarter of each matrix's"
            )

    @override
    def operations(self, entries: int, num_sequences: int, length: int) -> float:
        # L·U is multiplied twice in each step, and once more for either factor's gradient. A block's seven or so
        # matrices tell its width only roughly.
        rank = self._rank(round((entries / 8) ** 0.5))
        products = 8.0 * rank * entries * self.num_steps
        return BlockLearning.operations(self, entries, num_sequences, length) + products

    @override
    def latent(self, weight: GroupInt, wanted: Float[Tensor, "out in"]) -> Latent:
        generator = torch.Generator().manual_seed(self.seed)
        return _Divided.of(Start.of(weight), wanted, self._rank(min(weight.shape)), generator)

    def _rank(self, width: int) -> int:
        """For a matrix whose smaller side is `width`."""
        return max(1, width // _SHARE) if self.rank is None else self.rank


class _Divided(Division):
    """Divisors of low rank, of rows and of columns."""

    @classmethod
    def of(cls, begun: Start, wanted: Float[Tensor, "out in"], rank: int, generator: torch.Generator) -> "_Divided":
        """Begin at divisors of one, in a random subspace."""
        rows, cols = begun.weight.shape
        return cls(
            begun,
            wanted,
            {
                "L": torch.zeros(rows, rank),
                # Rows of this size let an entry of L move a log divisor as far as itself, whatever the rank.
                "U": torch.randn(rank, cols, generator=generator) / rank**0.5,
                "r": torch.zeros(rows, 1),
                "c": torch.zeros(1, cols),
            },
        )

    @override
    def log_divisor(self) -> Float[Tensor, "out groups size"]:
        found = self.learned["L"] @ self.learned["U"]
        return found.add_(self.learned["r"]).add_(self.learned["c"]).reshape(self.begun.shape)

    @override
    def pull(self, gradient: Float[Tensor, "out groups size"]) -> dict[str, Tensor]:
        g = gradient.reshape(self.begun.weight.shape)
        return {
            "L": g @ self.learned["U"].T,
            "U": self.learned["L"].T @ g,
            "r": g.sum(1, keepdim=True),
            "c": g.sum(0, keepdim=True),
        }
