"""Modules that take the place of Linear, Embedding and fused experts, and unpack a weight only while it is used."""

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from typing_extensions import override

from decoct.runtime.kernels import Part, linear
from decoct.runtime.kernels.gpu import available, linear_on_gpu
from decoct.weights import Dense, Weight


class PackedWeight(nn.Module):
    """A weight whose stored tensors are buffers, so that moving the model moves them."""

    def __init__(self) -> None:
        super().__init__()
        self._template: Weight | None = None

    def run(self, weight: Weight) -> None:
        """Let the best kernel there is multiply with a weight; it keeps the tensors as it needs them, on the CPU."""
        self._template = Part.of(linear(weight))

    @property
    def kernel(self) -> str | None:
        """What multiplies, where a kernel was chosen when the weight was loaded."""
        return self._template.product.describe() if isinstance(self._template, Part) else None

    def fill(self, weight: Weight, device: torch.device) -> None:
        """Take a weight's tensors over."""
        self._template = weight
        for name, tensor in weight.tensors().items():
            self.register_buffer(_buffer(name), tensor.to(device))

    def expression(self) -> Weight:
        """The weight, over the tensors where they are now."""
        assert self._template is not None, "the weight has not been loaded"
        if isinstance(self._template, Part):
            return self._template
        return self._template.with_tensors(self._tensors())

    @override
    def forward(self, dtype: torch.dtype) -> Tensor:
        """The matrix [out, in]."""
        return self.expression().unpack(dtype)

    def _tensors(self) -> dict[str, Tensor]:
        assert self._template is not None
        return {name: cast("Tensor", getattr(self, _buffer(name))) for name in self._template.tensors()}

    def preview(self) -> Tensor:
        """The matrix for code that looks at `.weight`; empty before loading, when initialisers look at it."""
        return torch.empty(0) if self._template is None else self.expression().unpack()


class PackedLinear(nn.Module):
    """x·Wᵀ + b with a packed W; stands for Linear and for GPT-2's Conv1D alike."""

    def __init__(self, packed: PackedWeight, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.packed = packed
        self.bias = bias

    @property
    def weight(self) -> Tensor:
        """The matrix, unpacked: for code that looks at it."""
        return self.packed.preview()

    @override
    def forward(self, x: Tensor) -> Tensor:
        weight = self.packed.expression()
        if available(x.device):
            return linear_on_gpu(weight, x, self.bias)
        if not weight.quantizes_inputs:
            return nn.functional.linear(x, weight.unpack(x.dtype), self.bias)
        product = weight.apply(x)
        return product if self.bias is None else product + self.bias


def run_dense_linears(model: nn.Module) -> None:
    """Let kernels multiply with uncompressed matrices too; they read them where they are."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear:
                packed = PackedWeight()
                packed.run(Dense.of(child.weight))
                module.register_module(name, PackedLinear(packed, child.bias))


def kernels_of(model: nn.Module) -> dict[str, str]:
    """What multiplies with each matrix of a model that `decoct.load` gave, by the module's name.

    "unpack" stands for a weight that no kernel fits: it is unpacked for every call.
    """
    found = {
        name.removesuffix(".packed"): module.kernel
        for name, module in model.named_modules()
        if isinstance(module, PackedWeight)
    }
    return {name: kernel for name, kernel in found.items() if kernel is not None}


class PackedEmbedding(nn.Module):
    """Looks rows up without unpacking the rest of the table.

    Attributes:
        embed_scale: factor on what is looked up (Gemma), or None.
        dtype: of the rows.
    """

    def __init__(self, packed: PackedWeight, embed_scale: float | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.packed = packed
        self.dtype = dtype
        self.embed_scale = embed_scale

    @property
    def weight(self) -> Tensor:
        """The table, unpacked: for code that looks at it."""
        return self.packed.preview()

    @override
    def forward(self, ids: Tensor) -> Tensor:
        rows = self.packed.expression().unpack_rows(ids, self.dtype)
        return rows if self.embed_scale is None else rows * torch.tensor(self.embed_scale, dtype=self.dtype)


class PackedExperts(nn.Module):
    """All experts of a layer; their fused tensors exist only during a call."""

    def __init__(self, experts: nn.Module, packed: Mapping[str, list[list[PackedWeight]]]) -> None:
        """Wrap transformers' module.

        Args:
            experts: the fused module on the meta device; its mathematics is used, its parameters are not.
            packed: for each fused parameter, each expert's weights, stacked by rows.
        """
        super().__init__()
        self._experts = [experts]  # in a list: not a submodule, its meta parameters are nobody's business
        self._layout = {name: [len(rows) for rows in experts_] for name, experts_ in packed.items()}
        self.packed = nn.ModuleDict(
            {name: nn.ModuleList(w for rows in experts_ for w in rows) for name, experts_ in packed.items()}
        )

    @override
    def forward(self, hidden: Tensor, *args: Tensor) -> Tensor:
        fused = {name: self._fused(name, hidden.dtype) for name in self._layout}
        return cast("Tensor", functional_call(self._experts[0], fused, (hidden, *args)))

    def _fused(self, name: str, dtype: torch.dtype) -> Tensor:
        weights = iter(cast("nn.ModuleList", self.packed[name]))
        experts = [torch.cat([next(weights)(dtype) for _ in range(rows)]) for rows in self._layout[name]]
        return torch.stack(experts)


def _buffer(name: str) -> str:
    """Buffers may not have dots in their names."""
    return name.replace(".", "__")
