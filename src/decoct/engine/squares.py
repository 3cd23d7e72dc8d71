"""Squares of what every matrix reads, summed over a text: the diagonal of second moments, one block at a time."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from jaxtyping import Int
from torch import Tensor

from decoct.engine.activations import Activations
from decoct.engine.budget import Budget
from decoct.engine.record import record
from decoct.engine.runner import Runner
from decoct.model import Model
from decoct.stats import ColumnNorm

_SHARE = 0.25  # of the memory that may be used, for the hidden states; more of them go to a file


@torch.no_grad()
def gather_squares(
    model: Model,
    tokens: Int[Tensor, "sequences length"],
    dtype: torch.dtype,
    folder: Path,
    on_progress: Callable[[int, int], None],
) -> dict[str, ColumnNorm]:
    """Sums of squares of each input feature of every matrix but the embedding, by full name.

    Args:
        model: as it is run; compressed matrices as they are.
        tokens: the text.
        dtype: what blocks run in.
        folder: where hidden states lie for a while if they are too large for memory.
        on_progress: told how many blocks of how many are done.

    Returns:
        A statistic for each slot; one with `num_tokens` 0 where no token came, as to an expert that none was sent to.
    """
    runner, found = Runner(model, dtype), dict[str, ColumnNorm]()
    wanted = {slot.reads: frozenset({ColumnNorm}) for slot in model.block_slots}
    with _states(runner, tokens, folder) as (states, in_file):
        size = runner.batch_size(*tokens.shape)
        for block in range(model.num_blocks):
            names = {slot.name: model.prefix(block) + slot.name for slot in model.block_slots}
            laid = runner.lay_out(block, {name: model.weight(name) for name in names.values()})
            model.prefetch(block + 1)
            module = runner.skeleton.blocks[block]
            if in_file:
                states.begin()
            with record(module, runner.edges, wanted, runner.edge_widths(), runner.reader_paths()) as recorder:
                for start in range(0, len(tokens), size):
                    states.write(start, runner.run(block, laid, states.read(start, start + size)))
            if in_file:
                states.commit(block + 1)
                states.discard(block)
            found |= {names[slot.name]: recorder.stats[slot.reads][ColumnNorm] for slot in model.block_slots}
            on_progress(block + 1, model.num_blocks)
        if not model.tied:
            found[model.family.head] = _of_head(runner, states, size)
    return found


def _of_head(runner: Runner, states: Activations, size: int) -> ColumnNorm:
    """What the output projection reads."""
    stat = ColumnNorm.empty(runner.model.shape(runner.model.family.head)[1])
    for start in range(0, states.shape[0], size):
        stat.add(runner.final(states.read(start, start + size)).flatten(0, 1))
    return stat


@contextmanager
def _states(runner: Runner, tokens: Tensor, folder: Path) -> Iterator[tuple[Activations, bool]]:
    """What enters the first block, and whether it lies in a file; removed afterwards."""
    table = runner.model.weight(runner.model.family.embed).unpack(runner.dtype)
    shape = (len(tokens), tokens.shape[1], int(runner.model.config["hidden_size"]))
    in_file = prod(shape) * runner.dtype.itemsize > _SHARE * Budget().host_limit()
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder, prefix=".states-") as place:
        states = Activations(Path(place), shape, runner.dtype, in_memory=not in_file)
        if in_file:
            states.begin()
        for row in range(len(tokens)):
            states.write(row, runner.embed(tokens[row : row + 1], table))
        if in_file:
            states.commit(0)
        yield states, in_file
