"""Binary: a matrix's signs at one bit each, with scales; perhaps a second plane of signs for what the first lost."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor
from typing_extensions import override

from decoct.ops.packing import pack_mask, unpack_mask
from decoct.ops.parallel import each_piece
from decoct.weights.base import Weight


@dataclass(frozen=True, eq=False, slots=True)
class Plane:
    """One plane of signs on its way into a `Binary`.

    Attributes:
        positive: True for +1, False for -1.
        scale: [out, groups], in the dtype that is stored.
    """

    positive: Bool[Tensor, "out in"]
    scale: Float[Tensor, "out groups"]


def scale_index(
    width: int, group_size: int, salient: Bool[Tensor, "in"] | None = None, device: torch.device | None = None
) -> Int[Tensor, "in"]:
    """Which scale each input feature has: that of its group or, if it is salient, its group's second one.

    Second scales come after all first ones, in order, and only for the groups that have salient features.
    """
    group = torch.arange(width, device=device) // group_size
    if salient is None:
        return group
    groups = -(-width // group_size)
    second = torch.zeros(groups, dtype=torch.long, device=device)
    second[group[salient]] = 1
    return torch.where(salient, groups + second.cumsum(0)[group] - 1, group)


@dataclass(frozen=True, eq=False, slots=True)
class Binary(Weight):
    """value = (sign * scale + residual sign * residual scale) * column factor; the last two are optional.

    With two planes an entry has one of four values, ±scale ± residual scale. The same two bits tell large from small
    where a paper splits weights into two groups by magnitude: |value| is then scale ± residual scale.

    Attributes:
        signs: bitmap, uint8 [out, ceil(in / 8)]; a set bit is +1.
        scale: [out, groups], and after them one more for each group that has salient features.
        residual: the second plane, like `signs`; or None.
        residual_scale: like `scale`; or None.
        columns: [in], a factor for each input feature; or None.
        salient: bitmap of the features that share a scale of their own within their group, uint8 [ceil(in / 8)]; or
            None.
        group_size: consecutive input features that share a scale; the last group may be shorter.
    """

    kind: ClassVar[str] = "Binary"
    signs: UInt8[Tensor, "out sign_bytes"]
    scale: Float[Tensor, "out groups"]
    residual: UInt8[Tensor, "out sign_bytes"] | None
    residual_scale: Float[Tensor, "out groups"] | None
    columns: Float[Tensor, "in"] | None
    salient: UInt8[Tensor, " salient_bytes"] | None
    group_size: int

    @classmethod
    def of(
        cls,
        plane: Plane,
        group_size: int,
        dtype: torch.dtype,
        *,
        residual: Plane | None = None,
        columns: Float[Tensor, "in"] | None = None,
        salient: Bool[Tensor, "in"] | None = None,
    ) -> "Binary":
        """Pack planes of signs; scales and factors are stored as they are, `dtype` is what the matrix was before."""
        return cls(
            shape=(plane.positive.shape[0], plane.positive.shape[1]),
            dtype=dtype,
            signs=pack_mask(plane.positive),
            scale=plane.scale,
            residual=None if residual is None else pack_mask(residual.positive),
            residual_scale=None if residual is None else residual.scale,
            columns=columns,
            salient=None if salient is None else pack_mask(salient),
            group_size=group_size,
        )

    @property
    def planes(self) -> int:
        """Bits that every entry takes, beside scales: one, or two with a residual."""
        return 1 if self.residual is None else 2

    @override
    def unpack(self, dtype: torch.dtype | None = None) -> Float[Tensor, "out in"]:
        out = torch.empty(self.shape, dtype=dtype or self.dtype, device=self.signs.device)

        def work(part: slice) -> None:
            out[part] = self.unpack_rows(part, out.dtype)

        each_piece(work, *self.shape, self.signs.device)
        return out

    @override
    def unpack_rows(self, rows: Int[Tensor, "*n"] | slice, dtype: torch.dtype | None = None) -> Float[Tensor, "*n in"]:
        index = self._scale_index()
        values = self._plane(self.signs, self.scale, rows, index)
        if self.residual is not None and self.residual_scale is not None:
            values += self._plane(self.residual, self.residual_scale, rows, index)
        if self.columns is not None:
            values *= self.columns.float()
        return values.to(dtype or self.dtype)

    def pull_back(self, gradient: Float[Tensor, "out in"]) -> dict[str, Tensor]:
        """Gradients of scales (sign·factor·gradient, gathered over each group) and of column factors."""
        scaled = gradient if self.columns is None else gradient * self.columns.float()
        found = {"scale": self._gather(self.signs, scaled)}
        if self.residual is not None:
            found["residual_scale"] = self._gather(self.residual, scaled)
        if self.columns is not None:
            unit = self.with_tensors({**self.own_tensors(), "columns": torch.ones_like(self.columns)})
            found["columns"] = (unit.unpack(torch.float32) * gradient).sum(0)
        return found

    def _scale_index(self) -> Int[Tensor, "in"]:
        """Which scale each input feature has."""
        salient = None if self.salient is None else unpack_mask(self.salient, self.shape[1])
        return scale_index(self.shape[1], self.group_size, salient, self.signs.device)

    def _plane(self, signs: Tensor, scale: Tensor, rows: Tensor | slice, index: Tensor) -> Tensor:
        size = scale[rows].float()
        spread = size if size.shape[-1] == 1 else size[..., index]
        return unpack_mask(signs[rows], self.shape[1]).float().mul_(2).sub_(1).mul_(spread)

    def _gather(self, signs: Tensor, gradient: Tensor) -> Tensor:
        signed = unpack_mask(signs, self.shape[1]).float().mul_(2).sub_(1).mul_(gradient)
        return torch.zeros_like(self.scale, dtype=torch.float32).index_add_(1, self._scale_index(), signed)
