"""What vLLM asks of a checkpoint, looked up in its sources: kernels for the bits, whole groups on every device.

vLLM is not run here. What it would refuse to load, run slowly, or run with a package that is installed apart is told as
a warning, since other engines may read the same folder; a number of devices that was asked for and does not fit is
refused.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from decoct.exporters.misfit import MisfitError
from decoct.exporters.report import Check
from decoct.model import Model

_MARLIN_GROUPS = (-1, 32, 64, 128)
_DEVICES = (1, 2, 4, 8)
_COLUMNS = ("attn.q", "attn.k", "attn.v", "attn.qkv", "mlp.gate", "mlp.up", "mlp.gate_up")
_ROWS = ("attn.o", "mlp.down")


@dataclass(frozen=True, slots=True)
class Stored:
    """One matrix as a folder has it.

    Attributes:
        name: in the checkpoint.
        role: of its slot.
        shape: [out, in].
        bits: of a code.
        group_size: input features that share a scale; -1: a row; None: one scale for all.
        symmetric: whether there are no zero points.
        number: "int", or the name of the scheme of floating-point numbers.
        inputs: how inputs are rounded, e.g. "int8"; "": they are not.
        words: which sides are packed into words of 32 bits, of "in" and "out".
    """

    name: str
    role: str
    shape: tuple[int, int]
    bits: int
    group_size: int | None
    symmetric: bool
    number: str = "int"
    inputs: str = ""
    words: tuple[str, ...] = ("in",)

    @property
    def words_for_it(self) -> str:
        """For messages."""
        size = {-1: "a scale a row", None: "one scale"}.get(self.group_size, f"groups of {self.group_size}")
        if self.number != "int":
            return self.number + (f" with inputs in {self.inputs}" if self.inputs else "")
        zero = "symmetric" if self.symmetric else "with zero points"
        rounded = f", inputs in {self.inputs}" if self.inputs else ""
        return f"{self.bits}-bit integers, {zero}, {size}{rounded}"


def check_for_vllm(model: Model, form: str, stored: Sequence[Stored], config: dict[str, Any]) -> list[Check]:
    """What its rules say of a folder.

    Args:
        model: what was written.
        form: "compressed_tensors", "gptq" or "awq".
        stored: every matrix that is quantized.
        config: the `quantization_config` that was written.
    """
    problems = Counter(
        f"{each.words_for_it}: {problem}" for each in stored if (problem := kernel_problem(form, each)) is not None
    )
    kernels = [f"{problem} ({count})" for problem, count in problems.items()]
    found = Check(
        "vllm kernels", None if kernels else True, "; ".join(kernels) or "all matrices have one", warning=bool(kernels)
    )
    works, fails = [], []
    for devices in _DEVICES:
        problem = parallel_problem(model, stored, devices)
        if problem is None:
            works.append(str(devices))
        else:
            fails.append(f"{devices}: {problem}")
    said = f"fits {', '.join(works) or 'no number of'} devices" + "".join(f"; not {each}" for each in fails[:1])
    alone = not works
    parallel = Check("vllm tensor parallel", None if alone else True, said, warning=alone)
    return [found, parallel, _check_ignored(model, form, stored, config)]


def _check_ignored(model: Model, form: str, stored: Sequence[Stored], config: dict[str, Any]) -> Check:
    """Whether the config says of every layer what it is: one that is missing there would be loaded in the wrong way."""
    quantized = {each.name for each in stored}
    linear = [name for name, slot in model.slots().items() if slot.role != "embed"]
    linear += [model.family.head] if model.tied else []
    wrong = [
        name
        for name in linear
        if is_quantized(form, config, model.family.module_name(name).removesuffix(".weight")) != (name in quantized)
    ]
    return Check("vllm ignore list", not wrong, f"wrong of {wrong[0]}" if wrong else f"right of {len(linear)} layers")


def is_quantized(form: str, config: dict[str, Any], module: str) -> bool:
    """What a `quantization_config` says of a linear layer, as vLLM reads it."""
    if form == "compressed_tensors":
        targets = {target for group in config["config_groups"].values() for target in group["targets"]}
        return not targets.isdisjoint({"Linear", module}) and module not in set(config["ignore"])
    if form == "awq":
        return not any(part in module for part in config["modules_to_not_convert"])
    for pattern in config["dynamic"] or {}:
        if re.match(pattern[2:], module):
            return bool(pattern.startswith("+:"))
    return bool(config["lm_head"]) or not module.endswith(("lm_head", "embed_out"))


def check_tensor_parallel(model: Model, stored: Sequence[Stored], devices: int) -> None:
    """Refuse a number of devices that the matrices cannot be divided among.

    Raises:
        MisfitError: see `parallel_problem`; names a smaller number that works.
    """
    problem = parallel_problem(model, stored, devices)
    if problem is None:
        return
    smaller = [n for n in range(devices - 1, 0, -1) if parallel_problem(model, stored, n) is None]
    advice = f"use --tensor-parallel {smaller[0]}" if smaller else "export as dense"
    raise MisfitError(f"vLLM cannot divide it among {devices} devices: {problem}", advice, advice)


def kernel_problem(form: str, each: Stored) -> str | None:
    """Why vLLM does not load a matrix, or runs it slowly; None: it has a kernel for it."""
    if each.inputs or each.number != "int":
        return _rounded_problem(each)
    if form == "gptq":
        if each.bits not in (4, 8) or not each.symmetric:
            return "vLLM loads GPTQ's layout with 4 and 8 symmetric bits only"
        return None if each.group_size in _MARLIN_GROUPS else "vLLM loads groups of 32, 64, 128 or a row only"
    if each.group_size is None:
        return "vLLM wants a scale for each row or group"
    if not each.symmetric and each.bits != 4:
        return "vLLM has kernels for zero points with 4 bits only"
    if each.bits not in (4, 8):
        return "vLLM runs these bits through the package humming only"
    if each.group_size not in _MARLIN_GROUPS:
        return "not in Marlin, which knows groups of 32, 64, 128 or a row; slower kernels may take it"
    return None


def _rounded_problem(each: Stored) -> str | None:
    """The same for floating-point numbers, and for integers whose inputs are rounded."""
    if each.number == "int":
        if each.bits == 8 and each.symmetric and each.group_size in (-1, None):
            return None
        if each.bits == 8:
            return "vLLM wants symmetric weights with a scale a row, or one, where inputs are rounded"
        return "vLLM runs rounded inputs with these bits on some machines only, or through the package humming"
    if each.number == "mxfp6-pack-quantized":
        return "vLLM has no kernel for it"
    if each.number == "mxfp8-quantized" and not each.inputs:
        return "vLLM rounds the inputs to MXFP8 as well"
    return None


def parallel_problem(model: Model, stored: Sequence[Stored], devices: int) -> str | None:
    """Why heads, neurons, groups or words cannot be divided among so many devices; None: they can."""
    heads = int(model.config["num_attention_heads"])
    shared = int(model.config.get("num_key_value_heads") or heads)
    if heads % devices:
        return f"{heads} attention heads"
    if shared % devices and devices % shared:
        return f"{shared} heads of keys and values"
    for each in stored:
        problem = _matrix_problem(each, devices, shared)
        if problem is not None:
            return f"{each.name}: {problem}"
    return None


def _matrix_problem(each: Stored, devices: int, shared: int) -> str | None:
    out, cols = each.shape
    if each.role in _ROWS:
        if cols % devices:
            return f"{cols} input features"
        part, size = cols // devices, each.group_size or -1
        if size > 0 and part % size:
            return f"{part} input features a device are no whole groups of {size}"
        if "in" in each.words and part * each.bits % 32:
            return f"{part} input features a device do not fill words of 32 bits"
    if each.role in _COLUMNS:
        among = min(devices, shared) if each.role in ("attn.k", "attn.v") else devices
        if out % among:
            return f"{out} output features"
        if "out" in each.words and out // among * each.bits % 32:
            return f"{out // among} output features a device do not fill words of 32 bits"
    return None
