"""Every searched matrix at every level, made once and kept on disk: what all later questions look up."""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from decoct.arch import Edge, Slot
from decoct.engine.activations import Activations
from decoct.engine.block import Block, chain, each_linear
from decoct.engine.journal import Journal
from decoct.engine.record import Gathered, record
from decoct.engine.runner import Runner
from decoct.engine.stream import Event, OnEvent
from decoct.engine.write import shard_name, write_shard
from decoct.model import DESCRIPTIONS, PART
from decoct.search.settings import Level
from decoct.search.target import Target
from decoct.store import SafetensorsFile, open_safetensors
from decoct.weights import Masked, Sparse, Weight, rebuild

_AT = "@"  # in a shard a candidate is called by its slot's name, this, and its level


@dataclass(frozen=True)
class Candidates:
    """What `make_candidates` wrote, read again one matrix at a time.

    Attributes:
        folder: with the shards.
    """

    folder: Path

    def weight(self, name: str, level: Level) -> Weight:
        """A searched matrix at this level."""
        shard, description, parts = self._stored[f"{name}{_AT}{level}"]
        return rebuild(description, {part.split(PART, 1)[1]: shard.read(part) for part in parts}, name)

    def nbytes(self, name: str, level: Level) -> int:
        """Exact bytes of what it stores."""
        shard, _, parts = self._stored[f"{name}{_AT}{level}"]
        return sum(shard.tensors[part].nbytes for part in parts)

    def kept(self, name: str, level: Level) -> int:
        """Weights of it that are not removed."""
        mask = next(node for node in self.weight(name, level).walk() if isinstance(node, Masked | Sparse))
        return int(mask.survivors().sum())

    @cached_property
    def _stored(self) -> dict[str, tuple[SafetensorsFile, dict[str, Any], list[str]]]:
        """Where each candidate lies, its description, and its tensors' names."""
        found: dict[str, tuple[SafetensorsFile, dict[str, Any], list[str]]] = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            shard = open_safetensors(path)
            weights = json.loads(shard.metadata[DESCRIPTIONS])["weights"] if DESCRIPTIONS in shard.metadata else {}
            found.update({key: (shard, description, []) for key, description in weights.items()})
            for part in shard.tensors:
                found[part.split(PART, 1)[0]][2].append(part)
        return found


def make_candidates(
    target: Target,
    tokens: Int[Tensor, "sequences length"],
    dtype: torch.dtype,
    folder: Path,
    journal: Journal,
    on_event: OnEvent,
) -> Candidates:
    """Stream the uncompressed model once; compress every searched matrix at every level on its way.

    All levels see the same statistics, those of the uncompressed model's inputs. Goes on where the journal ends.

    Args:
        target: what is searched.
        tokens: calibration; statistics are gathered on all of it.
        dtype: what blocks run in.
        folder: where shards and hidden states go.
        journal: what is done already.
        on_event: told of every part.

    Raises:
        ValueError: as a streamed pass.
    """
    _Maker(target, tokens, dtype, folder, journal, on_event).run()
    return Candidates(folder)


