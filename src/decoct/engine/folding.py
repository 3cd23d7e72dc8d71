"""Channel scales folded into a block: what writes an edge is divided, what reads it multiplied, nothing else changes.

The identity behind SmoothQuant, AWQ and OmniQuant's equivalent transform: W·x = (W·diag(s))·(x / s). A norm's gain, or
the rows of a matrix whose output reaches the edge without meeting anything that depends on its size, take over 1 / s.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod

import torch
from jaxtyping import Float
from torch import Tensor

from decoct.arch import Norm, edges
from decoct.engine.block import Block, Step
from decoct.methods import EdgeScaling
from decoct.model import Model
from decoct.weights import Dense, Weight


@dataclass(frozen=True, slots=True)
class Fold:
    """An edge of a block whose channels can be rescaled; names are relative to the block.

    Attributes:
        edge: as slots spell it in `reads`.
        readers: slots that read it.
        norm: what writes it, or
        carrier: the slot whose rows do.
        width: channels of the edge.
        repeats: times that each of the carrier's heads appears in the edge (grouped-query attention).
        head: channels of a head.
    """

    edge: str
    readers: tuple[str, ...]
    norm: Norm | None
    carrier: str | None
    width: int
    repeats: int = 1
    head: int = 1

    def rows(self, scale: Float[Tensor, " width"]) -> Float[Tensor, " rows"]:
        """Per row of what writes the edge: the geometric mean over the channels that repeat it."""
        if self.repeats == 1:
            return scale
        return scale.log().reshape(-1, self.repeats, self.head).mean(1).exp().reshape(-1)

    def tie(self, scale: Float[Tensor, " width"]) -> Float[Tensor, " width"]:
        """The nearest scale that can be folded: channels that one row writes share theirs."""
        if self.repeats == 1:
            return scale
        return self.spread(self.rows(scale))

    def spread(self, rows: Float[Tensor, " rows"]) -> Float[Tensor, " width"]:
        """Of each channel, what its row has."""
        if self.repeats == 1:
            return rows
        return rows.reshape(-1, 1, self.head).expand(-1, self.repeats, -1).reshape(-1)


def folds(model: Model) -> tuple[Fold, ...]:
    """The edges of a model's blocks whose channels can be rescaled, in the order in which a block computes them."""
    prefix = model.prefix(0)
    norms = {norm.writes: norm for norm in model.family.norms(model.config)}
    carriers = {slot.carries: slot.name for slot in model.block_slots if slot.carries is not None}
    found = []
    for name, edge in edges(model.block_slots).items():
        readers = tuple(slot.name for slot in edge.readers)
        width = model.shape(prefix + readers[0])[1]
        if name in norms:
            found.append(Fold(name, readers, norms[name], None, width))
        elif name in carriers:
            repeats = width // model.shape(prefix + carriers[name])[0]
            head = model.family.head_size(model.config) if repeats > 1 else 1
            found.append(Fold(name, readers, None, carriers[name], width, repeats, head))
    return tuple(found)


def each_edge(method: EdgeScaling, found: tuple[Fold, ...]) -> Step:
    """Lift a method that chooses an edge's scales to a block; what lies outside the blocks stays as it is."""

    def step(block: Block) -> Block:
        if block.prefix is None:
            return block
        for each in found:
            stat = block.stats[each.edge][method.stat]
            matrices = [block.weights[block.prefix + name].unpack(torch.float32) for name in each.readers]
            try:
                scale = method.scale(matrices, stat, each.tie)
            except ValueError as error:
                raise ValueError(f"{block.label}, {each.edge}: {error}") from error
            block = fold(block, each, scale)
        return block

    return step


