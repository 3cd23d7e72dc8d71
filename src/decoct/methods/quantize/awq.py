"""AWQ (arXiv 2306.00978): scale up the input channels that activations make salient, before the weights are rounded."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from decoct.methods.base import EdgeScaling
from decoct.ops.grid import check_grid, dequantize, fit_grid, quantize, resolve_group_size, stored_scale_dtype
from decoct.ops.parallel import each_piece
from decoct.ops.products import bf16_products
from decoct.stats import Gram


@dataclass(frozen=True, slots=True, kw_only=True)
class AWQ(EdgeScaling):
    """Search each edge's channel scales for the least output error after rounding; the next steps do the rounding.

    A channel's size, which the paper measures by mean |x|, is its root mean square here: the Gram matrix has it, and
    gives the exact squared error of a candidate over all calibration tokens, with no need to run the block. The last
    three settings name what the following step does, so that the search rounds likewise.

    Attributes:
        num_ratios: exponents r tried for size^r, from 0 to just below 1.
        weight_aware: also try size^r / (mean relative |w|)^(1-r), and keep the better.
        bits: of the rounding that follows.
        group_size: of the rounding that follows.
        symmetric: of the rounding that follows.
    """

    stat: ClassVar[type[Gram]] = Gram

    num_ratios: int = 20
    weight_aware: bool = True
    bits: int = 4
    group_size: int | str = 64
    symmetric: bool = True

    def __post_init__(self) -> None:
        check_grid(self.bits, self.group_size)
        if self.num_ratios < 1:
            raise ValueError("num_ratios must be at least 1")

    @override
    def check(self, shape: tuple[int, int]) -> None:
        resolve_group_size(self.group_size, shape[1])

    @override
    def workspace(self, shape: tuple[int, int]) -> int:
        return 24 * shape[0] * shape[1] + 12 * shape[1] ** 2

    @override
    def operations(self, shape: tuple[int, int]) -> float:
        return (
            self.num_ratios * (1 + self.weight_aware) * (2.0 * shape[0] * shape[1] ** 2 + 100.0 * shape[0] * shape[1])
        )

    @override
    def scale(
        self, readers: Sequence[Float[Tensor, "out in"]], stat: Gram, tie: Callable[[Tensor], Tensor]
    ) -> Float[Tensor, "in"]:
        H = stat.matrix()
        best, least = torch.ones(H.shape[0]), self._error(readers, H, None)
        if not least < float("inf"):
            raise ValueError("weights or inputs hold NaN or infinite values; the checkpoint or the text is damaged")
        for candidate in self._candidates(readers, torch.diagonal(H).sqrt()):
            scale = tie(candidate)
            error = self._error(readers, H, scale)
            if error < least:
                best, least = scale, error
        return best

    def _candidates(self, readers: Sequence[Tensor], size: Float[Tensor, "in"]) -> Iterator[Float[Tensor, "in"]]:
        """Scales whose largest and smallest are each other's inverse, as in the paper."""
        size = size.clamp(min=1e-4 * float(size.max()))  # channels that never fire keep a finite scale
        relative = _relative_size(readers, self.group_size) if self.weight_aware else None
        for step in range(self.num_ratios):
            ratio = step / self.num_ratios
            if step > 0:
                yield _centred(size.pow(ratio))
            if relative is not None:
                yield _centred(size.pow(ratio) / relative.pow(1.0 - ratio))

    def _error(self, readers: Sequence[Tensor], H: Tensor, scale: Tensor | None) -> float:
        """tr(ΔW·H·ΔWᵀ) over all readers, ΔW the change by rounding W·diag(scale).

        Candidates differ by much more than products in bfloat16 are off: a thousandth, in a sum of so many terms.
        """
        total = 0.0
        for w in readers:
            lost = torch.empty(w.shape[0])

            def round_rows(part: slice, w: Tensor = w, lost: Tensor = lost) -> None:
                scaled = w[part] if scale is None else w[part] * scale
                grid = fit_grid(
                    scaled,
                    bits=self.bits,
                    group_size=self.group_size,
                    symmetric=self.symmetric,
                    scale_dtype=stored_scale_dtype(torch.bfloat16),  # what most models are in
                )
                change = dequantize(quantize(scaled, grid), grid)
                change = (change if scale is None else change.div_(scale)).sub_(w[part])
                lost[part] = (change @ H).mul_(change).sum(1)

            with bf16_products():
                each_piece(round_rows, *w.shape)
            total += float(lost.sum(dtype=torch.float64))
        return total


def _centred(scale: Tensor) -> Tensor:
    return scale / (scale.max() * scale.min()).sqrt()


def _relative_size(readers: Sequence[Tensor], group_size: int | str) -> Float[Tensor, "in"]:
    """How large each column's weights are beside the largest of their group, on average over all rows."""
    stacked = torch.cat(list(readers)).abs()
    rows, cols = stacked.shape
    groups = stacked.reshape(rows, -1, resolve_group_size(group_size, cols))
    largest = groups.amax(-1, keepdim=True)
    relative = groups / torch.where(largest == 0, 1.0, largest)
    return relative.mean(0).reshape(cols).clamp(min=1e-4)
