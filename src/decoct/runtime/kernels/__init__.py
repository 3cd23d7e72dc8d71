"""Products of inputs with packed weights: `linear(weight)` gives the best one there is for a weight."""

from decoct.runtime.kernels.choose import linear
from decoct.runtime.kernels.composed import Part
from decoct.runtime.kernels.product import Product, Unpacking

__all__ = ["Part", "Product", "Unpacking", "linear"]
