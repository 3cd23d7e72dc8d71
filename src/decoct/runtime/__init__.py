"""Running compressed models: modules that keep their weights packed, and caches that keep keys and values packed."""

from decoct.runtime.cache import BlockCache, WholeWindow, places
from decoct.runtime.packed import (
    PackedEmbedding,
    PackedExperts,
    PackedLinear,
    PackedWeight,
    kernels_of,
    run_dense_linears,
)

__all__ = [
    "BlockCache",
    "PackedEmbedding",
    "PackedExperts",
    "PackedLinear",
    "PackedWeight",
    "WholeWindow",
    "kernels_of",
    "places",
    "run_dense_linears",
]
