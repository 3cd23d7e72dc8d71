"""KVQuant (arXiv 2401.18079), its uniform part: keys quantized per channel before their positions turn them."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from decoct.methods.cache_policy import GroupedCache, Packed, Place
from decoct.ops.rope import turn


@dataclass(frozen=True, slots=True, kw_only=True)
class KVQuant(GroupedCache):
    """Rotary positions mix a key's channels, by another angle at each token; before that, channels are more alike.

    Keys are turned back to position 0, packed as KIVI packs them, and turned forth again when they are read. The first
    tokens, which attention looks at most, stay as they are. The paper's levels that are not uniform, its outliers and
    its calibrated ranges are not built: ranges are each group's own.

    Attributes:
        sinks: the first tokens, in full precision; none where attention has a sliding window.
        window: the last tokens, in full precision.
    """

    sinks: int = 1
    window: int = 0

    def __post_init__(self) -> None:
        GroupedCache.__post_init__(self)
        if self.sinks < 0:
            raise ValueError(f"sinks must not be negative, not {self.sinks}")

    @override
    def check(self, channels: int, place: Place) -> None:
        if place.frequencies is None:
            raise ValueError("kvquant undoes rotary positions, and this model has none; use kivi")
        GroupedCache.check(self, channels, place)

    @override
    def pack_keys(self, keys: Float[Tensor, "batch heads tokens channels"], place: Place, start: int) -> Packed:
        """Groups of tokens of each channel, as they were before RoPE."""
        assert place.frequencies is not None
        before = turn(keys.float(), place.frequencies, start, inverse=True)
        return GroupedCache.pack_keys(self, before, place, start)

    @override
    def unpack_keys(self, packed: Packed, place: Place, start: int) -> Float[Tensor, "batch heads tokens channels"]:
        assert place.frequencies is not None
        return turn(GroupedCache.unpack_keys(self, packed, place, start), place.frequencies, start)
