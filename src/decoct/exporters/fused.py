"""Matrices that vLLM and SGLang load as one, so that they have to be stored alike."""

from collections.abc import Hashable, Mapping

from decoct.exporters.misfit import MisfitError
from decoct.model import Model

_PARTS = ("attn.q", "attn.k", "attn.v", "mlp.gate", "mlp.up")


def fused_groups(model: Model) -> list[tuple[int, dict[str, str]]]:
    """For each block, and each group of matrices that engines fuse: full names by role."""
    found = []
    for block in range(model.num_blocks):
        groups: dict[tuple[str, str], dict[str, str]] = {}
        for slot in model.block_slots:
            if slot.role in _PARTS:
                group = (slot.reads, slot.role.split(".")[0])
                groups.setdefault(group, {})[slot.role] = model.prefix(block) + slot.name
        found += [(block, members) for members in groups.values() if len(members) > 1]
    return found


def check_fused(model: Model, schemes: Mapping[str, Hashable]) -> None:
    """Refuse fused matrices with different schemes.

    Args:
        model: what is to be written.
        schemes: how each slot will be stored, by full name.

    Raises:
        MisfitError: q, k and v of a block, or gate and up, are stored differently.
    """
    for block, members in fused_groups(model):
        if len({schemes[name] for name in members.values()}) > 1:
            raise MisfitError(
                f"block {block}: {', '.join(members)} have different schemes, but vLLM and SGLang load them as one "
                "matrix",
                "give them the same method",
                "give them the same method, or export as dense",
            )
