"""A GGUF file, tensor after tensor; never more than one of them in memory."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from decoct.exporters.gguf.choose import Choice, choose_types, feed_forward_widths
from decoct.exporters.gguf.encode import encode
from decoct.exporters.gguf.keys import Architecture, architecture_of, keys_of, rope_factors
from decoct.exporters.gguf.vocabulary import Vocabulary, check_vocabulary, read_vocabulary
from decoct.model import Model
from decoct.ops.ggml_blocks import BLOCKS, row_bytes
from decoct.store import atomic_path

_FILE_TYPES = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K": 12, "Q4_K": 15,
    "Q5_K": 17, "Q6_K": 18, "IQ4_NL": 25, "BF16": 32, "TQ1_0": 36, "TQ2_0": 37, "MXFP4": 38,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of the file.

    Attributes:
        name: GGUF's name.
        source: the checkpoint's name; "" for one that is computed.
        choice: how it is written; None: in float32.
        shape: as written.
    """

    name: str
    source: str
    choice: Choice | None
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class GgufPlan:
    """A file before it is written.

    Attributes:
        model: what is written.
        architecture: what llama.cpp calls it.
        choices: each slot's type.
        widths: neurons of each block where they differ.
    """

    model: Model
    architecture: Architecture
    choices: dict[str, Choice]
    widths: list[int] | None

    def entries(self) -> list[Entry]:
        """Every tensor in the file's order: what lies outside the blocks first."""
        import gguf

        model, arch = self.model, gguf.MODEL_ARCH
        names = gguf.get_tensor_name_map(arch[self.architecture.name.upper()], model.num_blocks)
        found = []
        for block in (None, *range(model.num_blocks)):
            prefix = "" if block is None else model.prefix(block)
            ends = [slot.name for slot in model.end_slots]
            slots = ends if block is None else [prefix + slot.name for slot in model.block_slots]
            for source in (*slots, *model.others(block)):
                stem, suffix = source.rsplit(".", 1)
                theirs = names.get_name(stem)
                if theirs is None:
                    known = self.architecture.name
                    raise ValueError(f"llama.cpp's {known} has no tensor for {source}; export it as dense")
                choice = self.choices.get(source)
                shape = model.shape(source) if choice is None else choice.shape
                found.append(Entry(f"{theirs}.{suffix}", source, choice, self._vector_shape(source, shape)))
        factors = rope_factors(model)
        if factors is not None:
            found.insert(0, Entry("rope_freqs.weight", "", None, tuple(factors.shape)))
        return found

    def kinds(self) -> Counter[str]:
        """How many matrices of each type there are."""
        return Counter(choice.kind for choice in self.choices.values())

    def notes(self) -> tuple[str, ...]:
        """What a user should know of the choices: types that gave way, and what is held exactly."""
        exact = sum(choice.exact and choice.kind not in ("F32", "F16", "BF16") for choice in self.choices.values())
        types = ", ".join(f"{count} {kind}" for kind, count in self.kinds().most_common())
        found = [f"{types}; {exact} of {len(self.choices)} matrices hold decoct's own integers"]
        instead = Counter((c.instead, c.kind, c.shape[1]) for c in self.choices.values() if c.instead is not None)
        found += [
            f"{count} matrices of {cols} input features are {kind}: {wanted} has blocks of {BLOCKS[str(wanted)][0]}"
            for (wanted, kind, cols), count in instead.items()
        ]
        if self.widths is not None:
            found.append(f"blocks have their own widths, {min(self.widths)} to {max(self.widths)} neurons")
        return tuple(found)

    def tensor(self, entry: Entry, importance: dict[str, Tensor]) -> Tensor:
        """A tensor's values, or bytes, as they go into the file."""
        if entry.source == "":
            factors = rope_factors(self.model)
            assert factors is not None
            return factors
        if entry.choice is not None:
            rows = encode(self.model.weight(entry.source), entry.choice, importance.get(entry.source))
            return self._permuted(entry.source, rows)
        vector = self.model.tensor(entry.source).float()
        if entry.source.endswith("norm.weight"):
            vector = vector + self.architecture.norm_offset
        vector = vector[: entry.shape[0]] if vector.ndim == 1 else vector
        return self._permuted(entry.source, vector).contiguous()

    def _vector_shape(self, source: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Biases of gate and up are as long as their matrices are high."""
        matrix = self.choices.get(source.removesuffix("bias") + "weight")
        return (matrix.shape[0],) if source.endswith(".bias") and matrix is not None else shape

    def unpermuted(self, source: str, rows: Tensor) -> Tensor:
        """Rows of the file in transformers' order."""
        heads = self._permuted_heads(source)
        if heads is None:
            return rows
        return rows.reshape(heads, rows.shape[0] // heads // 2, 2, -1).transpose(1, 2).reshape(rows.shape)

    def _permuted(self, source: str, rows: Tensor) -> Tensor:
        """llama.cpp rotates neighbours (0, 1), (2, 3) of a head where transformers rotates its halves."""
        heads = self._permuted_heads(source)
        if heads is None:
            return rows
        return rows.reshape(heads, 2, rows.shape[0] // heads // 2, -1).transpose(1, 2).reshape(rows.shape)

    def _permuted_heads(self, source: str) -> int | None:
        """The heads of queries or keys whose rows stand in another order there; None: they do not."""
        config = self.model.config
        heads = {".q_proj.": int(config["num_attention_heads"])}
        heads[".k_proj."] = int(config.get("num_key_value_heads") or heads[".q_proj."])
        found = [count for part, count in heads.items() if part in source]
        return found[0] if found and self.architecture.interleaved else None


def plan_gguf(model: Model, variant: str | None, *, fold: bool) -> GgufPlan:
    """What a file would be; looks at descriptions and the tokenizer alone.

    Raises:
        MisfitError: GGUF, or the type asked for, cannot hold something, and `fold` is not set.
    """
    architecture = architecture_of(model)
    widths = None if architecture.uneven is None else feed_forward_widths(model)
    if widths is not None:  # llama.cpp takes the first block's width for all in most architectures, llama among them
        architecture = replace(architecture, name=str(architecture.uneven))
    choices = choose_types(model, variant, widths, fold=fold)
    check_vocabulary(model)
    return GgufPlan(model, architecture, choices, widths)


def write_gguf(plan: GgufPlan, out: Path, importance: dict[str, Tensor]) -> None:
    """Write the file; whole or not at all.

    Args:
        plan: see `plan_gguf`.
        out: its path.
        importance: of each input feature, by slot, for types that are fitted.

    Raises:
        MisfitError: a tokenizer that llama.cpp does not know.
        ValueError: weights that are not finite.
    """
    import gguf

    vocabulary, special = read_vocabulary(plan.model)
    entries = plan.entries()
    with atomic_path(out) as partial:
        writer = gguf.GGUFWriter(partial, plan.architecture.name)
        _add_keys(writer, plan, vocabulary)
        special.add_to_gguf(writer, quiet=True)
        for entry in entries:
            _announce(writer, entry)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for _, tensor in _tensors(plan, entries, importance):
            writer.write_tensor_data(tensor.numpy())
        writer.close()


def _tensors(plan: GgufPlan, entries: list[Entry], importance: dict[str, Tensor]) -> Iterator[tuple[Entry, Tensor]]:
    for number, entry in enumerate(entries):
        if number % 16 == 0 and entry.source.startswith(plan.model.family.blocks):
            plan.model.prefetch(int(entry.source.removeprefix(f"{plan.model.family.blocks}.").split(".", 1)[0]) + 1)
        yield entry, plan.tensor(entry, importance)


def _announce(writer: Any, entry: Entry) -> None:
    """Name, shape and type, before any data is there."""
    import gguf
    import numpy as np

    if entry.choice is None:
        size = 4 * int(torch.tensor(entry.shape).prod())
        writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.float32), size)
        return
    out, cols = entry.shape
    size = out * row_bytes(entry.choice.kind, cols)
    kind = gguf.GGMLQuantizationType[entry.choice.kind]
    writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.float32), size, raw_dtype=kind)


def _add_keys(writer: Any, plan: GgufPlan, vocabulary: Vocabulary) -> None:
    name = plan.architecture.name
    writer.add_name(Path(plan.model.source.label).name)
    common = plan.kinds().most_common(1)[0][0]
    writer.add_file_type(_FILE_TYPES[common])
    writer.add_quantization_version(2)
    for key, value in keys_of(plan.model, plan.architecture, plan.widths).items():
        _add_key(writer, f"{name}.{key}", value)
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.split)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.kinds)
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(vocabulary.add_space)


def _add_key(writer: Any, key: str, value: object) -> None:
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case list():
            writer.add_array(key, value)
        case _:
            raise AssertionError(key)
