"""How far two tensors lie apart."""

from jaxtyping import Float
from torch import Tensor


def squared_distance(a: Float[Tensor, "*shape"], b: Float[Tensor, "*shape"]) -> float:
    """The sum of squared differences, in float64: finite for whatever float32 holds."""
    return float((a.double() - b.double()).square().sum())
