"""KIVI (arXiv 2402.02750): keys quantized per channel, values per token, the last tokens left as they are."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from decoct.methods.base import CacheMethod, Packed, Place
from decoct.ops.min_max import pack_between, unpack_between


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
        for name, bits in (("key_bits", self._key_bits), ("value_bits", self._value_bits)):
            if not 2 <= bits <= 8:
                raise ValueError(f"{name} must be 2 to 8, not {bits}")
        if self.group_size < 8 or self.group_size % 8:
            raise ValueError(f"group_size must be a multiple of 8, not {self.group_size}: groups fill whole bytes")
        if self.window < 0:
            raise ValueError(f"window must not be negative, not {self.window}")

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
        if channels % self.group_size:
            fits = [size for size in (8, 16, 24, 32, 40, 48, 64, 128) if channels % size == 0]
            hint = f"use one of {fits}" if fits else "no multiple of 8 does: use another policy"
            raise ValueError(f"group_size {self.group_size} does not divide heads of {channels} channels; {hint}")

    @override
    def pack_keys(self, keys: Float[Tensor, "batch heads tokens channels"], place: Place, start: int) -> Packed:
        """Groups of tokens of each channel."""
        grouped = keys.reshape(*keys.shape[:2], -1, self.group_size, keys.shape[3]).transpose(-1, -2)
        codes, scale, low = pack_between(grouped, self._key_bits)
        return {"codes": codes, "step": scale, "low": low}

    @override
    def unpack_keys(self, packed: Packed, place: Place, start: int) -> Float[Tensor, "batch heads tokens channels"]:
        values = unpack_between(packed["codes"], packed["step"], packed["low"], self._key_bits, self.group_size)
        return values.transpose(-1, -2).flatten(2, 3)

    @override
    def pack_values(self, values: Float[Tensor, "batch heads tokens channels"], place: Place) -> Packed:
        """Groups of channels of each token."""
        codes, scale, low = pack_between(values.reshape(*values.shape[:3], -1, self.group_size), self._value_bits)
        return {"codes": codes, "step": scale, "low": low}

    @override
    def unpack_values(self, packed: Packed, place: Place) -> Float[Tensor, "batch heads tokens channels"]:
        values = unpack_between(packed["codes"], packed["step"], packed["low"], self._value_bits, self.group_size)
        return values.flatten(-2)
