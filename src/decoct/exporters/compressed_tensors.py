"""compressed-tensors, the format that transformers, vLLM and SGLang read; packed by its own package.

Integer weights (GroupInt, masked or not) become `pack-quantized`; dense ones stay dense; what the format cannot express
is refused by name.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from decoct.exporters.folder import write_folder
from decoct.model import Model
from decoct.weights import GroupInt, Masked, Weight


@dataclass(frozen=True, slots=True)
class Scheme:
    """What compressed-tensors calls a quantization scheme of weights."""

    bits: int
    symmetric: bool
    strategy: str
    group_size: int | None


def export_compressed_tensors(model: Model, out: Path, *, fold: bool = False) -> None:
    """Write a checkpoint that transformers loads without decoct.

    Args:
        model: a model that decoct compressed.
        out: a folder that does not exist yet, or is empty.
        fold: write as dense what the format cannot express, instead of refusing.

    Raises:
        ValueError: a weight the format cannot express, slots that engines fuse but that have different schemes, or
            nothing quantized at all.
    """
    schemes = {name: _scheme(model, name, fold=fold) for name in model.slots()}
    if not any(schemes.values()):
        raise ValueError(f"{model.source.label} has no integer weights; export it as dense instead")
    _check_fused(model, schemes)

    def encode(name: str) -> dict[str, Tensor]:
        weight = model.weight(name)
        if schemes[name] is None:
            matrix = weight.unpack(model.dtype)
            return {name: matrix.T if model.slots()[name].transposed else matrix}
        return _pack(name.removesuffix(".weight"), weight)

    write_folder(model, out, encode, _config(model, schemes))


def _scheme(model: Model, name: str, *, fold: bool) -> Scheme | None:
    description = model.described.get(name)
    if description is None:
        return None
    inner = description["inner"] if description["kind"] == Masked.kind else description
    slot = model.slots()[name]
    reason = None
    if inner["kind"] != GroupInt.kind:
        reason = f"a {description['kind']} weight"
    elif slot.role in ("embed", "lm_head"):
        reason = f"a quantized {slot.role}, which its readers do not all load"
    elif slot.transposed or slot.param is not None:
        reason = "a layer that is no plain Linear"
    if reason is None:
        return _scheme_of(inner)
    if fold:
        return None
    raise ValueError(
        f"compressed-tensors cannot hold {name}: it is {reason}; add --fold to write such weights uncompressed, "
        "or export as dense"
    )


def _scheme_of(description: dict[str, Any]) -> Scheme:
    rows, groups = description["scale"]["shape"]
    symmetric = description["zero"] is None
    bits = int(description["bits"])
    if groups > 1:
        return Scheme(bits, symmetric, "group", int(description["group_size"]))
    return Scheme(bits, symmetric, "channel" if rows > 1 else "tensor", None)


def _check_fused(model: Model, schemes: dict[str, Scheme | None]) -> None:
    """Engines load q, k, v as one matrix, and gate, up as one: each group must have one scheme."""
    for block in range(model.num_blocks):
        found: dict[tuple[str, str], dict[str, Scheme | None]] = {}
        for slot in model.block_slots:
            if slot.role in ("attn.q", "attn.k", "attn.v", "mlp.gate", "mlp.up"):
                group = (slot.reads, slot.role.split(".")[0])
                found.setdefault(group, {})[slot.role] = schemes[model.prefix(block) + slot.name]
        for members in found.values():
            if len(set(members.values())) > 1:
                raise ValueError(
                    f"block {block}: {', '.join(members)} have different schemes, but vLLM and SGLang load them as one "
                    "matrix; give them the same method, or export as dense"
                )


def _pack(stem: str, weight: Weight) -> dict[str, Tensor]:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    survivors = weight.survivors() if isinstance(weight, Masked) else None
    inner = weight.inner if isinstance(weight, Masked) else weight
    assert isinstance(inner, GroupInt)
    grid, codes = inner.grid(), inner.unpack_codes()
    if survivors is not None:
        _, zero = grid.columns(0, inner.shape[1])
        codes = torch.where(survivors, codes, zero.to(torch.uint8).expand_as(codes))
    offset = 2 ** (inner.bits - 1)
    packed = {
        f"{stem}.weight_packed": pack_to_int32((codes.to(torch.int16) - offset).to(torch.int8), inner.bits),
        f"{stem}.weight_scale": inner.scale.reshape(1) if inner.scale.numel() == 1 else inner.scale,
        f"{stem}.weight_shape": torch.tensor(inner.shape, dtype=torch.int64),
    }
    if grid.zero is not None:
        zero = (grid.zero.to(torch.int16) - offset).to(torch.int8)
        packed[f"{stem}.weight_zero_point"] = pack_to_int32(zero, inner.bits, packed_dim=0)
    return packed


def _config(model: Model, schemes: dict[str, Scheme | None]) -> dict[str, Any]:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme

    modules: dict[Scheme, list[str]] = {}
    for name, scheme in schemes.items():
        if scheme is not None:
            modules.setdefault(scheme, []).append(name.removesuffix(".weight"))
    dense = [name.removesuffix(".weight") for name, scheme in schemes.items() if scheme is None]
    embed = model.family.embed.removesuffix(".weight")
    ignore = [name for name in dense if name != embed]
    if model.tied:
        ignore.append(model.family.head.removesuffix(".weight"))
    groups = {}
    for number, (scheme, names) in enumerate(modules.items()):
        weights = QuantizationArgs(
            num_bits=scheme.bits,
            type="int",
            symmetric=scheme.symmetric,
            strategy=scheme.strategy,
            group_size=scheme.group_size,
        )
        targets = ["Linear"] if len(modules) == 1 else names
        groups[f"group_{number}"] = QuantizationScheme(targets=targets, weights=weights, format="pack-quantized")
    config = QuantizationConfig(
        config_groups=groups,
        format="pack-quantized",
        quantization_status="compressed",
        ignore=[model.family.module_name(name) for name in ignore],
    )
    written: dict[str, Any] = config.model_dump(mode="json")
    return {**written, "quant_method": "compressed-tensors"}
