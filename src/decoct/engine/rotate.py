"""A change of basis is a view of a model: matrices come out rotated as they are read, and everything else is as ever.

With Q orthogonal and x' = Q·x in place of the residual stream x: what writes it becomes Q·W, what reads it through a
norm W·diag(gain)·Qᵀ, and the norm's gain 1, since a root mean square is the same in every basis. A LayerNorm also
subtracts the mean; so there what writes is centred, and Q leaves the vector of ones where it is. Which slots read and
write the stream, the architecture's table says.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from decoct.arch import Slot, Stream
from decoct.engine.rules import Assignment, Resolved
from decoct.engine.shallow import check_whole
from decoct.methods import BlockMethod, Rotation, name_of
from decoct.model import Model
from decoct.ops.grid import stored_scale_dtype
from decoct.ops.rotation import Turn
from decoct.weights import Dense, Rotated, Weight

_READ_BY_THE_MLP = ("mlp.down", "moe.down")
_PIECES = 1 << 26  # what is in float64 at a time, a few times over


@dataclass(frozen=True, slots=True)
class Basis:
    """The rotations of a model.

    Attributes:
        residual: of the residual stream, or None.
        values: of each head's values, by block; empty: they stay.
    """

    residual: Turn | None
    values: tuple[Turn, ...]

    @classmethod
    def first(cls, model: Model, method: Rotation) -> "Basis":
        """Random rotations."""
        residual = None
        if method.residual:
            width, stream = model.shape(model.family.embed)[1], model.family.stream(model.config)
            residual = method.first_of_residual(width, keeps_mean=stream.centred)
        head = model.family.head_size(model.config) if method.values else 0
        return cls(residual, (method.first_of_values(head),) * model.num_blocks if method.values else ())


@dataclass(frozen=True)
class RotatedModel(Model):
    """A model in another basis; it predicts what `base` predicts.

    Attributes:
        base: the model as it was.
        method: which rotations.
        basis: the rotations themselves.
    """

    base: Model = field(kw_only=True)
    method: Rotation = field(kw_only=True)
    basis: Basis = field(kw_only=True)

    @property
    @override
    def config(self) -> dict[str, Any]:
        return {**self.base.config, "tie_word_embeddings": False} if self.unties else self.base.config

    @property
    def unties(self) -> bool:
        """Whether lm_head becomes a matrix of its own, since the final norm's gain is folded into it alone."""
        return self.method.residual and self.base.tied

    @property
    @override
    def nbytes(self) -> int:
        signs = sum(signs_nbytes(self, slot, self.shape(name)[1]) for name, slot in self._slot_names.items())
        head = prod(self.shape(self.family.head)) * self.dtype.itemsize if self.unties else 0
        return self.base.nbytes + head + signs

    @cached_property
    def online(self) -> tuple[str, ...]:
        """Roles whose inputs are turned while the model runs."""
        return online_roles(self.base, self.method)

    @override
    def shape(self, name: str) -> tuple[int, ...]:
        return self.base.shape(self._source_name(name))

    @override
    def weight(self, name: str) -> Weight:
        slot = self.slot(name)
        plain = self.base.weight(self._source_name(name))
        if not isinstance(plain, Dense):
            raise TypeError(f"{name}: a {plain.kind} weight cannot be rotated; planning refuses it")
        block = self._block(name)
        dtype, residual = plain.dtype, self.basis.residual
        wide = _wide(dtype)
        values = plain.values
        if residual is not None:
            if slot.role == "embed":
                values = residual.rows(values, centre=self.stream.centred, dtype=wide)
            elif slot.role == "lm_head" or slot.reads in self.stream.norms:
                values = residual.rows(values, factor=self._gain(slot, block), dtype=wide)
            if slot.writes == "resid" and slot.role != "embed":
                values = residual.columns(values, centre=self.stream.centred, dtype=wide)
        if block is not None and self.basis.values:
            values = self._with_turned_heads(values, slot, self.basis.values[block], wide)
        if slot.role not in self.online:
            return Dense.of(values.to(dtype))
        signs = self.method.signs(values.shape[1])
        inner = Dense.of(Turn(signs=signs).rows(values, dtype=dtype))
        return Rotated.of(inner, None, signs.to(stored_scale_dtype(dtype)))

    @override
    def tensor(self, name: str) -> Tensor:
        tensor = self.base.tensor(name)
        block, residual = self._block(name), self.basis.residual
        relative = name if block is None else name.removeprefix(self.prefix(block))
        matrix = relative.removesuffix("bias") + "weight" if relative.endswith(".bias") else None
        if residual is not None:
            gains = (self.stream.final,) if block is None else tuple(self.stream.norms.values())
            if relative in gains:
                return torch.ones_like(tensor)
            if matrix in gains:
                return residual.rows(self._over_gain(name, tensor).unsqueeze(0), dtype=tensor.dtype)[0]
            if name in self.stream.added:
                return residual.rows(tensor, centre=self.stream.centred)
            if block is not None and matrix in self._writers:
                return residual.rows(tensor.unsqueeze(0), centre=self.stream.centred)[0]
        carrier = _values_slot(self.base)
        if block is not None and self.basis.values and carrier is not None and matrix == carrier.name:
            turn = self.basis.values[block]
            return turn.rows(tensor.reshape(-1, self._head)).reshape(-1)
        return tensor

    @cached_property
    @override
    def _stored(self) -> dict[str, str]:
        return self.base._stored  # noqa: SLF001

    @cached_property
    def stream(self) -> Stream:
        """How the residual stream is read."""
        return self.family.stream(self.base.config)

    @cached_property
    def _head(self) -> int:
        return self.family.head_size(self.base.config)

    @cached_property
    def _writers(self) -> set[str]:
        return {slot.name for slot in self.block_slots if slot.writes == "resid"}

    def _source_name(self, name: str) -> str:
        """Where the base model keeps what is called this here."""
        return self.family.embed if self.unties and name == self.family.head else name

    def _block(self, name: str) -> int | None:
        """The block that a tensor belongs to."""
        blocks = f"{self.family.blocks}."
        return int(name.removeprefix(blocks).split(".", 1)[0]) if name.startswith(blocks) else None

    def _gain(self, slot: Slot, block: int | None) -> Tensor:
        """Of the norm through which a slot reads the stream."""
        return self.base.tensor(
            self.stream.final if block is None else self.prefix(block) + self.stream.norms[slot.reads]
        )

    def _over_gain(self, name: str, bias: Tensor) -> Tensor:
        """A norm's bias in units of its gain, which its readers take over; float64."""
        gain = self.base.tensor(name.removesuffix("bias") + "weight").double()
        if ((gain == 0) & (bias != 0)).any():
            raise ValueError(f"{name}: a channel's gain is zero and its bias is not; set residual: false")
        return bias.double() / torch.where(gain == 0, 1.0, gain)

    def _with_turned_heads(self, values: Tensor, slot: Slot, turn: Turn, dtype: torch.dtype) -> Tensor:
        carrier = _values_slot(self.base)
        assert carrier is not None
        if slot.name == carrier.name:
            heads = values.reshape(-1, self._head, values.shape[1])
            return torch.cat([turn.columns(head, dtype=dtype) for head in heads])
        if slot.reads == carrier.carries:
            return turn.rows(values.reshape(-1, self._head), dtype=dtype).reshape(values.shape)
        return values


