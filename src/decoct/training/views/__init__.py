"""Views: what of a weight is trained, as parameters that its matrix is made of, and the weight that comes of it."""

from decoct.training.views.leaf import Leaf
from decoct.training.views.vector import Vector
from decoct.training.views.view import View

__all__ = ["Leaf", "Vector", "View"]
