"""Products made by the compiled kernels."""

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import override

from decoct.native.library import FLOATS, LEVELS, TYPES, Layout, Library, Matrix
from decoct.runtime.kernels.dense import dense_product
from decoct.runtime.kernels.product import MOST_DIRECT, Product

BLOCK = 16
"""Rows that kernels unpack together."""

_TILE = 1 << 22  # entries that are unpacked at a time for a dense product
_TYPED = {"scale": "scale_type", "zero": "zero_type", "values": "value_type", "index": "index_type"}


class Compiled(Product):
    """A matrix in one of the kernels' layouts.

    Attributes:
        matrix: as the kernels see it.
        rounds_prompts: whether inputs are rounded to 8 bits where there are many of them; only if it `can_round`.
    """

    rounds_prompts = False

    def __init__(
        self,
        library: Library,
        shape: tuple[int, int],
        dtype: torch.dtype,
        layout: Layout,
        tensors: Mapping[str, Tensor],
        settings: Mapping[str, int],
    ) -> None:
        """Describe a matrix to the kernels.

        Args:
            library: where they are.
            shape: (out, in).
            dtype: what the matrix was before it was compressed.
            layout: how the tensors lie.
            tensors: by the names of Matrix's pointers.
            settings: Matrix's other fields.
        """
        self.shape, self.dtype = shape, dtype
        self._library = library
        self._level = LEVELS.index(library.levels[-1])
        self.kernel = f"{layout.name.lower().replace('_', ' ')} {settings.get('bits', '')}".strip()
        self._tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        shared = {"table"} if layout == Layout.TRELLIS else set()  # one for all trellises of a kind
        self.nbytes = sum(tensor.nbytes for name, tensor in self._tensors.items() if name not in shared)
        types = {_TYPED[name]: TYPES[t.dtype] for name, t in self._tensors.items() if name in _TYPED}
        pointers = {name: tensor.data_ptr() for name, tensor in self._tensors.items()}
        self.matrix = Matrix(layout=layout, rows=shape[0], cols=shape[1], **settings, **types, **pointers)

    @property
    def can_round(self) -> bool:
        """Whether there is a product with inputs rounded to 8 bits."""
        return self._library.can_round(self.matrix, self._level)

    def at_level(self, name: str) -> "Compiled":
        """Itself, told to use one of the library's instruction levels: for tests and measurements."""
        assert name in self._library.levels
        self._level = LEVELS.index(name)
        return self

    @override
    def __call__(self, x: Float[Tensor, "*tokens in"]) -> Float[Tensor, "*tokens out"]:
        assert x.device.type == "cpu", "kernels run on the CPU"
        rows = x.numel() // self.shape[1]
        many = rows > MOST_DIRECT
        if x.dtype not in FLOATS or (x.requires_grad and torch.is_grad_enabled()) or (many and not self.rounds_prompts):
            return self._dense(x)
        out = torch.empty(*x.shape[:-1], self.shape[0], dtype=x.dtype)
        given, found = x.reshape(rows, self.shape[1]).contiguous(), out.view(rows, -1)
        multiply = self._library.multiply_rounded if many else self._library.multiply
        multiply(self.matrix, given, found, self._level)
        return out

    @override
    def unpack(self, dtype: torch.dtype | None = None) -> Float[Tensor, "out in"]:
        return self._blocks(range(-(-self.shape[0] // BLOCK)), dtype or self.dtype)

    @override
    def rows(self, ids: Int[Tensor, "*n"], dtype: torch.dtype | None = None) -> Float[Tensor, "*n in"]:
        flat = (ids.flatten() % self.shape[0]).tolist()  # -1 is the last one
        found = [self._blocks(range(i // BLOCK, i // BLOCK + 1), dtype or self.dtype)[i % BLOCK] for i in flat]
        empty = torch.empty(0, self.shape[1], dtype=dtype or self.dtype)
        return (torch.stack(found) if found else empty).reshape(*ids.shape, self.shape[1])

    def _blocks(self, blocks: range, dtype: torch.dtype) -> Float[Tensor, "rows in"]:
        rows = min(self.shape[0], blocks.stop * BLOCK) - blocks.start * BLOCK
        out = torch.empty(rows, self.shape[1], dtype=dtype if dtype in FLOATS else torch.float32)
        self._library.unpack(self.matrix, blocks, out, self._level)
        return out.to(dtype)

    def _dense(self, x: Tensor) -> Tensor:
        """The product with the unpacked matrix, some rows at a time."""
        step = max(1, _TILE // (self.shape[1] * BLOCK))
        total = -(-self.shape[0] // BLOCK)
        tiles = [range(start, min(start + step, total)) for start in range(0, total, step)]
        if len(tiles) == 1:
            return dense_product(x, self._blocks(tiles[0], x.dtype))
        return torch.cat([dense_product(x, self._blocks(tile, x.dtype)) for tile in tiles], -1)
