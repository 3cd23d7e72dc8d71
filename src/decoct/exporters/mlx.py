"""MLX's layout: integers in groups for Apple's machines, which mlx-lm reads. MLX does not run here: see `verify_mlx`.

Packed along the inputs in words of 32 bits: `weight` uint32 [out, in·bits/32], the first code lowest; `scales` and
`biases` [out, groups] in the model's dtype. Readers compute code · scale + bias, so the bias is -zero · scale.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from decoct.exporters.folder import write_folder
from decoct.exporters.integer_folder import (
    Kind,
    Layout,
    Layouts,
    Read,
    choose_layouts,
    grouped,
    notes_of,
    uncompressed,
    verify_folder,
)
from decoct.exporters.integer_formats import MLX
from decoct.exporters.report import Check
from decoct.model import Model
from decoct.ops.packing import pack_words, unpack_words


@dataclass(frozen=True, slots=True)
class MlxPlan:
    """A folder before it is written.

    Attributes:
        model: what is written.
        layouts: of each slot.
    """

    model: Model
    layouts: Layouts

    def tensors(self, name: str) -> dict[str, Tensor]:
        """What a matrix is stored as; where it is left uncompressed, itself."""
        layout, stem = self.layouts[name], name.removesuffix(".weight")
        if layout is None:
            return uncompressed(self.model, name)
        found, dtype = grouped(self.model.weight(name), layout), self.model.dtype
        scales, biases = found.scale.to(dtype), (-found.zero * found.scale).to(dtype)
        if not bool(scales.isfinite().all() and biases.isfinite().all()):
            raise ValueError(f"{name} has scales that {dtype} cannot hold; export as gguf")
        return {
            name: pack_words(found.codes, layout.bits).view(torch.uint32),
            f"{stem}.scales": scales,
            f"{stem}.biases": biases,
        }

    def kinds(self, name: str) -> dict[str, Kind]:
        """Shapes and types of the tensors of a matrix in integers."""
        layout, (out, cols), stem = self.layouts[name], self.model.shape(name), name.removesuffix(".weight")
        assert layout is not None
        groups = (out, cols // layout.group_size)
        return {
            name: ((out, cols * layout.bits // 32), torch.uint32),
            f"{stem}.scales": (groups, self.model.dtype),
            f"{stem}.biases": (groups, self.model.dtype),
        }

    def matrix(self, name: str, read: Read) -> Tensor:
        """A matrix as readers of the format unpack it, float32 [out, in]."""
        layout, stem = self.layouts[name], name.removesuffix(".weight")
        assert layout is not None
        codes = unpack_words(read(name).view(torch.int32), layout.bits).float()
        scales, biases = (
            read(f"{stem}.{part}").float().repeat_interleave(layout.group_size, 1) for part in ("scales", "biases")
        )
        return codes * scales + biases

    def config(self) -> dict[str, Any]:
        """`quantization`: what most matrices have, and by path what others have."""
        held = {name: layout for name, layout in self.layouts.items() if layout is not None}
        base = Counter(_settings(layout) for layout in held.values()).most_common(1)[0][0]
        others = {
            name.removesuffix(".weight"): dict(_settings(layout))
            for name, layout in held.items()
            if _settings(layout) != base
        }
        return {**dict(base), "mode": "affine", **others}


def plan_mlx(model: Model, *, fold: bool) -> MlxPlan:
    """What a folder would be; looks at descriptions alone.

    Args:
        model: what is to be written, or what a recipe is expected to make.
        fold: write uncompressed what the format cannot hold.

    Raises:
        MisfitError: see `choose_layouts`.
    """
    return MlxPlan(model, choose_layouts(model, MLX, fold=fold))


def write_mlx(plan: MlxPlan, out: Path) -> tuple[str, ...]:
    """Write the folder; gives notes.

    Raises:
        ValueError: the folder holds something already, or scales that the model's dtype cannot hold.
    """
    write_folder(plan.model, out, plan.tensors, plan.config(), key="quantization")
    notes = notes_of(plan.model, plan.layouts)
    uneven = sum(not layout.symmetric for layout in plan.layouts.values() if layout is not None)
    if uneven and plan.model.dtype != torch.float32:
        notes += (f"{uneven} matrices have zero points, whose products with scales are rounded to {plan.model.dtype}",)
    return notes


def verify_mlx(plan: MlxPlan, out: Path) -> list[Check]:
    """Names, shapes, types and values, read back; MLX itself runs on Apple's machines only.

    Symmetric integers have to be the same; of those with zero points the error of rounding their biases is told.
    """
    rounded = [name for name, layout in plan.layouts.items() if layout is not None and not layout.symmetric]
    return verify_folder(plan, out, rounded)


def _settings(layout: Layout) -> tuple[tuple[str, int], ...]:
    return (("group_size", layout.group_size), ("bits", layout.bits))
