"""peft's adapters (LoRA, arXiv 2106.09685): written beside a plain base from low-rank terms, and read as such terms."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from decoct.exporters.dense import check_dense
from decoct.exporters.folder import write_folder
from decoct.exporters.misfit import MisfitError
from decoct.model import Model
from decoct.store import open_safetensors, read_json, save_safetensors, write_json
from decoct.weights import Dense, LowRank, Sum, Weight

BASE = "base"
"""The folder of the plain base, in that of an export."""

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_MORE = ("use_dora", "lora_bias", "modules_to_save", "use_qalora", "target_parameters", "trainable_token_indices")
_PREFIX = "base_model.model."
_TENSOR = re.compile(rf"{re.escape(_PREFIX)}(?P<module>.+)\.lora_(?P<side>[AB])\.weight")


@dataclass(frozen=True, slots=True)
class Term:
    """One matrix's share of an adapter.

    Attributes:
        left: [out, rank], the scale included.
        right: [rank, in].
    """

    left: Tensor
    right: Tensor

    def weight(self, dtype: torch.dtype) -> LowRank:
        """As a weight."""
        return LowRank.of(Dense.of(self.left.to(dtype)), Dense.of(self.right.to(dtype)))


def check_peft(model: Model, *, fold: bool) -> None:
    """Refuse what an adapter and a plain base cannot say. Looks at descriptions alone.

    Raises:
        MisfitError: there is no low-rank term beside anything, one where peft has none, or what `check_dense` refuses.
    """
    found = [name for name, description in model.described.items() if _has_term(description)]
    if not found:
        raise MisfitError(
            f"{model.source.label} has no low-rank terms beside its matrices, which adapters are made of",
            "train them with distill: {train: [lora]}",
            "train them with distill: {train: [lora]}, or export it as dense",
        )
    for name in found:
        slot = model.slot(name)
        if not fold and (slot.param is not None or slot.role == "embed"):
            what = f"peft has no adapters for {name}: it is {'an embedding' if slot.role == 'embed' else 'an expert'}"
            raise MisfitError(what, "leave it out of the step that corrects", "add --fold to merge that term")
    check_dense(model, fold=fold)


def export_peft(model: Model, out: Path, *, fold: bool = False) -> None:
    """Write a plain base, every weight unpacked but for the terms, and the terms as an adapter of it.

    Args:
        model: what to write.
        out: a folder that does not exist yet, or is empty.
        fold: merge into the base what peft cannot hold.

    Raises:
        MisfitError: see `check_peft`.
        ValueError: the folder holds something already.
    """
    check_peft(model, fold=fold)
    slots, terms = model.slots(), dict[str, Term]()

    def encode(name: str) -> dict[str, Tensor]:
        slot, weight = slots[name], model.weight(name)
        rest, term = (weight, None) if slot.param is not None or slot.role == "embed" else divided(weight)
        if term is not None:
            terms[model.family.module_name(name).removesuffix(".weight")] = term
        matrix = rest.unpack(model.dtype)
        return {name: matrix.T if slot.transposed else matrix}

    write_folder(model, out / BASE, encode, None)
    tensors = {}
    for module, term in terms.items():
        tensors[f"{_PREFIX}{module}.lora_A.weight"] = term.right.contiguous()
        tensors[f"{_PREFIX}{module}.lora_B.weight"] = term.left.contiguous()
    save_safetensors(out / TENSORS, tensors, {"format": "pt"})
    transposed = any(slot.transposed for slot in slots.values())
    write_json(out / CONFIG, _config(terms, str((out / BASE).resolve()), transposed=transposed))


def divided(weight: Weight) -> tuple[Weight, Term | None]:
    """A weight without the low-rank terms beside it, and these as one."""
    if not isinstance(weight, Sum):
        return weight, None
    low = [term for term in weight.terms if isinstance(term, LowRank)]
    rest = [term for term in weight.terms if not isinstance(term, LowRank)]
    if not low or not rest:
        return weight, None
    left = torch.cat([each.left.unpack(weight.dtype) for each in low], 1)
    right = torch.cat([each.right.unpack(weight.dtype) for each in low], 0)
    return rest[0] if len(rest) == 1 else Sum.of(*rest), Term(left, right)


def read_adapter(folder: Path, model: Model) -> dict[str, Term]:
    """An adapter's terms by the full names of the slots that they belong to.

    Args:
        folder: with adapter_config.json and adapter_model.safetensors.
        model: what it is for.

    Raises:
        ValueError: there is none, it is of another kind than LoRA, or does not fit the model.
    """
    stated, halves = _stated(folder), _halves(folder)
    names = {
        model.family.module_name(name).removesuffix(".weight"): name
        for name, slot in model.slots().items()
        if slot.param is None and slot.role != "embed"
    }
    found = {}
    for module, sides in halves.items():
        if module not in names:
            raise ValueError(f"{folder} adapts {module}, which {model.source.label} does not have; name its own base")
        if sides.keys() != {"A", "B"}:
            raise ValueError(f"{folder}: {module} has half an adapter; the file is incomplete")
        left, right = sides["B"].float(), sides["A"].float()
        shape = (left.shape[0], right.shape[1])
        if shape != model.shape(names[module]) or left.shape[1] != right.shape[0]:
            raise ValueError(
                f"{folder} adapts {module} as a {shape[0]}x{shape[1]} matrix, in {model.source.label} it is "
                f"{'x'.join(map(str, model.shape(names[module])))}; name its own base"
            )
        if not (torch.isfinite(left).all() and torch.isfinite(right).all()):
            raise ValueError(f"{folder}: {module} holds NaN or infinite values; the adapter is damaged")
        found[names[module]] = Term(left * _scale(stated, module, left.shape[1]), right)
    return found


def read_ranks(folder: Path) -> dict[str, int]:
    """The rank of each adapted module's term, by the module's name in transformers.

    Raises:
        ValueError: as `read_adapter`, where that shows without a model.
    """
    _stated(folder)
    halves = _halves(folder)
    if not halves:
        raise ValueError(f"{folder} adapts nothing; its {TENSORS} is empty")
    return {module: sides["A"].shape[0] if "A" in sides else sides["B"].shape[1] for module, sides in halves.items()}


def _has_term(description: dict[str, Any]) -> bool:
    kinds = {term["kind"] for term in description["terms"]} if description["kind"] == Sum.kind else set()
    return LowRank.kind in kinds and kinds != {LowRank.kind}


def _config(terms: Mapping[str, Term], base: str, *, transposed: bool) -> dict[str, Any]:
    """adapter_config.json: each matrix's alpha is its rank, so that nothing is scaled."""
    ranks = {module: term.right.shape[0] for module, term in terms.items()}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    others = {module: rank for module, rank in ranks.items() if rank != usual}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": transposed,
    }


