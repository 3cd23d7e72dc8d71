"""Running compressed models: modules that keep their weights packed."""

from decoct.runtime.packed import PackedEmbedding, PackedExperts, PackedLinear, PackedWeight

__all__ = ["PackedEmbedding", "PackedExperts", "PackedLinear", "PackedWeight"]
