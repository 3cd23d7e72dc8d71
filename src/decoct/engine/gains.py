"""Norms' gains, refitted after what reads them has changed: no matrix is touched, nothing is added."""

from collections.abc import Sequence
from dataclasses import replace
from math import prod

import torch
from jaxtyping import Float
from torch import Tensor

from decoct.engine.block import Block, Step
from decoct.engine.folding import Fold, folds
from decoct.engine.rules import Assignment, Resolved
from decoct.methods import BlockMethod, GainRefit
from decoct.model import Model


def normed(model: Model) -> tuple[Fold, ...]:
    """The edges of a block that a norm writes, and that its matrices read."""
    return tuple(each for each in folds(model) if each.norm is not None)


def each_gain(method: GainRefit, found: tuple[Fold, ...]) -> Step:
    """Lift a method that refits gains to a block; what lies outside the blocks stays as it is."""

    def step(block: Block) -> Block:
        if block.prefix is None:
            return block
        vectors = dict(block.vectors)
        for each in found:
            names = [block.prefix + reader for reader in each.readers]
            if all(block.weights[name] is block.original[name] for name in names):
                continue
            became, was = (
                [weights[name].unpack(torch.float32) for name in names] for weights in (block.weights, block.original)
            )
            try:
                factors = method.factors(became, was, block.stats[each.edge][method.stat])
            except ValueError as error:
                raise ValueError(f"{block.label}, {each.edge}: {error}") from error
            assert each.norm is not None
            gain = block.prefix + each.norm.name
            vectors[gain] = _times(vectors[gain], factors, each.norm.offset)
            bias = gain.removesuffix("weight") + "bias"
            if bias in vectors:
                vectors[bias] = _times(vectors[bias], factors, 0.0)
        return replace(block, vectors=vectors)

    return step


def _times(vector: Tensor, factors: Float[Tensor, " width"], offset: float) -> Tensor:
    """A gain times some factors, where its dtype can hold that."""
    new = ((vector.float() + offset) * factors - offset).to(vector.dtype)
    return torch.where(torch.isfinite(new), new, vector)


def check_gains(model: Model, stages: Sequence[Sequence[Resolved]]) -> None:
    """Refuse to refit the gains of norms whose readers have not changed, or where other steps would not see it.

    Raises:
        ValueError: such a step; says where it belongs.
    """
    for steps in stages:
        for number, step in enumerate(steps):
            if not isinstance(step, GainRefit):
                continue
            if not normed(model) or any(slot.expert is not None for slot in model.block_slots):
                raise ValueError(
                    f"no norm of a {model.family.name} model is read by matrices alone that all tokens pass; leave "
                    "norm_tweaking out"
                )
            if not any(isinstance(each, Assignment | BlockMethod) for each in steps[:number]):
                raise ValueError(
                    "norm_tweaking makes up for the steps before it, and there is none; put it behind them"
                )
            if number + 1 < len(steps):
                raise ValueError("norm_tweaking changes what matrices read; put it last in its list of steps")


def gain_operations(model: Model) -> float:
    """Floating-point operations of refitting all gains, roughly; for the planner's estimate."""
    total = 0.0
    for each in normed(model):
        entries = sum(prod(model.shape(model.prefix(0) + name)) for name in each.readers)
        total += 2 * (4.0 * entries * each.width + each.width**3)  # in float64, which takes twice as long
    return total * model.num_blocks


def gain_workspace(model: Model) -> int:
    """Bytes that refitting one norm's gain takes: its readers twice in float32 and one in float64; four squares."""
    most = 0
    for each in normed(model):
        sizes = [prod(model.shape(model.prefix(0) + name)) for name in each.readers]
        most = max(most, 8 * sum(sizes) + 16 * max(sizes) + 5 * 8 * each.width**2)
    return most
