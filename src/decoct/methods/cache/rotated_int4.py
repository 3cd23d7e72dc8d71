"""Rotated integer cache (as in QuaRot, arXiv 2404.00456): a Hadamard transform spreads each head's outliers first."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from decoct.methods.cache_policy import CacheMethod, Packed, Place, check_heads, check_levels
from decoct.ops.hadamard import hadamard
from decoct.ops.min_max import pack_by_token, unpack_by_token


@dataclass(frozen=True, slots=True, kw_only=True)
class RotatedInt4(CacheMethod):
    """Keys and values of a head are transformed, orthonormally, then quantized token by token.

    After the transform no channel stands out, so a token's own range suits all of its channels, and tokens need not be
    collected in groups. The transform is undone when the cache is read. (QuaRot transforms queries instead, which
    gives the same scores.)

    Attributes:
        bits: 2 to 8, of keys and values.
        group_size: transformed channels of a token that share levels; "head": all of a head.
        window: the last tokens, in full precision.
    """

    bits: int = 4
    group_size: int | str = "head"
    window: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.group_size, str) and self.group_size != "head":
            raise ValueError(f"group_size must be a number or head, not {self.group_size!r}")
        check_levels(8 if isinstance(self.group_size, str) else self.group_size, self.window, bits=self.bits)

    @property
    @override
    def sinks(self) -> int:
        return 0

    @property
    @override
    def step(self) -> int:
        return 1

    @override
    def check(self, channels: int, place: Place) -> None:
        check_heads(8 if isinstance(self.group_size, str) else self.group_size, channels)

    @override
    def pack_keys(self, keys: Float[Tensor, "batch heads tokens channels"], place: Place, start: int) -> Packed:
        """Transformed, groups of channels of each token."""
        return self.pack_values(keys, place)

    @override
    def unpack_keys(self, packed: Packed, place: Place, start: int) -> Float[Tensor, "batch heads tokens channels"]:
        return self.unpack_values(packed, place)

    @override
    def pack_values(self, values: Float[Tensor, "batch heads tokens channels"], place: Place) -> Packed:
        size = values.shape[-1] if isinstance(self.group_size, str) else self.group_size
        return pack_by_token(hadamard(values.float()), size, self.bits)

    @override
    def unpack_values(self, packed: Packed, place: Place) -> Float[Tensor, "batch heads tokens channels"]:
        size = packed["codes"].shape[-1] * 8 // self.bits
        return hadamard(unpack_by_token(packed, size, self.bits), inverse=True)
