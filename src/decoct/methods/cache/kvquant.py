"""KVQuant (arXiv 2401.18079), its uniform part: keys quantized per channel before their positions turn them."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from decoct.methods.cache_policy import CacheMethod, Packed, Place, check_heads, check_levels
from decoct.ops.min_max import pack_by_channel, pack_by_token, unpack_by_channel, unpack_by_token
from decoct.ops.rope import turn


@dataclass(frozen=True, slots=True, kw_only=True)
class KVQuant(CacheMethod):
    """Rotary positions mix a key's channels, by another angle at each token; before that, channels are more alike.

    Keys are turned back to position 0, packed as KIVI packs them, and turned forth again when they are read. The first
    tokens, which attention looks at most, stay as they are. The paper's levels that are not uniform, its outliers and
    its calibrated ranges are not built: ranges are each group's own.

    Attributes:
        bits: 2 to 8, of keys and values.
        key_bits: of keys alone; None: `bits`.
        value_bits: of values alone; None: `bits`.
        group_size: tokens (keys) and channels (values) that share levels.
        sinks: the first tokens, in full precision; none where attention has a sliding window.
        window: the last tokens, in full precision.
    """

    bits: int = 4
    key_bits: int | None = None
    value_bits: int | None = None
    group_size: int = 32
    sinks: int = 1
    window: int = 0

    def __post_init__(self) -> None:
        check_levels(self.group_size, self.window, key_bits=self._key_bits, value_bits=self._value_bits)
        if self.sinks < 0:
            raise ValueError(f"sinks must not be negative, not {self.sinks}")

    @property
    def _key_bits(self) -> int:
        return self.bits if self.key_bits is None else self.key_bits

    @property
    def _value_bits(self) -> int:
        return self.bits if self.value_bits is None else self.value_bits

    @property
    @override
    def step(self) -> int:
        return self.group_size

    @override
    def check(self, channels: int, place: Place) -> None:
        if place.frequencies is None:
            raise ValueError("kvquant undoes rotary positions, and this model has none; use kivi")
        check_heads(self.group_size, channels)

    @override
    def pack_keys(self, keys: Float[Tensor, "batch heads tokens channels"], place: Place, start: int) -> Packed:
        """Groups of tokens of each channel, as they were before RoPE."""
        assert place.frequencies is not None
        before = turn(keys.float(), place.frequencies, start, inverse=True)
        return pack_by_channel(before, self.group_size, self._key_bits)

    @override
    def unpack_keys(self, packed: Packed, place: Place, start: int) -> Float[Tensor, "batch heads tokens channels"]:
        assert place.frequencies is not None
        return turn(unpack_by_channel(packed, self.group_size, self._key_bits), place.frequencies, start)

    @override
    def pack_values(self, values: Float[Tensor, "batch heads tokens channels"], place: Place) -> Packed:
        """Groups of channels of each token."""
        return pack_by_token(values, self.group_size, self._value_bits)

    @override
    def unpack_values(self, packed: Packed, place: Place) -> Float[Tensor, "batch heads tokens channels"]:
        return unpack_by_token(packed, self.group_size, self._value_bits)
