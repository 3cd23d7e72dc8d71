"""View: a weight of any kind whose real numbers are parameters, and whose matrix is made of them."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from decoct.training.views.leaf import Leaf
from decoct.training.views.size import typical_size
from decoct.weights import Dense, Weight, for_training, pull_back, trainable


class View(nn.Module):
    """The numbers that a weight stores, float32, and leaves, which take the place of matrices inside it.

    Codes, masks, positions of zeros and ranks are no numbers of this kind: they stay what they were. What a view gives
    is rounded to what the weight stores, so training sees the very matrix that will be there afterwards.
    """

    def __init__(
        self,
        weight: Weight,
        leaves: Mapping[str, Leaf] | None = None,
        chosen: Callable[[str], bool] = lambda _: True,
    ) -> None:
        """Look at a weight.

        Args:
            weight: any expression.
            leaves: by the path of the nested weight that each stands for; "" is the weight itself.
            chosen: whether to train a stored number, by its name in `trainable(weight)`; those inside leaves never are.
        """
        super().__init__()
        leaves = dict(leaves or {})
        self._weight, self._dtype = weight, weight.dtype
        self._held = for_training(replaced(weight, {path: _room(weight, path) for path in leaves}))
        self._paths = tuple(leaves)
        self.leaves = nn.ModuleList(leaves.values())
        inside = {f"{path}.values" if path else "values" for path in leaves}
        numbers = {name: tensor for name, tensor in trainable(self._held).items() if tensor.numel()}
        found = {name: tensor for name, tensor in numbers.items() if name not in inside and chosen(name)}
        self._names = tuple(found)
        self.reals = nn.ParameterList([nn.Parameter(tensor.float()) for tensor in found.values()])

    @property
    def empty(self) -> bool:
        """Whether nothing of the weight is trained."""
        return not self._names and not self._paths

    @override
    def forward(self, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        """The matrix in `dtype`; gradients flow to the parameters."""
        if self.empty:
            return self._held.unpack(dtype)
        names = [*self._names, *(f"{path}.values" if path else "values" for path in self._paths)]
        given = [*self.reals, *(leaf.matrix() for leaf in self._leaves())]
        return _Unpack.apply(self._held, names, dtype, *given)  # type: ignore[no-any-return, no-untyped-call]

    def weight(self) -> Weight:
        """The weight as it has become: of the same kind, or of what its leaves are stored as."""
        found = replaced(
            self._weight, {path: leaf.weight() for path, leaf in zip(self._paths, self._leaves(), strict=True)}
        )
        tensors = found.tensors()
        for name, real in zip(self._names, self.reals, strict=True):
            tensors[name] = real.detach().to(tensors[name].dtype)
        return found.with_tensors(tensors)

    def units(self) -> list[tuple[nn.Parameter, float]]:
        """Every parameter, and the size of its entries."""
        found = [(real, typical_size(real.detach())) for real in self.reals]
        for leaf in self._leaves():
            sizes = leaf.units()
            found += [(parameter, sizes[name]) for name, parameter in leaf.named_parameters()]
        return found

    def _leaves(self) -> list[Leaf]:
        found = list(self.leaves)
        assert all(isinstance(leaf, Leaf) for leaf in found)
        return found  # type: ignore[return-value]


class _Unpack(torch.autograd.Function):
    """A weight's matrix from the numbers it stores; gradients by `pull_back`, which knows every kind of weight."""

    @staticmethod
    def forward(ctx: Any, weight: Weight, names: list[str], dtype: torch.dtype, *given: Tensor) -> Tensor:
        tensors = weight.tensors()
        tensors.update({name: value.to(tensors[name].dtype) for name, value in zip(names, given, strict=True)})
        ctx.weight, ctx.names = weight.with_tensors(tensors), names
        return ctx.weight.unpack(dtype)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        found = pull_back(ctx.weight, grads[0])
        return (None, None, None, *(found.get(name) for name in ctx.names))


def replaced(weight: Weight, parts: Mapping[str, Weight], path: str = "") -> Weight:
    """The same expression with other weights at these paths; "" is the whole of it."""
    if path in parts:
        return parts[path]
    before = f"{path}." if path else ""
    children = {name: replaced(child, parts, before + name) for name, child in weight.children().items()}
    return weight.with_children(children) if children else weight


def _room(weight: Weight, path: str) -> Dense:
    """Where a leaf's matrix goes while the weight around it is unpacked."""
    for name, child in weight.children().items():
        if path == name or path.startswith(f"{name}."):
            return _room(child, path[len(name) + 1 :])
    return Dense(weight.shape, torch.float32, torch.zeros(1, 1).expand(weight.shape))
