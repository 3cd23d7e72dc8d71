"""A model whose residual stream has lost its least principal components: a view of it in their basis, cut short.

The norms' gains are 1 in that basis but for a common factor: a root mean square over fewer channels would come out
larger, since what was cut off hardly added to the sum.
"""

from dataclasses import dataclass, field
from functools import cached_property
from math import lcm, prod, sqrt
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import override

from decoct.arch.hf import Skeleton
from decoct.engine.budget import Budget, compute_dtype, format_size, product_rate, resident_bytes
from decoct.engine.copy import copy_parts
from decoct.engine.data import Data, check_length, writing_bytes
from decoct.engine.journal import Journal
from decoct.engine.plan import FIXED, MARGIN, Group, Plan
from decoct.engine.record import record_inputs
from decoct.engine.reshaped import nbytes_under
from decoct.engine.rotate import Basis, RotatedModel, check_rotatable
from decoct.engine.runner import Runner, running_nbytes
from decoct.engine.shallow import check_whole
from decoct.engine.stream import Event, OnEvent
from decoct.engine.thin import plain_nbytes, stream_axes, thin_config
from decoct.methods import Rotation
from decoct.methods.prune.slicegpt import SliceGPT
from decoct.model import Model
from decoct.ops.rotation import Turn
from decoct.store import open_safetensors, save_safetensors
from decoct.weights import Dense, Weight

_BASIS = "components.safetensors"  # in the stage's folder
_HIDDEN_STATES = 6  # of one batch inside a block: its parts that live at a time, roughly
_PIECES = 1 << 26  # what is in float64 at a time while a matrix is turned
_NEAR = 0.01  # of the channels: what is left is what was asked
_FOLDED = Rotation(residual=True, values=False, online=False)


@dataclass(frozen=True)
class SlicedModel(RotatedModel):
    """What is left of `base`, in the basis of principal components.

    Attributes:
        width: channels of the residual stream that stay.
    """

    width: int = field(kw_only=True)

    @classmethod
    def of(cls, base: Model, width: int, components: Float[Tensor, "n n"] | None = None) -> "SlicedModel":
        """Cut a model short.

        Args:
            base: dense.
            width: channels that stay.
            components: in descending order, one a row; None: not known yet, only shapes are asked for.
        """
        given: tuple[Any, ...] = (base.source, base.family, base.described, base.lineage, base.cache)
        turn = None if components is None else Turn(matrix=components)
        return cls(*given, base=base, method=_FOLDED, basis=Basis(turn, ()), width=width)

    @property
    @override
    def config(self) -> dict[str, Any]:
        return {**thin_config(self.base, self.width), "tie_word_embeddings": False}

    @property
    @override
    def nbytes(self) -> int:
        return plain_nbytes(self)

    @override
    def nbytes_under(self, prefix: str) -> int:
        return nbytes_under(self, self.base, prefix)

    @override
    def shape(self, name: str) -> tuple[int, ...]:
        shape = self.base.shape(self._source_name(name))
        axes = stream_axes(name, self._slot_names, self.stream)
        return tuple(self.width if axis in axes else size for axis, size in enumerate(shape, start=-len(shape)))

    @override
    def weight(self, name: str) -> Weight:
        whole, (out, cols) = super().weight(name), self.shape(name)
        return Dense.of(whole.unpack()[:out, :cols].contiguous())

    @override
    def tensor(self, name: str) -> Tensor:
        found, shape = super().tensor(name), self.shape(name)
        if found.shape == shape:
            return found
        cut = found[..., : self.width].contiguous()
        if name.endswith((self.stream.final, *self.stream.norms.values())):
            cut = cut * sqrt(found.shape[-1] / self.width)
        return cut

    @cached_property
    def online(self) -> tuple[str, ...]:
        """None: nothing is turned while the model runs."""
        return ()


