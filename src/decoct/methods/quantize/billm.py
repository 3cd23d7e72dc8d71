"""BiLLM (arXiv 2402.04291): signs, and a second bit for which of two sizes; block by block with error feedback."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from typing_extensions import override

from decoct.methods.base import LinearMethod, quantize_structure
from decoct.ops.blockwise import feed_back_blocks
from decoct.ops.feedback import Elimination
from decoct.ops.grid import stored_scale_dtype
from decoct.ops.refit import refit_scales
from decoct.ops.signs import finite_scale, residual_error, residual_sizes, two_sizes
from decoct.stats import Gram
from decoct.weights import Binary, Plane, Weight, scale_index

_SPLITS = torch.linspace(0.1, 0.9, 81)  # quantiles of |w| that are tried as a block's break-point


@dataclass(frozen=True, slots=True, kw_only=True)
class BiLLM(LinearMethod):
    """Two bits for every entry, whatever is done with the second one.

    In each block of input features, the salient ones (few, with the largest Σ w²/[H⁻¹]_jj) are binarized and what
    that loses is binarized again; the other weights are split into small and large ones, each with a scale of its
    own. Either way an entry is one of ±m ± d with two scales for its row, so both are a `Binary` with two planes: the
    paper's 1.08 bits leave out the bitmap of the split, which is a bit for every entry, and the scales.

    Attributes:
        block_size: consecutive input features that share scales. The last block may have fewer.
        max_salient: most salient features, as a fraction of a block; 0: none, which saves their scales.
        as_published: as in the paper and its code: one break-point for all rows of a block, found among quantiles;
            sizes by plain squared error; errors pushed on from whole blocks only. Otherwise each row splits where it
            loses least, errors weigh 1/U_jj² as in the feedback, which also runs within blocks, and each entry takes
            the nearest of its four values.
        refit: at the end fit all scales of a row together, by least output error.
        damping: fraction of the Hessian's mean diagonal added to it.
    """

    block_size: int = 128
    max_salient: float = 0.4
    as_published: bool = False
    refit: bool = True
    damping: float = 0.01

    stat: ClassVar[type[Gram]] = Gram

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise ValueError(f"block_size must be positive, not {self.block_size}")
        if not 0 <= self.max_salient < 1:
            raise ValueError(f"max_salient must be at least 0 and below 1, not {self.max_salient}")
        if not 0 < self.damping <= 1:
            raise ValueError(f"damping must be above 0 and at most 1, not {self.damping}")

    @override
    def workspace(self, shape: tuple[int, int]) -> int:
        """Weights twice, bits, and of one block its values, their order and sums; the Hessian, its factor."""
        return 14 * shape[0] * shape[1] + 120 * shape[0] * self.block_size + 28 * shape[1] ** 2 + (1 << 27)

    @override
    def operations(self, shape: tuple[int, int]) -> float:
        """Feedback, factorization and normal equations; trying each number of salient features; sorting."""
        out, cols = shape
        tried = self.max_salient * self.block_size
        unknowns = 4 * -(-cols // self.block_size)
        fitting = out * cols * (4.0 * cols + 4.0 * unknowns**2) if self.refit else 0.0
        return 2.0 * out * cols**2 + 2.0 * cols**3 + fitting + out * cols * (1500.0 + 100.0 * tried) + 2e7 * cols

    @override
    def compress(self, weight: Weight, stat: Gram) -> Weight:
        """Quantize; masks and low rank are kept."""
        return quantize_structure(weight, stat, self._dense, "billm")

    def _dense(self, w: Float[Tensor, "out in"], mask: Bool[Tensor, "out in"] | None, stat: Gram) -> Weight:
        H = stat.matrix()
        present = torch.diagonal(H).ne(0).expand(w.shape)
        present = present if mask is None else mask & present
        values = torch.where(present, w.float(), 0.0)
        coder = _BlockCoder(self, present, mask, stored_scale_dtype(w.dtype))
        elimination = Elimination.of(H, damping=self.damping, act_order=False)
        feed_back_blocks(values, elimination, coder, self.block_size)
        planes, salient = coder.finish()
        index = scale_index(w.shape[1], self.block_size, salient)
        if self.refit:
            planes = _refit(values, H, planes, index, mask)
        first, second = planes
        return Binary.of(first, self.block_size, w.dtype, residual=second, salient=salient)


def _refit(
    values: Tensor,
    H: Tensor,
    planes: tuple[Plane, Plane],
    index: Int[Tensor, "in"],
    mask: Bool[Tensor, "out in"] | None,
) -> tuple[Plane, Plane]:
    """The planes with the scales of least output error for their signs."""
    kept = torch.ones_like(planes[0].positive) if mask is None else mask
    units = [torch.where(plane.positive, 1, -1).to(torch.int8) * kept for plane in planes]
    found = refit_scales(values, H, units, [plane.scale for plane in planes], index)
    first, second = (
        Plane(plane.positive, finite_scale(scale, plane.scale.dtype))
        for plane, scale in zip(planes, found, strict=True)
    )
    return first, second


class _BlockCoder:
    """Chooses each block's scales and rounds it; holds what is stored."""

    def __init__(self, method: BiLLM, present: Tensor, mask: Tensor | None, dtype: torch.dtype) -> None:
        self._method, self._present, self._mask, self._dtype = method, present, mask, dtype
        self._positive = torch.empty(present.shape, dtype=torch.bool)
        self._second = torch.empty(present.shape, dtype=torch.bool)
        self._salient = torch.zeros(present.shape[1], dtype=torch.bool)
        self._scales: list[Tensor] = []  # for each block [out, 2]: middle and distance of its two sizes
        self._salient_scales: list[Tensor] = []

    def __call__(self, start: int, values: Float[Tensor, "out n"], within: Elimination) -> Float[Tensor, "out n"]:
        """See ops.blockwise.BlockRounding."""
        columns = slice(start, start + values.shape[1])
        pivots = torch.diagonal(within.upper)
        present = self._present[:, columns]
        size = values.abs() * present
        weight = present.float() if self._method.as_published else present / pivots.square()
        salient = self._choose_salient(size / pivots, size, weight)
        self._salient[columns] = salient
        large = self._fit(size, weight, salient)
        rounding = _FourValues(self._spread(salient), None if self._mask is None else self._mask[:, columns])
        if self._method.as_published:
            rounded = rounding.whole(values, large)
        else:
            within.run(values, rounding)
            rounded = rounding.rounded()
        self._positive[:, columns], self._second[:, columns] = rounding.bits()
        return rounded

    def finish(self) -> tuple[tuple[Plane, Plane], Bool[Tensor, "in"] | None]:
        """Both planes, and which features are salient."""
        scales = torch.stack(self._scales + self._salient_scales, 1)  # [out, groups, 2]
        planes = Plane(self._positive, scales[..., 0].contiguous()), Plane(self._second, scales[..., 1].contiguous())
        return planes, self._salient if self._salient_scales else None

    def _choose_salient(self, loss: Tensor, size: Tensor, weight: Tensor) -> Bool[Tensor, " n"]:
        """As many of the features whose removal would cost most as make the error of both parts least."""
        most = int(self._method.max_salient * size.shape[1])
        order = loss.square().sum(0).argsort(descending=True, stable=True)
        sizes, weights = size[:, order], weight[:, order]
        errors = [
            residual_error(sizes[:, :count], weights[:, :count]) + residual_error(sizes[:, count:], weights[:, count:])
            for count in range(most + 1)
        ]
        salient = torch.zeros_like(order, dtype=torch.bool)
        salient[order[: int(torch.stack(errors).argmin())]] = True
        return salient

    def _fit(self, size: Tensor, weight: Tensor, salient: Tensor) -> Bool[Tensor, "out n"]:
        """Choose the block's scales; gives which entries are large by the paper's rule."""
        rest, published = ~salient, self._method.as_published
        splits = None
        if published:
            ordered = size[:, rest].flatten().sort().values
            splits = ordered[(_SPLITS * (ordered.numel() - 1)).long()]
        sizes, shared = two_sizes(size[:, rest], weight[:, rest], splits)
        self._scales.append(self._stored(sizes))
        large = torch.zeros_like(size, dtype=torch.bool)
        if shared is not None:
            large[:, rest] = size[:, rest] > shared
        if salient.any():
            part = size[:, salient], weight[:, salient]
            sizes = residual_sizes(*part) if published else two_sizes(*part)[0]
            self._salient_scales.append(self._stored(sizes))
            large[:, salient] = size[:, salient] > sizes.mean(1, keepdim=True)
        return large

    def _stored(self, sizes: Float[Tensor, "out 2"]) -> Float[Tensor, "out 2"]:
        middle = sizes.mean(1)
        return finite_scale(torch.stack([middle, sizes[:, 1] - middle], 1), self._dtype)

    def _spread(self, salient: Bool[Tensor, " n"]) -> Float[Tensor, "n out 2"]:
        """The latest block's scales of each of its features."""
        scales = [self._scales[-1], *(self._salient_scales[-1:] if salient.any() else [])]
        return torch.stack(scales).float()[salient.long()]


