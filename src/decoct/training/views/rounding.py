"""Rounding: a weight that rounds its inputs, and views of what it multiplies them with (LLM-QAT, arXiv 2305.17888)."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from decoct.arch.hf import Product
from decoct.training.views.size import typical_size
from decoct.training.views.view import View, replaced
from decoct.weights import Trellis, Weight, trainable


class Rounding(nn.Module):
    """Views of the parts of a weight that round no inputs themselves, and the numbers around these parts.

    Gradients pass the rounding of inputs as if it were not there.
    """

    def __init__(
        self,
        weight: Weight,
        view: Callable[[Weight, str], View],
        chosen: Callable[[str], bool] = lambda _: True,
    ) -> None:
        """Look at a weight that rounds its inputs.

        Args:
            weight: any such expression.
            view: of a part, given also its path.
            chosen: whether to train a number around the parts, by its name in `trainable(weight)`.
        """
        super().__init__()
        parts = dict(_parts(weight))
        self._weight = weight
        # Trellises take long to decode, and the scales around them say the same as their own.
        self._fixed = {path: part.unpack() for path, part in parts.items() if isinstance(part, Trellis)}
        self._paths = tuple(path for path in parts if path not in self._fixed)
        self._views = tuple(view(parts[path], path) for path in self._paths)
        self.parts = nn.ModuleList(self._views)
        inside = tuple(f"{path}." for path in parts)
        around = {name: t for name, t in trainable(weight).items() if not name.startswith(inside) and chosen(name)}
        self._names = tuple(around)
        self.reals = nn.ParameterList([nn.Parameter(tensor.float()) for tensor in around.values()])

    @property
    def empty(self) -> bool:
        """Whether nothing of the weight is trained."""
        return not self._names and all(view.empty for view in self._views)

    @override
    def forward(self, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        """The matrix alone, in `dtype`."""
        return self._living(dtype).unpack(dtype)

    def product(self, dtype: torch.dtype) -> Product:
        """What the weight makes of inputs [*tokens, in], in `dtype`; gradients flow to inputs and parameters."""
        return in_dtype(self._living(dtype).apply, dtype)

    def weight(self) -> Weight:
        """The weight as it has become."""
        became = {path: view.weight() for path, view in zip(self._paths, self._views, strict=True)}
        return self._with_reals(replaced(self._weight, became), [real.detach() for real in self.reals])

    def units(self) -> list[tuple[nn.Parameter, float]]:
        """Every parameter, and the size of its entries."""
        own = [(real, typical_size(real.detach())) for real in self.reals]
        return [*own, *(unit for view in self._views for unit in view.units())]

    def _living(self, dtype: torch.dtype) -> Weight:
        """The weight with matrices to which gradients flow."""
        matrices = {path: view(dtype) for path, view in zip(self._paths, self._views, strict=True)}
        matrices |= {path: matrix.to(dtype) for path, matrix in self._fixed.items()}
        living = {path: _Living((m.shape[0], m.shape[1]), dtype, m) for path, m in matrices.items()}
        return self._with_reals(replaced(self._weight, living), list(self.reals))

    def _with_reals(self, weight: Weight, reals: list[Tensor]) -> Weight:
        """With these numbers around the parts, in the dtypes that they are stored in."""
        tensors = weight.tensors()
        for name, real in zip(self._names, reals, strict=True):
            tensors[name] = real.to(tensors[name].dtype)
        return weight.with_tensors(tensors)


@dataclass(frozen=True, eq=False, slots=True)
class _Living(Weight):
    """A matrix to which gradients flow; never stored."""

    kind: ClassVar[str] = "Living"
    values: Float[Tensor, "out in"]

    @override
    def unpack(self, dtype: torch.dtype | None = None) -> Float[Tensor, "out in"]:
        return self.values.to(dtype or self.dtype)


def in_dtype(product: Product, dtype: torch.dtype) -> Product:
    """A product as it is without training: of inputs in `dtype`, its rotations in float32 whatever autocast says."""

    def of(x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return product(x.to(dtype))

    return of


def _parts(weight: Weight, path: str = "") -> Iterator[tuple[str, Weight]]:
    """The largest parts that do not round their inputs, by path."""
    if not weight.quantizes_inputs:
        yield path, weight
        return
    for name, child in weight.children().items():
        yield from _parts(child, f"{path}.{name}" if path else name)
