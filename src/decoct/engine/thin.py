"""A model whose residual stream has lost channels, the same ones in every block: a view of it without them.

What writes the stream loses rows, what reads it columns. A norm divides by the root mean square of the channels that
are left, which is another one than that of all of them: of the channels that matter most it is larger. So each norm's
gain is multiplied by √E[mean square of what is left / mean square of all], taken over the calibration tokens: then what
it puts out is, on average, as large as it was. Where the method refits, every matrix behind a norm also takes over what
the missing channels can be predicted to be from those that stay. An output projection tied to the embedding does not:
it stays the embedding.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import gcd, lcm, prod
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import override

from decoct.arch import Slot, Stream
from decoct.arch.hf import Skeleton
from decoct.engine.reshaped import nbytes_under
from decoct.methods import name_of
from decoct.methods.width import WidthMethod
from decoct.model import Model
from decoct.store import open_safetensors
from decoct.weights import Dense, Weight

CHANNELS = "channels.safetensors"
"""Which channels stay and what becomes of the norms, in a stage's folder: written when all is found."""

KEPT = "kept"
"""The channels' name in that file; the norms' factors have the names of their gains."""


def map_file(folder: Path, number: int) -> Path:
    """Where the missing channels' predictions lie, by the gains' names: of a block; after the last, of what follows."""
    return folder / f"channels-{number:05d}.safetensors"


@dataclass(frozen=True, slots=True)
class Selection:
    """Channels that stay, and what makes up for the others.

    Attributes:
        kept: ascending.
        factors: of the norms' gains, by full name.
        folder: where predictions lie (see `map_file`); None: nothing is refitted.
    """

    kept: Int[Tensor, " kept"]
    factors: Mapping[str, Tensor]
    folder: Path | None

    @classmethod
    def read(cls, folder: Path, *, refits: bool) -> "Selection":
        """As it was found."""
        saved = open_safetensors(folder / CHANNELS)
        factors = {name: saved.read(name) for name in saved.tensors if name != KEPT}
        return cls(saved.read(KEPT), factors, folder if refits else None)

    def columns(self, matrix: Float[Tensor, "out n"], gain: str, number: int) -> Float[Tensor, "out kept"]:
        """What is left of a matrix behind a norm, in block `number` or after the last one."""
        left = matrix[:, self.kept]
        if self.folder is None:
            return left
        gone = torch.ones(matrix.shape[1], dtype=torch.bool)
        gone[self.kept] = False
        predicted = open_safetensors(map_file(self.folder, number)).read(gain)
        return (left.float() + matrix[:, gone].float() @ predicted).to(matrix.dtype)


@dataclass(frozen=True)
class ThinModel(Model):
    """What is left of `base`.

    Attributes:
        base: the model as it was, dense.
        width: channels that stay.
        selection: which; None: not known yet, only shapes are asked for.
    """

    base: Model = field(kw_only=True)
    width: int = field(kw_only=True)
    selection: Selection | None = field(kw_only=True, default=None)

    @classmethod
    def of(cls, base: Model, method: WidthMethod, selection: Selection | None = None) -> "ThinModel":
        """Take channels out of a model as a method says.

        Raises:
            ValueError: the architecture or the shapes do not allow it, or something is compressed already.
        """
        check_thinnable(base, method)
        given: tuple[Any, ...] = (base.source, base.family, base.described, base.lineage, base.cache)
        return cls(*given, base=base, width=hidden_left(base, method), selection=selection)

    @property
    @override
    def config(self) -> dict[str, Any]:
        return thin_config(self.base, self.width)

    @override
    def shape(self, name: str) -> tuple[int, ...]:
        axes = stream_axes(name, self._slot_names, self.stream)
        shape = self.base.shape(name)
        return tuple(self.width if axis in axes else size for axis, size in enumerate(shape, start=-len(shape)))

    @property
    @override
    def nbytes(self) -> int:
        return plain_nbytes(self)

    @override
    def nbytes_under(self, prefix: str) -> int:
        return nbytes_under(self, self.base, prefix)

    @override
    def weight(self, name: str) -> Weight:
        slot, values, selection = self.slot(name), self.base.weight(name).unpack(), self._selected
        axes = stream_axes(name, self._slot_names, self.stream)
        if -2 in axes:
            values = values[selection.kept]
        if -1 not in axes:
            return Dense.of(values)
        if slot.role == "embed":
            return Dense.of(values[:, selection.kept])
        if slot.role == "lm_head":
            return Dense.of(selection.columns(values, self.stream.final, self.num_blocks))
        blocks = f"{self.family.blocks}."
        number = int(name.removeprefix(blocks).split(".", 1)[0])
        return Dense.of(selection.columns(values, self.prefix(number) + self.stream.norms[slot.reads], number))

    @override
    def tensor(self, name: str) -> Tensor:
        found = self.base.tensor(name)
        if -1 not in stream_axes(name, self._slot_names, self.stream):
            return found
        left = found[..., self._selected.kept]
        factor = self._selected.factors.get(name)
        return left.contiguous() if factor is None else (left.double() * factor).to(left.dtype)

    @override
    def prefetch(self, block: int) -> None:
        self.base.prefetch(block)

    @cached_property
    def stream(self) -> Stream:
        """How the residual stream is read."""
        return self.family.stream(self.base.config)

    @cached_property
    @override
    def _stored(self) -> dict[str, str]:
        return self.base._stored  # noqa: SLF001

    @property
    def _selected(self) -> Selection:
        if self.selection is None:
            raise TypeError("which channels are left shows only in the run")
        return self.selection


