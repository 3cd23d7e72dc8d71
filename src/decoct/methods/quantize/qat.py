"""Quantization-aware training (ParetoQ, arXiv 2502.02631): weights learn where to be rounded to, and scales how far."""

from dataclasses import dataclass
from typing import Literal

from decoct.methods.training import TrainingMethod
from decoct.ops.grid import resolve_group_size

LEVELS: dict[float, int] = {1: 2, 1.58: 3, **{float(bits): 2**bits for bits in range(2, 9)}}
"""Values that a weight may have, by its bits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QAT(TrainingMethod):
    """Behind each rounded weight stands a latent one, which is trained; what the model computes with is rounded.

    Rounding passes gradients straight through. What is uncompressed is rounded to `bits`, under its mask or within its
    factors if it has some; what is quantized already keeps its bits and groups, and goes on from its own codes;
    codebooks and trellises are trained as they are stored. Embedding and lm_head are left to other stages.

    Attributes:
        bits: 1, 1.58 (values -1, 0, 1), 2 to 8.
        group_size: input features that share a scale, or "channel" (one a row).
        grid: `lsq` (arXiv 1902.08153): levels about zero, one of them zero; `seq`: as many below as above zero, evenly
            spread, which suits few bits; `absmean` (BitNet b1.58, arXiv 2402.17764): the scale is the mean of |w|, not
            learned, for 1.58 bits; `auto`: seq below 3 bits, else lsq.
    """

    bits: float = 2
    group_size: int | str = 64
    grid: Literal["auto", "lsq", "seq", "absmean"] = "auto"

    def __post_init__(self) -> None:
        TrainingMethod.__post_init__(self)
        if self.bits not in LEVELS:
            raise ValueError(f"bits must be 1, 1.58, or 2 to 8, not {self.bits:g}")
        if self.group_size == "tensor":
            raise ValueError("group_size must be a number or channel: training fits a scale to each row at least")
        if self.group_size != "channel":
            resolve_group_size(self.group_size, 0)
        if self.grid == "absmean" and self.bits != 1.58:
            raise ValueError("grid absmean is for bits: 1.58")
        if self.grid == "lsq" and self.bits < 2:
            raise ValueError("grid lsq has too few levels below 2 bits; take seq")
        if not self.trains("matrices"):
            raise ValueError("qat trains the matrices that it rounds; put matrices into train")

    @property
    def levels(self) -> int:
        """Values that a weight may have."""
        return LEVELS[self.bits]

    @property
    def zero(self) -> float:
        """Which level, counted from 0, would be zero; between two of them where none is."""
        balanced = self.grid == "seq" or (self.grid == "auto" and self.bits < 3)
        return (self.levels - 1) / 2 if balanced or self.levels < 4 else self.levels // 2

    @property
    def wide(self) -> bool:
        """Whether weights up to half a step beyond the outer levels still get gradients, as SEQ has it."""
        return self.grid == "seq" or (self.grid == "auto" and self.bits < 3)
