"""A GGUF file as a model to compress: dequantized tensor by tensor to bfloat16, under Hugging Face names.

transformers can load such a file but neither streams it nor saves it again; this reads one tensor at a time.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_LLAMA_LAYOUT = {"llama": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3"}
_INTERLEAVED = {"llama"}  # the converter permutes query and key rows of these for llama.cpp's RoPE


@dataclass(frozen=True)
class GgufSource:
    """An opened GGUF file."""

    path: Path
    config: dict[str, Any]
    entries: dict[str, Any]  # Hugging Face name -> gguf.ReaderTensor

    @property
    def label(self) -> str:
        """The path, for messages."""
        return str(self.path)

    def names(self) -> Iterable[str]:
        """Every tensor's Hugging Face name."""
        return self.entries.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """GGUF lists dimensions fastest first."""
        return tuple(int(n) for n in reversed(self.entries[name].shape))

    def dtype(self, name: str) -> torch.dtype:  # noqa: ARG002 - one answer for all
        """Everything is dequantized to bfloat16."""
        return torch.bfloat16

    def read(self, name: str) -> Tensor:
        """Dequantize one tensor.

        Raises:
            ValueError: it holds NaN or infinite values.
        """
        from gguf.quants import dequantize

        entry = self.entries[name]
        values = torch.tensor(dequantize(entry.data, entry.tensor_type)).reshape(self.shape(name))
        if not torch.isfinite(values.sum()):
            raise ValueError(f"{self.path}: {name} holds NaN or infinite values; the file is damaged")
        if self.config["model_type"] in _INTERLEAVED and (".q_proj." in name or ".k_proj." in name):
            heads = "num_attention_heads" if ".q_proj." in name else "num_key_value_heads"
            values = _rotate_half_order(values, int(self.config[heads]))
        return values.to(torch.bfloat16)

    def prefetch(self, names: Iterable[str]) -> None:
        """The file is mapped; the system reads ahead by itself."""

    def fingerprint(self) -> str:
        """Name, size and modification time."""
        stat = self.path.stat()
        return f"{self.path.name}:{stat.st_size}:{stat.st_mtime_ns}"

    def save_extras(self, folder: Path) -> None:
        """Build the tokenizer from the file's vocabulary, as transformers does, and save it."""
        from transformers import AutoTokenizer

        AutoTokenizer.from_pretrained(self.path.parent, gguf_file=self.path.name).save_pretrained(folder)


def open_gguf(path: Path) -> GgufSource:
    """Open a GGUF file of an architecture whose tensors map one to one.

    Raises:
        ValueError: the file is missing, damaged, or of an architecture that cannot be read yet.
    """
    try:
        import gguf
    except ImportError:
        raise ValueError("reading GGUF files needs the gguf package: pip install 'decoct[gguf]'") from None
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError) as error:
        raise ValueError(f"{path} is not a whole GGUF file ({error}); download it again") from None
    architecture = reader.fields["general.architecture"].contents()
    layout = _LLAMA_LAYOUT.get(architecture)
    if layout is None:
        known = ", ".join(_LLAMA_LAYOUT)
        raise ValueError(f"{path}: GGUF models of architecture {architecture!r} cannot be read yet; only {known}")
    config = _config(path)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[layout], int(config["num_hidden_layers"]))
    by_gguf_name = {tensor.name: tensor for tensor in reader.tensors}
    entries = {}
    for name in _expected_names(config):
        stem, suffix = name.rsplit(".", 1)
        entry = by_gguf_name.get(f"{names.get_name(stem)}.{suffix}")
        if entry is not None:
            entries[name] = entry
    known_names = {entry.name for entry in entries.values()}
    lost = [name for name in by_gguf_name if name not in known_names]
    if lost:
        raise ValueError(f"{path}: decoct does not know what to do with {lost[0]}; use the model's safetensors instead")
    return GgufSource(path, config, entries)


def _config(path: Path) -> dict[str, Any]:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name).to_dict()
    config.pop("quantization_config", None)
    architecture = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
    private = {key for key in config if key.startswith("_")}
    kept = {key: value for key, value in config.items() if key not in private}
    return {**kept, "architectures": [architecture[config["model_type"]]], "dtype": "bfloat16"}


def _expected_names(config: dict[str, Any]) -> list[str]:
    layer = [
        "input_layernorm.weight", "post_attention_layernorm.weight", "mlp.gate_proj.weight", "mlp.up_proj.weight",
        "mlp.down_proj.weight", "self_attn.q_norm.weight", "self_attn.k_norm.weight", "self_attn.o_proj.weight",
    ]  # fmt: skip
    layer += [f"self_attn.{x}_proj.{part}" for x in "qkv" for part in ("weight", "bias")]
    blocks = [f"model.layers.{i}.{name}" for i in range(int(config["num_hidden_layers"])) for name in layer]
    return ["model.embed_tokens.weight", *blocks, "model.norm.weight", "lm_head.weight"]


def _rotate_half_order(rows: Tensor, heads: int) -> Tensor:
    """From pairs (x0, x1), (x2, x3), … of each head to halves (x0, x2, …), (x1, x3, …)."""
    return rows.reshape(heads, rows.shape[0] // heads // 2, 2, -1).transpose(1, 2).reshape(rows.shape)
