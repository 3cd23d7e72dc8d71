"""Architecture as data: the slots of a family, and everything that can be derived from what they read and write."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Config = Mapping[str, Any]
"""A checkpoint's config.json."""


@dataclass(frozen=True, slots=True)
class Slot:
    """A matrix that methods may compress.

    Attributes:
        name: the tensor's name in the checkpoint, relative to its block (whole for embeddings and lm_head).
        role: what it does, e.g. "attn.q", "mlp.down", "moe.gate": rules match on it.
        reads: the edge its input comes from; slots that read one edge share their input statistics.
        writes: the edge its output goes to.
        transposed: the checkpoint stores [in, out] (GPT-2's Conv1D).
        param: where transformers' module keeps it, if not under `name`: the fused tensor of all experts.
        expert: which expert's slice of `param`.
        half: 0 or 1 if it is the first or second half of that slice's rows (gate and up fused), else None.
        protected: left alone unless a rule names its role outright: routers, embeddings, lm_head.
        carries: the edge whose channels its rows can rescale, since nothing in between depends on their size: values
            for the attention's output, "up" for a gated MLP's middle.
    """

    name: str
    role: str
    reads: str
    writes: str
    transposed: bool = False
    param: str | None = None
    expert: int | None = None
    half: int | None = None
    protected: bool = False
    carries: str | None = None


@dataclass(frozen=True, slots=True)
class Norm:
    """A normalisation whose gain can take over a scale of the edge it writes.

    Attributes:
        name: the gain's tensor name, relative to its block.
        writes: the edge it produces.
        offset: the gain is (offset + weight): 1 for Gemma.
    """

    name: str
    writes: str
    offset: float = 0.0


@dataclass(frozen=True, slots=True)
class Stream:
    """How a family's residual stream is read, where it may be rotated: only through norms whose gains can be folded.

    Attributes:
        norms: edge -> the gain, relative to its block, of the norm through which slots that read the edge see the
            stream.
        final: full name of the gain of the norm before the output projection.
        centred: the norms subtract the mean (LayerNorm).
        added: full names of tables that are added to the embedding (positions).
    """

    norms: Mapping[str, str]
    final: str
    centred: bool = False
    added: tuple[str, ...] = ()


def no_stream(_: Config) -> Stream:
    """The default.

    Raises:
        ValueError: always.
    """
    raise ValueError("this architecture's table does not say how its residual stream is read")


@dataclass(frozen=True, slots=True)
class Family:
    """One architecture family's table.

    Attributes:
        name: the family's name, as users know it.
        model_types: values of config.json's `model_type` that it covers.
        blocks: dotted path of the list of blocks, in the checkpoint and in the module alike.
        slots: the slots of one block, from the config.
        embed: full name of the token embedding.
        head: full name of the output projection in the checkpoint.
        norms: the norms of one block that write one edge and nothing else, from the config.
        stream: how the residual stream is read, from the config; raises ValueError where it cannot be rotated.
        renames: (part of a checkpoint name, the same part in transformers' module), where the two differ.
        num_blocks_key: the config's key for the number of blocks.
        parallel: whether attention and MLP of a block read the same hidden states, from the config.
    """

    name: str
    model_types: tuple[str, ...]
    slots: Callable[[Config], tuple[Slot, ...]]
    norms: Callable[[Config], tuple[Norm, ...]] = lambda _: ()
    stream: Callable[[Config], Stream] = no_stream
    blocks: str = "model.layers"
    embed: str = "model.embed_tokens.weight"
    head: str = "lm_head.weight"
    renames: tuple[tuple[str, str], ...] = ()
    num_blocks_key: str = "num_hidden_layers"
    base_prefix: str = "model."
    parallel: Callable[[Config], bool] = lambda _: False

    def num_blocks(self, config: Config) -> int:
        """How many blocks a checkpoint has."""
        return int(config[self.num_blocks_key])

    def module_name(self, checkpoint_name: str) -> str:
        """A tensor's name in transformers' module."""
        for theirs, modules in self.renames:
            checkpoint_name = checkpoint_name.replace(theirs, modules)
        return checkpoint_name

    def head_size(self, config: Config) -> int:
        """Channels of one attention head."""
        given = config.get("head_dim")
        if given:
            return int(given)
        if "n_embd" in config:  # GPT-2's names for the same
            return int(config["n_embd"]) // int(config["n_head"])
        return int(config["hidden_size"]) // int(config["num_attention_heads"])

    def ends(self) -> tuple[Slot, Slot]:
        """The two slots outside the blocks: token embedding and output projection."""
        return (
            Slot(self.embed, "embed", reads="tokens", writes="resid", protected=True),
            Slot(self.head, "lm_head", reads="final", writes="logits", protected=True),
        )


@dataclass(frozen=True, slots=True)
class Edge:
    """A value inside a block that several slots may read.

    Attributes:
        name: as slots spell it in `reads`.
        readers: the slots that read it, in the table's order.
    """

    name: str
    readers: tuple[Slot, ...] = field(default_factory=tuple)


def edges(slots: tuple[Slot, ...]) -> dict[str, Edge]:
    """The edges that a block's slots read, in execution order: one statistic each."""
    readers: dict[str, list[Slot]] = {}
    for slot in slots:
        readers.setdefault(slot.reads, []).append(slot)
    return {name: Edge(name, tuple(found)) for name, found in readers.items()}