@dataclass(frozen=True, slots=True)
class Slicing:
    """Everything that slicing needs.

    Attributes:
        method: settings.
        model: to be sliced.
        tokens: calibration.
        dtype: what blocks run in.
        folder: where shards go, and the components.
        journal: what is done already.
        on_event: told of every block that ran and every part that is written.
    """

    method: SliceGPT
    model: Model
    tokens: Int[Tensor, "sequences length"]
    dtype: torch.dtype
    folder: Path
    journal: Journal
    on_event: OnEvent


@torch.no_grad()
def run_slicing(todo: Slicing) -> SlicedModel:
    """Find the components, unless an earlier process did, and write what is left.

    Raises:
        ValueError: hidden states that are not finite.
    """
    path = todo.folder / _BASIS
    if not path.exists():
        save_safetensors(path, {"components": _components(todo)}, {})
    components = open_safetensors(path).read("components")
    left = SlicedModel.of(todo.model, width_left(todo.model, todo.method), components)
    copy_parts(left, {}, todo.folder, todo.journal, todo.on_event)
    return left


def _components(todo: Slicing) -> Float[Tensor, "n n"]:
    """Principal components of what the model's norms put out before their gains, all norms alike; float64."""
    model, runner = todo.model, Runner(todo.model, todo.dtype)
    norms = tuple(dict.fromkeys(model.family.stream(model.config).norms.values()))
    paths = {name: model.family.module_name(name).removesuffix(".weight") for name in norms}
    table = model.weight(model.family.embed).unpack(todo.dtype)
    hidden = runner.embed_all(todo.tokens, table)
    total = torch.zeros(hidden.shape[-1], hidden.shape[-1], dtype=torch.float64)
    size = runner.batch_size(*todo.tokens.shape)
    for block in range(model.num_blocks):
        names = [model.prefix(block) + slot.name for slot in model.block_slots]
        laid = runner.lay_out(block, {name: model.weight(name) for name in names})
        model.prefetch(block + 1)
        with record_inputs(runner.skeleton.blocks[block], paths) as read:
            for start in range(0, len(hidden), size):
                after = runner.run(block, laid, hidden[start : start + size])
                for name in norms:  # before the states are written over: the first norm reads these very numbers
                    total += _second_moment(read[name])
                hidden[start : start + size] = after
        todo.on_event(Event(f"block {block}, components", block + 1, model.num_blocks, None, 0.0, 0))
    for start in range(0, len(hidden), size):
        total += _second_moment(hidden[start : start + size])
    if not torch.isfinite(total).all():
        raise ValueError("the model's hidden states are not finite; the checkpoint or the text is damaged")
    ascending: Tensor = torch.linalg.eigh(total).eigenvectors
    return ascending.T.flip(0).contiguous()


def _second_moment(x: Tensor) -> Float[Tensor, "n n"]:
    """Σ x·xᵀ of tokens scaled to a root mean square of 1, float64."""
    rows = x.reshape(-1, x.shape[-1]).float()
    rows = rows * rows.square().mean(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny).rsqrt()
    return (rows.T @ rows).double()


def width_left(model: Model, method: SliceGPT) -> int:
    """Channels of the residual stream that stay.

    Raises:
        ValueError: none would, or all.
    """
    full, step = model.shape(model.family.embed)[1], _step(model, method)
    width = int(full * method.keep) // step * step
    if not 0 < width < full:
        raise ValueError(
            f"keep={method.keep} of {full} channels leaves {width}, in steps of {step} (a multiple of multiple_of and "
            "of the number of heads); choose another keep or multiple_of"
        )
    return width


def _step(model: Model, method: SliceGPT) -> int:
    """The number of channels is a multiple of this: configs that state no head size derive it from the hidden size."""
    return lcm(method.multiple_of, int(model.config.get("num_attention_heads", 1)))


