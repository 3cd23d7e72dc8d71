"""Architecture tables; `hf` is the only door to transformers' modules."""

from decoct.arch.classic import GPT2, GPT_NEOX, OPT
from decoct.arch.llama import GEMMA2, GEMMA3, LLAMA, MISTRAL, OLMO2, PHI3, QWEN2, QWEN3
from decoct.arch.moe import MIXTRAL, QWEN3_MOE
from decoct.arch.schema import Config, Edge, Family, Norm, Slot, Stream, edges

FAMILIES: tuple[Family, ...] = (
    LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA2, GEMMA3, PHI3, OLMO2, GPT2, OPT, GPT_NEOX, MIXTRAL, QWEN3_MOE,
)  # fmt: skip


def find_family(config: Config) -> Family:
    """The family that a config.json belongs to.

    Raises:
        ValueError: no table covers its model_type; the message lists those there are and what to add.
    """
    model_type = config.get("model_type")
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    known = ", ".join(name for family in FAMILIES for name in family.model_types)
    raise ValueError(
        f"architecture {model_type!r} is not supported; supported: {known}. "
        "To add it, write its slot table in src/decoct/arch/ (docs/guide/add-an-architecture.md)"
    )


__all__ = ["FAMILIES", "Config", "Edge", "Family", "Norm", "Slot", "Stream", "edges", "find_family"]
