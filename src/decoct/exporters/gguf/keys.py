"""What a GGUF file says about a model besides its tensors, and what llama.cpp takes for granted about each family."""

from collections.abc import Callable
from dataclasses import dataclass
from math import pi
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from decoct.exporters.misfit import MisfitError
from decoct.model import Model

Keys = dict[str, int | float | bool | str | list[int]]


@dataclass(frozen=True, slots=True)
class Architecture:
    """How llama.cpp sees a family.

    Attributes:
        name: its name there.
        interleaved: queries and keys are rotated in neighbouring pairs, so their rows are permuted.
        norm_offset: what is added to the gains of norms.
        uneven: the architecture there that runs the same blocks and lets their widths differ; None: there is none.
        check: refuses configs that llama.cpp would run otherwise.
        more: further keys, after the architecture's name.
    """

    name: str
    interleaved: bool = False
    norm_offset: float = 0.0
    uneven: str | None = None
    check: Callable[[dict[str, Any]], None] = lambda _: None
    more: Callable[[dict[str, Any]], Keys] = lambda _: {}


def _check_gemma(config: dict[str, Any]) -> None:
    """llama.cpp scales queries by the head size, and alternates windows as the released models do."""
    if config.get("query_pre_attn_scalar") != config.get("head_dim"):
        raise _refused("queries scaled by something else than the head size", "gemma")
    every = 2 if config["model_type"] == "gemma2" else 6
    given = config.get("layer_types") or []
    if [kind == "full_attention" for kind in given] != [(i + 1) % every == 0 for i in range(len(given))]:
        raise _refused(f"windows other than {every - 1} sliding ones and one over everything in turn", "gemma")


def _gemma2(config: dict[str, Any]) -> Keys:
    return {
        "attention.sliding_window": int(config["sliding_window"]),
        "attn_logit_softcapping": float(config["attn_logit_softcapping"]),
        "final_logit_softcapping": float(config["final_logit_softcapping"]),
    }


def _gemma3(config: dict[str, Any]) -> Keys:
    return {
        "attention.sliding_window": int(config["sliding_window"]),
        "rope.freq_base_swa": float(_rope(config, "sliding_attention").get("rope_theta", 10000.0)),
    }


def _phi3(config: dict[str, Any]) -> Keys:
    window = config.get("sliding_window")
    return {} if window is None else {"attention.sliding_window": int(window)}


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("llama", interleaved=True, uneven="deci"),
    "mistral": Architecture("llama", interleaved=True, uneven="deci"),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "gemma2": Architecture("gemma2", norm_offset=1.0, check=_check_gemma, more=_gemma2),
    "gemma3_text": Architecture("gemma3", norm_offset=1.0, check=_check_gemma, more=_gemma3),
    "olmo2": Architecture("olmo2"),
    "phi3": Architecture("phi3", more=_phi3),
}
"""By config.json's `model_type`."""


def architecture_of(model: Model) -> Architecture:
    """What llama.cpp calls a model's architecture.

    Raises:
        MisfitError: it cannot be written yet, or llama.cpp would run this config otherwise.
    """
    found = ARCHITECTURES.get(model.config["model_type"])
    if found is None:
        known = ", ".join(ARCHITECTURES)
        what = f"a {model.config['model_type']} model cannot be written as GGUF yet (only {known})"
        raise MisfitError(what, "export it as compressed_tensors or dense", "export it as compressed_tensors or dense")
    found.check(model.config)
    _check_rope(model.config)
    return found


def keys_of(model: Model, architecture: Architecture, widths: list[int] | None) -> Keys:
    """The architecture's keys and values, each after its name and a dot.

    Args:
        model: what is written.
        architecture: see `architecture_of`.
        widths: neurons of each block, where they differ.
    """
    config, head = model.config, model.family.head_size(model.config)
    heads = int(config["num_attention_heads"])
    context, window = int(model.max_length or 2048), config.get("sliding_window")
    if architecture.interleaved and window:  # which llama.cpp knows nothing of here
        context = min(context, int(window))
    rope = _rope(config, "full_attention")
    keys: Keys = {
        "block_count": model.num_blocks,
        "context_length": context,
        "embedding_length": int(config["hidden_size"]),
        "feed_forward_length": widths or int(config["intermediate_size"]),
        "attention.head_count": heads,
        "attention.head_count_kv": int(config.get("num_key_value_heads") or heads),
        "attention.key_length": head,
        "attention.value_length": head,
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "rope.dimension_count": int(head * rope.get("partial_rotary_factor", 1.0)),
        "rope.freq_base": float(rope.get("rope_theta", 10000.0)),
        "vocab_size": model.shape(model.family.embed)[0],
    }
    kind = rope.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        keys |= {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
    if kind == "yarn":
        keys["rope.scaling.original_context_length"] = int(
            rope.get("original_max_position_embeddings") or config["max_position_embeddings"]
        )
    return keys | architecture.more(config)


def rope_factors(model: Model) -> Float[Tensor, " half"] | None:
    """What each frequency of rotary positions is divided by (Llama 3.1's scaling), or None."""
    rope = _rope(model.config, "full_attention")
    if rope.get("rope_type") != "llama3":
        return None
    size = model.family.head_size(model.config)
    frequencies = float(rope["rope_theta"]) ** -(torch.arange(0, size, 2).double() / size)
    lengths = 2 * pi / frequencies
    low, high, factor = (float(rope[key]) for key in ("low_freq_factor", "high_freq_factor", "factor"))
    context = float(rope["original_max_position_embeddings"])
    smooth = ((context / lengths - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).float()


def _rope(config: dict[str, Any], layer: str) -> dict[str, Any]:
    """A kind of layer's settings of rotary positions, in configs old and new."""
    stated = config.get("rope_parameters")
    if stated is not None:
        return dict(stated.get(layer, {})) if any(isinstance(v, dict) for v in stated.values()) else dict(stated)
    scaling = dict(config.get("rope_scaling") or {})
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    theta = "rope_local_base_freq" if layer == "sliding_attention" else "rope_theta"
    return {**scaling, "rope_type": kind, "rope_theta": config.get(theta, 10000.0)}


def _check_rope(config: dict[str, Any]) -> None:
    kind = _rope(config, "full_attention").get("rope_type", "default")
    if kind not in ("default", "linear", "yarn", "llama3"):
        raise _refused(f"rotary positions scaled by {kind}", str(config["model_type"]))


def _refused(what: str, family: str) -> MisfitError:
    return MisfitError(
        f"llama.cpp runs no {family} model with {what}",
        "export it as dense",
        "export it as compressed_tensors or dense",
    )
