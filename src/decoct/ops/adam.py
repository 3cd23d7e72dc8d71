"""Adam (arXiv 1412.6980) on a few tensors that are moved in place."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from decoct.ops.parallel import each_piece

_BETAS = (0.9, 0.95)
_EPS = 1e-16  # gradients of a block's relative error by one weight are tiny: the usual 1e-8 would slow them


class Adam:
    """The two moments of each tensor's gradients, float32, by name: 8 bytes an entry."""

    def __init__(self, like: Mapping[str, Float[Tensor, "*shape"]]) -> None:
        """Begin with moments of zero for tensors of these shapes, at least one-dimensional."""
        self._mean = {name: torch.zeros_like(tensor) for name, tensor in like.items()}
        self._square = {name: torch.zeros_like(tensor) for name, tensor in like.items()}
        self._steps = 0

    def step(
        self,
        values: Mapping[str, Float[Tensor, "*shape"]],
        gradients: Mapping[str, Float[Tensor, "*shape"]],
        rates: Mapping[str, float],
    ) -> None:
        """Move the values in place.

        Args:
            values: all the tensors.
            gradients: of each; of the same shapes.
            rates: how far an entry moves at most, about, by name.
        """
        self._steps += 1
        fade, fade_square = (1.0 - beta**self._steps for beta in _BETAS)
        for name, tensor in values.items():
            self._move(name, tensor, gradients[name].reshape(tensor.shape), rates[name] / fade, fade_square)

    def _move(self, name: str, tensor: Tensor, gradient: Tensor, rate: float, fade_square: float) -> None:
        mean, square = self._mean[name], self._square[name]

        def work(part: slice) -> None:
            g = gradient[part]
            mean[part].lerp_(g, 1.0 - _BETAS[0])
            square[part].lerp_(g.square(), 1.0 - _BETAS[1])
            tensor[part].sub_(rate * mean[part] / (square[part] / fade_square).sqrt_().add_(_EPS))

        each_piece(work, tensor.shape[0], tensor[0].numel())
