"""Hard concrete masks (arXiv 1712.01312): random numbers from 0 to 1, often exactly 0 or 1, that gradients can move."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

_HEAT = 2 / 3  # how soft the draw is
_LOW, _HIGH = -0.1, 1.1  # the draw is stretched to here, and cut to 0 … 1


def draw_mask(logits: Float[Tensor, "*units"], chance: Float[Tensor, "*units"]) -> Float[Tensor, "*units"]:
    """Masks as random as `chance`, uniform between 0 and 1; differentiable by the logits where they are not cut."""
    chance = chance.clamp(1e-6, 1 - 1e-6)
    soft = torch.sigmoid((chance.log() - (-chance).log1p() + logits) / _HEAT)
    return (soft * (_HIGH - _LOW) + _LOW).clamp(0, 1)


def open_chance(logits: Float[Tensor, "*units"]) -> Float[Tensor, "*units"]:
    """How likely each mask is not 0: its share of the expected L0 norm."""
    return torch.sigmoid(logits - _HEAT * math.log(-_LOW / _HIGH))
