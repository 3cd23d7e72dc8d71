"""GPTQ's format: integers in groups, which gptqmodel, transformers, vLLM, SGLang and exllama read.

Packed along the inputs in words of 32 bits: `qweight` [in·bits/32, out]; `scales` float16 [groups, out]; `qzeros`
[groups, out·bits/32]; `g_idx` [in], each input's group. Readers compute (code - zero) · scale, so a scale may be
negative. Files of version 1 (`checkpoint_format: gptq`) store zeros less one, those of version 2 as they are.
"""

import re
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
    in_float16,
    notes_of,
    uncompressed,
)
from decoct.exporters.integer_formats import GPTQ
from decoct.exporters.integers import Integers
from decoct.model import Model
from decoct.ops.packing import pack_words, unpack_words
from decoct.store import write_json
from decoct.version import __version__

VARIANTS = ("v1", "v2")
_FORMATS = {"v1": "gptq", "v2": "gptq_v2"}
_ALIASES = {"q_proj": "qkv_proj", "gate_proj": "gate_up_proj"}
"""What vLLM calls the matrix that a part is loaded into: rules have to match that too."""


@dataclass(frozen=True, slots=True)
class GptqPlan:
    """A folder before it is written.

    Attributes:
        model: what is written.
        layouts: of each slot.
        version: "v1": zeros are stored less one; "v2": as they are.
    """

    model: Model
    layouts: Layouts
    version: str

    def tensors(self, name: str) -> dict[str, Tensor]:
        """What a matrix is stored as; where it is left uncompressed, itself."""
        layout, stem = self.layouts[name], name.removesuffix(".weight")
        if layout is None:
            return uncompressed(self.model, name)
        found, bits = grouped(self.model.weight(name), layout), layout.bits
        if self.version == "v1":
            found = _zeros_above_nothing(found, bits)
        zeros = found.zero.to(torch.uint8) - int(self.version == "v1")
        cols = found.codes.shape[1]
        return {
            f"{stem}.qweight": pack_words(found.codes, bits).T.contiguous(),
            f"{stem}.qzeros": pack_words(zeros.T.contiguous(), bits),
            f"{stem}.scales": in_float16(found.scale, name).T.contiguous(),
            f"{stem}.g_idx": (torch.arange(cols) // layout.columns(cols)).to(torch.int32),
        }

    def kinds(self, name: str) -> dict[str, Kind]:
        """Shapes and types of the tensors of a matrix in integers."""
        layout, (out, cols), stem = self.layouts[name], self.model.shape(name), name.removesuffix(".weight")
        assert layout is not None
        bits, groups = layout.bits, cols // layout.columns(cols)
        return {
            f"{stem}.qweight": ((cols * bits // 32, out), torch.int32),
            f"{stem}.qzeros": ((groups, out * bits // 32), torch.int32),
            f"{stem}.scales": ((groups, out), torch.float16),
            f"{stem}.g_idx": ((cols,), torch.int32),
        }

    def matrix(self, name: str, read: Read) -> Tensor:
        """A matrix as readers of the format unpack it, float32 [out, in]."""
        layout, stem = self.layouts[name], name.removesuffix(".weight")
        assert layout is not None
        bits = layout.bits
        codes = unpack_words(read(f"{stem}.qweight").T, bits).float()
        zeros = unpack_words(read(f"{stem}.qzeros"), bits).T.float() + int(self.version == "v1")
        index = read(f"{stem}.g_idx").long()
        return (codes - zeros[:, index]) * read(f"{stem}.scales").T.float()[:, index]

    def config(self) -> dict[str, Any]:
        """`quantization_config`: what most matrices have, and rules for those that differ."""
        base = Counter(layout for layout in self.layouts.values() if layout is not None).most_common(1)[0][0]
        partly = self._modules_in_integers()
        return {
            "quant_method": "gptq",
            "checkpoint_format": _FORMATS[self.version],
            **_settings(base),
            "desc_act": False,
            "lm_head": False,
            "pack_dtype": "int32",
            "dynamic": self._rules(base) or None,
            **({} if partly is None else {"modules_in_block_to_quantize": [partly]}),
            "meta": {"quantizer": [f"decoct:{__version__}"]},
        }

    def _rules(self, base: Layout) -> dict[str, dict[str, Any]]:
        """For the matrices of blocks that differ: a pattern of names, and what they have."""
        found: dict[str, dict[str, Any]] = {}
        for slot in self.model.block_slots:
            layouts = [self.layouts[self.model.prefix(block) + slot.name] for block in range(self.model.num_blocks)]
            for other in dict.fromkeys(layouts):
                if other != base:
                    blocks = [block for block, layout in enumerate(layouts) if layout == other]
                    pattern = self._pattern(slot.name, None if len(blocks) == len(layouts) else blocks)
                    found[("-:" if other is None else "+:") + pattern] = {} if other is None else _settings(other)
        return found

    def _pattern(self, slot: str, blocks: list[int] | None) -> str:
        """A regular expression for a slot's modules, in some blocks or (None) all."""
        parent, _, last = slot.removesuffix(".weight").rpartition(".")
        ends = [re.escape(each) for each in (last, _ALIASES.get(last)) if each is not None]
        numbers = r"\d+" if blocks is None else f"(?:{'|'.join(str(block) for block in blocks)})"
        start = re.escape(self.model.family.module_name(f"{self.model.family.blocks}."))
        above = re.escape(f".{parent}." if parent else ".")
        return f"^{start}{numbers}{above}(?:{'|'.join(ends)})$"

    def _modules_in_integers(self) -> list[str] | None:
        """Names within a block, if only some of its matrices are in integers, the same in every block; else None."""
        held = [
            {s.name for s in self.model.block_slots if self.layouts[self.model.prefix(block) + s.name] is not None}
            for block in range(self.model.num_blocks)
        ]
        if len(held[0]) == len(self.model.block_slots) or any(each != held[0] for each in held):
            return None
        return sorted(name.removesuffix(".weight") for name in held[0])


def plan_gptq(model: Model, variant: str | None, *, fold: bool) -> GptqPlan:
    """What a folder would be; looks at descriptions alone.

    Args:
        model: what is to be written, or what a recipe is expected to make.
        variant: the version; None: 1, which everything reads, or 2 if there are zero points, as gptqmodel then wants.
        fold: write uncompressed what the format cannot hold.

    Raises:
        MisfitError: see `choose_layouts`.
    """
    layouts = choose_layouts(model, GPTQ, fold=fold)
    symmetric = all(layout.symmetric for layout in layouts.values() if layout is not None)
    return GptqPlan(model, layouts, variant or ("v1" if symmetric else "v2"))


def write_gptq(plan: GptqPlan, out: Path) -> tuple[str, ...]:
    """Write the folder; gives notes.

    Raises:
        ValueError: the folder holds something already, or scales that float16 cannot hold.
    """
    config = plan.config()
    write_folder(plan.model, out, plan.tensors, config)
    write_json(out / "quantize_config.json", config)
    notes = notes_of(plan.model, plan.layouts)
    if plan.version == "v2":
        notes += ("checkpoint_format gptq_v2: zero points as they are; gptq:v1 stores them less one",)
    return notes


def _settings(layout: Layout) -> dict[str, Any]:
    return {"bits": layout.bits, "group_size": layout.group_size, "sym": layout.symmetric}


def _zeros_above_nothing(found: Integers, bits: int) -> Integers:
    """The same values without zero points of 0, which version 1 cannot store: those groups are mirrored.

    With a code q becoming top - q, and the zero point top - 0, the scale changes its sign: (q - 0)·s is
    (top - q - top)·(-s).
    """
    nothing, top = found.zero == 0, 2**bits - 1
    mirrored = nothing.repeat_interleave(found.form.group_size, -1)
    codes = torch.where(mirrored, top - found.codes, found.codes)
    scale, zero = torch.where(nothing, -found.scale, found.scale), torch.where(nothing, float(top), found.zero)
    return Integers(found.form, codes, scale, zero)
