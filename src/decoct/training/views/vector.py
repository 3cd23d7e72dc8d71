"""Vector: a norm's gain or a bias, trained in float32 and rounded to the dtype that it is stored in."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from typing_extensions import override

from decoct.training.views.size import typical_size


class Vector(nn.Module):
    """A tensor that is no matrix, as a parameter."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self._dtype = tensor.dtype
        self.values = nn.Parameter(tensor.float())
        self.unit = typical_size(tensor)

    @override
    def forward(self, dtype: torch.dtype) -> Tensor:
        """The tensor as it would be stored now, in `dtype`."""
        return rounded(self.values, self._dtype).to(dtype)

    def tensor(self) -> Tensor:
        """What is stored."""
        return self.values.detach().to(self._dtype)


class _Rounded(torch.autograd.Function):
    """Rounding to a dtype, whose gradient is passed on as if nothing had been rounded."""

    @staticmethod
    def forward(ctx: FunctionCtx, values: Tensor, dtype: torch.dtype) -> Tensor:  # noqa: ARG004 - torch's signature
        return values.to(dtype).to(values.dtype)

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor, None]:  # noqa: ARG004
        return grads[0], None


def rounded(values: Float[Tensor, "*shape"], dtype: torch.dtype) -> Float[Tensor, "*shape"]:
    """The values that `dtype` would store, in the dtype that they came in; gradients pass straight through."""
    return _Rounded.apply(values, dtype)  # type: ignore[no-any-return, no-untyped-call]