def _stated(folder: Path) -> dict[str, Any]:
    """adapter_config.json, of an adapter that is low-rank terms and nothing else."""
    if not (folder / CONFIG).exists():
        raise ValueError(f"{folder} is no adapter in peft's format: it has no {CONFIG}")
    stated: dict[str, Any] = read_json(folder / CONFIG)
    if stated.get("peft_type") != "LORA":
        raise ValueError(f"{folder} is a {stated.get('peft_type')} adapter; decoct reads those of the type LORA")
    for key in (
        "use_dora",
        "lora_bias",
        "modules_to_save",
        "use_qalora",
        "target_parameters",
        "trainable_token_indices",
    ):
        if stated.get(key):
            raise ValueError(f"{folder} uses {key}, which is no low-rank term; merge it with peft (merge_and_unload)")
    if stated.get("bias", "none") != "none":
        raise ValueError(f"{folder} has trained biases too; merge it with peft (merge_and_unload)")
    return stated


def _halves(folder: Path) -> dict[str, dict[str, Tensor]]:
    """An adapter's tensors by module and side."""
    if not (folder / TENSORS).exists():
        raise ValueError(f"{folder} has no {TENSORS}; save the adapter as safetensors")
    saved, found = open_safetensors(folder / TENSORS), dict[str, dict[str, Tensor]]()
    for name in saved.tensors:
        match = _TENSOR.fullmatch(name)
        if match is None:
            raise ValueError(f"{folder}: {name} is no low-rank term of a linear layer; merge it with peft")
        found.setdefault(match["module"], {})[match["side"]] = saved.read(name)
    return found


def _scale(stated: Mapping[str, Any], module: str, rank: int) -> float:
    """What the product of the factors is multiplied with."""
    alpha = stated.get("lora_alpha", 8)
    for pattern, other in (stated.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = other
            break
    return float(alpha) / (rank**0.5 if stated.get("use_rslora") else rank)
