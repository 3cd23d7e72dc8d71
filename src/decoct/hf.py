"""`import decoct.hf`, and transformers loads decoct's checkpoints: AutoModelForCausalLM.from_pretrained(folder).

Compressed weights stay packed in memory. `make_cache(folder)` makes the key-value cache that was saved with a model.
`import decoct` alone does not import this, nor transformers.
"""

from collections.abc import Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from decoct.arch import Slot
from decoct.engine.runner import Runner
from decoct.methods.policy import read_policy
from decoct.model import PART, Model, open_model
from decoct.runtime import (
    BlockCache,
    PackedEmbedding,
    PackedExperts,
    PackedLinear,
    PackedWeight,
    places,
    run_dense_linears,
)
from decoct.runtime.network import Feed
from decoct.store import FolderSource
from decoct.store.gguf_source import GgufSource
from decoct.weights import check_version

_BY_KERNELS: ContextVar[bool] = ContextVar("by_kernels", default=False)
"""Whether weights that are loaded are rearranged for kernels."""


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
            if _BY_KERNELS.get():
                packed.run(self._model.weight(name))
            else:
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


class PolicyCache(Cache):  # type: ignore[misc]
    """Keys and values as a policy that was saved with the model keeps them: packed, the last tokens as they are."""

    def __init__(self, caches: list[BlockCache], windows: list[int | None]) -> None:
        """Hold a cache for each block, with its attention's sliding window."""
        super().__init__(layers=[PolicyLayer(*each) for each in zip(caches, windows, strict=True)])

    @property
    def nbytes(self) -> int:
        """Bytes of everything that is held, scales and the tokens in full precision included."""
        return sum(layer.cache.nbytes for layer in self.layers)


class PolicyLayer(CacheLayerMixin):  # type: ignore[misc]
    """One block's part, as transformers asks for it."""

    def __init__(self, cache: BlockCache, sliding_window: int | None) -> None:
        super().__init__()
        self.cache, self.sliding_window = cache, sliding_window
        self.is_sliding = sliding_window is not None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is allocated ahead."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Take new tokens; gives what attention looks at."""
        self.is_initialized = True
        return self.cache.update(key_states, value_states)

    def get_seq_length(self) -> int:
        """Tokens seen."""
        return self.cache.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Number and first position of the tokens that the next `update` gives."""
        held = self.cache.length
        if self.sliding_window is not None:
            held = min(held, self.sliding_window - 1)
        return held + query_length, self.cache.length - held

    def get_max_length(self) -> int:
        """The sliding window, or no limit."""
        return -1 if self.sliding_window is None else self.sliding_window

    def reset(self) -> None:
        """Forget everything."""
        self.cache.reset()
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Choose sequences, as beam search does."""
        self.cache.each_sequence(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences."""
        self.cache.each_sequence(lambda tensor: tensor[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence."""
        self.cache.each_sequence(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse: packed tokens do not become what they were."""
        if tokens_to_remove:
            raise ValueError("a packed key-value cache cannot take tokens back; generate without assisted decoding")

    def offload(self) -> None:
        """Refuse: it is small, and stays where it is."""
        raise ValueError("a packed key-value cache is not offloaded; leave offloading away")


def make_cache(model: "str | Path | Model") -> PolicyCache:
    """An empty key-value cache for `generate(…, past_key_values=…)`, as the policy saved with a model says.

    Args:
        model: the folder that decoct wrote, or an opened model.

    Raises:
        ValueError: no policy was saved with it.
    """
    opened = open_model(model)
    policy = read_policy(opened)
    if policy is None:
        raise ValueError(
            f"{opened.source.label} has no key-value cache policy; "
            "save one with a recipe's stage {cache: {kivi: {bits: 4}}}"
        )
    found = places(policy, Runner(opened, torch.float32).attentions())
    return PolicyCache([BlockCache(policy.method, place) for place in found], [place.sliding_window for place in found])


class TransformersNetwork:
    """A model of transformers in the seat of decoct's decode loop: one sequence after another, each with its cache.

    Attributes:
        about: one line: what computes.
        context: the most tokens that a sequence may have.
        num_seats: sequences that it holds at once.
        nbytes: bytes of its parameters and buffers, but for a table that is only looked up in.
    """

    def __init__(self, network: Any, model: Model, about: str, *, context: int, num_seats: int = 1) -> None:
        """Take a loaded model of transformers, and the checkpoint that says how keys and values are kept."""
        self.about, self.context, self.num_seats = about, context, num_seats
        self._network, self._model = network, model
        self._caches: dict[int, Cache] = {}
        table = network.get_input_embeddings()
        looked_up = [] if model.tied else [*table.parameters(), *table.buffers()]
        held = sum(each.nbytes for each in (*network.parameters(), *network.buffers()))
        self.nbytes = held - sum(each.nbytes for each in looked_up)

    def length(self, seat: int) -> int:
        """Tokens that a sequence has so far."""
        return int(self._caches[seat].get_seq_length()) if seat in self._caches else 0

    def release(self, seat: int) -> None:
        """Forget a sequence."""
        self._caches.pop(seat, None)

    @torch.inference_mode()
    def advance(self, feeds: Sequence[Feed]) -> Tensor:
        """Take tokens in; gives the float32 logits after the last token of each feed [feeds, vocab]."""
        return torch.stack([self._advance(feed) for feed in feeds])

    def _advance(self, feed: Feed) -> Tensor:
        if feed.seat not in self._caches:
            plain = self._model.cache is None
            self._caches[feed.seat] = DynamicCache(config=self._network.config) if plain else make_cache(self._model)
        tokens = torch.tensor([list(feed.tokens)], device=self._network.device)
        out = self._network(tokens, past_key_values=self._caches[feed.seat], use_cache=True, logits_to_keep=1)
        logits: Tensor = out.logits[0, -1].float()
        return logits.cpu()


def load(model: "str | Path | Model", dtype: torch.dtype | None = None) -> Any:
    """A checkpoint as transformers' own model on the CPU, each of its matrices run by the best kernel there is.

    Compressed weights stay packed, rearranged for the kernels one after the other while the model is loaded.
    `decoct.runtime.kernels_of` tells which kernel each matrix got. Such a model runs; it cannot be moved or trained.

    Args:
        model: a folder that decoct wrote, or an opened model.
        dtype: of hidden states; None: the model's own.
    """
    token = _BY_KERNELS.set(True)
    try:
        network = load_whole(open_model(model), dtype)
    finally:
        _BY_KERNELS.reset(token)
    run_dense_linears(network)
    return network


def load_whole(model: Model, dtype: torch.dtype | None = None, device: str | None = None) -> Any:
    """A checkpoint as transformers' own model, packed weights packed.

    Args:
        model: what to load.
        dtype: of hidden states; None: the model's own.
        device: that everything is put on, as torch names it; None: the CPU.
    """
    source, wanted = model.source, {"dtype": dtype or model.dtype, "device_map": device}
    if isinstance(source, GgufSource):
        return AutoModelForCausalLM.from_pretrained(source.path.parent, gguf_file=source.path.name, **wanted)
    assert isinstance(source, FolderSource)
    return AutoModelForCausalLM.from_pretrained(source.folder, experts_implementation="eager", **wanted)


def _set(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
