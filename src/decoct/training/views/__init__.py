"""Views: what of a weight is trained, as parameters that its matrix is made of, and the weight that comes of it."""

from decoct.training.views.leaf import Leaf
from decoct.training.views.rounding import Rounding
from decoct.training.views.vector import Vector
from decoct.training.views.view import View

AnyView = View | Rounding
"""Of a weight that is a matrix, or of one that rounds its inputs too."""

__all__ = ["AnyView", "Leaf", "Rounding", "Vector", "View"]
