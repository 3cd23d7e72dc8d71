"""Which of llama.cpp's types each matrix takes: one that holds it exactly if that is no larger, else the best fit."""

from dataclasses import dataclass
from typing import Any

import torch

from decoct.exporters.integers import IntegerForm, form_of
from decoct.exporters.misfit import MisfitError
from decoct.model import Model
from decoct.ops.ggml_blocks import BLOCKS
from decoct.weights import Dense, FloatBlock, Padded, QuantizedInput, described_kinds

VARIANTS: dict[str, str] = {
    "f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0", "q4_0": "Q4_0", "q4_1": "Q4_1", "q5_0": "Q5_0",
    "q5_1": "Q5_1", "iq4_nl": "IQ4_NL", "tq1_0": "TQ1_0", "tq2_0": "TQ2_0", "q2_k": "Q2_K", "q3_k_s": "Q3_K",
    "q3_k_m": "Q3_K", "q4_k_s": "Q4_K", "q4_k_m": "Q4_K", "q5_k_s": "Q5_K", "q5_k_m": "Q5_K", "q6_k": "Q6_K",
}  # fmt: skip
"""What may stand after `gguf:`, and the type that most matrices then take."""

_RAISED = {"q2_k": "Q3_K", "q3_k_m": "Q4_K", "q4_k_m": "Q6_K", "q5_k_m": "Q6_K"}
_NARROW = {
    "Q2_K": "IQ4_NL", "Q3_K": "IQ4_NL", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "TQ1_0": "Q4_0",
    "TQ2_0": "Q4_0",
}  # fmt: skip
_DENSE = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_FLOATS = ("F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class Choice:
    """How one matrix is written.

    Attributes:
        kind: the tensor type.
        exact: whether it holds the codes and scales of ours, so nothing is rounded but scales to float16.
        shape: [out, in] as written: without the padding of uneven widths.
        instead: the type that was asked for, where its blocks do not divide the width.
    """

    kind: str
    exact: bool
    shape: tuple[int, int]
    instead: str | None = None


def choose_types(model: Model, variant: str | None, widths: list[int] | None, *, fold: bool) -> dict[str, Choice]:
    """Each slot's type by full name; looks at descriptions alone.

    Args:
        model: what is to be written, or what a recipe is expected to make.
        variant: one of VARIANTS; None: the smallest types that hold what there is exactly.
        widths: neurons of each block, where they are written as uneven as they are.
        fold: round again, or write uncompressed, what a type cannot hold; leave out what GGUF cannot say.

    Raises:
        MisfitError: there is something of that kind and `fold` is not set.
    """
    if model.cache is not None and not fold:
        (policy,) = model.cache["policy"]
        what = f"GGUF cannot say that keys and values are kept by {policy}"
        raise MisfitError(what, "leave the cache stage out", "add --fold to leave that out")
    found = {}
    for name, slot in model.slots().items():
        description = model.described.get(name)
        _check_inputs(name, description, fold=fold)
        shape = (model.shape(name)[0], model.shape(name)[1])
        if widths is not None and slot.role in ("mlp.gate", "mlp.up", "mlp.down"):
            width = widths[_block(model, name)]
            shape = (shape[0], width) if slot.role == "mlp.down" else (width, shape[1])
        wanted = None if variant is None else _wanted(model, variant, name, slot.role)
        found[name] = _choose(name, bare(description), shape, wanted, model.dtype, fold=fold)
    return found


def bare(description: dict[str, Any] | None) -> dict[str, Any] | None:
    """A description without padding around it and rounding of its inputs; None: what is left is not compressed."""
    while description is not None and description["kind"] in (Padded.kind, QuantizedInput.kind):
        description = description["inner"]
    return None if description is not None and description["kind"] == Dense.kind else description


def feed_forward_widths(model: Model) -> list[int] | None:
    """Each block's number of neurons where they differ (padded matrices), in multiples of 32; None: they do not."""
    downs = {s.role: s for s in model.block_slots}
    if "mlp.down" not in downs:
        return None
    found, uneven = [], False
    for block in range(model.num_blocks):
        name = model.prefix(block) + downs["mlp.down"].name
        description, whole = model.described.get(name), model.shape(name)[1]
        width = whole
        while description is not None and description["kind"] in (Padded.kind, QuantizedInput.kind):
            if description["kind"] == Padded.kind:
                width, uneven = int(description["inner"]["shape"][1]), True
            description = description["inner"]
        found.append(min(whole, -(-width // 32) * 32))
    return found if uneven else None


def exact_types(form: IntegerForm | None, description: dict[str, Any] | None, cols: int) -> list[str]:
    """Types that hold a weight's own codes and scales, smallest first."""
    if description is not None and description["kind"] == FloatBlock.kind:
        parts = tuple(description[key] for key in ("element", "scale_kind", "block_size"))
        return ["MXFP4"] if parts == ("e2m1", "e8m0", 32) and cols % 32 == 0 else []
    if form is None or form.group_size % 32 or cols % 32:
        return []
    found = ["TQ1_0", "TQ2_0"] if form.ternary and form.group_size % 256 == 0 else []
    if form.zero != "real":
        low, high = form.reach
        found += [kind for kind, half in (("Q4_0", 8), ("Q5_0", 16), ("Q8_0", 128)) if low >= -half and high < half]
    if form.zero != "middle" and not form.masked:
        found += [kind for kind, bits in (("Q4_1", 4), ("Q5_1", 5)) if form.bits <= bits]
    return sorted(found, key=lambda kind: BLOCKS[kind][1] / BLOCKS[kind][0])


def bits_of(kind: str) -> float:
    """Bits of an entry in a type, scales counted."""
    entries, nbytes = BLOCKS[kind]
    return 8 * nbytes / entries


def _choose(
    name: str,
    description: dict[str, Any] | None,
    shape: tuple[int, int],
    wanted: str | None,
    dtype: torch.dtype,
    *,
    fold: bool,
) -> Choice:
    exact = exact_types(form_of(description), description, shape[1])
    if wanted is None:
        if description is None:
            return Choice(_DENSE[dtype], exact=True, shape=shape)
        if exact:
            return Choice(exact[0], exact=True, shape=shape)
        if fold:
            return Choice(_DENSE[dtype], exact=False, shape=shape)
        raise _misfit(name, description, "GGUF has no type that holds it exactly", shape)
    kind = _fitting(wanted, shape[1])
    instead = wanted if kind != wanted else None
    smaller = [each for each in exact if bits_of(each) <= max(bits_of(kind), bits_of(wanted))]
    if smaller:
        return Choice(smaller[0], exact=True, shape=shape)
    if description is not None and kind not in _FLOATS and not kind.endswith("_K") and not fold:
        raise _misfit(name, description, f"it would be rounded again to fit {kind}", shape)
    if description is not None and kind in _FLOATS and not fold:
        raise _misfit(name, description, f"{kind} would be larger than what it is", shape)
    return Choice(kind, exact=kind in _FLOATS, shape=shape, instead=instead)


def _misfit(name: str, description: dict[str, Any], why: str, shape: tuple[int, int]) -> MisfitError:
    form = form_of(description)
    words = form.words if form is not None else f"a {description['kind']} weight"
    exact = exact_types(form, description, shape[1])
    if exact:
        wanted = f"use gguf:{exact[0].lower()}, which holds it"
    elif shape[1] % 32:
        wanted = f"no type has blocks that divide its {shape[1]} columns: leave it uncompressed"
        return MisfitError(f"{name} is {words}: {why}", wanted, f"{wanted}, or add --fold")
    elif form is not None and form.group_size % 32:
        wanted = "use groups of a multiple of 32, or gguf:q4_k_m, which is fitted to what there is"
    else:
        wanted = "use gguf:q4_k_m or another type ending in _k, which is fitted to what there is"
    return MisfitError(f"{name} is {words}: {why}", wanted, f"{wanted}, or add --fold")


def _fitting(kind: str, cols: int) -> str:
    """The type, or the one that takes its place where its blocks do not divide the width, as in llama.cpp."""
    if cols % BLOCKS[kind][0] and kind in _NARROW:
        kind = _NARROW[kind]
    return kind if cols % BLOCKS[kind][0] == 0 else "F16"


def _wanted(model: Model, variant: str, name: str, role: str) -> str:
    """The type that a variant gives a role: more bits at both ends, and for what errors cost most in."""
    kind = VARIANTS[variant]
    if kind in _FLOATS:
        return kind
    if role in ("embed", "lm_head"):
        return "Q6_K" if kind.endswith("_K") else "Q8_0"
    if variant in _RAISED and role in ("attn.v", "mlp.down", "attn.qkv"):
        block, count = _block(model, name), model.num_blocks
        if block < count // 8 or block >= 7 * count // 8 or (block - count // 8) % 3 == 2:
            return _RAISED[variant]
    return kind


def _block(model: Model, name: str) -> int:
    return int(name.removeprefix(f"{model.family.blocks}.").split(".", 1)[0])


def _check_inputs(name: str, description: dict[str, Any] | None, *, fold: bool) -> None:
    if description is not None and not fold and QuantizedInput.kind in described_kinds(description):
        what = f"GGUF cannot say that the inputs of {name} are rounded"
        raise MisfitError(what, "leave the step inputs out", "add --fold to leave that out")