def rotation_of(steps: Iterable[object]) -> Rotation | None:
    """The rotation among a stage's steps."""
    return next((step for step in steps if isinstance(step, Rotation)), None)


def rotated(model: Model, steps: Iterable[object], basis: Basis | None = None) -> Model:
    """A model as a stage's steps find it: in the basis that the rotation among them sets, if there is one.

    Args:
        model: what the stage begins with.
        steps: of the stage.
        basis: the rotations; None: random ones, which is where learning starts.
    """
    method = rotation_of(steps)
    if method is None:
        return model
    found = basis or Basis.first(model, method)
    given: tuple[Any, ...] = (model.source, model.family, model.described, model.lineage, model.cache)
    return RotatedModel(*given, base=model, method=method, basis=found)


def check_rotation(model: Model, steps: Sequence[object], earlier: Sequence[Sequence[Resolved]]) -> None:
    """Refuse a rotation that does not come first, or that the model does not allow.

    Args:
        model: what the recipe begins with.
        steps: of the stage.
        earlier: the steps of the passes before.

    Raises:
        ValueError: why not, and what to do.
    """
    found = [step for step in steps if isinstance(step, Rotation)]
    if not found:
        return
    if len(found) > 1 or steps[0] is not found[0]:
        raise ValueError("a rotation changes what all other steps see; let it be the first of its blocks list")
    compressed = set(model.described)
    for step in (step for stage in earlier for step in stage):
        if isinstance(step, Assignment):
            compressed |= step.methods.keys()
        elif isinstance(step, BlockMethod):
            compressed |= {name for name, slot in model.slots().items() if not slot.protected}
        elif isinstance(step, Rotation):
            roles = online_roles(model, step)
            compressed |= {name for name, slot in model.slots().items() if slot.role in roles}
    check_rotatable(model, found[0], compressed)


