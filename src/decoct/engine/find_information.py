"""How much the loss depends on each neuron and head: the Fisher information of a factor on what it puts out.

Found once, before blocks are narrowed, on the whole model, and kept on disk: a run that is interrupted reads it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from decoct.engine.gradients import Sweep
from decoct.engine.narrow import Trunk
from decoct.engine.record import record_inputs
from decoct.engine.stream import Event, OnEvent
from decoct.model import Model
from decoct.store import open_safetensors, save_safetensors

Information = list[dict[str, Float[Tensor, " units"]]]
"""For every block, by edge."""


@dataclass(frozen=True, slots=True)
class Informing:
    """Everything that finding it needs.

    Attributes:
        model: whole.
        trunks: the edges whose units are looked at.
        tokens: calibration.
        dtype: what blocks run in.
        folder: for what is found.
        scratch: for hidden states and gradients on the way.
        on_event: told of every block.
    """

    model: Model
    trunks: tuple[Trunk, ...]
    tokens: Int[Tensor, "sequences length"]
    dtype: torch.dtype
    folder: Path
    scratch: Path
    on_event: OnEvent


@torch.no_grad()
def find_information(todo: Informing) -> Information:
    """Find it, or go on where an earlier process stopped; nothing is run if it was found.

    Raises:
        ValueError: gradients that are not finite.
    """
    model, last = todo.model, todo.model.num_blocks
    if not all(_file(todo, block).exists() for block in range(last)):
        sweep = Sweep(model, todo.tokens, todo.dtype, todo.scratch)
        for part, number, seconds in sweep.backwards(0, partial(_find_block, todo, sweep)):
            todo.on_event(Event(part, number, last + 1, None, seconds, 0))
        sweep.discard(-1)
    saved = [open_safetensors(_file(todo, block)) for block in range(last)]
    return [{edge: each.read(edge) for edge in each.tensors} for each in saved]


def _find_block(todo: Informing, sweep: Sweep, block: int) -> None:
    """A block's information, on disk before the gradient by its input counts as done."""
    paths, trunks = sweep.runner.reader_paths(), todo.trunks
    found = {trunk.edge: torch.zeros(trunk.num_units, dtype=torch.float64) for trunk in trunks}
    with record_inputs(sweep.runner.skeleton.blocks[block], {t.edge: paths[t.reader.name] for t in trunks}) as read:

        def targets() -> Sequence[Tensor]:
            return [read[trunk.edge] for trunk in trunks]

        for slopes in sweep.through_block(block, sweep.given(block), targets):
            for trunk, slope in zip(trunks, slopes, strict=True):
                by_channel = (slope.double() * read[trunk.edge].double()).flatten(0, -2).sum(0)
                found[trunk.edge] += by_channel.reshape(trunk.num_units, trunk.unit).sum(1).square()
    save_safetensors(_file(todo, block), {edge: total.float() for edge, total in found.items()}, {})


def _file(todo: Informing, block: int) -> Path:
    return todo.folder / f"information-{block:05d}.safetensors"
