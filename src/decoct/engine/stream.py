"""One pass over a model: load a block, gather statistics, compress, run on, save, note it in the journal, go on."""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from decoct.arch import Edge, Slot
from decoct.engine.activations import Activations
from decoct.engine.block import Block, Step, chain, each_block, each_linear
from decoct.engine.folding import each_edge, folds
from decoct.engine.gains import each_gain, normed
from decoct.engine.guidance import Guidance
from decoct.engine.halfway import Halfway
from decoct.engine.journal import Journal
from decoct.engine.passage import BlockPassage
from decoct.engine.record import Gathered, Wanted, record, record_answers
from decoct.engine.reshaped import Reshaped
from decoct.engine.rules import Assignment, Resolved, is_paired, statistic
from decoct.engine.runner import LaidOut, Runner
from decoct.engine.write import shard_name, write_shard
from decoct.methods import BlockMethod, EdgeScaling, GainRefit, Rotation
from decoct.methods.experts import ExpertStat
from decoct.model import Model
from decoct.ops.distance import squared_distance
from decoct.weights import Weight

_COMPARED = 8  # sequences whose block outputs are kept to measure the error
_SAMPLED_ROWS = 128  # rows of each matrix compared when there is no data to run


@dataclass(frozen=True, slots=True)
class Event:
    """A finished part, or a finished step of tuning, for whoever shows progress.

    Attributes:
        part: "embedding", "block 3", "lm_head"; "step 5".
        done: parts, or steps, finished, this one included.
        total: parts, or steps, in all.
        error: relative squared error of the block's contribution to the residual stream, or of its weights when no
            data ran; None if nothing was compressed.
        seconds: what it took; 0 for what was restored from an earlier run.
        nbytes: bytes written.
        starved: slots that no calibration token reached.
        loss: of a step: divergence from the model that is imitated, before it; None for a part.
    """

    part: str
    done: int
    total: int
    error: float | None
    seconds: float
    nbytes: int
    starved: tuple[str, ...] = ()
    loss: float | None = None


OnEvent = Callable[[Event], None]


@dataclass(frozen=True, slots=True)
class Pass:
    """Everything one streamed pass needs.

    Attributes:
        model: what to compress, in the basis that a rotation among the steps sets.
        steps: what each step does, in order.
        tokens: calibration tokens; None if no step needs data.
        dtype: what blocks run in.
        in_memory: whether activations stay in memory.
        folder: where shards go.
        scratch: where activations go.
        journal: what is done already.
        on_event: told of every finished part.
        guidance: token weights of the slots whose statistics are guided; None if there are none.
        becomes: what the model will be when the pass gives its blocks other shapes; None: every matrix keeps its own.
    """

    model: Model
    steps: tuple[Resolved, ...]
    tokens: Int[Tensor, "sequences length"] | None
    dtype: torch.dtype
    in_memory: bool
    folder: Path
    scratch: Path
    journal: Journal
    on_event: OnEvent
    guidance: Guidance | None = None
    becomes: Reshaped | None = None


@torch.no_grad()
def run_pass(todo: Pass) -> None:
    """Do every part that the journal does not have yet.

    Raises:
        ValueError: a method refuses a weight, or numbers are not finite; the message names the slot or block.
    """
    streamer = _Streamer(todo)
    total = todo.model.num_blocks + 2
    for number, (part, work) in enumerate(streamer.parts()):
        line = todo.journal.finished(part)
        started = time.perf_counter()
        if line is None:
            line = work(number, total)
        seconds = time.perf_counter() - started
        starved = tuple(line.get("starved", ()))
        todo.on_event(Event(part, number + 1, total, line["error"], seconds, line["nbytes"], starved))


