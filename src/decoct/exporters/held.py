"""How graphs hold matrices: as decoct's own integers where the format's kernels multiply such, else uncompressed."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from decoct.exporters.integers import IntegerForm, Zero, form_of, integers_of
from decoct.exporters.misfit import MisfitError
from decoct.model import Model
from decoct.weights import Dense, FloatBlock, Padded, QuantizedInput, Weight, described_kinds


@dataclass(frozen=True, slots=True)
class Kernels:
    """What a format's products of integers take.

    Attributes:
        name: of the format, for messages.
        bits: widths of a code, smallest first.
        group: the size to write groups in, from theirs and the number of input features; None: it takes none.
        groups: the sizes that it takes, for messages.
        real_zero: bits of the widest codes with real zero points; 0: none.
    """

    name: str
    bits: tuple[int, ...]
    group: Callable[[int, int], int | None]
    groups: str
    real_zero: int


@dataclass(frozen=True, slots=True)
class Held:
    """How one matrix is written.

    Attributes:
        bits: of a code; None: it is written uncompressed.
        group: input features that share a scale.
        zero: see `IntegerForm`.
        exact: whether these are its own codes and scales, or numbers.
    """

    bits: int | None
    group: int = 0
    zero: Zero = "middle"
    exact: bool = True

    @property
    def words(self) -> str:
        """For notes."""
        if self.bits is None:
            return "uncompressed"
        return f"{self.bits}-bit in groups of {self.group}" + ("" if self.zero == "middle" else " with zero points")


@dataclass(frozen=True, slots=True)
class Codes:
    """A matrix as a kernel reads it: value = (code - zero) * scale, the last group of a row filled up.

    Attributes:
        codes: unsigned; what fills a row up multiplies nothing.
        scale: float32.
        zero: float32; 2^(bits-1) throughout where it is in the middle.
    """

    codes: UInt8[Tensor, "out groups size"]
    scale: Float[Tensor, "out groups"]
    zero: Float[Tensor, "out groups"]

    def unpack(self, cols: int) -> Float[Tensor, "out cols"]:
        """The matrix in float32."""
        whole = (self.codes.float() - self.zero.unsqueeze(-1)) * self.scale.unsqueeze(-1)
        return whole.flatten(1)[:, :cols]


_OTHERS = {FloatBlock.kind: "compressed_tensors", Padded.kind: "gguf"}
"""Formats that hold kinds of weight which no graph does."""


def choose_held(model: Model, kernels: Kernels, *, fold: bool) -> dict[str, Held]:
    """How each slot's matrix is written, by full name; looks at descriptions alone.

    Args:
        model: what is to be written, or what a recipe is expected to make.
        kernels: what the format takes.
        fold: write uncompressed what they do not; leave out what a graph cannot say.

    Raises:
        MisfitError: there is something of that kind and `fold` is not set.
    """
    if model.cache is not None and not fold:
        (policy,) = model.cache["policy"]
        what = f"{kernels.name} cannot say that keys and values are kept by {policy}"
        raise MisfitError(what, "leave the cache stage out", "add --fold to leave that out")
    return {name: _choose(model, name, kernels, fold=fold) for name in model.slots()}


def note_of(held: Mapping[str, Held]) -> str:
    """How matrices are held, for a user."""
    kinds = ", ".join(f"{n} {words}" for words, n in Counter(each.words for each in held.values()).most_common())
    own = sum(each.bits is not None for each in held.values())
    return f"{kinds}; {own} of {len(held)} matrices hold decoct's own integers"


def codes_of(weight: Weight, held: Held) -> Codes:
    """A weight's own numbers as they are written."""
    assert held.bits is not None
    found = integers_of(weight.inner if isinstance(weight, QuantizedInput) else weight)
    middle, shift = 2 ** (held.bits - 1), 0
    if held.zero == "middle":
        shift = middle - int(found.zero[0, 0])
    codes, scale, zero = found.codes + shift, found.scale, found.zero + shift
    rows, cols = codes.shape
    groups = -(-cols // held.group)
    if scale.shape[1] == 1:
        scale, zero = scale.expand(rows, groups), zero.expand(rows, groups)
    else:
        parts = found.regrouped(held.group)
        scale, zero = parts.scale, parts.zero + shift
    codes = torch.nn.functional.pad(codes, (0, groups * held.group - cols))
    return Codes(codes.reshape(rows, groups, held.group), scale.contiguous(), zero.contiguous())


def _choose(model: Model, name: str, kernels: Kernels, *, fold: bool) -> Held:
    description = model.described.get(name)
    if description is None or description["kind"] == Dense.kind:
        return Held(None)
    if QuantizedInput.kind in described_kinds(description):
        if not fold:
            what = f"{kernels.name} as decoct writes it cannot say that the inputs of {name} are rounded"
            raise MisfitError(what, "leave the step inputs out", "add --fold to leave that out")
        description = description["inner"] if description["kind"] == QuantizedInput.kind else description
    form = form_of(description)
    if form is not None:
        held = _hold(form, model.shape(name)[1], model.slot(name).role, kernels)
        if held is not None:
            return held
    if fold:
        return Held(None, exact=False)
    raise _misfit(name, description, form, kernels)


def _hold(form: IntegerForm, cols: int, role: str, kernels: Kernels) -> Held | None:
    """What holds a form exactly; None: nothing does."""
    group = kernels.group(form.group_size, cols)
    bits = next((bits for bits in kernels.bits if bits >= form.bits), None)
    real = form.zero == "real"
    if group is None or bits is None or (real and (bits > kernels.real_zero or form.masked or role == "embed")):
        return None
    return Held(bits, group, form.zero)


def _misfit(name: str, description: dict[str, Any], form: IntegerForm | None, kernels: Kernels) -> MisfitError:
    if form is None:
        words = f"a {description['kind']} weight"
        wanted = "quantize to integers by groups, channels or tensors (such as rtn or gptq)"
        other = _OTHERS.get(description["kind"], "dense")
    elif form.zero == "real":
        words, other = form.words, "gguf" if form.bits <= 5 and not form.masked else "dense"
        wanted = "quantize with zero: integer"
    else:
        words, wanted, other = form.words, f"use groups of {kernels.groups}", "compressed_tensors"
    return MisfitError(
        f"{kernels.name} has no kernel for {name}: it is {words}",
        wanted,
        f"{wanted}, add --fold to write such weights uncompressed, or export as {other}",
    )


def narrowed(
    values: Float[Tensor, "*shape"], dtypes: Sequence[torch.dtype] = (torch.float16, torch.bfloat16)
) -> Float[Tensor, "*shape"]:
    """In the first of some 16-bit dtypes that holds every one of the values exactly, else as they are."""
    for dtype in dtypes:
        if torch.equal(values.to(dtype).float(), values):
            return values.to(dtype)
    return values