class _Maker:
    """The position of the pass."""

    def __init__(
        self,
        target: Target,
        tokens: Tensor,
        dtype: torch.dtype,
        folder: Path,
        journal: Journal,
        on_event: OnEvent,
    ) -> None:
        self._target, self._model, self._tokens = target, target.model, tokens
        self._runner, self._folder, self._journal, self._on_event = (
            Runner(self._model, dtype),
            folder,
            journal,
            on_event,
        )
        self._steps = {level: target.steps(level) for level in target.levels}
        width = self._model.shape(self._model.family.embed)[1]
        self._states = Activations(folder, (*tokens.shape, width), dtype, in_memory=False)
        self._searched = set(target.names)
        methods = [m for steps in self._steps.values() for step in steps for m in step.methods.values()]
        self._reading = any(method.stat is not None for method in methods)

    @torch.no_grad()
    def run(self) -> None:
        model = self._model
        total = model.num_blocks + 2
        for number, part in enumerate(["embedding", *(f"block {b}" for b in range(model.num_blocks)), "lm_head"]):
            started = time.perf_counter()
            line = self._journal.finished(part)
            if line is None:
                if part == "embedding":
                    made = self._embedding()
                else:
                    made = self._head() if part == "lm_head" else self._block(number - 1)
                shard = self._folder / shard_name(number, total)
                nbytes = write_shard(shard, made, {}, set())
                self._journal.finish(part, shard, error=None, nbytes=nbytes, starved=[])
                self._states.discard(number - 1)  # what entered the block
                line = self._journal.parts[part]
            seconds = time.perf_counter() - started
            self._on_event(Event(f"candidates, {part}", number + 1, total, None, seconds, line["nbytes"]))

    def _embedding(self) -> dict[str, Weight]:
        name = self._model.family.embed
        table = self._model.weight(name)
        if self._reading:
            unpacked = table.unpack(self._runner.dtype)
            self._states.begin()
            for start, stop in self._batches():
                self._states.write(start, self._runner.embed(self._tokens[start:stop], unpacked))
            self._states.commit(0)
        return self._compress(Block("embedding", {name: self._model.end_slots[0]}, {name: table}, {name: table}))

    def _block(self, block: int) -> dict[str, Weight]:
        model, runner = self._model, self._runner
        slots = {model.prefix(block) + slot.name: slot for slot in model.block_slots}
        original = {name: model.weight(name) for name in slots}
        model.prefetch(block + 1)
        if not self._reading:
            return self._compress(Block(f"block {block}", slots, original, original))
        laid = runner.lay_out(block, original)
        wanted = self._wanted(slots)
        states = self._states.resume(block)
        states.begin()
        module = runner.skeleton.blocks[block]
        with record(module, runner.edges, wanted, runner.edge_widths(), runner.reader_paths()) as recorder:
            for start, stop in self._batches():
                states.write(start, runner.run(block, laid, states.read(start, stop)))
        states.commit(block + 1)
        del laid
        stats = recorder.stats
        for slot in slots.values():
            kinds = stats.get(slot.reads, {})
            if any(stat.num_tokens == 0 for stat in kinds.values()):  # an expert that no token reached
                width = model.shape(model.prefix(block) + slot.name)[1]
                stats[slot.reads] = {kind: kind.neutral(width) for kind in kinds}
        return self._compress(Block(f"block {block}", slots, original, original, stats))

    def _head(self) -> dict[str, Weight]:
        model, runner = self._model, self._runner
        slots = {slot.name: slot for slot in model.end_slots if slot.role == "lm_head" and slot.name in self._searched}
        original = {name: model.weight(name) for name in slots}
        wanted = self._wanted(slots)
        stats: Gathered = {}
        if wanted:
            ((name, slot),) = slots.items()
            head = original[name].unpack(runner.dtype)
            states = self._states.resume(model.num_blocks)
            edges = {slot.reads: Edge(slot.reads, (slot,))}
            module = runner.skeleton.head_module()
            with record(module, edges, wanted, {slot.reads: head.shape[1]}, {slot.name: ""}) as recorder:
                for start in range(len(self._tokens)):  # one sequence at a time: logits are large
                    runner.logits(states.read(start, start + 1), head)
            stats = recorder.stats
        return self._compress(Block("lm_head", slots, original, original, stats))

    def _compress(self, block: Block) -> dict[str, Weight]:
        """Every searched matrix of the block at every level."""
        made: dict[str, Weight] = {}
        for level, steps in self._steps.items():
            done = chain(*(each_linear(step.methods) for step in steps))(block).weights
            made.update({f"{name}{_AT}{level}": done[name] for name in block.slots if name in self._searched})
        return made

    def _wanted(self, slots: dict[str, Slot]) -> dict[str, frozenset[type[Any]]]:
        kinds: dict[str, set[type[Any]]] = {}
        for steps in self._steps.values():
            for step in steps:
                for name, slot in slots.items():
                    method = step.methods.get(name)
                    if method is not None and method.stat is not None:
                        kinds.setdefault(slot.reads, set()).add(method.stat)
        return {edge: frozenset(found) for edge, found in kinds.items()}

    def _batches(self) -> Iterator[tuple[int, int]]:
        count, length = self._tokens.shape
        size = self._runner.batch_size(count, length)
        return ((start, start + size) for start in range(0, count, size))
