"""A second look at a block in the middle of its step: what its matrices read once the first part has done its work."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import torch

from decoct.engine.activations import Activations
from decoct.engine.block import Block, Stats
from decoct.engine.record import Wanted, record
from decoct.engine.reshaped import Reshaped
from decoct.engine.runner import Runner


@dataclass(frozen=True, slots=True)
class Halfway:
    """Runs blocks of which only the first part is done.

    Attributes:
        runner: of the model of such blocks.
        wanted: statistics that the second part reads.
    """

    runner: Runner
    wanted: Wanted

    @classmethod
    def of(cls, becomes: Reshaped, dtype: torch.dtype) -> Self | None:
        """None if the step does not look twice."""
        found = becomes.halfway()
        return None if found is None else cls(Runner(found[0], dtype), found[1])

    def stats(self, number: int, states: Activations, batches: Iterable[tuple[int, int]], block: Block) -> Stats:
        """Run the calibration through a block as the first part left it.

        Args:
            number: of the block.
            states: what enters it.
            batches: first sequence of each batch, and the one after its last.
            block: with the weights and vectors that it has by now.
        """
        runner = self.runner
        laid = runner.lay_out(number, block.weights, block.vectors)
        module = runner.skeleton.blocks[number]
        with record(module, runner.edges, self.wanted, runner.edge_widths(), runner.reader_paths()) as recorder:
            for start, stop in batches:
                runner.run(number, laid, states.read(start, stop))
        return recorder.stats
