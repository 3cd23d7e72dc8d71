"""Llama-like decoders, said once for every format that is a graph: what a block computes, and in which order."""

from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from decoct.arch.hf import all_settings
from decoct.exporters.misfit import MisfitError
from decoct.model import Model

GRAPH_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Families whose blocks are drawn."""

_ROPES = ("default", "linear", "yarn", "llama3")

V = TypeVar("V")


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a graph has to know of a model besides its tensors.

    Attributes:
        heads: of the queries.
        kv_heads: of keys and values.
        head_size: channels of a head.
        hidden: channels between blocks.
        eps: added to a norm's mean square.
        context: the most tokens that a sequence may have.
        vocabulary: rows of the embedding.
    """

    heads: int
    kv_heads: int
    head_size: int
    hidden: int
    eps: float
    context: int
    vocabulary: int


class Canvas(Protocol[V]):
    """Draws the parts of a decoder; a value is whatever the format calls what flows between them."""

    def embed(self, name: str) -> V:
        """The rows of a table that the tokens stand for."""

    def norm(self, x: V, name: str) -> V:
        """Root-mean-square norm of the last axis, times a gain."""

    def norm_heads(self, x: V, name: str) -> V:
        """The same of each head."""

    def product(self, x: V, name: str, bias: str | None) -> V:
        """With a slot's matrix, and a bias by its name."""

    def attention(self, block: int, queries: V, keys: V, values: V) -> V:
        """Queries and keys turned by their positions; keys and values kept for later tokens."""

    def gated(self, gate: V, up: V) -> V:
        """SiLU of the gate, times up."""

    def add(self, x: V, y: V) -> V:
        """Of the same shape."""

    def last(self, x: V) -> V:
        """Only the last token of each sequence."""


def sizes_of(model: Model) -> Sizes:
    """A model's sizes.

    Raises:
        MisfitError: its blocks are not drawn yet.
    """
    _check(model)
    settings = all_settings(model.config)
    heads = int(settings["num_attention_heads"])
    return Sizes(
        heads=heads,
        kv_heads=int(settings.get("num_key_value_heads") or heads),
        head_size=model.family.head_size(settings),
        hidden=int(settings["hidden_size"]),
        eps=float(settings["rms_norm_eps"]),
        context=int(model.max_length or 2048),
        vocabulary=model.shape(model.family.embed)[0],
    )


def draw(model: Model, canvas: Canvas[V]) -> V:
    """Draw a whole decoder, from tokens to the logits after each sequence's last one."""
    hidden = canvas.embed(model.family.embed)
    for block in range(model.num_blocks):
        hidden = _block(model, canvas, block, hidden)
        model.prefetch(block + 1)
    final = canvas.norm(canvas.last(hidden), f"{model.family.base_prefix}norm.weight")
    return canvas.product(final, model.family.embed if model.tied else model.family.head, None)


Angles = tuple[Float[Tensor, "context pairs"], Float[Tensor, "context pairs"]]
"""Cosines and sines of rotary positions, for the first half of a head's channels, which are paired with the second."""


def angles_of(model: Model, context: int) -> tuple[list[Angles], list[int]]:
    """The kinds of rotary positions that a model has, float32, and which of them each block's is."""
    from decoct.engine.runner import Runner

    blocks = Runner(model, torch.float32).rotations(context)
    kinds = {id(cosines): (cosines, sines) for cosines, sines in blocks}
    order = list(kinds)
    halves = [(cosines.chunk(2, -1)[0], sines.chunk(2, -1)[0]) for cosines, sines in kinds.values()]
    return halves, [order.index(id(cosines)) for cosines, _ in blocks]


def windows_of(model: Model) -> list[int | None]:
    """How many tokens each block's attention sees; None: all."""
    from decoct.engine.runner import Runner

    return [each.sliding_window for each in Runner(model, torch.float32).attentions()]


def _block(model: Model, canvas: Canvas[V], block: int, hidden: V) -> V:
    prefix, others = model.prefix(block), set(model.others(block))

    def product(x: V, stem: str) -> V:
        bias = f"{prefix}{stem}.bias"
        return canvas.product(x, f"{prefix}{stem}.weight", bias if bias in others else None)

    read = canvas.norm(hidden, f"{prefix}input_layernorm.weight")
    queries, keys, values = (product(read, f"self_attn.{name}_proj") for name in "qkv")
    if f"{prefix}self_attn.q_norm.weight" in others:
        queries = canvas.norm_heads(queries, f"{prefix}self_attn.q_norm.weight")
        keys = canvas.norm_heads(keys, f"{prefix}self_attn.k_norm.weight")
    hidden = canvas.add(hidden, product(canvas.attention(block, queries, keys, values), "self_attn.o_proj"))
    read = canvas.norm(hidden, f"{prefix}post_attention_layernorm.weight")
    middle = canvas.gated(product(read, "mlp.gate_proj"), product(read, "mlp.up_proj"))
    return canvas.add(hidden, product(middle, "mlp.down_proj"))


def _check(model: Model) -> None:
    name = model.family.name
    if name not in GRAPH_FAMILIES:
        known = ", ".join(GRAPH_FAMILIES)
        raise _refused(f"a {model.config['model_type']} model cannot be drawn as a graph yet (only {known})")
    settings = all_settings(model.config)
    rope: dict[str, Any] = settings.get("rope_parameters") or {}
    kind = rope.get("rope_type", "default")
    if kind not in _ROPES:
        raise _refused(f"rotary positions scaled by {kind} cannot be drawn as a graph")
    if float(rope.get("partial_rotary_factor") or 1.0) != 1.0:
        raise _refused("rotary positions that turn a part of each head cannot be drawn as a graph")
    if settings["hidden_act"] not in ("silu", "swish"):
        raise _refused(f"the activation {settings['hidden_act']} cannot be drawn as a graph")


def _refused(what: str) -> MisfitError:
    return MisfitError(what, "export it as gguf or dense", "export it as gguf or dense")