def stream_axes(name: str, slots: Mapping[str, Slot], stream: Stream) -> set[int]:
    """Which axes of a tensor, counted from its end, are channels of the residual stream: -1, -2, both or none."""
    slot = slots.get(name)
    if slot is not None:
        writes = slot.writes == "resid" and slot.role != "embed"
        reads = slot.role in ("embed", "lm_head") or slot.reads in stream.norms
        return ({-2} if writes else set()) | ({-1} if reads else set())
    carrier = slots.get(name.removesuffix("bias") + "weight")
    bias = name.endswith(".bias") and carrier is not None and carrier.writes == "resid"
    gains = (stream.final, *stream.norms.values())
    return {-1} if bias or name in stream.added or name.endswith(gains) else set()


def plain_nbytes(model: Model) -> int:
    """Bytes of a model of which nothing is compressed, by its shapes."""
    inside = (name for block in range(model.num_blocks) for name in model.others(block))
    names = (*model.slots(), *model.others(None), *inside)
    return sum(prod(model.shape(name)) for name in names) * model.dtype.itemsize


def thin_config(base: Model, width: int) -> dict[str, Any]:
    """The config of a model with so many channels; its heads stay as wide as they are."""
    return {**base.config, "hidden_size": width, "head_dim": base.family.head_size(base.config)}


def hidden_left(model: Model, method: WidthMethod) -> int:
    """Channels of the residual stream that stay.

    Raises:
        ValueError: none would, or all.
    """
    full = model.shape(model.family.embed)[1]
    step = hidden_step(model, method)
    width = int(full * method.keep_hidden) // step * step
    if not 0 < width < full:
        raise ValueError(
            f"keep_hidden={method.keep_hidden} of {full} channels leaves {width}, in steps of {step}; choose another "
            "keep_hidden, or set multiple_of to less"
        )
    return width


def hidden_step(model: Model, method: WidthMethod) -> int:
    """What the number of channels left is a multiple of: `multiple_of` and, where transformers asks for it, the heads.

    Llama's config refuses hidden sizes that are no multiple of its attention heads, even where it says how wide these
    are; Mistral's and Qwen's do not.
    """
    full, step = model.shape(model.family.embed)[1], method.multiple_of
    heads = int(model.config.get("num_attention_heads", 1))
    if gcd(step, heads) == heads or full <= step:
        return step
    try:
        Skeleton(thin_config(model, next(size for size in range(step, full, step) if size % heads)), model.family)
    except ValueError:
        kept = max(1, round(int(model.config.get("num_key_value_heads", heads)) * method.keep_heads))
        left = kept * heads // int(model.config.get("num_key_value_heads", heads))
        return lcm(step, heads, left)
    return step


def check_thinnable(model: Model, method: WidthMethod) -> None:
    """Refuse a model whose residual stream cannot lose channels.

    Raises:
        ValueError: why not, and what to do.
    """
    family = model.family
    try:
        stream = family.stream(model.config)
    except ValueError as error:
        raise ValueError(
            f"the residual stream of {family.name} cannot lose channels: {error}; set keep_hidden: 1"
        ) from error
    if stream.centred:
        raise ValueError(
            f"a {family.name} model's norms subtract the mean, which missing channels would change; set keep_hidden: 1"
        )
    for name in model.described:
        raise ValueError(
            f"{name} is compressed already, or lacks something; {name_of(method)} takes out hidden channels of whole, "
            "uncompressed models: begin with the original, or set keep_hidden: 1"
        )


def whole(model: Model) -> Model:
    """The model as it was before its stream lost channels in this stage."""
    return model.base if isinstance(model, ThinModel) else model
