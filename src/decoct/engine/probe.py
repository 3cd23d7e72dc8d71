"""What a model would be without some of its blocks: many candidates side by side, in one pass over the checkpoint."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import ceil, inf, isfinite, pi, prod

import torch
from jaxtyping import Float, Int
from torch import Tensor

from decoct.engine.runner import LaidOut, Runner
from decoct.engine.shallow import SUBLAYERS, merged, slots_of
from decoct.methods.depth import Cut, Cuts, Part
from decoct.model import Model
from decoct.ops.divergence import kl_of

_MOST_COMPARED = 4096  # tokens whose predictions are compared, spaced evenly
_LOGITS_AT_ONCE = 1 << 24

States = Float[Tensor, "sequences length hidden"]

Measured = dict[tuple[Cuts, int], float]
"""Losses by what is taken out, and on how many sequences."""


@dataclass(frozen=True)
class ModelProbe:
    """Answers a depth method's questions; see `methods.depth.Probe`.

    Attributes:
        model: whole.
        tokens: calibration.
        dtype: what blocks run in.
        at_once: candidates whose hidden states are in memory at a time.
        known: losses, those that an earlier process measured included; grows.
        measured: told of every batch of losses as it becomes known.
    """

    model: Model
    tokens: Int[Tensor, "sequences length"]
    dtype: torch.dtype
    at_once: int
    known: Measured = field(default_factory=dict)
    measured: Callable[[Measured], None] = field(default=lambda _: None)

    @property
    def num_blocks(self) -> int:
        """The model's."""
        return self.model.num_blocks

    @property
    def num_sequences(self) -> int:
        """Calibration sequences."""
        return len(self.tokens)

    def share(self, cut: Cut) -> float:
        """What a cut takes out, in blocks."""
        sizes = {part: sum(self._entries(slot.name) for slot in slots_of(self.model, part)) for part in SUBLAYERS}
        return 1.0 if cut.part == "block" else sizes[cut.part] / sum(sizes.values())

    def influences(self) -> list[float]:
        """See Probe."""
        found = []
        for before, after in self._spans(1):
            found.append(float(1.0 - _cosines(before, after).mean()))
        return found

    def angles(self, span: int) -> list[float]:
        """See Probe."""
        return [float(_cosines(x, y).clamp(-1, 1).arccos().mean()) / pi for x, y in self._spans(span)]

    def losses(self, candidates: Sequence[Cuts], num_sequences: int | None = None) -> list[float]:
        """See Probe; only every so many tokens are compared, 4096 at most. What is not finite counts as infinite.

        Raises:
            ValueError: the model's own predictions are not finite.
        """
        asked = [merged(cuts) for cuts in candidates]
        count = min(num_sequences or self.num_sequences, self.num_sequences)
        new = [cuts for cuts in dict.fromkeys(asked) if (cuts, count) not in self.known]
        for start in range(0, len(new), self.at_once):
            some = new[start : start + self.at_once]
            losses = self._divergences(self._final_states(some, count))
            found = {(cuts, count): loss if isfinite(loss) else inf for cuts, loss in zip(some, losses, strict=True)}
            self.known.update(found)
            self.measured(found)
        return [self.known[cuts, count] for cuts in asked]

    @cached_property
    def _runner(self) -> Runner:
        return Runner(self.model, self.dtype)

    @cached_property
    def _final(self) -> States:
        """What leaves the whole model's last block."""
        (states,) = self._final_states([frozenset()], self.num_sequences)
        if not torch.isfinite(states.sum()):
            raise ValueError("the model's hidden states are not finite; the checkpoint or the text is damaged")
        return states

    def _embedded(self, num_sequences: int) -> States:
        table = self.model.weight(self.model.family.embed).unpack(self.dtype)
        return self._runner.embed_all(self.tokens[:num_sequences], table)

    def _blocks(self) -> Iterator[tuple[int, LaidOut]]:
        """Every block, laid out, the next one being read ahead."""
        model = self.model
        for block in range(model.num_blocks):
            names = [model.prefix(block) + slot.name for slot in model.block_slots]
            laid = self._runner.lay_out(block, {name: model.weight(name) for name in names})
            model.prefetch(block + 1)
            yield block, laid

    def _spans(self, span: int) -> Iterator[tuple[States, States]]:
        """What enters and what leaves each run of `span` blocks of the whole model."""
        window = deque([self._embedded(self.num_sequences)], maxlen=span + 1)
        for block, laid in self._blocks():
            window.append(self._run(block, laid, window[-1]))
            if len(window) > span:
                yield window[0], window[-1]

    def _final_states(self, candidates: Sequence[Cuts], num_sequences: int) -> list[States]:
        """What leaves the last block, for each candidate; what they have in common is computed once."""
        trunk, common = self._embedded(num_sequences), frozenset.intersection(*candidates)
        apart: dict[int, States] = {}
        for block, laid in self._blocks():
            variants: dict[Part | None, LaidOut] = {None: laid}
            for number, cuts in enumerate(candidates):
                here = _parts(cuts, block)
                if number not in apart and here == _parts(common, block):
                    continue
                apart[number] = self._past(block, variants, here, apart.get(number, trunk))
            if len(apart) < len(candidates):
                trunk = self._past(block, variants, _parts(common, block), trunk)
        return [apart.get(number, trunk) for number in range(len(candidates))]

    def _past(self, block: int, variants: dict[Part | None, LaidOut], parts: frozenset[Part], states: States) -> States:
        """States behind a block, without some parts of it."""
        if "block" in parts:
            return states
        part = next(iter(parts), None)
        if part not in variants:
            assert part is not None
            variants[part] = self._without(variants[None], part)
        return self._run(block, variants[part], states)

    def _run(self, block: int, laid: LaidOut, states: States) -> States:
        size = self._runner.batch_size(*states.shape[:2])
        out = torch.empty_like(states)
        for start in range(0, len(states), size):
            out[start : start + size] = self._runner.run(block, laid, states[start : start + size])
        return out

    def _without(self, laid: LaidOut, part: Part) -> LaidOut:
        """The block with a sublayer that adds nothing to the residual stream."""
        paths, tensors, products = self._runner.reader_paths(), dict(laid.tensors), dict(laid.products)
        for slot in slots_of(self.model, part):
            if slot.writes != "resid":
                continue
            path = paths[slot.name]
            products.pop(path, None)
            key = slot.param or f"{path}.weight"
            shape = self.model.shape(self.model.prefix(0) + slot.name)
            tensors[key] = torch.zeros_like(tensors[key]) if key in tensors else torch.zeros(shape, dtype=self.dtype)
            if f"{path}.bias" in tensors:
                tensors[f"{path}.bias"] = torch.zeros_like(tensors[f"{path}.bias"])
        return replace(laid, tensors=tensors, products=products)

    def _divergences(self, finals: Sequence[States]) -> list[float]:
        """Mean KL(whole ‖ candidate), nats a token; candidates' states may be of the first sequences alone."""
        model = self.model
        head = model.weight(model.end_slots[-1].name).unpack(self.dtype)
        count = finals[0].shape[:2].numel()
        picked = torch.arange(0, count, ceil(count / _MOST_COMPARED))
        step = max(1, _LOGITS_AT_ONCE // head.shape[0])
        totals = torch.zeros(len(finals), dtype=torch.float64)
        for start in range(0, len(picked), step):
            some = picked[start : start + step]
            wanted = self._logits(self._final, some, head)
            for number, states in enumerate(finals):
                totals[number] += kl_of(self._logits(states, some, head), wanted).sum()
        return [value / len(picked) for value in totals.tolist()]

    def _logits(self, states: States, some: Int[Tensor, " tokens"], head: Tensor) -> Float[Tensor, "tokens vocab"]:
        rows = states.reshape(-1, states.shape[-1])[some]
        return self._runner.logits(rows.unsqueeze(0), head)[0]

    def _entries(self, slot: str) -> int:
        return prod(self.model.shape(self.model.prefix(0) + slot))


def _parts(cuts: Cuts, block: int) -> frozenset[Part]:
    """What of a block is taken out."""
    return frozenset(cut.part for cut in cuts if cut.block == block)


def _cosines(x: States, y: States) -> Float[Tensor, "sequences length"]:
    """Of each token's hidden states."""
    similarity = torch.nn.functional.cosine_similarity
    found = torch.stack([similarity(a.double(), b.double(), dim=-1) for a, b in zip(x, y, strict=True)])
    if not torch.isfinite(found).all():
        raise ValueError("the model's hidden states are not finite; the checkpoint or the text is damaged")
    return found
