"""KIVI (arXiv 2402.02750): keys quantized per channel, values per token, the last tokens left as they are."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from decoct.methods.cache_policy import CacheMethod, Packed, Place, check_heads, check_levels
from decoct.ops.min_max import pack_by_channel, pack_by_token, unpack_by_channel, unpack_by_token


@dataclass(frozen=True, slots=True, kw_only=True)
class KIVI(CacheMethod):
    """Keys have few channels of large size, the same for all tokens, so each channel gets its own levels.

    A group is `group_size` tokens of one channel for keys, `group_size` channels of one token for values; each has a
    minimum and a step in float16, so 4 bits come to 5 a value with groups of 32. Tokens leave the window a group at a
    time, keys and values together (the paper lets values leave one by one, and keys a whole window at a time).

    Attributes:
        bits: 2 to 8, of keys and values.
        key_bits: of keys alone; None: `bits`.
        value_bits: of values alone; None: `bits`.
        group_size: tokens (keys) and channels (values) that share levels.
        window: the last tokens, in full precision.
    """

    bits: int = 4
    key_bits: int | None = None
    value_bits: int | None = None
    group_size: int = 32
    window: int = 128

    def __post_init__(self) -> None:
        check_levels(self.group_size, self.window, key_bits=self._key_bits, value_bits=self._value_bits)

    @property
    def _key_bits(self) -> int:
        return self.bits if self.key_bits is None else self.key_bits

    @property
    def _value_bits(self) -> int:
        return self.bits if self.value_bits is None else self.value_bits

    @property
    @override
    def sinks(self) -> int:
        return 0

    @property
    @override
    def step(self) -> int:
        return self.group_size

    @override
    def check(self, channels: int, place: Place) -> None:
        check_heads(self.group_size, channels)

    @override
    def pack_keys(self, keys: Float[Tensor, "batch heads tokens channels"], place: Place, start: int) -> Packed:
        """Groups of tokens of each channel."""
        return pack_by_channel(keys, self.group_size, self._key_bits)

    @override
    def unpack_keys(self, packed: Packed, place: Place, start: int) -> Float[Tensor, "batch heads tokens channels"]:
        return unpack_by_channel(packed, self.group_size, self._key_bits)

    @override
    def pack_values(self, values: Float[Tensor, "batch heads tokens channels"], place: Place) -> Packed:
        """Groups of channels of each token."""
        return pack_by_token(values, self.group_size, self._value_bits)

    @override
    def unpack_values(self, packed: Packed, place: Place) -> Float[Tensor, "batch heads tokens channels"]:
        return unpack_by_token(packed, self.group_size, self._value_bits)
