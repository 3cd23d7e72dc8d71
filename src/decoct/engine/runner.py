"""Runs a model's blocks one at a time, with whatever weights it is handed."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod

import torch
from jaxtyping import Float, Int
from torch import Tensor

from decoct.arch import Slot, edges
from decoct.arch.hf import Attention, BlockCall, CacheLike, Product, Products, Skeleton, module_tensors
from decoct.model import Model
from decoct.weights import Weight, ready

_TOKENS_AT_ONCE = 2048


@dataclass(frozen=True, slots=True)
class LaidOut:
    """A block, ready to run.

    Attributes:
        tensors: its parameters, by name within the block as transformers' module has it.
        products: of weights that round their inputs: what to do instead of multiplying with a matrix, by layer.
    """

    tensors: Mapping[str, Tensor]
    products: Products = field(default_factory=dict)


class Runner:
    """A model's forward pass, taken apart.

    Attributes:
        dtype: what everything is computed in.
        edges: the edges of a block.
    """

    def __init__(self, model: Model, dtype: torch.dtype) -> None:
        """Build the skeleton and load what lies outside the blocks, except embedding and lm_head.

        Raises:
            ValueError: the checkpoint lacks a tensor that the architecture needs.
        """
        self.model, self.dtype = model, dtype
        self.skeleton = Skeleton(model.config, model.family)
        family = model.family
        self._rest = {family.module_name(name): model.tensor(name).to(dtype) for name in model.others(None)}
        self.edges = edges(model.block_slots)
        self._calls: dict[tuple[int, int], list[BlockCall]] = {}

    def batch_size(self, num_sequences: int, length: int) -> int:
        """Sequences to run together: the largest divisor of their number that keeps a batch near 2048 tokens."""
        most = max(1, _TOKENS_AT_ONCE // length)
        return max(n for n in range(1, min(most, num_sequences) + 1) if num_sequences % n == 0)

    def embed(
        self, tokens: Int[Tensor, "batch seq"], embedding: Tensor, others: Mapping[str, Tensor] | None = None
    ) -> Float[Tensor, "batch seq hidden"]:
        """What enters the first block.

        Args:
            tokens: to look up.
            embedding: the unpacked table, in `dtype`; gradients flow back to it.
            others: tensors outside the blocks that replace the checkpoint's, in `dtype`, by checkpoint name.
        """
        return self.skeleton.embed(tokens, self._outside(self.model.family.embed, embedding, others))

    def embed_all(self, tokens: Int[Tensor, "many seq"], embedding: Tensor) -> Float[Tensor, "many seq hidden"]:
        """What enters the first block, of many sequences: one after another, into one tensor that is there once."""
        hidden = torch.empty(*tokens.shape, embedding.shape[1], dtype=self.dtype)
        for row in range(len(tokens)):
            hidden[row] = self.embed(tokens[row : row + 1], embedding)[0]
        return hidden

    def lay_out(
        self, block: int, weights: Mapping[str, Weight], vectors: Mapping[str, Tensor] | None = None
    ) -> LaidOut:
        """A block's parameters as transformers' module wants them, unpacked; weights that round their inputs applied.

        Args:
            block: its number.
            weights: of its slots.
            vectors: its norms, biases and the like; None: as the checkpoint has them.

        Raises:
            ValueError: the checkpoint lacks one.
        """
        products = products_of(weights, self.dtype)
        matrices = {name: weight.unpack(self.dtype) for name, weight in weights.items() if name not in products}
        return self.lay_out_matrices(block, matrices, vectors, products)

    def lay_out_matrices(
        self,
        block: int,
        matrices: Mapping[str, Tensor],
        vectors: Mapping[str, Tensor] | None = None,
        products: Mapping[str, Product] | None = None,
    ) -> LaidOut:
        """The same from matrices [out, in] in `dtype`, to which gradients flow back, and `products_of` the others."""
        if vectors is None:
            vectors = {name: self.model.tensor(name) for name in self.model.others(block)}
        given = {**matrices, **{name: v.to(self.dtype) for name, v in vectors.items()}}
        return self.lay_out_given(block, given, products)

    def lay_out_given(
        self, block: int, given: Mapping[str, Tensor], products: Mapping[str, Product] | None = None
    ) -> LaidOut:
        """The same from all of a block's tensors, in `dtype`, and products instead of some; by full checkpoint name."""
        model, prefix = self.model, self.model.prefix(block)
        slots = {prefix + slot.name: slot for slot in model.block_slots}
        instead = {self._path(slots[name]): product for name, product in (products or {}).items()}
        tensors = {name.removeprefix(prefix): tensor for name, tensor in given.items()}
        laid = module_tensors(model.family, prefix, model.block_slots, tensors)
        lacking = self.skeleton.block_parameters(block) - laid.keys() - {f"{path}.weight" for path in instead}
        if lacking:
            name = prefix + min(lacking)
            raise ValueError(f"{model.source.label} lacks the tensor {name}; the checkpoint is incomplete")
        return LaidOut(laid, instead)

    def attentions(self) -> list[Attention]:
        """What a key-value cache has to know about each block's attention."""
        return self.skeleton.attentions(self._rest)

    def rotations(self, length: int) -> list[tuple[Tensor, Tensor]]:
        """Cosines and sines [length, channels] of each block's rotary embedding, from position 0."""
        return self.skeleton.rotations(length, self.dtype, self._rest)

    def run(
        self,
        block: int,
        laid: LaidOut,
        hidden: Float[Tensor, "batch seq hidden"],
        cache: CacheLike | None = None,
    ) -> Tensor:
        """One block's output for one batch; `cache`: what its keys and values go through."""
        shape = (hidden.shape[0], hidden.shape[1])
        if shape not in self._calls:
            self._calls[shape] = self.skeleton.block_calls(shape, self.dtype, self._rest)
        call = self._calls[shape][block]
        return self.skeleton.run_block(block, laid.tensors, hidden, call, cache, laid.products)

    def logits(
        self, hidden: Float[Tensor, "batch seq hidden"], head: Tensor, others: Mapping[str, Tensor] | None = None
    ) -> Float[Tensor, "batch seq vocab"]:
        """Logits of the last block's output.

        Args:
            hidden: that output.
            head: the unpacked projection [vocab, hidden], in `dtype`; gradients flow back to it.
            others: as for `embed`.
        """
        return self.skeleton.head(hidden, self._outside(self.model.family.head, head, others))

    def final(
        self, hidden: Float[Tensor, "batch seq hidden"], others: Mapping[str, Tensor] | None = None
    ) -> Float[Tensor, "batch seq final"]:
        """What the output projection reads, given the last block's output; `others` as for `embed`."""
        given = {self.model.family.module_name(key): tensor for key, tensor in (others or {}).items()}
        return self.skeleton.final(hidden, {**self._rest, **given})

    def edge_widths(self) -> dict[str, int]:
        """Features of each edge of a block."""
        model = self.model
        return {edge.name: model.shape(model.prefix(0) + edge.readers[0].name)[1] for edge in self.edges.values()}

    def reader_paths(self) -> dict[str, str]:
        """Submodule whose input is each slot's input, by slot name."""
        return {slot.name: self._path(slot) for slot in self.model.block_slots}

    def experts_path(self) -> str:
        """Submodule that holds a block's experts; "" where there are none."""
        paths = self.reader_paths()
        return next((paths[slot.name] for slot in self.model.block_slots if slot.expert is not None), "")

    def _outside(self, name: str, matrix: Tensor, others: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """What lies outside the blocks, by module name, with a matrix among it."""
        given = {**(others or {}), name: matrix}
        return {**self._rest, **{self.model.family.module_name(key): tensor for key, tensor in given.items()}}

    def _path(self, slot: Slot) -> str:
        if slot.param is not None:
            return slot.param.rsplit(".", 1)[0]
        prefix = self.model.prefix(0)
        return self.model.family.module_name(prefix + slot.name).removeprefix(prefix).removesuffix(".weight")


def products_of(weights: Mapping[str, Weight], dtype: torch.dtype) -> dict[str, Product]:
    """What those of some weights that round their inputs make of these, by name."""
    return {name: ready(weight, dtype).apply for name, weight in weights.items() if weight.quantizes_inputs}


def running_nbytes(model: Model, dtype: torch.dtype) -> int:
    """Bytes of a block that is about to run: its tensors as they are read, and laid out in the dtype it runs in."""
    return block_nbytes(model) * (model.dtype.itemsize + dtype.itemsize) // model.dtype.itemsize


def block_nbytes(model: Model, block: int = 0) -> int:
    """Bytes of a block's tensors when unpacked in the model's dtype."""
    names = [model.prefix(block) + slot.name for slot in model.block_slots] + model.others(block)
    return sum(prod(model.shape(name)) for name in names) * model.dtype.itemsize
