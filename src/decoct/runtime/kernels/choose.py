"""Which product a weight gets."""

from collections.abc import Callable
from typing import Any

import torch

from decoct.native.library import Library, library
from decoct.runtime.kernels import layouts
from decoct.runtime.kernels.compiled import Compiled
from decoct.runtime.kernels.composed import Composed, Gathered
from decoct.runtime.kernels.product import Product, Unpacking
from decoct.weights import (
    Columns,
    Dense,
    LowRank,
    Masked,
    Padded,
    QuantizedInput,
    Rotated,
    Shared,
    Stacked,
    Sum,
    Weight,
)

_LAYOUTS: dict[str, Callable[[Library, Any], Compiled | None]] = {
    "GroupInt": layouts.group_int,
    "Ternary": layouts.ternary,
    "Binary": layouts.binary,
    "FloatBlock": layouts.float_block,
    "Dense": layouts.dense,
    "Codebook": layouts.codebook,
    "Additive": layouts.additive,
    "Sparse": layouts.sparse,
    "SparseInt": layouts.sparse_int,
    "TwoLevelInt": layouts.two_level_int,
    "Trellis": layouts.trellis,
}
_COMPOSED = (Sum, LowRank, Rotated, Stacked, Padded, QuantizedInput)


def linear(weight: Weight) -> Product:
    """The fastest product there is for a weight on this machine; gives what `weight.apply` gives, but for rounding.

    Compiled kernels multiply with the inputs as they are, in float32, and add up in float32. What has no kernel is
    unpacked while it is used; `describe()` tells which it was.
    """
    if isinstance(weight, Shared) and weight.owner is not None:
        return linear(weight.owner)
    found = library()
    if found is None or any(tensor.device.type != "cpu" for tensor in weight.tensors().values()):
        return Unpacking(weight)
    if isinstance(weight, Masked):
        return _masked(weight)
    if isinstance(weight, Columns) and len(weight.index):
        return Gathered(weight, linear(Dense.of(weight.values)))
    if isinstance(weight, _COMPOSED):
        return Composed(weight, {name: linear(child) for name, child in weight.children().items()})
    layout = _LAYOUTS.get(weight.kind)
    return (layout(found, weight) if layout else None) or Unpacking(weight)


def _masked(weight: Masked) -> Product:
    """The inner weight's product, if it is zero itself wherever the mask says so."""
    survivors, step = weight.survivors(), max(1, (1 << 22) // weight.shape[1])
    for first in range(0, weight.shape[0], step):
        part = slice(first, first + step)
        if weight.inner.unpack_rows(part, torch.float32)[~survivors[part]].any():
            return Unpacking(weight)
    return linear(weight.inner)
