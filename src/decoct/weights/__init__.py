"""Weights as expressions: frozen, exactly sized, nested freely."""

from decoct.weights.additive import Additive
from decoct.weights.base import FORMAT_VERSION, Weight
from decoct.weights.binary import Binary, Plane, scale_index
from decoct.weights.codebook import Codebook
from decoct.weights.columns import Columns
from decoct.weights.dense import Dense
from decoct.weights.describe import (
    WEIGHTS,
    check_version,
    describe,
    described_dtype,
    described_kinds,
    rebuild,
    tensor_specs,
)
from decoct.weights.float_block import FloatBlock
from decoct.weights.gradient import for_training, pull_back, trainable
from decoct.weights.group_int import GroupInt
from decoct.weights.low_rank import LowRank
from decoct.weights.masked import Masked
from decoct.weights.padded import Padded
from decoct.weights.quantized_input import QuantizedInput, ready
from decoct.weights.rotated import Rotated
from decoct.weights.shared import Shared
from decoct.weights.sparse import Sparse
from decoct.weights.sparse_int import SparseInt
from decoct.weights.stacked import Stacked, stack
from decoct.weights.sum import Sum
from decoct.weights.ternary import Ternary
from decoct.weights.trellis import Trellis
from decoct.weights.two_level_int import TwoLevelInt

__all__ = [
    "FORMAT_VERSION",
    "WEIGHTS",
    "Additive",
    "Binary",
    "Codebook",
    "Columns",
    "Dense",
    "FloatBlock",
    "GroupInt",
    "LowRank",
    "Masked",
    "Padded",
    "Plane",
    "QuantizedInput",
    "Rotated",
    "Shared",
    "Sparse",
    "SparseInt",
    "Stacked",
    "Sum",
    "Ternary",
    "Trellis",
    "TwoLevelInt",
    "Weight",
    "check_version",
    "describe",
    "described_dtype",
    "described_kinds",
    "for_training",
    "pull_back",
    "ready",
    "rebuild",
    "scale_index",
    "stack",
    "tensor_specs",
    "trainable",
]
