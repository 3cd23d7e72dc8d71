"""Rotary position embedding (arXiv 2104.09864), applied or undone on the keys of known positions."""

import torch
from jaxtyping import Float
from torch import Tensor


def turn(
    x: Float[Tensor, "*rows tokens channels"],
    frequencies: Float[Tensor, " pairs"],
    start: int,
    *,
    inverse: bool = False,
) -> Float[Tensor, "*rows tokens channels"]:
    """Turn channels i and i + pairs of each token by position · frequency i; channels beyond 2 · pairs stay.

    A rotation: what is undone and applied again comes back, whatever the model's own positions and scaling are.

    Args:
        x: float32 or float64.
        frequencies: radians a token.
        start: position of the first token.
        inverse: undo it.
    """
    pairs = len(frequencies)
    positions = torch.arange(start, start + x.shape[-2], dtype=torch.float64, device=x.device)
    angles = positions.unsqueeze(1) * frequencies.to(x.device, torch.float64)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    if inverse:
        sin = -sin
    one, two, rest = x[..., :pairs], x[..., pairs : 2 * pairs], x[..., 2 * pairs :]
    return torch.cat([one * cos - two * sin, two * cos + one * sin, rest], dim=-1)
