"""A weight as JSON (what it is) and tensors (what it holds), and back again."""

from dataclasses import MISSING, fields
from typing import Any

import torch
from torch import Tensor

from decoct.weights.additive import Additive
from decoct.weights.base import FORMAT_VERSION, Weight
from decoct.weights.binary import Binary
from decoct.weights.codebook import Codebook
from decoct.weights.columns import Columns
from decoct.weights.dense import Dense
from decoct.weights.float_block import FloatBlock
from decoct.weights.group_int import GroupInt
from decoct.weights.low_rank import LowRank
from decoct.weights.masked import Masked
from decoct.weights.padded import Padded
from decoct.weights.quantized_input import QuantizedInput
from decoct.weights.rotated import Rotated
from decoct.weights.shared import Shared
from decoct.weights.sparse import Sparse
from decoct.weights.sparse_int import SparseInt
from decoct.weights.stacked import Stacked
from decoct.weights.sum import Sum
from decoct.weights.ternary import Ternary
from decoct.weights.trellis import Trellis
from decoct.weights.two_level_int import TwoLevelInt

WEIGHTS: dict[str, type[Weight]] = {
    cls.kind: cls
    for cls in (
        Dense, GroupInt, TwoLevelInt, FloatBlock, Codebook, Additive, Trellis, Rotated, Binary, Ternary, SparseInt,
        Masked, Sparse, Columns, LowRank, Sum, Stacked, Padded, QuantizedInput, Shared,
    )
}  # fmt: skip


_DTYPES: dict[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
        torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
    )
}  # fmt: skip


def describe(weight: Weight) -> dict[str, Any]:
    """Everything about a weight but its tensors' values, as plain JSON.

    A stored tensor appears as `{"tensor": dtype, "shape": [...]}`; a nested weight as its own description.
    """
    found: dict[str, Any] = {"kind": weight.kind}
    for field in fields(weight):
        value = getattr(weight, field.name)
        if weight.kind == Shared.kind and field.name == "owner":
            continue
        found[field.name] = _encode(value)
    return found


def rebuild(description: dict[str, Any], tensors: dict[str, Tensor], name: str = "weight") -> Weight:
    """Undo `describe`: put the tensors, named as `Weight.tensors()` names them, back into the expression.

    Raises:
        ValueError: an unknown kind, a missing tensor, or one of another shape or dtype than described.
    """
    kind = description.get("kind")
    cls = WEIGHTS.get(str(kind))
    if cls is None:
        raise ValueError(f"{name}: unknown kind of weight {kind!r}; this decoct knows {', '.join(WEIGHTS)}")
    values: dict[str, Any] = {}
    for field in fields(cls):
        if field.name not in description and field.default is MISSING:
            raise ValueError(f"{name}: its description lacks {field.name}; the checkpoint is damaged")
        if field.name in description:
            values[field.name] = _decode(description[field.name], tensors, f"{name}.{field.name}", field.name)
    return cls(**values)


def tensor_specs(description: dict[str, Any]) -> dict[str, tuple[torch.dtype, list[int]]]:
    """Dtype and shape of every stored tensor in a description, by the names `Weight.tensors()` uses."""
    found: dict[str, tuple[torch.dtype, list[int]]] = {}
    for key, value in description.items():
        if isinstance(value, dict) and "tensor" in value:
            found[key] = (_dtype(value["tensor"]), value["shape"])
        elif isinstance(value, dict) and "kind" in value:
            found.update({f"{key}.{inner}": spec for inner, spec in tensor_specs(value).items()})
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for i, item in enumerate(value):
                found.update({f"{key}.{i}.{inner}": spec for inner, spec in tensor_specs(item).items()})
    return found


def described_kinds(description: dict[str, Any]) -> set[str]:
    """The kinds of a described weight and of all nested ones."""
    found = {str(description["kind"])}
    for value in description.values():
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, dict) and "kind" in item:
                found |= described_kinds(item)
    return found


def described_dtype(description: dict[str, Any]) -> torch.dtype:
    """The dtype that a described weight unpacks to."""
    return _dtype(description["dtype"]["dtype"])


def check_version(version: object, where: str) -> None:
    """Refuse a description written by a later decoct.

    Raises:
        ValueError: the version is newer than this decoct reads, or is not a version at all.
    """
    if not isinstance(version, int) or version < 1:
        raise ValueError(f"{where}: no format version; it was not written by decoct")
    if version > FORMAT_VERSION:
        raise ValueError(
            f"{where}: written in format {version}, this decoct reads up to {FORMAT_VERSION}; upgrade decoct"
        )


def _encode(value: object) -> object:
    match value:
        case Tensor():
            return {"tensor": _dtype_name(value.dtype), "shape": list(value.shape)}
        case Weight():
            return describe(value)
        case torch.dtype():
            return {"dtype": _dtype_name(value)}
        case tuple() | list():
            return [_encode(item) for item in value]
        case None | bool() | int() | float() | str():
            return value
    raise TypeError(f"a weight's field cannot be a {type(value).__name__}")


def _decode(value: object, tensors: dict[str, Tensor], where: str, key: str) -> object:
    match value:
        case {"tensor": dtype, "shape": shape}:
            return _checked(tensors.get(key), _dtype(dtype), shape, where)
        case {"kind": _}:
            assert isinstance(value, dict)
            below = {k.removeprefix(f"{key}."): v for k, v in tensors.items() if k.startswith(f"{key}.")}
            return rebuild(value, below, where)
        case {"dtype": dtype}:
            return _dtype(dtype)
        case list():
            return tuple(_decode(item, tensors, f"{where}.{i}", f"{key}.{i}") for i, item in enumerate(value))
    return value


def _checked(tensor: Tensor | None, dtype: torch.dtype, shape: list[int], where: str) -> Tensor:
    if tensor is None:
        raise ValueError(f"{where} is missing from the checkpoint")
    if tensor.dtype != dtype or list(tensor.shape) != list(shape):
        raise ValueError(
            f"{where} is {tensor.dtype} {list(tensor.shape)} in the checkpoint, but described as {dtype} {list(shape)}"
        )
    return tensor


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype(name: str) -> torch.dtype:
    if name not in _DTYPES:
        raise ValueError(f"unknown dtype {name!r} in the description of a weight")
    return _DTYPES[name]
