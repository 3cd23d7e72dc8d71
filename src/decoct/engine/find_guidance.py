"""What each token weighs in guided statistics: mean squared gradients of the loss by groups of a layer's outputs.

The loss is the negative log-likelihood of labels that the model itself draws, summed over tokens: its squared gradients
are diagonal entries of the Fisher information by those outputs. Weights are found once, before the streamed pass, on
the model as it is then, and kept on disk: a pass that goes on after an interruption reads them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from decoct.engine.gradients import Sweep
from decoct.engine.guidance import Guidance, Layout
from decoct.engine.record import record_outputs
from decoct.engine.stream import Event, OnEvent
from decoct.methods.guided import group_means
from decoct.model import Model


@dataclass(frozen=True, slots=True)
class Finding:
    """Everything that finding token weights needs.

    Attributes:
        model: as the pass finds it.
        layout: the guided slots.
        tokens: calibration.
        dtype: what blocks run in.
        folder: for the weights, and for hidden states and gradients on the way.
        on_event: told of every block.
    """

    model: Model
    layout: Layout
    tokens: Int[Tensor, "sequences length"]
    dtype: torch.dtype
    folder: Path
    on_event: OnEvent


@torch.no_grad()
def find_guidance(todo: Finding) -> Guidance:
    """Find the weights, or go on where an earlier process stopped; nothing is run if it had them all.

    Raises:
        ValueError: gradients that are not finite.
    """
    model, last, first = todo.model, todo.model.num_blocks, todo.layout.first
    guidance = Guidance(todo.layout, (todo.tokens.shape[0], todo.tokens.shape[1]), todo.folder)
    sweep = Sweep(model, todo.tokens, todo.dtype, todo.folder)
    for part, number, seconds in sweep.backwards(first, partial(_find_block, sweep, guidance)):
        todo.on_event(Event(part, number, last - first + 1, None, seconds, 0))
    for block in range(-1, first - 1):  # what enters the blocks before the first guided one
        sweep.discard(block)
    return guidance


def _find_block(sweep: Sweep, guidance: Guidance, block: int) -> None:
    """The gradient by a block's input, and its token weights, on disk before the gradient counts as done."""
    groups = guidance.layout.groups[block]
    paths = sweep.runner.reader_paths()
    given, weights = sweep.given(block), guidance.file(block)
    if groups:
        weights.begin()
    module = sweep.runner.skeleton.blocks[block]
    with record_outputs(module, {name: paths[name] for name in groups}) as outputs:
        targets = partial(_in_order, outputs, tuple(groups))
        for row, slopes in enumerate(sweep.through_block(block, given, targets)):
            means = [group_means(g[0].float().square(), n) for g, n in zip(slopes, groups.values(), strict=True)]
            if means:
                weights.write(row, torch.cat(means, 1).unsqueeze(0))
    if groups:
        weights.commit(block)


def _in_order(outputs: Mapping[str, Tensor], names: tuple[str, ...]) -> list[Tensor]:
    return [outputs[name] for name in names]
