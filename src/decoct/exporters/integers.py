"""Integer weights as other formats see them: codes, scales and zero points of groups, whatever they are nested in.

`form_of` looks at a description alone, so that an export can be refused while planning; `integers_of` at the numbers.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from decoct.weights import GroupInt, Masked, Stacked, Ternary, TwoLevelInt, Weight

Zero = Literal["middle", "integer", "real"]


@dataclass(frozen=True, slots=True)
class IntegerForm:
    """What can be said of an integer weight without its numbers.

    Attributes:
        bits: of a code, 2 to 8.
        group_size: input features that share a scale.
        zero: "middle" where the code 2^(bits-1) stands for zero, "integer" or "real" where each group has its own.
        masked: some entries are pruned.
        ternary: codes are 1, 2, 3 for -1, 0, 1 times the scale.
    """

    bits: int
    group_size: int
    zero: Zero
    masked: bool = False
    ternary: bool = False

    @property
    def reach(self) -> tuple[int, int]:
        """The least and the largest code once zero is taken from it, where zero is a whole number."""
        if self.ternary:
            return -1, 1
        top = 2**self.bits - 1
        return (-(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1) if self.zero == "middle" else (-top, top)

    @property
    def words(self) -> str:
        """For messages."""
        zero = {"middle": "symmetric", "integer": "with zero points", "real": "with real zero points"}[self.zero]
        return f"{'ternary' if self.ternary else f'{self.bits}-bit integers, {zero},'} in groups of {self.group_size}"


@dataclass(frozen=True, slots=True)
class Integers:
    """value = (code - zero) * scale.

    Attributes:
        form: what kind of integers they are.
        codes: unsigned.
        scale: float32, of each group of each row.
        zero: float32, of each group of each row.
    """

    form: IntegerForm
    codes: UInt8[Tensor, "out in"]
    scale: Float[Tensor, "out groups"]
    zero: Float[Tensor, "out groups"]

    def regrouped(self, size: int) -> "Integers":
        """The same with smaller groups, which repeat the scales of those they are parts of.

        Raises:
            ValueError: `size` does not divide the groups.
        """
        have = self.form.group_size
        if have % size:
            raise ValueError(f"groups of {have} are no multiple of {size}")
        scale, zero = (each.repeat_interleave(have // size, -1) for each in (self.scale, self.zero))
        return replace(self, form=replace(self.form, group_size=size), scale=scale, zero=zero)

    def shifted(self) -> Float[Tensor, "out in"]:
        """Codes without their zero points: value / scale."""
        groups = self.codes.float().reshape(*self.scale.shape, self.form.group_size)
        return (groups - self.zero.unsqueeze(-1)).reshape(self.codes.shape)


def form_of(description: dict[str, Any] | None) -> IntegerForm | None:
    """The form of a described weight; None: it is not one of integers in groups, or rounds its inputs.

    Args:
        description: as the checkpoint has it; None: a dense weight.
    """
    kind = None if description is None else description["kind"]
    if description is None or kind not in (GroupInt.kind, TwoLevelInt.kind, Ternary.kind, Masked.kind, Stacked.kind):
        return None
    if kind == Masked.kind:
        inner = form_of(description["inner"])
        return None if inner is None else replace(inner, masked=True)
    if kind == Stacked.kind:
        forms = {form_of(part) for part in description["parts"]}
        return forms.pop() if len(forms) == 1 else None
    size = int(description["group_size"])
    if kind == Ternary.kind:
        return IntegerForm(2, size, "middle", ternary=True)
    if kind == TwoLevelInt.kind:
        return IntegerForm(int(description["bits"]), size, "integer")
    zero: Zero = "middle"
    if description["zero"] is not None:
        zero = "integer" if description["zero"]["tensor"] == "uint8" else "real"
    return IntegerForm(int(description["bits"]), size, zero)


def integers_of(weight: Weight) -> Integers:
    """The numbers of a weight that `form_of` has a form for."""
    if isinstance(weight, Masked):
        inner = integers_of(weight.inner)
        nothing = inner.zero.round().to(torch.uint8).repeat_interleave(inner.form.group_size, -1)
        codes = torch.where(weight.survivors(), inner.codes, nothing)
        return replace(inner, form=replace(inner.form, masked=True), codes=codes)
    if isinstance(weight, Stacked):
        parts = [integers_of(part) for part in weight.parts]
        codes, scale, zero = (
            torch.cat(each) for each in zip(*((p.codes, p.scale, p.zero) for p in parts), strict=True)
        )
        return Integers(parts[0].form, codes, scale, zero)
    if isinstance(weight, Ternary):
        scale = _every_row(weight.scale, weight)
        codes = (weight.unpack_trits() + 2).to(torch.uint8)
        form = IntegerForm(2, weight.group_size, "middle", ternary=True)
        return Integers(form, codes, scale, torch.full_like(scale, 2.0))
    assert isinstance(weight, GroupInt | TwoLevelInt)
    grid = weight.grid()
    scale = _every_row(grid.scale, weight)
    middle = torch.full_like(scale, 2.0 ** (weight.bits - 1))
    zero = middle if grid.zero is None else _every_row(grid.zero, weight)
    kind: Zero = "middle" if grid.zero is None else "real" if grid.zero.is_floating_point() else "integer"
    return Integers(IntegerForm(weight.bits, weight.group_size, kind), weight.unpack_codes(), scale, zero)


def _every_row(values: Tensor, weight: Weight) -> Tensor:
    """Float32, and one row for each row of the matrix where one scale serves all."""
    return values.float().expand(weight.shape[0], -1)
