"""Which product a weight gets."""

from decoct.runtime.kernels.product import Product, Unpacking
from decoct.weights import Weight


def linear(weight: Weight) -> Product:
    """The fastest product there is for a weight on this machine; always gives what `weight.apply` gives."""
    return Unpacking(weight)
