"""Calibration through one block, for methods that run it: inputs as compressed, targets as they were."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from decoct.engine.activations import Activations
from decoct.engine.runner import Runner, products_of
from decoct.weights import Weight


@dataclass(frozen=True, slots=True)
class BlockPassage:
    """See `decoct.methods.Passage`.

    Attributes:
        runner: of the model.
        block: its number.
        states: what enters the block in the model as compressed so far.
        reference: what left it in the model as it was.
        vectors: its norms and biases.
        applied: weights that round their inputs, by full name: they run as they are, whatever matrix is given.
    """

    runner: Runner
    block: int
    states: Activations
    reference: Activations
    vectors: Mapping[str, Tensor]
    applied: Mapping[str, Weight] = field(default_factory=dict)

    def with_vectors(self, vectors: Mapping[str, Tensor]) -> "BlockPassage":
        """The same with other norms and biases."""
        return replace(self, vectors=vectors)

    def with_weights(self, weights: Mapping[str, Weight]) -> "BlockPassage":
        """The same for a block in which earlier steps made these weights."""
        return replace(self, applied={name: weight for name, weight in weights.items() if weight.quantizes_inputs})

    @property
    def num_sequences(self) -> int:
        """Calibration sequences."""
        return self.states.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """What the block runs in."""
        return self.runner.dtype

    def inputs(self, start: int, stop: int) -> Float[Tensor, "batch seq hidden"]:
        """What the compressed blocks so far give."""
        return self.states.read(start, stop)

    def targets(self, start: int, stop: int) -> Float[Tensor, "batch seq hidden"]:
        """What the uncompressed block gave."""
        return self.reference.read(start, stop)

    def run(
        self, matrices: Mapping[str, Float[Tensor, "out in"]], x: Float[Tensor, "batch seq hidden"]
    ) -> Float[Tensor, "batch seq hidden"]:
        """The block's output."""
        products = products_of(self.applied, self.runner.dtype)
        plain = {name: matrix for name, matrix in matrices.items() if name not in self.applied}
        return self.runner.run(self.block, self.runner.lay_out_matrices(self.block, plain, self.vectors, products), x)
