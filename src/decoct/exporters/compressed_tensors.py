"""compressed-tensors, the format that transformers, vLLM and SGLang read; packed by its own package.

Integer weights (GroupInt, masked or not) become `pack-quantized`, floating-point ones (FloatBlock) `float-quantized` or
one of the MX and NVFP4 formats; those whose inputs are rounded too become `int-quantized` or `float-quantized`, a byte
for each code. Dense ones stay dense; what the format cannot express is refused by name.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from decoct.exporters.folder import write_folder
from decoct.exporters.fused import check_fused
from decoct.exporters.misfit import MisfitError
from decoct.exporters.vllm_rules import Stored
from decoct.model import Model
from decoct.ops.minifloat import ELEMENTS
from decoct.ops.packing import pack_bits
from decoct.weights import FloatBlock, GroupInt, Masked, QuantizedInput, Weight


@dataclass(frozen=True, slots=True)
class InputScheme:
    """What it calls a scheme of input activations: a scale for each token as it comes, or one stored for all."""

    bits: int
    symmetric: bool
    strategy: str
    type: str


@dataclass(frozen=True, slots=True)
class Scheme:
    """What compressed-tensors calls a quantization scheme of weights, and perhaps of their inputs."""

    bits: int
    symmetric: bool
    strategy: str
    group_size: int | None
    type: str = "int"
    scale_dtype: torch.dtype | None = None
    format: str = "pack-quantized"
    inputs: InputScheme | None = None


_FLOATS = {
    ("e4m3", "e8m0", 32): Scheme(8, True, "group", 32, "float", torch.uint8, "mxfp8-quantized"),
    ("e2m3", "e8m0", 32): Scheme(6, True, "group", 32, "float", torch.uint8, "mxfp6-pack-quantized"),
    ("e2m1", "e8m0", 32): Scheme(4, True, "group", 32, "float", torch.uint8, "mxfp4-pack-quantized"),
    ("e2m1", "e4m3", 16): Scheme(4, True, "tensor_group", 16, "float", torch.float8_e4m3fn, "nvfp4-pack-quantized"),
}
"""Schemes of elements, kind of scale and block size."""


class _Misfit(NamedTuple):
    """Why a weight has no scheme, and what would have one."""

    reason: str
    wanted: str


_KINDS = "quantize to integers by groups, channels or tensors (such as rtn or gptq), or with mxfp"


def export_compressed_tensors(model: Model, out: Path, *, fold: bool = False) -> None:
    """Write a checkpoint that transformers loads without decoct.

    Args:
        model: a model that decoct compressed.
        out: a folder that does not exist yet, or is empty.
        fold: write as dense what the format cannot express, instead of refusing.

    Raises:
        MisfitError: see `find_schemes`.
        ValueError: the folder holds something already.
    """
    schemes = find_schemes(model, fold=fold)

    def encode(name: str) -> dict[str, Tensor]:
        weight = model.weight(name)
        if schemes[name] is None:
            matrix = weight.unpack(model.dtype)
            return {name: matrix.T if model.slots()[name].transposed else matrix}
        return _pack(name.removesuffix(".weight"), weight)

    write_folder(model, out, encode, _config(model, schemes))


def find_schemes(model: Model, *, fold: bool) -> dict[str, Scheme | None]:
    """Each slot's scheme by full name; None: it is written as dense. Looks at descriptions alone.

    Args:
        model: what is to be written, or what a recipe is expected to make.
        fold: write as dense what the format cannot express.

    Raises:
        MisfitError: a weight or a cache policy that the format cannot express, slots that engines fuse but that have
            different schemes, or nothing quantized at all.
    """
    if model.cache is not None and not fold:
        (policy,) = model.cache["policy"]
        what = f"compressed-tensors cannot say that keys and values are kept by {policy}"
        raise MisfitError(what, "leave the cache stage out", "add --fold to leave that out")
    schemes = {name: _scheme(model, name, fold=fold) for name in model.slots()}
    if not any(schemes.values()):
        raise MisfitError(
            f"{model.source.label} has no quantized weights that compressed-tensors can hold",
            _KINDS,
            "export it as dense instead",
        )
    check_fused(model, schemes)
    return schemes


def stored_matrices(model: Model, *, fold: bool) -> list[Stored]:
    """What vLLM's rules go by, for every quantized matrix.

    Raises:
        MisfitError: see `find_schemes`.
    """
    slots, found = model.slots(), []
    for name, scheme in find_schemes(model, fold=fold).items():
        if scheme is None:
            continue
        size = {"channel": -1, "tensor": None}.get(scheme.strategy, scheme.group_size)
        inputs = "" if scheme.inputs is None else f"{scheme.inputs.type}{scheme.inputs.bits}"
        number = "int" if scheme.type == "int" else scheme.format
        words = ("in",) if scheme.format == "pack-quantized" else ()
        out, cols = model.shape(name)
        role, symmetric = slots[name].role, scheme.symmetric
        found.append(Stored(name, role, (out, cols), scheme.bits, size, symmetric, number, inputs, words))
    return found


def _scheme(model: Model, name: str, *, fold: bool) -> Scheme | None:
    description = model.described.get(name)
    if description is None:
        return None
    slot = model.slots()[name]
    scheme = _scheme_with_inputs(description)
    if isinstance(scheme, _Misfit):
        misfit = scheme
    elif slot.role in ("embed", "lm_head"):
        reason = f"a quantized {slot.role}, which its readers do not all load"
        misfit = _Misfit(reason, f"leave {slot.role} uncompressed")
    elif slot.transposed or slot.param is not None:
        misfit = _Misfit("a layer that is no plain Linear", f"leave {slot.role} uncompressed")
    else:
        return scheme
    if fold:
        return None
    raise MisfitError(
        f"compressed-tensors cannot hold {name}: it is {misfit.reason}",
        misfit.wanted,
        f"{misfit.wanted}, add --fold to write such weights uncompressed, or export as dense",
    )


def _scheme_with_inputs(description: dict[str, Any]) -> Scheme | _Misfit:
    """The scheme of a weight, masked or not, and of its inputs if they are rounded."""
    if description["kind"] == Masked.kind:
        return _scheme_of(description["inner"])
    if description["kind"] != QuantizedInput.kind:
        return _scheme_of(description)
    inner = description["inner"]
    scheme = _scheme_of(inner["inner"] if inner["kind"] == Masked.kind else inner, " with rounded inputs")
    if isinstance(scheme, _Misfit):
        return scheme
    form, size = description["format"], description["group_size"]
    if description["kept"] is not None or description["clip_ratio"] != 1:
        return _Misfit(
            "a weight whose inputs are rounded but for some features, or clipped", "round all inputs, clip_ratio: 1"
        )
    if form not in ("int", "fp8") or isinstance(size, int):
        return _Misfit(
            f"a weight with inputs in {form} by blocks of {size}, whose scales other engines choose otherwise",
            "round inputs in int or fp8, group_size: token or tensor",
        )
    if scheme.format not in ("pack-quantized", "float-quantized"):
        return _Misfit(
            f"a weight in {scheme.format} with inputs in {form}", "quantize it to integers or fp8, or leave its inputs"
        )
    kind = "int" if form == "int" else "float"
    inputs = InputScheme(description["bits"] if form == "int" else 8, description["symmetric"], size, kind)
    return replace(scheme, inputs=inputs, format=f"{scheme.type}-quantized")


def _scheme_of(description: dict[str, Any], suffix: str = "") -> Scheme | _Misfit:
    """The scheme of a weight that is not nested."""
    if description["kind"] == FloatBlock.kind:
        return _float_scheme(description)
    if description["kind"] != GroupInt.kind:
        return _Misfit(f"a {description['kind']} weight{suffix}", _KINDS)
    zero, bits = description["zero"], int(description["bits"])
    if zero is not None and zero["tensor"] != "uint8":
        return _Misfit("integers with real zero points", "quantize with zero: integer")
    rows, groups = description["scale"]["shape"]
    if groups > 1:
        return Scheme(bits, zero is None, "group", int(description["group_size"]))
    return Scheme(bits, zero is None, "channel" if rows > 1 else "tensor", None)


def _float_scheme(description: dict[str, Any]) -> Scheme | _Misfit:
    element, scale_kind, size = (description[key] for key in ("element", "scale_kind", "block_size"))
    rows, blocks = description["scale"]["shape"]
    if (element, scale_kind) == ("e4m3", "real") and blocks == 1:
        strategy = "channel" if rows > 1 else "tensor"
        return Scheme(8, True, strategy, None, "float", None, "float-quantized")
    scheme = _FLOATS.get((element, scale_kind, size))
    if scheme is not None:
        return scheme
    return _Misfit(f"{element} numbers with {scale_kind} scales for blocks of {size}", "leave mxfp's group_size out")


def _pack(stem: str, weight: Weight) -> dict[str, Tensor]:
    if isinstance(weight, QuantizedInput):
        scale = {} if weight.scale is None else {f"{stem}.input_scale": weight.scale}
        return {**_pack_matrix(stem, weight.inner, a_byte_each=True), **scale}
    return _pack_matrix(stem, weight, a_byte_each=False)


def _pack_matrix(stem: str, weight: Weight, *, a_byte_each: bool) -> dict[str, Tensor]:
    survivors = weight.survivors() if isinstance(weight, Masked) else None
    inner = weight.inner if isinstance(weight, Masked) else weight
    if isinstance(inner, FloatBlock):
        return _pack_floats(stem, inner, survivors)
    assert isinstance(inner, GroupInt)
    return _pack_integers(stem, inner, survivors, a_byte_each=a_byte_each)


def _pack_floats(stem: str, weight: FloatBlock, survivors: Tensor | None) -> dict[str, Tensor]:
    """Numbers of 4 and 6 bits lie in these formats as they do in ours: one stream of bits, the first number lowest."""
    codes = weight.unpack_codes()
    if survivors is not None:
        codes = codes * survivors
    scale = weight.scale.reshape(1) if weight.scale.numel() == 1 else weight.scale
    if weight.scale_kind == "e4m3":
        scale = scale.view(torch.float8_e4m3fn)
    if weight.element == "e4m3":
        return {f"{stem}.weight": codes.view(torch.float8_e4m3fn), f"{stem}.weight_scale": scale}
    packed = {
        f"{stem}.weight_packed": pack_bits(codes, ELEMENTS[weight.element].bits),
        f"{stem}.weight_scale": scale,
    }
    if weight.tensor_scale is not None:
        packed[f"{stem}.weight_global_scale"] = weight.tensor_scale.reciprocal()
    return packed


def _pack_integers(stem: str, inner: GroupInt, survivors: Tensor | None, *, a_byte_each: bool) -> dict[str, Tensor]:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    grid, codes = inner.grid(), inner.unpack_codes()
    if survivors is not None:
        _, zero = grid.columns(0, inner.shape[1])
        codes = torch.where(survivors, codes, zero.to(torch.uint8).expand_as(codes))
    offset = 2 ** (inner.bits - 1)
    signed = (codes.to(torch.int16) - offset).to(torch.int8)
    packed: dict[str, Tensor] = {
        f"{stem}.weight_scale": inner.scale.reshape(1) if inner.scale.numel() == 1 else inner.scale
    }
    zeros = None if grid.zero is None else (grid.zero.to(torch.int16) - offset).to(torch.int8)
    if a_byte_each:
        packed[f"{stem}.weight"] = signed
        if zeros is not None:
            packed[f"{stem}.weight_zero_point"] = zeros
        return packed
    packed[f"{stem}.weight_packed"] = pack_to_int32(signed, inner.bits)
    packed[f"{stem}.weight_shape"] = torch.tensor(inner.shape, dtype=torch.int64)
    if zeros is not None:
        packed[f"{stem}.weight_zero_point"] = pack_to_int32(zeros, inner.bits, packed_dim=0)
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
            type=scheme.type,
            symmetric=scheme.symmetric,
            strategy=scheme.strategy,
            group_size=scheme.group_size,
            scale_dtype=scheme.scale_dtype,
        )
        inputs = None
        if scheme.inputs is not None:
            inputs = QuantizationArgs(
                num_bits=scheme.inputs.bits,
                type=scheme.inputs.type,
                symmetric=scheme.inputs.symmetric,
                strategy=scheme.inputs.strategy,
                dynamic=scheme.inputs.strategy == "token",
            )
        targets = ["Linear"] if len(modules) == 1 else names
        groups[f"group_{number}"] = QuantizationScheme(
            targets=targets, weights=weights, input_activations=inputs, format=scheme.format
        )
    formats = {scheme.format for scheme in modules}
    config = QuantizationConfig(
        config_groups=groups,
        format=formats.pop() if len(formats) == 1 else "mixed-precision",
        quantization_status="compressed",
        ignore=[model.family.module_name(name) for name in ignore],
    )
    written: dict[str, Any] = config.model_dump(mode="json")
    return {**written, "quant_method": "compressed-tensors"}
