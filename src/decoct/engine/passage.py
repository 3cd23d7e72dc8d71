"""Calibration through one block, for methods that run it: inputs as compressed, targets as they were."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from decoct.engine.activations import Activations
from decoct.engine.runner import Runner


@dataclass(frozen=True, slots=True)
class BlockPassage:
    """See `decoct.methods.Passage`."""

    runner: Runner
    block: int
    states: Activations
    reference: Activations
    vectors: Mapping[str, Tensor]

    def with_vectors(self, vectors: Mapping[str, Tensor]) -> "BlockPassage":
        """The same with other norms and biases."""
        return replace(self, vectors=vectors)

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
        return self.runner.run(self.block, self.runner.lay_out_matrices(self.block, matrices, self.vectors), x)
