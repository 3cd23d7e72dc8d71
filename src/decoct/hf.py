"""`import decoct.hf`, and transformers loads decoct's checkpoints: AutoModelForCausalLM.from_pretrained(folder).

Compressed weights stay packed in memory. `import decoct` alone does not import this, nor transformers.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from decoct.arch import Slot
from decoct.model import PART, Model, open_model
from decoct.runtime import PackedEmbedding, PackedExperts, PackedLinear, PackedWeight
from decoct.weights import check_version


@register_quantization_config("decoct")
class DecoctConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """What config.json's `quantization_config` says: that decoct wrote the checkpoint, and in which format."""

    def __init__(self, format_version: int = 1, **_: Any) -> None:
        self.quant_method = "decoct"
        self.format_version = format_version


@register_quantizer("decoct")
class DecoctQuantizer(HfQuantizer):  # type: ignore[misc]
    """Puts packed modules where the checkpoint has compressed weights, and fills them after everything else."""

    requires_calibration = True

    def __init__(self, quantization_config: DecoctConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._model: Model | None = None
        self._pending: dict[str, PackedWeight] = {}

    def validate_environment(self, *_: Any, **__: Any) -> None:
        """Refuse a checkpoint of a later decoct."""
        check_version(self.quantization_config.format_version, "config.json")

    def _process_model_before_weight_loading(
        self,
        model: PreTrainedModel,
        checkpoint_files: list[str] | None = None,
        dtype: torch.dtype | None = None,
        **_: Any,
    ) -> None:
        if not checkpoint_files:
            raise ValueError("a decoct checkpoint is loaded from its folder: from_pretrained(folder)")
        self._model = open_model(Path(checkpoint_files[0]).parent)
        self._pending = {}
        fused: dict[str, list[tuple[str, Slot]]] = {}
        slots = self._model.slots()
        for name in self._model.described:
            slot = slots[name]
            if slot.param is None:
                self._replace(model, name, slot, dtype or self._model.dtype)
            else:
                block = name.removesuffix(slot.name)
                fused.setdefault(block + slot.param.rsplit(".", 1)[0], []).append((name, slot))
        for path in fused:
            self._replace_experts(model, path)
        ours = {PART, *(rf"^{path}\." for path in fused)}
        ignored = set(model._keys_to_ignore_on_load_unexpected or ())  # noqa: SLF001 - transformers' own switch
        model._keys_to_ignore_on_load_unexpected = ignored | ours  # noqa: SLF001 - as above

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        assert self._model is not None
        device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
        for name, packed in self._pending.items():
            packed.fill(self._model.weight(name), device)
        self._pending = {}
        self._model = None
        return model

    def update_weight_conversions(self, weight_conversions: list[Any], model: PreTrainedModel) -> list[Any]:
        """Packed experts are not fused while loading."""
        packed = any(isinstance(module, PackedExperts) for module in model.modules())
        kept = [c for c in weight_conversions if not (packed and "experts" in str(getattr(c, "target_patterns", "")))]
        return list(super().update_weight_conversions(kept, model))

    @property
    def is_trainable(self) -> bool:
        """Not through transformers' Trainer."""
        return False

    def is_serializable(self) -> bool:
        """Copy the folder instead: save_pretrained would unpack."""
        return False

    def _replace(self, model: PreTrainedModel, name: str, slot: Slot, dtype: torch.dtype) -> None:
        assert self._model is not None
        packed = self._pending.setdefault(name, PackedWeight())
        path = self._model.family.module_name(name).removesuffix(".weight")
        old = model.get_submodule(path)
        if slot.role == "embed":
            _set(model, path, PackedEmbedding(packed, getattr(old, "scalar_embed_scale", None), dtype))
            if self._model.tied:
                head = self._model.family.module_name(self._model.family.head).removesuffix(".weight")
                _set(model, head, PackedLinear(packed, None))
                model.all_tied_weights_keys = {}
                model._tied_weights_keys = {}  # noqa: SLF001 - the packed table is shared already
        else:
            bias = getattr(old, "bias", None)
            _set(model, path, PackedLinear(packed, bias))

    def _replace_experts(self, model: PreTrainedModel, path: str) -> None:
        """Pack every expert of a layer, also those that were left dense."""
        assert self._model is not None
        layout: dict[str, dict[int, dict[int, PackedWeight]]] = {}
        block = (
            self._model.family.blocks + "." + path.removeprefix(self._model.family.blocks + ".").split(".", 1)[0] + "."
        )
        for slot in self._model.block_slots:
            if slot.param is not None and slot.expert is not None:
                packed = self._pending.setdefault(block + slot.name, PackedWeight())
                parameter = slot.param.rsplit(".", 1)[1]
                layout.setdefault(parameter, {}).setdefault(slot.expert, {})[slot.half or 0] = packed
        rows = {
            parameter: [[halves[h] for h in sorted(halves)] for _, halves in sorted(experts.items())]
            for parameter, experts in layout.items()
        }
        _set(model, path, PackedExperts(model.get_submodule(path), rows))


def _set(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