def _off(method: Rotation, key: str) -> str:
    """How to do without a part of it."""
    return f"set {key}: false (--set {type(method).__name__.lower()}.{key}=false)"


def check_rotatable(model: Model, method: Rotation, compressed: set[str]) -> None:
    """Refuse a rotation that would not leave the model's predictions as they are.

    Args:
        model: what the recipe begins with.
        method: the rotation.
        compressed: slots that are not dense any more when it comes.

    Raises:
        ValueError: why not, and what to do.
    """
    family = model.family
    if method.residual:
        try:
            family.stream(model.config)
        except ValueError as error:
            message = f"the residual stream of {family.name} cannot be rotated: {error}; {_off(method, 'residual')}"
            raise ValueError(message) from error
    if method.values:
        slot = _values_slot(model)
        if slot is None:
            raise ValueError(f"{family.name} has no matrix for values alone to rotate; {_off(method, 'values')}")
        if model.shape(model.prefix(0) + slot.name)[0] % family.head_size(model.config):
            raise ValueError(f"{family.name}'s values are not whole heads; {_off(method, 'values')}")
    if type(method) is not Rotation:  # as the user names it; slicing says so itself
        check_whole(model, name_of(method))
    roles = online_roles(model, method)
    for name, slot in model.slots().items():
        if name in compressed and (method.residual or slot.role in ("attn.v", "attn.o", *roles)):
            raise ValueError(f"{name}: only dense weights can be rotated; put the rotation first")


def online_roles(model: Model, method: Rotation) -> tuple[str, ...]:
    """Roles whose inputs a rotation turns while the model runs.

    Raises:
        ValueError: the model has no such role.
    """
    known = {slot.role for slot in model.block_slots if not slot.protected}
    if isinstance(method.online, bool):
        return tuple(role for role in _READ_BY_THE_MLP if role in known) if method.online else ()
    for role in method.online:
        if role not in known:
            raise ValueError(f"online: this model has no role {role!r}; its roles: {', '.join(sorted(known))}")
    return method.online


def signs_nbytes(model: Model, slot: Slot, cols: int) -> int:
    """Bytes of a slot's signs, where its inputs are turned while the model runs; else 0."""
    turned = isinstance(model, RotatedModel) and slot.role in model.online
    return cols * stored_scale_dtype(model.dtype).itemsize if turned else 0


def rotation_workspace(model: Model, slot: Slot, shape: tuple[int, int]) -> int:
    """Bytes of reading a matrix of a rotated model, or of unpacking one whose inputs are turned: copies in float32."""
    if not isinstance(model, RotatedModel):
        return 0
    entries = shape[0] * shape[1]
    unpacking = 16 * entries if slot.role in model.online else 0
    return max(entries * (model.dtype.itemsize + 2 * _wide(model.dtype).itemsize) + _PIECES, unpacking)


def rotation_operations(model: Model) -> float:
    """Floating-point operations of rotating a model's matrices, roughly; for the planner's estimate."""
    if not isinstance(model, RotatedModel):
        return 0.0
    residual, width = model.basis.residual, model.shape(model.family.embed)[1]
    each = 2.0 * width if residual is not None and residual.matrix is not None else 400.0
    return 2.0 * each * model.num_parameters  # in float64, at half the speed


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What matrices are kept in between two rotations."""
    return torch.float32 if dtype.itemsize < torch.float32.itemsize else torch.float64


def turned_slots(model: Model, steps: Iterable[object]) -> dict[str, tuple[Rotation, ...]]:
    """The rotation among a stage's steps, by the full name of each slot that it touches; `model` is in its basis."""
    if not isinstance(model, RotatedModel) or rotation_of(steps) is None:
        return {}
    method, roles = model.method, set(model.online) | ({"attn.v", "attn.o"} if model.method.values else set())
    reads = set(model.family.stream(model.config).norms) if method.residual else set()
    found = {name for name, slot in model.slots().items() if slot.role in roles or slot.reads in reads}
    if method.residual:
        found |= {name for name, slot in model.slots().items() if slot.writes == "resid" or slot.role == "lm_head"}
    return dict.fromkeys(found, (method,))


def _values_slot(model: Model) -> Slot | None:
    """The matrix that writes values and nothing else."""
    return next((slot for slot in model.block_slots if slot.role == "attn.v" and slot.carries is not None), None)
