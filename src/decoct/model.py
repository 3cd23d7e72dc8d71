"""A model as data: an architecture, names, and lazily read weights. Nothing is loaded until it is asked for."""

import json
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from decoct.arch import Family, Slot, find_family
from decoct.store import FolderSource, Source, open_source
from decoct.weights import Dense, Shared, Weight, check_version, described_dtype, rebuild, tensor_specs

DESCRIPTIONS = "decoct"
"""Key of a shard's safetensors metadata under which its weights' descriptions stand, as JSON."""

PART = "/"
"""Separates a slot's name from the name of one of its stored tensors: `….q_proj.weight/codes`."""

CACHE_VERSION = 2
"""Of the policy for keys and values in decoct.json; a reader refuses a later one."""

_BUFFERS = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias")


@dataclass(frozen=True)
class Model:
    """A checkpoint, opened.

    Attributes:
        source: where tensors come from.
        family: its architecture's table.
        described: description of every slot that is not dense, by full name.
        lineage: what decoct did to it before, oldest first.
        cache: how keys and values are to be kept while it runs, as `methods.policy` describes it; None: as they are.
    """

    source: Source
    family: Family
    described: dict[str, dict[str, Any]] = field(default_factory=dict)
    lineage: tuple[dict[str, Any], ...] = ()
    cache: dict[str, Any] | None = None

    @property
    def config(self) -> dict[str, Any]:
        """config.json."""
        return self.source.config

    @property
    def num_blocks(self) -> int:
        """Number of transformer blocks."""
        return self.family.num_blocks(self.config)

    @property
    def max_length(self) -> int | None:
        """The longest sequence that the model was made for, tokens; None if its config does not say."""
        stated = self.config.get("max_position_embeddings") or self.config.get("n_positions")
        return None if stated is None else int(stated)

    @cached_property
    def tied(self) -> bool:
        """Whether the output projection is the token embedding."""
        stated = self.config.get("tie_word_embeddings")
        return self.family.head not in self._stored if stated is None else bool(stated)

    @cached_property
    def block_slots(self) -> tuple[Slot, ...]:
        """The slots of any one block."""
        return self.family.slots(self.config)

    @cached_property
    def end_slots(self) -> tuple[Slot, ...]:
        """Embedding and, where it is a matrix of its own, lm_head."""
        embed, head = self.family.ends()
        return (embed,) if self.tied else (embed, head)

    @cached_property
    def dtype(self) -> torch.dtype:
        """The dtype of the uncompressed weights."""
        name = self.family.embed
        if name in self.described:
            return described_dtype(self.described[name])
        return self.source.dtype(self._stored[name])

    def prefix(self, block: int) -> str:
        """Full-name prefix of a block's tensors."""
        return f"{self.family.blocks}.{block}."

    def slots(self) -> dict[str, Slot]:
        """Every slot of the model by full name, embedding first, blocks in order, lm_head last."""
        ends = {slot.name: slot for slot in self.end_slots}
        found = {self.family.embed: ends.pop(self.family.embed)}
        for block in range(self.num_blocks):
            found.update({self.prefix(block) + slot.name: slot for slot in self.block_slots})
        return {**found, **ends}

    def slot(self, name: str) -> Slot:
        """A slot by its full name."""
        return self._slot_names[name]

    def others(self, block: int | None) -> list[str]:
        """Full names of the tensors that are no slots (norms, biases, positions) in a block, or outside all of them."""
        slots = self._slot_names
        prefix = f"{self.family.blocks}." if block is None else self.prefix(block)
        return [n for n in self._stored if n.startswith(prefix) == (block is not None) and n not in slots]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a slot as [out, in], or of another tensor."""
        if name in self.described:
            out, cols = self.described[name]["shape"]
            return int(out), int(cols)
        shape = self.source.shape(self._stored[name])
        slot = self._slot_names.get(name)
        return tuple(reversed(shape)) if slot is not None and slot.transposed else shape

    def weight(self, name: str) -> Weight:
        """A slot's weight.

        Raises:
            ValueError: the checkpoint lacks it or a part of it.
        """
        description = self.described.get(name)
        if description is None:
            tensor = self.tensor(name)
            return Dense.of(tensor.T.contiguous() if self._slot_names[name].transposed else tensor)
        if description["kind"] == Shared.kind:
            return Shared.of(description["target"], self.weight(description["target"]))
        parts = tensor_specs(description)
        tensors = {part: self.source.read(f"{name}{PART}{part}") for part in parts}
        return rebuild(description, tensors, name)

    def tensor(self, name: str) -> Tensor:
        """A tensor as the checkpoint stores it, by canonical name.

        Raises:
            ValueError: the checkpoint lacks it.
        """
        if name not in self._stored:
            raise ValueError(f"{self.source.label} lacks the tensor {name}; the checkpoint is incomplete")
        return self.source.read(self._stored[name])

    def prefetch(self, block: int) -> None:
        """Have a block's tensors, or after the last block lm_head, read ahead while something else is computed."""
        prefix = self.prefix(block) if block < self.num_blocks else self.family.head
        either = (prefix, prefix.removeprefix(self.family.base_prefix))
        self.source.prefetch([raw for raw in self.source.names() if raw.startswith(either)])

    def missing(self) -> list[str]:
        """Slots that the architecture's table expects and the checkpoint lacks."""
        return [name for name in self._slot_names if name not in self._stored and name not in self.described]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors in the checkpoint."""
        return sum(self.source.dtype(n).itemsize * prod(self.source.shape(n)) for n in self._kept_raw_names)

    def nbytes_under(self, prefix: str) -> int:
        """Bytes of all tensors whose names, or the names of whose slots, begin so: a block's, or one slot's."""
        base = self.family.base_prefix
        return sum(
            self.source.dtype(raw).itemsize * prod(self.source.shape(raw))
            for raw in self._kept_raw_names
            if raw.startswith(prefix) or (base + raw).startswith(prefix)
        )

    @property
    def num_parameters(self) -> int:
        """Entries of all matrices and vectors before any compression; a tied embedding counts once."""
        others = (n for n in self._stored if n not in self._slot_names)
        return sum(prod(self.shape(n)) for n in (*self._slot_names, *others))

    @property
    def bits_per_weight(self) -> float:
        """Stored bits for each parameter, everything counted: scales, masks, norms, embeddings."""
        return 8 * self.nbytes / self.num_parameters

    @cached_property
    def _slot_names(self) -> dict[str, Slot]:
        return self.slots()

    @cached_property
    def _stored(self) -> dict[str, str]:
        """Canonical name -> name in the source, for tensors that are stored plainly."""
        head, base = self.family.head, self.family.base_prefix
        stated = self.config.get("tie_word_embeddings")
        found = {}
        for raw in self.source.names():
            if PART in raw or raw.endswith(_BUFFERS) or (raw == head and stated):
                continue
            found[raw if raw.startswith(base) or raw == head else base + raw] = raw
        return found

    @cached_property
    def _kept_raw_names(self) -> list[str]:
        packed = [raw for raw in self.source.names() if PART in raw]
        return [*self._stored.values(), *packed]


def open_model(model: "str | Path | Model") -> Model:
    """Open a folder, a .gguf file or a hub id, compressed by decoct or not.

    Raises:
        ValueError: no such model, an unsupported architecture, a foreign quantization, damaged or missing tensors.
    """
    if isinstance(model, Model):
        return model
    source = open_source(model)
    family = find_family(source.config)
    _refuse_foreign_quantization(source)
    opened = Model(source, family, _descriptions(source), _lineage(source), _cache(source))
    lacking = opened.missing()
    if lacking:
        raise ValueError(
            f"{source.label} lacks {len(lacking)} weights, first {lacking[0]}; the checkpoint is incomplete"
        )
    return opened


def _refuse_foreign_quantization(source: Source) -> None:
    quantization = source.config.get("quantization_config")
    method = (quantization or {}).get("quant_method")
    if method not in (None, "decoct"):
        raise ValueError(
            f"{source.label} is already quantized ({method}); decoct needs the unquantized checkpoint: use the original"
        )


def _descriptions(source: Source) -> dict[str, dict[str, Any]]:
    if not isinstance(source, FolderSource):
        return {}
    found: dict[str, dict[str, Any]] = {}
    for shard in source.shards:
        text = shard.metadata.get(DESCRIPTIONS)
        if text is not None:
            try:
                stated = json.loads(text)
                version, weights = stated["format_version"], dict(stated["weights"])
            except (json.JSONDecodeError, KeyError, TypeError, ValueError):
                raise ValueError(f"{shard.path} has damaged descriptions of its weights; write it again") from None
            check_version(version, str(shard.path))
            found.update(weights)
    return found


def _lineage(source: Source) -> tuple[dict[str, Any], ...]:
    manifest = source.manifest() if isinstance(source, FolderSource) else None
    return tuple((manifest or {}).get("lineage", ()))


def _cache(source: Source) -> dict[str, Any] | None:
    manifest = source.manifest() if isinstance(source, FolderSource) else None
    stated = (manifest or {}).get("cache")
    if stated is None:
        return None
    version = stated.get("format_version")
    if not isinstance(version, int) or version > CACHE_VERSION:
        raise ValueError(
            f"{source.label}: its key-value cache policy has format {version}, this decoct reads {CACHE_VERSION}; "
            "install a newer decoct"
        )
    return dict(stated)
