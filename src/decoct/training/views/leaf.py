"""Leaf: a matrix inside a weight that is trained in another form than the one it is stored in."""

from abc import ABC, abstractmethod

from jaxtyping import Float
from torch import Tensor, nn

from decoct.weights import Weight


class Leaf(nn.Module, ABC):
    """Has parameters, float32; gives the matrix they stand for, and in the end the weight that is stored.

    The matrix is that of the weight, entry by entry: what training sees is what will be there.
    """

    @abstractmethod
    def matrix(self) -> Float[Tensor, "out in"]:
        """The matrix as it would be stored now, float32; gradients flow to the parameters."""

    @abstractmethod
    def weight(self) -> Weight:
        """What is stored."""

    @abstractmethod
    def units(self) -> dict[str, float]:
        """The size of each parameter's entries, by name: what its changes in a step are relative to."""