def _rounded(model: Model, method: SliceGPT) -> tuple[str, ...]:
    """Says so where whole steps of channels take out more than was asked."""
    full, left = model.shape(model.family.embed)[1], width_left(model, method)
    if full * method.keep - left < _NEAR * full:
        return ()
    return (
        (
            f"{left} of {full} channels are left, {left / full:.1%}, not {method.keep:.1%}: their number is rounded "
            f"down to a multiple of {_step(model, method)} (multiple_of={method.multiple_of}, and the number of heads)"
        ),
    )


def plan_slicing(
    model: Model, method: SliceGPT, data: Data, budget: Budget, dtype: torch.dtype | None = None
) -> tuple[Plan, SlicedModel]:
    """Predict what slicing takes, and what shapes are left.

    Raises:
        ValueError: an architecture or shapes that do not allow it, a result that is no smaller, a calibration that is
            too long, or too little memory.
    """
    check_whole(model, "slicegpt")
    check_rotatable(model, _FOLDED, set(model.described))
    if model.family.stream(model.config).centred:
        raise ValueError(f"a {model.family.name} model's norms subtract the mean, which slicing would change")
    left = SlicedModel.of(model, width_left(model, method))
    _check_config(left)
    if left.nbytes >= model.nbytes:
        raise ValueError(
            f"lm_head becomes a matrix of its own, and what is left would be larger ({format_size(left.nbytes)}) than "
            f"the model ({format_size(model.nbytes)}); set keep to less, or take a width method"
        )
    check_length(data, model)
    dtype = dtype or compute_dtype(model.dtype)
    full = model.shape(model.family.embed)[1]
    states = data.num_tokens * full * dtype.itemsize
    batch = _HIDDEN_STATES * max(data.sequence_length, 2048) * full * dtype.itemsize
    ends = prod(model.shape(model.family.embed)) * (model.dtype.itemsize + 8)
    finding = states + running_nbytes(model, dtype) + batch + 40 * full**2
    working = max(finding, ends + _PIECES, writing_bytes(data, model))
    limit, peak = budget.host_limit(), int(MARGIN * (resident_bytes() + FIXED + working))
    if peak > limit:
        raise ValueError(
            f"{model.source.label} needs about {format_size(peak)} of memory to be sliced, the budget allows "
            f"{format_size(limit)}; raise budget.host, or set data.num_sequences to less"
        )
    entries = model.num_parameters
    moments = 4.0 * data.num_tokens * full**2 * (2 * model.num_blocks + 1) / product_rate(torch.float32)
    turning = 4.0 * entries * full / product_rate(torch.float32)
    return Plan(
        kind="slicegpt",
        steps=(),
        groups=(Group("residual stream", 1, entries, (method,)),),
        num_parameters=left.num_parameters,
        needs_data=True,
        dtype=dtype,
        in_memory=True,
        peak_bytes=peak,
        limit_bytes=limit,
        output_bytes=left.nbytes,
        seconds=2.0 * entries * data.num_tokens / (0.4 * product_rate(dtype)) + moments + turning,
        described=left.described,
        notes=_rounded(model, method),
        share_left=left.nbytes / model.nbytes,
    ), left


def _check_config(left: SlicedModel) -> None:
    """Whether transformers makes these shapes of the config.

    Raises:
        ValueError: it does not.
    """
    skeleton = Skeleton(left.config, left.family)
    made = {name: tuple(each.shape) for name, each in skeleton.blocks[0].named_parameters()}
    prefix = left.prefix(0)
    for slot in left.block_slots:
        if slot.param is not None:
            continue  # fused tensors of experts are put together from several slots
        path, shape = left.family.module_name(prefix + slot.name).removeprefix(prefix), left.shape(prefix + slot.name)
        if made.get(path) != (tuple(reversed(shape)) if slot.transposed else shape):
            raise ValueError(
                f"a {left.family.name} config cannot say that {slot.role} is {shape[0]} x {shape[1]}; take a width or "
                "depth method"
            )
