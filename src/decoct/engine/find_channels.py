"""Which channels of the residual stream stay, found in one run of the whole model over the calibration text."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from decoct.engine.record import record_inputs
from decoct.engine.runner import Runner
from decoct.engine.stream import Event, OnEvent
from decoct.engine.thin import CHANNELS, KEPT, Selection, ThinModel, map_file, stream_axes
from decoct.methods.width import Residual, WidthMethod
from decoct.model import Model
from decoct.ops.least_squares import refit_columns
from decoct.stats import Gram, Moments
from decoct.store import open_safetensors, save_safetensors


@dataclass(frozen=True, slots=True)
class Thinning:
    """Everything that finding the channels needs.

    Attributes:
        model: whole.
        method: settings.
        tokens: calibration.
        dtype: what blocks run in.
        folder: for what is found.
        on_event: told of every block.
    """

    model: Model
    method: WidthMethod
    tokens: Int[Tensor, "sequences length"]
    dtype: torch.dtype
    folder: Path
    on_event: OnEvent


@dataclass(slots=True)
class _Norm:
    """One norm: the name of its gain, the gain, squares of what reads it, and moments of what it puts out before it."""

    name: str
    gain: Float[Tensor, " channels"]
    read: Float[Tensor, " channels"]
    moments: Moments

    @property
    def mean_square(self) -> Float[Tensor, " channels"]:
        """Before the gain."""
        return self.moments.variance() + self.moments.mean.square()


@dataclass(slots=True)
class _Seen:
    """What one run of the model shows."""

    written: Float[Tensor, " channels"]
    norms: list[list[_Norm]] = field(default_factory=list)  # of each block; at the end the final one


@torch.no_grad()
def thinned(todo: Thinning) -> ThinModel:
    """The model without the channels that matter least to the method; found now, or by an earlier process.

    Raises:
        ValueError: hidden states or weights that are not finite.
    """
    todo.folder.mkdir(parents=True, exist_ok=True)
    model, method = ThinModel.of(todo.model, todo.method), todo.method
    if not (todo.folder / CHANNELS).exists():
        _find(todo, model.width)
    return ThinModel.of(todo.model, method, Selection.read(todo.folder, refits=method.reconstruct))


def _find(todo: Thinning, width: int) -> None:
    """Choose, and write what makes up for the others; the file that says which stay comes last."""
    seen = _look(todo)
    scores = todo.method.hidden_scores(_residual(seen))
    if not torch.isfinite(scores).all():
        raise ValueError("weights or activations hold NaN or infinite values; the checkpoint or the text is damaged")
    kept = torch.argsort(scores, descending=True, stable=True)[:width].sort().values
    found = {KEPT: kept}
    for number, norms in enumerate(seen.norms):
        found |= {norm.name: norm.mean_square[kept].mean().sqrt() for norm in norms}
        if todo.method.reconstruct:
            path = map_file(todo.folder, number)
            grams = open_safetensors(path)
            maps = {norm.name: _prediction(grams.read(norm.name), norm.gain, kept) for norm in norms}
            save_safetensors(path, maps)
    save_safetensors(todo.folder / CHANNELS, found)


def _prediction(
    gram: Float[Tensor, "n n"], gain: Float[Tensor, " n"], kept: Int[Tensor, " kept"]
) -> Float[Tensor, "gone kept"]:
    """What the missing channels are, seen through a norm, by least squares from those that stay."""
    gone = torch.ones(len(gain), dtype=torch.bool)
    gone[kept] = False
    scale = gain.float()
    return refit_columns(torch.eye(len(gain))[gone], gram * scale * scale.unsqueeze(1), kept)


def _residual(seen: _Seen) -> Residual:
    """What methods go by, float64."""
    norms = [norm for each in seen.norms for norm in each]
    return Residual(
        seen.written,
        torch.stack([norm.read for norm in norms]),
        torch.stack([norm.gain for norm in norms]),
        torch.stack([norm.moments.mean_abs * norm.gain.abs() for norm in norms]),
        torch.stack([norm.moments.variance() * norm.gain.square() for norm in norms]),
    )


def _look(todo: Thinning) -> _Seen:
    """Run the model once; second moments of what norms put out go to disk, a file a block."""
    model, runner = todo.model, Runner(todo.model, todo.dtype)
    table = model.weight(model.family.embed)
    hidden = runner.embed_all(todo.tokens, table.unpack(todo.dtype))
    seen = _Seen(table.unpack(torch.float32).square().sum(0).double())
    for block in range(model.num_blocks):
        names = dict.fromkeys(model.family.stream(model.config).norms.values())
        stats = _stats(todo, [model.prefix(block) + name for name in names])
        for read in _through(todo, runner, block, hidden):
            for name in names:
                _take(stats[model.prefix(block) + name], read[name])
        _note(todo, seen, block, stats)
        todo.on_event(Event(f"block {block}, channels", block + 1, model.num_blocks, None, 0.0, 0))
    final = model.family.stream(model.config).final
    stats = _stats(todo, [final])
    size = runner.batch_size(*todo.tokens.shape)
    for start in range(0, len(hidden), size):
        _take(stats[final], hidden[start : start + size])
    _note(todo, seen, model.num_blocks, stats)
    return seen


def _through(todo: Thinning, runner: Runner, block: int, hidden: Tensor) -> Iterator[dict[str, Tensor]]:
    """Run a block, one batch after another; gives what its norms read, by their gains' names within the block."""
    model, size = todo.model, runner.batch_size(*todo.tokens.shape)
    norms = dict.fromkeys(model.family.stream(model.config).norms.values())
    paths = {name: model.family.module_name(name).removesuffix(".weight") for name in norms}
    names = [model.prefix(block) + slot.name for slot in model.block_slots]
    laid = runner.lay_out(block, {name: model.weight(name) for name in names})
    model.prefetch(block + 1)
    with record_inputs(runner.skeleton.blocks[block], paths) as read:
        for start in range(0, len(hidden), size):
            after = runner.run(block, laid, hidden[start : start + size])
            yield read  # before the states are written over: the first norm reads these very numbers
            hidden[start : start + size] = after