class _FourValues:
    """Rounds a block to ±middle ± distance, one feature at a time or all at once."""

    def __init__(self, scales: Float[Tensor, "n out 2"], survivors: Bool[Tensor, "out n"] | None) -> None:
        self._middle, self._distance = scales[..., 0].contiguous(), scales[..., 1].contiguous()
        self._survivors = None if survivors is None else survivors.T.contiguous()
        self._positive = torch.empty(self._middle.shape, dtype=torch.bool)
        self._large = torch.empty(self._middle.shape, dtype=torch.bool)

    def __call__(self, column: Float[Tensor, " out"], feature: int, lost: Float[Tensor, " out"]) -> None:
        """See ops.feedback.Rounding."""
        self._positive[feature] = column >= 0
        self._large[feature] = column.abs() > self._middle[feature]
        torch.sub(column, self._values(slice(feature, feature + 1)).squeeze(0), out=lost)

    def whole(self, values: Float[Tensor, "out n"], large: Bool[Tensor, "out n"]) -> Float[Tensor, "out n"]:
        """Round all features as they are, to the sizes that are given."""
        self._positive, self._large = (values >= 0).T.contiguous(), large.T.contiguous()
        return self.rounded()

    def rounded(self) -> Float[Tensor, "out n"]:
        """What the block has become."""
        return self._values(slice(None)).T

    def bits(self) -> tuple[Bool[Tensor, "out n"], Bool[Tensor, "out n"]]:
        """Both planes: large entries have equal signs in both."""
        return self._positive.T, (self._positive == self._large).T

    def _values(self, features: slice) -> Float[Tensor, "n out"]:
        distance = torch.where(self._large[features], self._distance[features], -self._distance[features])
        size = self._middle[features] + distance
        values = torch.where(self._positive[features], size, -size)
        return values if self._survivors is None else values * self._survivors[features]
