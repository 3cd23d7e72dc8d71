"""A Hugging Face folder written part by part: one shard in memory at a time, config.json last."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from decoct.model import Model
from decoct.store import INDEX, save_safetensors, write_json


def parts(model: Model) -> Iterator[list[str]]:
    """Slot names of each part: embedding, each block, lm_head."""
    slots = list(model.slots())
    inside = {block: [n for n in slots if n.startswith(model.prefix(block))] for block in range(model.num_blocks)}
    yield [model.family.embed]
    yield from inside.values()
    yield [slot.name for slot in model.end_slots if slot.role == "lm_head"]


def write_folder(
    model: Model,
    out: Path,
    encode: Callable[[str], dict[str, Tensor]],
    quantization: dict[str, Any] | None,
    key: str = "quantization_config",
) -> None:
    """Write every slot through `encode`, every other tensor as it is.

    Args:
        model: what to write.
        out: a folder that does not exist yet, or is empty.
        encode: tensors, under the names of the target format, for a slot's full name.
        quantization: what config.json says of it, or None.
        key: under which key.

    Raises:
        ValueError: the folder holds something already.
    """
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty; choose another folder for the export")
    total = model.num_blocks + 2
    weight_map: dict[str, str] = {}
    size = 0
    for number, names in enumerate(parts(model)):
        block = number - 1 if 0 < number <= model.num_blocks else None
        tensors: dict[str, Tensor] = {}
        for name in names:
            tensors.update(encode(name))
        others = [] if number == 0 else model.others(block)
        tensors.update({name: model.tensor(name) for name in others})
        shard = out / f"model-{number + 1:05d}-of-{total:05d}.safetensors"
        save_safetensors(shard, tensors)
        weight_map.update(dict.fromkeys(tensors, shard.name))
        size += sum(tensor.nbytes for tensor in tensors.values())
    write_json(out / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})
    model.source.save_extras(out)
    config = {key: value for key, value in model.config.items() if key != "quantization_config"}
    if quantization is not None:
        config[key] = quantization
    write_json(out / "config.json", config)
