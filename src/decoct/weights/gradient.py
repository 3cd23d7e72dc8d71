"""What of a compressed weight can be trained, and how the gradient of its matrix reaches it."""

import torch
from jaxtyping import Float
from torch import Tensor

from decoct.ops.grid import Grid, dequantize
from decoct.ops.hadamard import hadamard
from decoct.weights.additive import Additive
from decoct.weights.base import Weight
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
from decoct.weights.scaled import Scaled
from decoct.weights.sparse import Sparse
from decoct.weights.sparse_int import SparseInt
from decoct.weights.stacked import Stacked
from decoct.weights.sum import Sum
from decoct.weights.ternary import Ternary
from decoct.weights.trellis import Trellis
from decoct.weights.two_level_int import TwoLevelInt


def trainable(weight: Weight) -> dict[str, Tensor]:
    """The stored tensors that are real numbers, named as `tensors()` names them: scales, factors, surviving values.

    Scales of inputs are not among them: the matrix does not depend on them.
    """
    own = {} if isinstance(weight, QuantizedInput) else weight.own_tensors()
    found = {name: tensor for name, tensor in own.items() if tensor.is_floating_point()}
    if isinstance(weight, Scaled):
        del found["middle"]
    for name, child in weight.children().items():
        found.update(_named(name, trainable(child)))
    return found


def for_training(weight: Weight) -> Weight:
    """The same matrix, to be unpacked again and again: what is slow to unpack and not trained is unpacked already.

    It takes more memory. Everything that `trainable` names of it is named the same, and means the same, in `weight`.
    """
    match weight:
        case Rotated(inner=Trellis(), left=left, right=right) if left is not None and right is not None:
            # The trellis's own scale is left out: that of the rows says the same.
            return Scaled(weight.shape, weight.dtype, weight.unscaled().to(weight.dtype), left, right)
    children = {name: for_training(child) for name, child in weight.children().items()}
    return weight.with_children(children) if children else weight


def pull_back(weight: Weight, gradient: Float[Tensor, "out in"]) -> dict[str, Tensor]:
    """Gradients of everything that `trainable` names, float32, given that of the unpacked matrix.

    Codes, integer zero points, scales of eight bits and the positions of zeros are constants.

    Args:
        weight: the expression that was unpacked.
        gradient: of the loss by each entry of the matrix; any float dtype.

    Raises:
        ValueError: a weight that cannot be trained this way (it is shared with another).
    """
    g = gradient.float()
    match weight:
        case QuantizedInput(inner=inner):
            return _named("inner", pull_back(inner, g))
        case Masked(inner=inner):
            return _named("inner", pull_back(inner, g * weight.survivors()))
        case LowRank(left=left, right=right):
            of_left = pull_back(left, g @ right.unpack(torch.float32).T)
            of_right = pull_back(right, left.unpack(torch.float32).T @ g)
            return {**_named("left", of_left), **_named("right", of_right)}
        case Padded(inner=inner):
            return _named("inner", pull_back(inner, g[: inner.shape[0], : inner.shape[1]]))
        case Rotated():
            return _of_rotated(weight, g)
        case Sum(terms=terms):
            found: dict[str, Tensor] = {}
            for number, term in enumerate(terms):
                found.update(_named(f"terms.{number}", pull_back(term, g)))
            return found
        case Stacked(parts=parts):
            pairs = enumerate(zip(parts, weight.split(g), strict=True))
            return {k: v for n, (part, rows) in pairs for k, v in _named(f"parts.{n}", pull_back(part, rows)).items()}
    return _of_own(weight, g)


def _of_own(weight: Weight, g: Float[Tensor, "out in"]) -> dict[str, Tensor]:  # noqa: PLR0911 - one for each kind
    """Gradients of the tensors of a weight that nests no other."""
    match weight:
        case Dense():
            return {"values": g}
        case GroupInt():
            return _of_grid(weight, g)
        case FloatBlock():
            return _of_float_scales(weight, g)
        case Trellis():
            steps = weight.unit().mul_(g)
            return {"scale": steps.sum(1, keepdim=True) if weight.scale.shape[0] > 1 else steps.sum().reshape(1, 1)}
        case Binary() | Ternary() | SparseInt() | Scaled() | Additive():
            return weight.pull_back(g)
        case TwoLevelInt():
            return _of_second_level(weight, g)
        case Codebook():
            return {"table": _of_table(weight, g)}
        case Columns(index=index):
            return {"values": g[:, index.long()]}
        case Sparse():
            return {"values": g[weight.survivors()]}
    raise ValueError(f"a {weight.kind} weight cannot be trained by itself")


