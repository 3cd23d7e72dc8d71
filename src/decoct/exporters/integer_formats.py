"""What the integer formats of other engines can hold, said as data: bits, group sizes, zero points."""

from dataclasses import dataclass
from typing import Any

from decoct.exporters.gguf.choose import exact_types
from decoct.exporters.integers import IntegerForm, form_of
from decoct.weights import GroupInt, Masked

WHOLE_ROWS = -1
"""The group size that such formats give a scale for each row."""


@dataclass(frozen=True, slots=True)
class IntegerFormat:
    """A folder format for integers in groups.

    Attributes:
        name: for `--to`.
        title: as people write it.
        bits: of codes.
        group_sizes: that its readers know.
        whole_rows: whether one scale a row can be said, whatever the width.
        full_words: which of "in", "out" have to fill words of 32 bits with their codes.
        ends: whether embedding and lm_head may be quantized.
        real_zeros: whether zero points may be real numbers.
        zeros_always: whether symmetric integers are stored with a zero point like others.
        fused: whether engines load q, k, v as one matrix, and gate, up.
    """

    name: str
    title: str
    bits: tuple[int, ...]
    group_sizes: tuple[int, ...]
    whole_rows: bool
    full_words: tuple[str, ...]
    ends: bool = False
    real_zeros: bool = False
    zeros_always: bool = False
    fused: bool = True

    def group_size(self, form: IntegerForm, shape: tuple[int, int]) -> int | None:
        """The largest size that holds the groups, which larger ones repeat their scale for; None: there is none."""
        if self.whole_rows and form.group_size == shape[1]:
            return WHOLE_ROWS
        fitting = [size for size in self.group_sizes if form.group_size % size == 0]
        return max(fitting, default=None)

    def misfit(self, form: IntegerForm, shape: tuple[int, int]) -> tuple[str, str] | None:
        """Why integers of a form do not fit, and what would; None: they do."""
        if form.zero == "real" and not self.real_zeros:
            return f"{form.words}, which it cannot say", "quantize with zero: integer"
        if form.bits not in self.bits:
            known = _listed(self.bits)
            return f"{form.words}, and it has {known} bits", f"quantize to {known} bits"
        if self.group_size(form, shape) is None:
            known = _listed(self.group_sizes)
            return f"{form.words}, and its readers know groups of {known}", f"use a group_size of {known}"
        for side, count in (("out", shape[0]), ("in", shape[1])):
            if side in self.full_words and count * form.bits % 32:
                words = f"{form.words}, and its {count} {side}put features do not fill words of 32 bits"
                return words, "leave it uncompressed"
        return None


GPTQ = IntegerFormat(
    "gptq", "GPTQ", (2, 3, 4, 8), (16, 32, 64, 128, 256, 512, 1024), whole_rows=True, full_words=("in", "out")
)  # fmt: skip
AWQ = IntegerFormat("awq", "AWQ", (4,), (16, 32, 64, 128), whole_rows=True, full_words=("out",), zeros_always=True)
MLX = IntegerFormat(
    "mlx", "MLX", (2, 3, 4, 5, 6, 8), (32, 64, 128), whole_rows=False, full_words=("in",), ends=True, real_zeros=True,
    fused=False,
)  # fmt: skip


def holders(description: dict[str, Any], shape: tuple[int, int]) -> list[str]:
    """Formats that hold a weight's own integers, by name: those that most engines read first, Apple's own last."""
    form = form_of(description)
    if form is None:
        return []
    found = [each.name for each in (GPTQ, AWQ) if each.misfit(form, shape) is None]
    kind = description["inner"]["kind"] if description["kind"] == Masked.kind else description["kind"]
    if kind == GroupInt.kind and form.zero != "real":
        found.append("compressed_tensors")
    if exact_types(form, description, shape[1]):
        found.append("gguf")
    if MLX.misfit(form, shape) is None:
        found.append(MLX.name)
    return found


def _listed(numbers: tuple[int, ...]) -> str:
    *most, last = (str(number) for number in numbers)
    return f"{', '.join(most)} or {last}" if most else last
