"""LLM.int8() (arXiv 2208.07339): 8-bit rows times 8-bit tokens, and the few features with huge inputs left whole."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import override

from decoct.methods.base import LinearMethod, refusal
from decoct.ops.grid import fit_grid, quantize_packed, stored_scale_dtype
from decoct.ops.input_grid import InputGrid
from decoct.stats import AbsMax
from decoct.weights import Columns, Dense, GroupInt, Masked, QuantizedInput, Sparse, Sum, Weight


@dataclass(frozen=True, slots=True, kw_only=True)
class LLMInt8(LinearMethod):
    """Weights and inputs in 8 bits, except for the input features that any calibration token drives far out.

    The paper looks for such features in every batch and keeps all weights in 16 bits to have their columns at hand.
    Here they are chosen once, on the calibration text, so that only their columns stay in 16 bits.

    Attributes:
        threshold: features whose |x| exceeds this stay whole. An absolute size: the paper's 6.0 is for models whose
            norms put out values of about one.
        keep: at most this fraction of the features, the largest ones.
    """

    stat: ClassVar[type[AbsMax]] = AbsMax
    quantizes_inputs: ClassVar[bool] = True

    threshold: float = 6.0
    keep: float = 0.05

    def __post_init__(self) -> None:
        if not self.threshold > 0:
            raise ValueError(f"threshold must be above 0, not {self.threshold}")
        if not 0 <= self.keep <= 1:
            raise ValueError(f"keep must lie between 0 and 1, not {self.keep}")

    @override
    def compress(self, weight: Weight, stat: AbsMax) -> Weight:
        """Quantize a dense weight; a mask is kept."""
        match weight:
            case Dense():
                survivors = None
            case Sparse() | Masked(inner=Dense()):
                survivors = weight.survivors()
            case _:
                raise refusal("llm_int8", weight)
        w = weight.unpack()
        outliers = self._outliers(stat.peak())
        rest = w.index_fill(1, outliers, 0.0)
        stored = stored_scale_dtype(w.dtype)
        grid = fit_grid(rest, bits=8, group_size="channel", scale_dtype=stored)
        ints: Weight = GroupInt.of_packed(quantize_packed(rest, grid), weight.shape, grid, w.dtype)
        if survivors is not None:
            ints = Masked.of(ints, survivors)
        if outliers.numel() == 0:
            return QuantizedInput.of(ints, InputGrid())
        columns = w[:, outliers]
        if not torch.isfinite(columns).all():
            raise ValueError("the weights hold NaN or infinite values; the checkpoint is damaged")
        whole = Columns.of(columns.to(stored), outliers, weight.shape[1], w.dtype)
        return Sum.of(QuantizedInput.of(ints, InputGrid(), kept=outliers), whole)

    def _outliers(self, peak: Float[Tensor, " in"]) -> Int[Tensor, " kept"]:
        """Features above the threshold, the largest first, at most as many as allowed."""
        order = peak.argsort(descending=True, stable=True)[: int(self.keep * peak.numel())]
        return order[peak[order] > self.threshold]
