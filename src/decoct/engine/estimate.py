"""How much memory and time a streamed pass takes, from shapes and from what methods say of themselves."""

from dataclasses import dataclass
from math import prod

import torch

from decoct.engine.budget import product_rate
from decoct.engine.data import Data
from decoct.engine.folding import folding_operations, folds
from decoct.engine.gains import gain_operations, gain_workspace, normed
from decoct.engine.rehearse import Chains, linear
from decoct.engine.rotate import rotation_operations, rotation_workspace, signs_nbytes
from decoct.engine.rules import Method, statistic
from decoct.methods import BlockMethod, EdgeScaling, GainRefit
from decoct.model import Model

_TOKENS_AT_ONCE = 2048


@dataclass(frozen=True, slots=True)
class Work:
    """A pass, resolved.

    Attributes:
        model: what is compressed.
        chains: each slot's methods.
        scalings: steps that rescale edges.
        refits: whether a step refits norms' gains.
        paired: whether a second chain of hidden states runs.
        data: calibration; None if nothing needs any.
        dtype: what blocks run in.
    """

    model: Model
    chains: Chains
    scalings: tuple[EdgeScaling, ...]
    refits: bool
    paired: bool
    data: Data | None
    dtype: torch.dtype


def peak_part(work: Work) -> int:
    """Bytes that the most demanding part (a block, the embedding, lm_head) takes while it is worked on."""
    return max(_block(work), _ends(work))


def time_taken(work: Work) -> float:
    """Seconds: the forward passes, the statistics, and the methods' own work, at the rate that products reach here."""
    model, chains, data = work.model, work.chains, work.data
    solving = sum(m.operations(_matrix(model, name)) for name, methods in chains.items() for m in linear(methods))
    solving += sum(folding_operations(model, step) for step in work.scalings) + rotation_operations(model)
    solving += gain_operations(model) if work.refits else 0.0
    full = product_rate(torch.float32)
    seconds = solving / full + 2 * model.nbytes / 1e9
    if data is not None:
        rate = product_rate(work.dtype)
        entries = sum(prod(model.shape(n)) for n, slot in model.slots().items() if not slot.protected)
        squares = sum(width**2 for width in _edge_widths(model).values()) * model.num_blocks
        whole = {m for methods in chains.values() for m in methods if isinstance(m, BlockMethod)}
        block = round(entries / model.num_blocks)
        learning = sum(m.operations(block, data.num_sequences, data.sequence_length) for m in whole) * model.num_blocks
        passes = 3 if work.paired else 2  # with a second chain, of the model as it was
        seconds += learning / (0.4 * rate)
        seconds += data.num_tokens * (2 * passes * entries / (0.6 * rate) + squares / full)
    return float(seconds)


def _block(work: Work) -> int:
    model, data, prefix = work.model, work.data, work.model.prefix(0)
    slots = {prefix + slot.name: slot for slot in model.block_slots}
    entries = sum(prod(model.shape(name)) for name in slots)
    blocks = f"{model.family.blocks}."
    inside = {name: linear(chain) for name, chain in work.chains.items() if name.startswith(blocks)}
    workspace = max((_working(model, name, m) for name, chain in inside.items() for m in chain), default=0)
    workspace = max(workspace, *(rotation_workspace(model, slot, _matrix(model, name)) for name, slot in slots.items()))
    needed = entries * model.dtype.itemsize + int(entries * 1.25)
    if data is None:
        return needed + workspace
    widths = sum(sum(model.shape(name)) for name, slot in slots.items() if slot.expert in (None, 0))
    # A block kept for its gradient holds each matrix's input and output, and as much again between them.
    sequence = 4 * data.sequence_length * widths * work.dtype.itemsize
    whole = {m for chain in work.chains.values() for m in chain if isinstance(m, BlockMethod)}
    stacked = [(sum(model.shape(prefix + n)[0] for n in each.readers), each.width) for each in folds(model)]
    workspace = max(
        workspace,
        *(m.workspace(entries, sequence) for m in whole),
        *(step.workspace(shape) for step in work.scalings for shape in stacked),
        gain_workspace(model) if work.refits else 0,
    )
    running = entries * work.dtype.itemsize + _TOKENS_AT_ONCE * widths * 4
    copies = 1 + bool(work.scalings)  # a rescaled block and its statistics stand beside what they were
    needed += entries * model.dtype.itemsize * (copies - 1)
    return needed + workspace + copies * _statistics(work) + running


def _working(model: Model, name: str, method: Method) -> int:
    """Bytes that a method takes on a matrix, and those of the statistic of its inputs where these are rotated."""
    shape = _matrix(model, name)
    needed = method.workspace(shape)
    if method.stat is not None and signs_nbytes(model, model.slot(name), 1):
        needed += 4 * method.stat.nbytes_for(shape[1])
    return needed


def _statistics(work: Work) -> int:
    """Bytes of all statistics of a block."""
    model = work.model
    slots = {model.prefix(b) + slot.name: slot for b in range(model.num_blocks) for slot in model.block_slots}
    inside = {name: linear(chain) for name, chain in work.chains.items() if name in slots}
    kinds = {(slots[name].reads, statistic(m, slots[name])) for name, chain in inside.items() for m in chain}
    kinds |= {(each.edge, step.stat) for each in folds(model) for step in work.scalings}
    kinds |= {(each.edge, GainRefit.stat) for each in normed(model)} if work.refits else set()
    widths = _edge_widths(model)
    return sum(kind.nbytes_for(widths[edge]) for edge, kind in kinds if kind is not None)


def _ends(work: Work) -> int:
    """The larger of embedding and lm_head."""
    model, most = work.model, 0
    for slot in model.end_slots:
        size = prod(model.shape(slot.name))
        extra = max((m.workspace(_matrix(model, slot.name)) for m in linear(work.chains[slot.name])), default=0)
        extra = max(extra, rotation_workspace(model, slot, _matrix(model, slot.name)))
        unpacked = 0 if work.data is None else size * work.dtype.itemsize
        most = max(most, size * model.dtype.itemsize + unpacked + extra)
    return most


def _matrix(model: Model, name: str) -> tuple[int, int]:
    out, cols = model.shape(name)
    return out, cols


def _edge_widths(model: Model) -> dict[str, int]:
    return {slot.reads: model.shape(model.prefix(0) + slot.name)[1] for slot in model.block_slots}
