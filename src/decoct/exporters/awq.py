"""AWQ's format, version "gemm": 4-bit integers with zero points, which vLLM, SGLang, transformers and gptqmodel read.

Packed along the outputs, eight to a word of 32 bits whose nibbles hold outputs 0, 2, 4, 6, 1, 3, 5, 7: `qweight`
[in, out/8]; `qzeros` [groups, out/8], packed alike; `scales` float16 [groups, out]. Readers compute (code - zero) ·
scale. One group size is said for the whole model.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from decoct.exporters.folder import write_folder
from decoct.exporters.integer_folder import (
    Kind,
    Layouts,
    Read,
    choose_layouts,
    grouped,
    in_float16,
    notes_of,
    uncompressed,
)
from decoct.exporters.integer_formats import AWQ, WHOLE_ROWS
from decoct.exporters.misfit import MisfitError
from decoct.model import Model
from decoct.ops.packing import pack_words, unpack_words
from decoct.store import write_json

_BITS, _WORD = 4, 8
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which output of eight each nibble of a word holds, the lowest first."""


@dataclass(frozen=True, slots=True)
class AwqPlan:
    """A folder before it is written.

    Attributes:
        model: what is written.
        layouts: of each slot, all with one group size.
    """

    model: Model
    layouts: Layouts

    def tensors(self, name: str) -> dict[str, Tensor]:
        """What a matrix is stored as; where it is left uncompressed, itself."""
        layout, stem = self.layouts[name], name.removesuffix(".weight")
        if layout is None:
            return uncompressed(self.model, name)
        found = grouped(self.model.weight(name), layout)
        return {
            f"{stem}.qweight": _pack(found.codes.T),
            f"{stem}.qzeros": _pack(found.zero.to(torch.uint8).T),
            f"{stem}.scales": in_float16(found.scale, name).T.contiguous(),
        }

    def kinds(self, name: str) -> dict[str, Kind]:
        """Shapes and types of the tensors of a matrix in integers."""
        layout, (out, cols), stem = self.layouts[name], self.model.shape(name), name.removesuffix(".weight")
        assert layout is not None
        groups = cols // layout.columns(cols)
        return {
            f"{stem}.qweight": ((cols, out // _WORD), torch.int32),
            f"{stem}.qzeros": ((groups, out // _WORD), torch.int32),
            f"{stem}.scales": ((groups, out), torch.float16),
        }

    def matrix(self, name: str, read: Read) -> Tensor:
        """A matrix as readers of the format unpack it, float32 [out, in]."""
        stem = name.removesuffix(".weight")
        codes, zeros = (_unpack(read(f"{stem}.{part}")).float() for part in ("qweight", "qzeros"))
        scales = read(f"{stem}.scales").float()
        size = codes.shape[0] // scales.shape[0]
        zeros, scales = (each.repeat_interleave(size, 0) for each in (zeros, scales))
        return ((codes - zeros) * scales).T

    def config(self) -> dict[str, Any]:
        """`quantization_config`."""
        held = next(layout for layout in self.layouts.values() if layout is not None)
        return {
            "quant_method": "awq",
            "version": "gemm",
            "bits": _BITS,
            "group_size": held.group_size,
            "zero_point": True,
            "modules_to_not_convert": sorted(self._left_alone()),
        }

    def _left_alone(self) -> set[str]:
        """Modules that are no integers; those of every block without its number."""
        model = self.model
        found = {model.family.head.removesuffix(".weight")}
        for slot in model.block_slots:
            names = [model.prefix(block) + slot.name for block in range(model.num_blocks)]
            left = [name for name in names if self.layouts[name] is None]
            several = [slot.name] if len(left) == len(names) else left
            found |= {model.family.module_name(name).removesuffix(".weight") for name in several}
        return found


def plan_awq(model: Model, *, fold: bool) -> AwqPlan:
    """What a folder would be; looks at descriptions alone.

    Args:
        model: what is to be written, or what a recipe is expected to make.
        fold: write uncompressed what the format cannot hold.

    Raises:
        MisfitError: see `choose_layouts`; or groups that no one size divides.
    """
    layouts = choose_layouts(model, AWQ, fold=fold)
    held = {name: layout for name, layout in layouts.items() if layout is not None}
    sizes = {layout.group_size for layout in held.values()}
    if len(sizes) == 1:
        return AwqPlan(model, layouts)
    # A scale for each row is repeated like those of larger groups.
    columns = [layout.columns(model.shape(name)[1]) for name, layout in held.items()]
    common = _common_size(columns)
    if common is None:
        listed = ", ".join("a row" if size == WHOLE_ROWS else str(size) for size in sorted(sizes))
        raise MisfitError(
            f"AWQ has one group size for all matrices, and {model.source.label} has groups of {listed}",
            "use one group_size",
            "use one group_size, or export as gptq",
        )
    shared = {name: replace(layout, group_size=common) for name, layout in held.items()}
    return AwqPlan(model, {**layouts, **shared})


def write_awq(plan: AwqPlan, out: Path) -> tuple[str, ...]:
    """Write the folder; gives notes.

    Raises:
        ValueError: the folder holds something already, or scales that float16 cannot hold.
    """
    config = plan.config()
    write_folder(plan.model, out, plan.tensors, config)
    write_json(out / "quant_config.json", config)
    return notes_of(plan.model, plan.layouts)


def _common_size(columns: Iterable[int]) -> int | None:
    return max((size for size in AWQ.group_sizes if all(each % size == 0 for each in columns)), default=None)


def _pack(codes: Tensor) -> Tensor:
    """[rows, out] → [rows, out/8]."""
    rows, out = codes.shape
    return pack_words(codes.reshape(rows, out // _WORD, _WORD)[..., list(_ORDER)].reshape(rows, out), _BITS)


def _unpack(words: Tensor) -> Tensor:
    """Undo `_pack`."""
    places = [_ORDER.index(output) for output in range(_WORD)]
    rows = words.shape[0]
    return unpack_words(words, _BITS).reshape(rows, -1, _WORD)[..., places].reshape(rows, -1)
