"""What every weight is: a frozen expression that unpacks to a matrix and knows its exact size."""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor

FORMAT_VERSION = 1
"""Version of the JSON description. Readers refuse a larger one and say which decoct wrote it."""


@dataclass(frozen=True, eq=False, slots=True)
class Weight:
    """A matrix [out, in], stored in some compressed form.

    Subclasses are frozen dataclasses whose fields are tensors (stored), other weights (nested), or plain JSON values
    (the description). Everything else here is derived from the fields, so a new kind of weight is one small file.

    Attributes:
        shape: (out_features, in_features) of the matrix it stands for.
        dtype: what `unpack()` gives by default.
    """

    kind: ClassVar[str]
    shape: tuple[int, int]
    dtype: torch.dtype

    def unpack(self, dtype: torch.dtype | None = None) -> Float[Tensor, "out in"]:
        """The matrix, in `dtype` (default: `self.dtype`). Never shares memory that a caller may write to."""
        raise NotImplementedError

    def apply(self, x: Float[Tensor, "*tokens in"]) -> Float[Tensor, "*tokens out"]:
        """What the weight makes of inputs: x times the transposed matrix, in x's dtype.

        The same as multiplying with what `unpack` gives, unless something inside rounds its inputs: then this is what
        the weight does to them, and the matrix alone does not tell.
        """
        assert not self.quantizes_inputs, f"a {self.kind} cannot hold a weight that rounds its inputs"
        return torch.nn.functional.linear(x, self.unpack(x.dtype))

    @property
    def quantizes_inputs(self) -> bool:
        """Whether inputs are rounded anywhere inside, so that the weight has to be applied, not just unpacked."""
        return any(child.quantizes_inputs for child in self.children().values())

    def unpack_rows(self, rows: Int[Tensor, "*n"] | slice, dtype: torch.dtype | None = None) -> Float[Tensor, "*n in"]:
        """Some rows of the matrix: what an embedding looks up. Subclasses do it without unpacking the rest."""
        return self.unpack(dtype)[rows]

    def children(self) -> dict[str, "Weight"]:
        """Nested weights by field name; a tuple's members as name.0, name.1 and so on."""
        found: dict[str, Weight] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Weight):
                found[field.name] = value
            elif isinstance(value, tuple) and value and isinstance(value[0], Weight):
                found.update({f"{field.name}.{i}": child for i, child in enumerate(value)})
        return found

    def own_tensors(self) -> dict[str, Tensor]:
        """This node's stored tensors by field name."""
        values = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {name: value for name, value in values if isinstance(value, Tensor)}

    def tensors(self) -> dict[str, Tensor]:
        """Every stored tensor, nested ones with dotted names."""
        found = self.own_tensors()
        for name, child in self.children().items():
            found.update({f"{name}.{key}": value for key, value in child.tensors().items()})
        return found

    @property
    def nbytes(self) -> int:
        """Exact bytes of everything stored: codes, scales, zero points, masks, indices."""
        return sum(t.nbytes for t in self.tensors().values())

    @property
    def bits_per_weight(self) -> float:
        """Stored bits for each entry of the matrix."""
        return 8 * self.nbytes / (self.shape[0] * self.shape[1])

    def walk(self) -> Iterator["Weight"]:
        """This weight and all nested ones, outermost first."""
        yield self
        for child in self.children().values():
            yield from child.walk()

    def with_tensors(self, tensors: dict[str, Tensor]) -> Self:
        """The same expression over other stored tensors, named as `tensors()` names them."""
        nested = {name: child.with_tensors(_below(tensors, name)) for name, child in self.children().items()}
        own: dict[str, Any] = {name: tensors[name] for name in self.own_tensors()}
        return replace(self.with_children(nested), **own)

    def with_children(self, children: "dict[str, Weight]") -> Self:
        """The same expression over other nested weights, named as `children()` names them."""
        changes: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in children:
                changes[field.name] = children[field.name]
            elif isinstance(value, tuple) and value and isinstance(value[0], Weight):
                changes[field.name] = tuple(children[f"{field.name}.{i}"] for i in range(len(value)))
        return replace(self, **changes)


def _below(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    prefix = f"{name}."
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