def _of_grid(weight: GroupInt, g: Float[Tensor, "out in"]) -> dict[str, Tensor]:
    """The value of an entry is (code - zero)·scale.

    So each scale gathers (code - zero)·gradient over its group, and each real zero point -scale·gradient.
    """
    unit = weight.with_tensors({**weight.own_tensors(), "scale": torch.ones_like(weight.scale)})
    found = {"scale": _group_sums(unit.unpack(torch.float32).mul_(g), weight.group_size, weight.scale)}
    if weight.zero is not None and weight.zero.is_floating_point():
        found["zero"] = _group_sums(g, weight.group_size, weight.scale) * -weight.scale.float()
    return found


def _of_float_scales(weight: FloatBlock, g: Float[Tensor, "out in"]) -> dict[str, Tensor]:
    """The value of an entry is element·scale, or element·scale·tensor_scale; real factors alone can be trained."""
    constants = weight.own_tensors()
    if weight.tensor_scale is not None:
        unit = weight.with_tensors({**constants, "tensor_scale": torch.ones_like(weight.tensor_scale)})
        return {"tensor_scale": unit.unpack(torch.float32).mul_(g).sum().reshape(1)}
    if not weight.scale.is_floating_point():
        return {}
    unit = weight.with_tensors({**constants, "scale": torch.ones_like(weight.scale)})
    return {"scale": _group_sums(unit.unpack(torch.float32).mul_(g), weight.block_size, weight.scale)}


def _group_sums(values: Float[Tensor, "out in"], size: int, like: Tensor) -> Float[Tensor, "rows groups"]:
    """Sums over groups of `size` columns, and over all rows if `like` has one row for all."""
    grouped = values.reshape(values.shape[0], -1, size).sum(-1)
    return grouped if like.shape[0] == values.shape[0] else grouped.sum(0, keepdim=True)


def _of_second_level(weight: TwoLevelInt, g: Float[Tensor, "out in"]) -> dict[str, Tensor]:
    """Base and step gather, over a block's rows, what their scales gather over a group; step times the scale's code."""
    grid = weight.grid()
    unit = Grid(torch.ones_like(grid.scale), grid.zero, grid.bits, grid.group_size)
    of_scale = dequantize(weight.unpack_codes(), unit).mul_(g).reshape(*grid.scale.shape, -1).sum(-1)
    block = torch.arange(weight.shape[0], device=g.device) // weight.rows_per_block
    zeros = torch.zeros(weight.base.shape, device=g.device)
    codes = weight.scales().codes
    return {"base": zeros.index_add(0, block, of_scale), "step": zeros.index_add(0, block, of_scale * codes)}


def _of_table(weight: Codebook, g: Float[Tensor, "out in"]) -> Float[Tensor, "tables entries d"]:
    """Each value of a table gathers the gradients of the entries that it stands for."""
    tables, entries, d = weight.table.shape
    first = weight.table_of(torch.arange(weight.shape[0], device=g.device)) * entries
    index = (weight.unpack_codes() + first.unsqueeze(1)).flatten()
    found = torch.zeros(tables * entries, d, device=g.device)
    return found.index_add_(0, index, g.reshape(-1, d)).reshape(tables, entries, d)


def _of_rotated(weight: Rotated, g: Float[Tensor, "out in"]) -> dict[str, Tensor]:
    """A side's scales gather the gradient times the matrix without them; the inner weight the gradient, rotated."""
    found: dict[str, Tensor] = {}
    steps = weight.unscaled().mul_(g)
    left = None if weight.left is None else weight.left.float()
    right = None if weight.right is None else weight.right.float()
    if left is not None:
        found["left"] = steps.sum(1) if right is None else steps @ right
        g = hadamard(g * left[:, None], dim=0)
    if right is not None:
        found["right"] = steps.sum(0) if left is None else left @ steps
        g = hadamard(g * right)
    return {**_named("inner", pull_back(weight.inner, g)), **found}


def _named(prefix: str, found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": tensor for name, tensor in found.items()}
