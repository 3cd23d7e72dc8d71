"""What is inside a model while it runs: noted in student and teacher, and compared pair of blocks by pair of blocks."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from decoct.arch.hf import CacheLike
from decoct.engine.record import record_outputs
from decoct.engine.runner import LaidOut, Runner
from decoct.losses import AttentionMaps, Projected, Relations, StateLoss, Targets
from decoct.model import Model
from decoct.training.objective import Objective

Place = tuple[int, str]
"""A block's number, and what of it: "states", which it puts out, "attention", "queries", "keys" or "values"."""

_ROLES = {"queries": "attn.q", "keys": "attn.k", "values": "attn.v"}


@dataclass(frozen=True, slots=True)
class Seen:
    """What a model made of a batch.

    Attributes:
        predictions: of the next tokens.
        inside: by place, what was wanted of it.
        exits: the student's predictions behind earlier blocks, by their numbers.
    """

    predictions: Targets
    inside: Mapping[Place, Tensor] = field(default_factory=dict)
    exits: Mapping[int, Projected] = field(default_factory=dict)


class Insides(nn.Module):
    """An objective's losses on inner states, with the matrices between widths that are learned beside the student.

    Attributes:
        student_wants: what has to be noted in the student.
        teacher_wants: what has to be noted in the teacher.
    """

    def __init__(self, objective: Objective, student: Model, teacher: Model | None) -> None:
        """Find the pairs.

        Raises:
            ValueError: there is no single teacher to compare with, or a model has no such states.
        """
        super().__init__()
        self._losses: list[tuple[float, StateLoss, list[tuple[int, int]]]] = []
        self._maps = nn.ParameterList()
        self._which: list[dict[str, int]] = []
        for weight, loss in objective.inner:
            if teacher is None:
                raise ValueError("losses on inner states need one teacher, which runs in every step (keep_teacher: 0)")
            _check(loss, student)
            _check(loss, teacher)
            pairs = loss.pairs(student.num_blocks, teacher.num_blocks)
            widths = _width(student, what_of(loss)), _width(teacher, what_of(loss))
            self._losses.append((weight, loss, pairs))
            learned = loss.maps(*widths, len(pairs))
            self._which.append({pair: len(self._maps) + i for i, pair in enumerate(learned)})
            self._maps.extend(nn.Parameter(matrix) for matrix in learned.values())
        wants = [(pair, what_of(loss)) for _, loss, pairs in self._losses for pair in pairs]
        self.student_wants = frozenset((pair[0], what) for pair, what in wants)
        self.teacher_wants = frozenset((pair[1], what) for pair, what in wants)

    @override
    def forward(
        self, own: Mapping[Place, Tensor], wanted: Mapping[Place, Tensor], weights: Float[Tensor, "batch seq"]
    ) -> Float[Tensor, ""]:
        """The weighted sum of the losses, given what was noted in both models; 0 without any."""
        total = torch.zeros(())
        for (weight, loss, pairs), which in zip(self._losses, self._which, strict=True):
            what = what_of(loss)
            maps = {pair: self._maps[number] for pair, number in which.items()}
            mine, theirs = [own[a, what] for a, _ in pairs], [wanted[b, what] for _, b in pairs]
            total = total + weight * loss(mine, theirs, weights, maps)
        return total

    def nbytes(self, student: Model, tokens: int, length: int) -> int:
        """Bytes, about, of what is noted of so many tokens in sequences of `length`, in both models, float32."""
        heads = _heads(student)
        places = self.student_wants | self.teacher_wants
        each = {what: (heads * length if what == "attention" else _width(student, "states")) for _, what in places}
        return sum(2 * 4 * tokens * each[what] for _, what in places)


def what_of(loss: StateLoss) -> str:
    """What a loss compares."""
    if isinstance(loss, AttentionMaps):
        return "attention"
    return loss.of if isinstance(loss, Relations) else "states"


class Noting:
    """Runs a model's blocks, and notes what is wanted of them on the way."""

    def __init__(self, runner: Runner, wants: Iterable[Place]) -> None:
        """Find where it is."""
        self._runner = runner
        self._wants: dict[int, tuple[str, ...]] = {}
        for block, what in sorted(wants):
            self._wants[block] = (*self._wants.get(block, ()), what)
        asked = {what for each in self._wants.values() for what in each}
        self._paths = {what: self._path(what) for what in asked if what != "states"}
        if "attention" in asked:
            runner.skeleton.keep_attention()

    def wants(self, block: int) -> tuple[str, ...]:
        """What is wanted of a block."""
        return self._wants.get(block, ())

    def run(self, block: int, laid: LaidOut, hidden: Tensor, cache: CacheLike | None = None) -> tuple[Tensor, ...]:
        """The block's output, then what is wanted of it, in the order of `wants`; `cache` as in `Runner.run`."""
        wants = self.wants(block)
        paths = {what: self._paths[what] for what in wants if what != "states"}
        if not paths:
            out = self._runner.run(block, laid, hidden, cache)
            return (out, *(out for _ in wants))
        with record_outputs(self._runner.skeleton.blocks[block], paths) as noted:
            out = self._runner.run(block, laid, hidden, cache)
        noted["states"] = out
        return (out, *(noted[what][1] if what == "attention" else noted[what] for what in wants))

    def _path(self, what: str) -> str:
        model, paths = self._runner.model, self._runner.reader_paths()
        if what == "attention":
            first = next(slot for slot in model.block_slots if slot.role.startswith("attn."))
            return paths[first.name].rsplit(".", 1)[0]
        return next(paths[slot.name] for slot in model.block_slots if slot.role == _ROLES[what])


def _check(loss: StateLoss, model: Model) -> None:
    """Refuse a model that has no such states."""
    if not isinstance(loss, Relations):
        return
    widths = [model.shape(model.prefix(0) + slot.name)[0] for slot in model.block_slots if slot.role == _ROLES[loss.of]]
    if not widths:
        raise ValueError(
            f"{model.source.label} computes queries, keys and values as one, so {loss.of} cannot be compared; take the "
            "loss attention_maps instead of relations"
        )
    if widths[0] % loss.num_heads:
        raise ValueError(
            f"num_heads {loss.num_heads} does not divide the {widths[0]} channels of the {loss.of} of "
            f"{model.source.label}; take a number that does"
        )


def _width(model: Model, what: str) -> int:
    return _heads(model) if what == "attention" else model.shape(model.family.embed)[1]


def _heads(model: Model) -> int:
    return int(model.config.get("num_attention_heads") or model.config["n_head"])
