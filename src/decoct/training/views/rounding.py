"""Rounding: a weight that rounds its inputs, and views of what it multiplies them with (LLM-QAT, arXiv 2305.17888)."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from decoct.training.views.view import View, replaced
from decoct.weights import Weight


class Rounding(nn.Module):
    """Views of the parts of a weight that round no inputs themselves; what lies around these parts stays.

    Gradients pass the rounding of inputs as if it were not there.
    """

    def __init__(self, weight: Weight, view: Callable[[Weight, str], View]) -> None:
        """Look at a weight that rounds its inputs.

        Args:
            weight: any such expression.
            view: of a part, given also its path.
        """
        super().__init__()
        parts = dict(_parts(weight))
        self._weight, self._paths = weight, tuple(parts)
        self._views = tuple(view(part, path) for path, part in parts.items())
        self.parts = nn.ModuleList(self._views)

    @property
    def empty(self) -> bool:
        """Whether nothing of the weight is trained."""
        return all(view.empty for view in self._views)

    @override
    def forward(self, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        """The matrix alone, in `dtype`."""
        return self._living(dtype).unpack(dtype)

    def product(self, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        """What the weight makes of inputs [*tokens, in], in `dtype`; gradients flow to inputs and parameters."""
        living = self._living(dtype)

        def of(x: Tensor) -> Tensor:
            with torch.autocast(x.device.type, enabled=False):  # rotations stay float32, as without training
                return living.apply(x.to(dtype))

        return of

    def weight(self) -> Weight:
        """The weight as it has become."""
        became = {path: view.weight() for path, view in zip(self._paths, self._views, strict=True)}
        return replaced(self._weight, became)

    def units(self) -> list[tuple[nn.Parameter, float]]:
        """Every parameter, and the size of its entries."""
        return [unit for view in self._views for unit in view.units()]

    def _living(self, dtype: torch.dtype) -> Weight:
        """The weight with matrices to which gradients flow."""
        matrices = (view(dtype) for view in self._views)
        living = {path: _Living(_shape(m), dtype, m) for path, m in zip(self._paths, matrices, strict=True)}
        return replaced(self._weight, living)


@dataclass(frozen=True, eq=False, slots=True)
class _Living(Weight):
    """A matrix to which gradients flow; never stored."""

    kind: ClassVar[str] = "Living"
    values: Float[Tensor, "out in"]

    @override
    def unpack(self, dtype: torch.dtype | None = None) -> Float[Tensor, "out in"]:
        return self.values.to(dtype or self.dtype)


def _shape(matrix: Tensor) -> tuple[int, int]:
    return matrix.shape[0], matrix.shape[1]


def _parts(weight: Weight, path: str = "") -> Iterator[tuple[str, Weight]]:
    """The largest parts that do not round their inputs, by path."""
    if not weight.quantizes_inputs:
        yield path, weight
        return
    for name, child in weight.children().items():
        yield from _parts(child, f"{path}.{name}" if path else name)
