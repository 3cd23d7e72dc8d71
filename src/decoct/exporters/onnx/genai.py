"""What onnxruntime-genai has to know beside the graph: genai_config.json."""

from pathlib import Path
from typing import Any

from decoct.exporters.llama_like import Sizes
from decoct.model import Model
from decoct.store import FolderSource, read_json

GENAI = "genai_config.json"


def genai_config(model: Model, sizes: Sizes, filename: str) -> dict[str, Any]:
    """The file's content.

    Args:
        model: what was written.
        sizes: its own.
        filename: of the graph.
    """
    stated = {**model.config, **_generation(model)}
    ends = stated.get("eos_token_id")
    first = ends[0] if isinstance(ends, list) else ends
    pad = stated.get("pad_token_id")
    return {
        "model": {
            "type": model.config["model_type"],
            "vocab_size": sizes.vocabulary,
            "context_length": sizes.context,
            "bos_token_id": stated.get("bos_token_id") or 0,
            "eos_token_id": 0 if ends is None else ends,
            "pad_token_id": pad if pad is not None else first or 0,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": filename,
                "head_size": sizes.head_size,
                "hidden_size": sizes.hidden,
                "num_attention_heads": sizes.heads,
                "num_key_value_heads": sizes.kv_heads,
                "num_hidden_layers": model.num_blocks,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "do_sample": bool(stated.get("do_sample", False)),
            "temperature": float(stated.get("temperature") or 1.0),
            "top_k": int(stated.get("top_k") or 50),
            "top_p": float(stated.get("top_p") or 1.0),
            "repetition_penalty": float(stated.get("repetition_penalty") or 1.0),
            "min_length": 0,
            "max_length": sizes.context,
            "num_beams": 1,
            "num_return_sequences": 1,
            "past_present_share_buffer": True,
        },
    }


def _generation(model: Model) -> dict[str, Any]:
    """generation_config.json, which names more tokens that end a text than config.json does."""
    source = model.source
    path = source.folder / "generation_config.json" if isinstance(source, FolderSource) else Path()
    found: dict[str, Any] = read_json(path) if path.is_file() else {}
    return {key: value for key, value in found.items() if value is not None}
