"""Weights as expressions: frozen, exactly sized, nested freely."""

from decoct.weights.base import FORMAT_VERSION, Weight
from decoct.weights.dense import Dense
from decoct.weights.describe import WEIGHTS, check_version, describe, described_dtype, rebuild, tensor_specs
from decoct.weights.float_block import FloatBlock
from decoct.weights.gradient import pull_back, trainable
from decoct.weights.group_int import GroupInt
from decoct.weights.low_rank import LowRank
from decoct.weights.masked import Masked
from decoct.weights.shared import Shared
from decoct.weights.sparse import Sparse
from decoct.weights.sum import Sum

__all__ = [
    "FORMAT_VERSION",
    "WEIGHTS",
    "Dense",
    "FloatBlock",
    "GroupInt",
    "LowRank",
    "Masked",
    "Shared",
    "Sparse",
    "Sum",
    "Weight",
    "check_version",
    "describe",
    "described_dtype",
    "pull_back",
    "rebuild",
    "tensor_specs",
    "trainable",
]