def fold(block: Block, each: Fold, scale: Float[Tensor, " width"]) -> Block:
    """The block with an edge's channels divided by `scale`.

    What writes the edge is changed first and rounded to its dtype; readers then take over exactly what it gave up, so a
    coarse norm gain costs nothing.

    Args:
        block: dense where the edge touches it.
        each: the edge.
        scale: positive, float32.

    Raises:
        ValueError: a scale that is not positive and finite.
    """
    if not (torch.isfinite(scale).all() and (scale > 0).all()):
        raise ValueError(f"{block.label}, {each.edge}: scales must be positive and finite; the calibration is damaged")
    assert block.prefix is not None
    prefix, vectors = block.prefix, dict(block.vectors)
    weights, original = dict(block.weights), dict(block.original)
    if each.norm is not None:
        gain = prefix + each.norm.name
        vectors[gain], exact = _divided(vectors[gain], scale, each.norm.offset)
        bias = gain.removesuffix("weight") + "bias"
        if bias in vectors:
            vectors[bias] = (vectors[bias].float() / exact).to(vectors[bias].dtype)
    else:
        assert each.carrier is not None
        name = prefix + each.carrier
        rows = each.rows(scale)
        exact = each.spread(rows)
        by_rows = _multiplied(rows.reciprocal().unsqueeze(1))
        weights[name], original[name] = _both(weights[name], original[name], by_rows)
        bias = name.removesuffix("weight") + "bias"
        if bias in vectors:
            vectors[bias] = (vectors[bias].float() / rows).to(vectors[bias].dtype)
    for reader in (prefix + name for name in each.readers):
        weights[reader], original[reader] = _both(weights[reader], original[reader], _multiplied(exact))
    stats = dict(block.stats)
    stats[each.edge] = {kind: stat.scaled(exact.reciprocal()) for kind, stat in stats[each.edge].items()}
    passage = None if block.passage is None else block.passage.with_vectors(vectors)
    return replace(block, weights=weights, original=original, vectors=vectors, stats=stats, passage=passage)


def _divided(gain: Tensor, scale: Tensor, offset: float) -> tuple[Tensor, Tensor]:
    """A gain divided by a scale, and by what it really was divided once rounded."""
    before = gain.float() + offset
    new = (before / scale - offset).to(gain.dtype)
    after = new.float() + offset
    fits = torch.isfinite(after) & ((after != 0) | (before == 0))  # else the dtype cannot hold it: leave it alone
    exact = torch.where(before == 0, scale, before / torch.where(fits & (after != 0), after, before))
    return torch.where(fits, new, gain), exact


def _multiplied(factor: Tensor) -> Callable[[Weight], Weight]:
    def apply(weight: Weight) -> Weight:
        if not isinstance(weight, Dense):
            raise TypeError(f"a {weight.kind} weight cannot be rescaled; planning refuses it")
        return Dense.of((weight.values.float() * factor).to(weight.dtype))

    return apply


def _both(weight: Weight, original: Weight, change: Callable[[Weight], Weight]) -> tuple[Weight, Weight]:
    """A slot's current and first weight, changed alike; where they are one, so they stay."""
    changed = change(weight)
    return changed, changed if original is weight else change(original)


def check_foldable(model: Model, method: EdgeScaling) -> None:
    """Refuse a model in which nothing can be rescaled.

    Raises:
        ValueError: no edge of the family can take scales, or widths do not fit the method.
    """
    found = folds(model)
    if not found:
        raise ValueError(f"no edge of a {model.family.name} block can be rescaled; leave that step out")
    for each in found:
        for reader in each.readers:
            try:
                method.check((model.shape(model.prefix(0) + reader)[0], each.width))
            except ValueError as error:
                raise ValueError(f"{model.prefix(0)}{reader}: {error}") from error


def touched(model: Model) -> set[str]:
    """Slots, relative to their block, that folding changes: they must still be dense."""
    found = folds(model)
    return {name for each in found for name in each.readers} | {each.carrier for each in found if each.carrier}


def folding_operations(model: Model, method: EdgeScaling) -> float:
    """Floating-point operations of choosing all scales, roughly; for the planner's estimate."""
    total = 0.0
    for each in folds(model):
        out = sum(prod(model.shape(model.prefix(0) + name)) for name in each.readers) // each.width
        total += method.operations((out, each.width))
    return total * model.num_blocks
