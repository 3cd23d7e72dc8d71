"""What a key-value cache policy is: how keys and values are packed, and which tokens stay in full precision."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from decoct.ops.min_max import pack_by_channel, pack_by_token, unpack_by_channel, unpack_by_token

Heads = Float[Tensor, "batch heads tokens channels"]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a key-value cache lies, and what a policy may know about it.

    Attributes:
        block: number of the block whose attention it serves.
        sliding_window: tokens that the attention looks back, its own included; None: all.
        frequencies: of the rotary position embedding, radians a token, one for each pair of channels that is turned;
            None: the model has none.
        learned: what the policy learned from calibration for this block, by name.
    """

    block: int = 0
    sliding_window: int | None = None
    frequencies: Float[Tensor, " pairs"] | None = None
    learned: Mapping[str, Tensor] = field(default_factory=dict)


Packed = dict[str, Tensor]
"""What a policy stores of keys or values: tensors [batch, heads, n, ...], in the order of the tokens along axis 2.

What is not stored by heads has length 1 along axis 1.
"""


class Learner(ABC):
    """Learns for one block what its policy saves, from the keys and values that calibration makes."""

    @abstractmethod
    def add(self, keys: Heads, values: Heads, slopes: tuple[Heads, Heads] | None) -> None:
        """Take some sequences into account.

        Args:
            keys: as attention uses them, from position 0 on.
            values: of the same tokens.
            slopes: gradients of the loss by both, where the policy asks for them.
        """

    @abstractmethod
    def learned(self) -> dict[str, Tensor]:
        """What to save, float32 by name.

        Raises:
            ValueError: numbers that are not finite.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheMethod(ABC):
    """How keys and values are kept while a model runs: a stage of its own in a recipe, saved with the model.

    Tokens leave the window of full precision `step` at a time, oldest first, so what is packed after n tokens depends
    on n alone, not on how many were fed at once.

    Attributes:
        before: what settings that were added later are worth in policies that were saved without them.
    """

    before: ClassVar[Mapping[str, Any]] = MappingProxyType({})

    @property
    @abstractmethod
    def sinks(self) -> int:
        """The first tokens, which always stay in full precision."""

    @property
    @abstractmethod
    def window(self) -> int:
        """The last tokens, at least so many of which are in full precision."""

    @property
    @abstractmethod
    def step(self) -> int:
        """Tokens that are packed together."""

    @abstractmethod
    def check(self, channels: int, place: Place) -> None:
        """Raise ValueError, with the remedy, where heads of so many channels do not fit. Called while planning."""

    @abstractmethod
    def pack_keys(self, keys: Float[Tensor, "batch heads tokens channels"], place: Place, start: int) -> Packed:
        """Keys as attention uses them, packed.

        Args:
            keys: a multiple of `step` tokens.
            place: whose they are.
            start: position of the first of them.
        """

    @abstractmethod
    def unpack_keys(self, packed: Packed, place: Place, start: int) -> Float[Tensor, "batch heads tokens channels"]:
        """Undo `pack_keys`, float32."""

    @abstractmethod
    def pack_values(self, values: Float[Tensor, "batch heads tokens channels"], place: Place) -> Packed:
        """Values, packed."""

    @abstractmethod
    def unpack_values(self, packed: Packed, place: Place) -> Float[Tensor, "batch heads tokens channels"]:
        """Undo `pack_values`, float32."""

    @property
    def learns(self) -> bool:
        """Whether something has to be learned from calibration, and is saved with the policy."""
        return False

    @property
    def by_gradients(self) -> bool:
        """Whether that takes gradients by keys and values."""
        return False

    def learner(self, place: Place) -> Learner:
        """What learns for one block; only asked for if the policy learns."""
        raise NotImplementedError

    def packed_after(self, num_tokens: int, place: Place) -> int:
        """How many tokens are packed once a cache holds so many."""
        sinks = 0 if place.sliding_window else self.sinks
        return max(0, num_tokens - sinks - self.window) // self.step * self.step


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupedCache(CacheMethod):
    """Integers with a minimum and a step in float16 for each group: keys per channel, values per token.

    Attributes:
        bits: 2 to 8, of keys and values.
        key_bits: of keys alone; None: `bits`.
        value_bits: of values alone; None: `bits`.
        group_size: tokens (keys) and channels (values) that share levels.
    """

    bits: int = 4
    key_bits: int | None = None
    value_bits: int | None = None
    group_size: int = 32

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


def check_levels(group_size: int, window: int, **bits: int) -> None:
    """Refuse numbers that no keys and values can be packed with.

    Raises:
        ValueError: bits not in 2..8, groups that fill no whole bytes, or a negative window.
    """
    for name, number in bits.items():
        if not 2 <= number <= 8:
            raise ValueError(f"{name} must be 2 to 8, not {number}")
    if group_size < 8 or group_size % 8:
        raise ValueError(f"group_size must be a multiple of 8, not {group_size}: groups fill whole bytes")
    if window < 0:
        raise ValueError(f"window must not be negative, not {window}")


def check_heads(group_size: int, channels: int) -> None:
    """Refuse groups that do not divide a head.

    Raises:
        ValueError: says which do.
    """
    if channels % group_size:
        fits = [size for size in (8, 16, 24, 32, 40, 48, 64, 128) if channels % size == 0]
        hint = f"use {' or '.join(map(str, fits))}" if fits else "no multiple of 8 does: use fp8_cache"
        raise ValueError(f"group_size {group_size} does not divide heads of {channels} channels; {hint}")