class _Streamer:
    """The hidden states and the position of a pass."""

    def __init__(self, todo: Pass) -> None:
        self._todo = todo
        self._model = todo.model
        # A rotation has done its work: the model that the pass reads is in its basis.
        self._steps: tuple[Step, ...] = tuple(self._lifted(s) for s in todo.steps if not isinstance(s, Rotation))
        self._runner: Runner | None = None if todo.tokens is None else Runner(todo.model, todo.dtype)
        self._after = self._runner  # runs what a block has become
        self._halfway: Halfway | None = None
        if todo.becomes is not None:
            self._steps += (todo.becomes.step(),)
            self._after = None if todo.tokens is None else Runner(todo.becomes, todo.dtype)
            self._halfway = None if todo.tokens is None else Halfway.of(todo.becomes, todo.dtype)
        # Two chains of hidden states: of the model as it becomes and, if a step compares with it, as it was.
        self._paired = any(is_paired(step) for step in todo.steps)
        self._states: Activations | None = None
        self._reference: Activations | None = None
        self._ready: int | None = None  # the block whose inputs the states hold
        self._last_needed = self._last_block_with_data()

    def _lifted(self, step: Assignment | BlockMethod | EdgeScaling | GainRefit) -> Step:
        if isinstance(step, BlockMethod):
            return each_block(step)
        if isinstance(step, EdgeScaling):
            return each_edge(step, folds(self._model))
        if isinstance(step, GainRefit):
            return each_gain(step, normed(self._model))
        return each_linear(step.methods)

    def parts(self) -> Iterator[tuple[str, Callable[[int, int], dict[str, Any]]]]:
        """Embedding, blocks, then lm_head with what else lies outside the blocks."""
        yield "embedding", self._embedding
        for block in range(self._model.num_blocks):
            yield f"block {block}", partial(self._block, block)
        yield "lm_head", self._head

    def _embedding(self, number: int, total: int) -> dict[str, Any]:
        self._model.prefetch(0)
        name = self._model.family.embed
        slots = {name: self._model.end_slots[0]}
        original = {name: self._model.weight(name)}
        new = self._compress(Block("embedding", slots, original, original)).weights
        if self._todo.tokens is not None:
            self._states = self._embed_all(new[name].unpack(self._todo.dtype), "activations")
            if self._paired:
                self._reference = self._embed_all(original[name].unpack(self._todo.dtype), "reference")
            self._ready = 0
        return self._save("embedding", number, total, original, new, {}, None)

    def _embed_all(self, table: Tensor, name: str) -> Activations:
        """The inputs of the first block, with this embedding."""
        assert self._todo.tokens is not None
        assert self._runner is not None
        states = self._new_states(name)
        states.begin()
        for start, stop in self._batches():
            states.write(start, self._runner.embed(self._todo.tokens[start:stop], table))
        states.commit(0)
        return states

    def _block(self, block: int, number: int, total: int) -> dict[str, Any]:
        model = self._model
        slots = {model.prefix(block) + slot.name: slot for slot in model.block_slots}
        original = {name: model.weight(name) for name in slots}
        others = {name: model.tensor(name) for name in model.others(block)}
        model.prefetch(block + 1)
        label = f"block {block}"
        if self._runner is None or block > self._last_needed:
            made = self._compress(Block(label, slots, original, original, vectors=others, prefix=model.prefix(block)))
            return self._save(label, number, total, original, made.weights, made.vectors, None)
        states = self._states_for(block)
        laid = self._runner.lay_out(block, original)
        answers = None if self._todo.becomes is None else self._todo.becomes.expert_stat()
        stats, references = self._gather(block, laid, states, answers)
        passage = None
        if self._reference is not None:
            passage = BlockPassage(self._runner, block, states, self._reference, others)
        del laid  # the steps need the room
        starved = self._fill_starved(stats, slots) + _unasked(answers, slots)
        given = Block(label, slots, original, original, stats, starved, passage, others, model.prefix(block), answers)
        if self._halfway is not None:
            given = replace(given, rerun=partial(self._halfway.stats, block, states, list(self._batches())))
        made = self._compress(given)
        del stats, given
        assert self._after is not None
        laid = self._after.lay_out(block, made.weights, made.vectors)
        error = self._advance(block, laid, states, references)
        return self._save(label, number, total, original, made.weights, made.vectors, error, starved)

    def _head(self, number: int, total: int) -> dict[str, Any]:
        model = self._model
        slots = {slot.name: slot for slot in model.end_slots if slot.role == "lm_head"}
        others = {name: model.tensor(name) for name in model.others(None)}
        stats: Gathered = {}
        wanted = self._wanted(slots)
        original = {name: model.weight(name) for name in slots}
        if wanted:
            stats = self._gather_head(wanted, original)
        new = self._compress(Block("lm_head", slots, original, original, stats)).weights
        return self._save("lm_head", number, total, original, new, others, None)

    def _compress(self, block: Block) -> Block:
        """Run the steps, and let go of what only they need."""
        made = chain(*self._steps)(block)
        return replace(made, stats={}, passage=None, rerun=None)

    def _gather(
        self, block: int, laid: LaidOut, states: Activations, answers: ExpertStat | None
    ) -> tuple[Gathered, list[tuple[Tensor, float]]]:
        """Run the block as it is: statistics of its inputs, and some outputs to compare with later.

        The second chain, of the model as it was, takes the same step: its outputs are the next block's inputs there.
        """
        runner = self._runner
        assert runner is not None
        slots = {self._model.prefix(block) + slot.name: slot for slot in self._model.block_slots}
        wanted = self._wanted(slots)
        references: list[tuple[Tensor, float]] = []
        module = runner.skeleton.blocks[block]
        reference = self._reference
        if reference is not None:
            reference.begin()
        with (
            record(module, runner.edges, wanted, runner.edge_widths(), runner.reader_paths()) as recorder,
            record_answers(module, runner.experts_path(), answers),
        ):
            for start, stop in self._batches():
                if reference is not None:
                    with recorder.uncompressed():
                        reference.write(start, runner.run(block, laid, reference.read(start, stop)))
                enough = len(references) * (stop - start) >= _COMPARED
                if enough and not wanted and answers is None:
                    continue
                x = states.read(start, stop)
                if self._todo.guidance is not None:
                    recorder.weights = self._todo.guidance.read(block, start, stop)
                y = runner.run(block, laid, x)
                if not enough:
                    references.append((y, squared_distance(y, x)))
        if reference is not None:
            reference.commit(block + 1)
        return recorder.stats, references

    def _advance(self, block: int, laid: LaidOut, states: Activations, references: list[tuple[Tensor, float]]) -> float:
        """Run the compressed block; its outputs become the next one's inputs. Gives the relative squared error."""
        runner = self._after
        assert runner is not None
        lost, moved = 0.0, 0.0
        states.begin()
        for number, (start, stop) in enumerate(self._batches()):
            y = runner.run(block, laid, states.read(start, stop))
            if not torch.isfinite(y.sum()):
                raise ValueError(
                    f"block {block} gives NaN or infinite activations; the checkpoint or the text is damaged"
                )
            if number < len(references):
                reference, update = references[number]
                lost += squared_distance(y, reference)
                moved += update
            states.write(start, y)
        self._commit(states, block + 1)
        return lost / moved if moved else 0.0

    def _gather_head(self, wanted: Wanted, original: dict[str, Weight]) -> Gathered:
        runner = self._runner
        assert runner is not None
        states = self._states_for(self._model.num_blocks)
        head = next(iter(original.values())).unpack(self._todo.dtype)
        slot = self._model.family.ends()[1]
        edges = {slot.reads: Edge(slot.reads, (slot,))}
        with record(
            runner.skeleton.head_module(), edges, wanted, {slot.reads: head.shape[1]}, {slot.name: ""}
        ) as found:
            for start, stop in self._batches():
                for hidden in states.read(start, stop):  # one sequence at a time: logits are large
                    runner.logits(hidden.unsqueeze(0), head)
        return found.stats

    def _wanted(self, slots: dict[str, Slot]) -> dict[str, frozenset[Any]]:
        kinds: dict[str, set[Any]] = {}
        if self._todo.becomes is not None and any(slot.writes == "resid" for slot in slots.values()):
            kinds = {edge: set(found) for edge, found in self._todo.becomes.wanted.items()}
        for step in self._todo.steps:
            if isinstance(step, EdgeScaling | GainRefit):
                inside = {slot.name for slot in slots.values()}
                for each in folds(self._model) if isinstance(step, EdgeScaling) else normed(self._model):
                    if inside.issuperset(each.readers):
                        kinds.setdefault(each.edge, set()).add(step.stat)
            if not isinstance(step, Assignment):
                continue
            for name, slot in slots.items():
                method = step.methods.get(name)
                if method is not None and method.stat is not None:
                    kinds.setdefault(slot.reads, set()).add(statistic(method, slot))
        return {edge: frozenset(found) for edge, found in kinds.items()}

    def _fill_starved(self, stats: Gathered, slots: dict[str, Any]) -> tuple[str, ...]:
        """Give slots that no token reached (rare experts) neutral statistics, and name them."""
        empty = {edge for edge, kinds in stats.items() if any(s.num_tokens == 0 for s in kinds.values())}
        starved = tuple(name for name, slot in slots.items() if slot.reads in empty)
        for name in starved:
            width = self._model.shape(name)[1]
            stats[slots[name].reads] = {kind: kind.neutral(width) for kind in stats[slots[name].reads]}
        return starved

    def _save(
        self,
        part: str,
        number: int,
        total: int,
        original: Mapping[str, Weight],
        new: Mapping[str, Weight],
        others: Mapping[str, Tensor],
        error: float | None,
        starved: tuple[str, ...] = (),
    ) -> dict[str, Any]:
        changed = [name for name in new if new[name] is not original[name]]
        if error is None and changed and self._todo.becomes is None:
            error = _weight_error([(original[name], new[name]) for name in changed])
        shard = self._todo.folder / shard_name(number, total)
        transposed = {name for name, slot in self._model.slots().items() if slot.transposed}
        nbytes = write_shard(shard, new, others, transposed)
        self._todo.journal.finish(part, shard, error=error, nbytes=nbytes, starved=list(starved))
        if self._states is not None and self._ready:
            self._states.discard(self._ready - 1)
            if self._reference is not None:
                self._reference.discard(self._ready - 1)
        return self._todo.journal.parts[part]

    def _new_states(self, name: str) -> Activations:
        assert self._todo.tokens is not None
        assert self._runner is not None
        count, length = self._todo.tokens.shape
        width = self._model.shape(self._model.family.embed)[1]
        shape = (count, length, width)
        return Activations(self._todo.scratch, shape, self._todo.dtype, in_memory=self._todo.in_memory, name=name)

    def _states_for(self, block: int) -> Activations:
        """The inputs of a block: at hand, or as an earlier run saved them."""
        if self._states is None or self._ready != block:
            self._states = self._new_states("activations").resume(block)
            self._reference = self._new_states("reference").resume(block) if self._paired else None
            self._ready = block
        return self._states

    def _commit(self, states: Activations, block: int) -> None:
        states.commit(block)
        self._states, self._ready = states, block

    def _batches(self) -> Iterator[tuple[int, int]]:
        assert self._todo.tokens is not None
        assert self._runner is not None
        count, length = self._todo.tokens.shape
        size = self._runner.batch_size(count, length)
        return ((start, start + size) for start in range(0, count, size))

    def _last_block_with_data(self) -> int:
        """The last block through which calibration data must run; past it, nothing needs statistics."""
        model = self._model
        head = {slot.name: slot for slot in model.end_slots if slot.role == "lm_head"}
        return model.num_blocks if self._wanted(head) else model.num_blocks - 1


def _unasked(answers: ExpertStat | None, slots: Mapping[str, Slot]) -> tuple[str, ...]:
    """Matrices of experts to which no token was sent."""
    if answers is None:
        return ()
    return tuple(n for n, slot in slots.items() if slot.expert is not None and not answers.num_sent[slot.expert])


def _weight_error(pairs: list[tuple[Weight, Weight]]) -> float:
    """Relative squared error of some rows of each compressed matrix."""
    lost, size = 0.0, 0.0
    for before, after in pairs:
        rows = slice(0, _SAMPLED_ROWS)
        w = before.unpack_rows(rows, torch.float32)
        lost += squared_distance(after.unpack_rows(rows, torch.float32), w)
        size += squared_distance(w, torch.zeros(()))
    return lost / size if size else 0.0
