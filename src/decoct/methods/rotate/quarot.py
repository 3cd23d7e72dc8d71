"""QuaRot (arXiv 2404.00456): randomised Hadamard transforms spread outlying channels over all of them."""

from dataclasses import dataclass

from decoct.methods.base import Rotation


@dataclass(frozen=True, slots=True, kw_only=True)
class QuaRot(Rotation):
    """Rotate by Hadamard transforms after random signs; needs no data. See `Rotation` for the settings."""
