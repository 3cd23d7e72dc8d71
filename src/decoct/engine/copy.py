"""Writing a model's parts as they are, or nearly: what a stage does that changes no matrix by itself."""

import time
from collections.abc import Mapping
from pathlib import Path

from decoct.engine.journal import Journal
from decoct.engine.stream import Event, OnEvent
from decoct.engine.write import contents, shard_name, write_shard
from decoct.model import Model
from decoct.weights import Weight


def copy_parts(model: Model, new: Mapping[str, Weight], folder: Path, journal: Journal, on_event: OnEvent) -> None:
    """Write the shards that are missing.

    Args:
        model: what to write.
        new: weights to write in place of the model's, by full slot name.
        folder: where shards go.
        journal: what is done already.
        on_event: told of every part.
    """
    parts = list(contents(model))
    transposed = {name for name, slot in model.slots().items() if slot.transposed}
    for number, (part, slots, others) in enumerate(parts):
        started = time.perf_counter()
        if journal.finished(part) is None:
            shard = folder / shard_name(number, len(parts))
            weights = {name: new[name] if name in new else model.weight(name) for name in slots}
            nbytes = write_shard(shard, weights, {name: model.tensor(name) for name in others}, transposed)
            journal.finish(part, shard, error=None, nbytes=nbytes, starved=[])
        line = journal.parts[part]
        on_event(Event(part, number + 1, len(parts), None, time.perf_counter() - started, line["nbytes"]))
