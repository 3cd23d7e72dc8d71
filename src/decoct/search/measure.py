"""True divergences of choices: the model is run with candidates in its slots, many choices side by side."""

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from decoct.engine.gradients import LOGITS_AT_ONCE
from decoct.engine.runner import Runner
from decoct.ops.divergence import kl_of
from decoct.search.candidates import Candidates
from decoct.search.settings import Level
from decoct.search.target import Choice, Target

STATES_BYTES = 1 << 29
"""Of the hidden states that are held side by side, before a block and after it."""

_Levels = tuple[Level | None, ...]
"""Of some slots; None: uncompressed."""

_Run = Callable[[_Levels, Tensor | None], Tensor]

_State = tuple[int, _Levels]
"""A state that the embedding or a block leads to: the one before it, and the levels of the matrices passed through."""


class Measurer:
    """The uncompressed model's last hidden states, and everything that is needed to compare others with them."""

    def __init__(self, target: Target, candidates: Candidates, tokens: Int[Tensor, "sequences length"]) -> None:
        """Take the tokens that all measurements are made on; nothing is run yet."""
        self._model, self._candidates, self._tokens = target.model, candidates, tokens
        self._searched = set(target.names)
        self._runner = Runner(self._model, torch.float32)
        self._base: Tensor | None = None
        width = self._model.shape(self._model.family.embed)[1]
        self._sequence_bytes = 4 * tokens.shape[1] * width

    @torch.no_grad()
    def divergences(self, choices: Sequence[Choice], num_sequences: int) -> list[float]:
        """KL(uncompressed ‖ chosen) of each choice, mean over the tokens of the first sequences, nats.

        Choices that agree on the first blocks share the work of running these.

        Args:
            choices: levels by slot name; slots that are absent stay uncompressed.
            num_sequences: how many of the sequences to run.
        """
        if self._base is None:
            ((_, self._base),) = self._last_states([{}], len(self._tokens))
        at_once = max(1, STATES_BYTES // (2 * num_sequences * self._sequence_bytes))
        found: list[float] = []
        for start in range(0, len(choices), at_once):
            some = choices[start : start + at_once]
            states = dict(self._last_states(some, num_sequences))
            found += [self._divergence(states[number], choice, num_sequences) for number, choice in enumerate(some)]
        return found

    def _last_states(self, choices: Sequence[Choice], num_sequences: int) -> list[tuple[int, Tensor]]:
        """What leaves the last block, by the choice's number."""
        model, tokens = self._model, self._tokens[:num_sequences]
        embed = model.family.embed
        at = [0] * len(choices)
        states: dict[int, Tensor] = {}

        def advance(names: Sequence[str], run: _Run) -> None:
            """Replace every choice's state; `run` is called once for each that differs."""
            nonlocal states
            keys: list[_State] = [
                (before, tuple(choice.get(name) for name in names)) for before, choice in zip(at, choices, strict=True)
            ]
            # Those with the same matrices one after another, so that these are unpacked once.
            order = sorted(dict.fromkeys(keys), key=lambda key: (tuple(level or 0 for level in key[1]), key[0]))
            left = [key[0] for key in order]
            made: dict[_State, Tensor] = {}
            for number, key in enumerate(order):
                made[key] = run(key[1], states.get(key[0]))
                if key[0] not in left[number + 1 :]:
                    states.pop(key[0], None)
            numbers = {key: number for number, key in enumerate(order)}
            states = {numbers[key]: state for key, state in made.items()}
            at[:] = [numbers[key] for key in keys]

        advance([embed], lambda levels, _: self._embedded(tokens, levels[0]))
        for block in range(model.num_blocks):
            names = [model.prefix(block) + slot.name for slot in model.block_slots]
            advance(names, _BlockRun(self, block, names))
        return [(number, states[state]) for number, state in enumerate(at)]

    def _embedded(self, tokens: Tensor, level: Level | None) -> Tensor:
        table = self.matrix(self._model.family.embed, level)
        return self._runner.embed_all(tokens, table)

    def _divergence(self, state: Float[Tensor, "sequences length hidden"], choice: Choice, num_sequences: int) -> float:
        assert self._base is not None
        name = self._model.end_slots[-1].name
        base_head, head = self.matrix(name, None), self.matrix(name, choice.get(name))
        at_once = max(1, LOGITS_AT_ONCE // head.shape[0])
        total = 0.0
        for base, own in zip(self._base[:num_sequences], state, strict=True):
            for start in range(0, len(own), at_once):
                part = slice(start, start + at_once)
                wanted = self._runner.logits(base[part].unsqueeze(0), base_head)[0]
                found = self._runner.logits(own[part].unsqueeze(0), head)[0]
                total += float(kl_of(found, wanted).sum())
        return max(0.0, total / state[:, :, 0].numel())

    def matrix(self, name: str, level: Level | None) -> Float[Tensor, "out in"]:
        """A slot's matrix as this level leaves it; None: uncompressed."""
        weight = self._model.weight(name) if level is None else self._candidates.weight(name, level)
        return weight.unpack(torch.float32)

    def run_block(self, block: int, matrices: Mapping[str, Tensor], state: Tensor) -> Tensor:
        """One block's outputs for all sequences."""
        laid = self._runner.lay_out_matrices(block, matrices)
        size = self._runner.batch_size(*state.shape[:2])
        return torch.cat([self._runner.run(block, laid, part) for part in torch.split(state, size)])


class _BlockRun:
    """Runs one block; keeps the last choice's matrices unpacked."""

    def __init__(self, measurer: Measurer, block: int, names: Sequence[str]) -> None:
        self._measurer, self._block, self._names = measurer, block, names
        self._levels: _Levels | None = None
        self._matrices: dict[str, Tensor] = {}

    def __call__(self, levels: _Levels, state: Tensor | None) -> Tensor:
        assert state is not None
        if levels != self._levels:
            before = dict(zip(self._names, self._levels or (), strict=False))
            self._matrices = {
                name: self._matrices[name] if before.get(name, -1) == each else self._measurer.matrix(name, each)
                for name, each in zip(self._names, levels, strict=True)
            }
            self._levels = levels
        return self._measurer.run_block(self._block, self._matrices, state)
