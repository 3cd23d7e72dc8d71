"""The gaps that taking blocks or sublayers out leaves in the residual stream, and what stands before each."""

from collections.abc import Sequence
from dataclasses import dataclass

from decoct.engine.shallow import SUBLAYERS, ShallowModel, merged
from decoct.methods.depth import Cut, Cuts


@dataclass(frozen=True, slots=True)
class Gap:
    """Sublayers, one after another, that are missing.

    Attributes:
        cuts: what is missing; blocks are numbered as in the whole model, here and below.
        before: the sublayer that writes the stream last before the gap; None: only the embedding does.
        stop: the block in which the stream goes on; the number of blocks if nothing is left behind the gap.
        halfway: whether it goes on between that block's attention and its MLP.
    """

    cuts: Cuts
    before: Cut | None
    stop: int
    halfway: bool


def gaps_of(left: ShallowModel) -> list[Gap]:
    """All gaps, in order.

    Where attention and MLP of a block read the same hidden states, nothing lies between them: what is missing of a
    block is made up for by what is left of it.
    """
    base = left.base
    parallel = base.family.parallel(base.config)
    missing = {Cut(cut.block, part) for cut in left.cuts for part in SUBLAYERS if cut.part in ("block", part)}
    order: list[Cut] = []
    for block in range(base.num_blocks):
        sublayers = [Cut(block, part) for part in SUBLAYERS]
        order += sorted(sublayers, key=missing.__contains__) if parallel else sublayers
    found: list[Gap] = []
    before: Cut | None = None
    run: list[Cut] = []
    for sublayer in order:
        if sublayer in missing:
            run.append(sublayer)
            continue
        if run:
            halfway = sublayer.part == "mlp" and not parallel
            found.append(Gap(merged(frozenset(run)), before, sublayer.block, halfway))
        before, run = sublayer, []
    return [*found, Gap(merged(frozenset(run)), before, base.num_blocks, halfway=False)] if run else found


def describe_cuts(cuts: Cuts) -> list[str]:
    """For people and for the lineage: "block 3", "the attn of block 7"."""
    return [str(cut) for cut in sorted(cuts)]


def describe_gaps(gaps: Sequence[Gap]) -> dict[str, list[dict[str, object]]]:
    """For the lineage: which gaps were bridged by refitting what, and before which there is nothing to refit."""
    bridged = [{"gap": describe_cuts(gap.cuts), "refitted": str(gap.before)} for gap in gaps if gap.before is not None]
    alone: list[dict[str, object]] = [{"gap": describe_cuts(gap.cuts)} for gap in gaps if gap.before is None]
    return {"bridged": [dict(each) for each in bridged], "not_bridged": alone}