def _stats(todo: Thinning, names: list[str]) -> dict[str, list[Any]]:
    width = todo.model.shape(todo.model.family.embed)[1]
    kinds: tuple[Any, ...] = (Moments, Gram) if todo.method.reconstruct else (Moments,)
    return {name: [kind.empty(width) for kind in kinds] for name in names}


def _take(stats: list[Any], x: Tensor) -> None:
    """Add tokens, scaled to a root mean square of 1 as a norm does before its gain."""
    rows = x.reshape(-1, x.shape[-1]).float()
    rows = rows * rows.square().mean(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny).rsqrt()
    for stat in stats:
        stat.add(rows)


def _note(todo: Thinning, seen: _Seen, number: int, stats: dict[str, list[Any]]) -> None:
    """Put together what is known of a block's norms, or of the final one, and of what reads and writes there."""
    model, slots = todo.model, todo.model.slots()
    stream, last = model.family.stream(model.config), number == model.num_blocks
    norms = {
        name: _Norm(name, model.tensor(name).double(), torch.zeros_like(seen.written), found[0])
        for name, found in stats.items()
    }
    prefix = "" if last else model.prefix(number)
    names = [slot.name for slot in model.end_slots[-1:]] if last else [prefix + s.name for s in model.block_slots]
    for name in names:
        squares = model.weight(name).unpack(torch.float32).square()
        if last:
            norms[stream.final].read += squares.sum(0).double()
            continue
        if -1 in stream_axes(name, slots, stream):
            norms[prefix + stream.norms[slots[name].reads]].read += squares.sum(0).double()
        if -2 in stream_axes(name, slots, stream):
            seen.written += squares.sum(1).double()
    seen.norms.append(list(norms.values()))
    if todo.method.reconstruct:
        save_safetensors(map_file(todo.folder, number), {n: found[1].matrix() for n, found in stats.items()})
