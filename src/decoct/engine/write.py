"""A compressed model's files: one shard for each part, then index, config and manifest, config.json last of all."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from decoct.model import DESCRIPTIONS, PART, Model
from decoct.store import INDEX, MANIFEST, open_safetensors, save_safetensors, write_json
from decoct.weights import FORMAT_VERSION, Dense, Weight, describe


def shard_name(number: int, total: int) -> str:
    """The usual name of a shard."""
    return f"model-{number + 1:05d}-of-{total:05d}.safetensors"


def write_shard(path: Path, weights: Mapping[str, Weight], others: Mapping[str, Tensor], transposed: set[str]) -> int:
    """Save a part atomically: dense weights under their own names, as any loader expects; the rest described.

    Args:
        path: the shard.
        weights: by full slot name.
        others: norms, biases and the like, by full name.
        transposed: slots that the checkpoint format stores as [in, out].

    Returns:
        Bytes of all tensors.
    """
    tensors: dict[str, Tensor] = dict(others)
    described: dict[str, Any] = {}
    for name, weight in weights.items():
        if isinstance(weight, Dense):
            tensors[name] = weight.values.T if name in transposed else weight.values
            continue
        described[name] = describe(weight)
        tensors.update({f"{name}{PART}{part}": tensor for part, tensor in weight.tensors().items()})
    metadata = {}
    if described:
        metadata[DESCRIPTIONS] = json.dumps({"format_version": FORMAT_VERSION, "weights": described})
    save_safetensors(path, tensors, metadata)
    return sum(tensor.nbytes for tensor in tensors.values())


def contents(model: Model) -> Iterator[tuple[str, list[str], list[str]]]:
    """Each part's name, slots and other tensors, as a streamed pass divides a model."""
    head = [slot.name for slot in model.end_slots if slot.role == "lm_head"]
    yield "embedding", [model.family.embed], []
    for block in range(model.num_blocks):
        yield f"block {block}", [model.prefix(block) + slot.name for slot in model.block_slots], model.others(block)
    yield "lm_head", head, model.others(None)


def finish_folder(
    model: Model,
    staged: Path,
    folder: Path,
    shards: Mapping[str, str],
    entry: dict[str, Any],
    cache: Mapping[str, Any] | None,
) -> None:
    """Turn finished shards into a checkpoint. Safe to repeat: config.json, without which nothing loads, comes last.

    Args:
        model: what was compressed; its tokenizer and generation files travel along.
        staged: folder with the shards.
        folder: the checkpoint's place.
        shards: checksum by shard name.
        entry: what was done, appended to the lineage.
        cache: the result's policy for keys and values, as `methods.policy` describes it; None: it has none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in shards:
        if (staged / name).exists():
            (staged / name).replace(folder / name)
    opened = [open_safetensors(folder / name) for name in shards]
    weight_map = {tensor: shard.path.name for shard in opened for tensor in shard.tensors}
    total = sum(info.nbytes for shard in opened for info in shard.tensors.values())
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    manifest = {
        "format_version": FORMAT_VERSION,
        "shards": dict(shards),
        "lineage": [*model.lineage, entry],
        **({} if cache is None else {"cache": dict(cache)}),
    }
    write_json(folder / MANIFEST, manifest)
    model.source.save_extras(folder)
    config = {key: value for key, value in model.config.items() if key != "quantization_config"}
    if any(DESCRIPTIONS in shard.metadata for shard in opened):
        config["quantization_config"] = {"quant_method": "decoct", "format_version": FORMAT_VERSION}
    write_json(folder / "config.json", config)
