"""KVQuant (arXiv 2401.18079): keys quantized before their positions turn them, levels that are learned, outliers."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from decoct.methods.cache_policy import GroupedCache, Heads, Learner, Packed, Place
from decoct.ops.min_max import (
    by_channel,
    by_token,
    ends,
    pack_by_channel,
    pack_by_token,
    unpack_by_channel,
    unpack_by_token,
)
from decoct.ops.rope import turn
from decoct.ops.set_aside import MOST, set_aside
from decoct.ops.shared_levels import LevelCounts

_MOST_OUTLIERS = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class KVQuant(GroupedCache):
    """Rotary positions mix a key's channels, by another angle at each token; before that, channels are more alike.

    Keys are turned back to position 0, packed in groups of each channel's tokens, and turned forth again when they are
    read; values are packed in groups of each token's channels. The first tokens, which attention looks at most, stay as
    they are. Ranges are each group's own, as KIVI's (the paper's are calibrated for keys).

    Levels lie within a group's range where the loss of the calibration text depends on it most: for all keys of a block
    and for all its values, weighted k-means of their places in the range, weights being squared gradients by them
    (Fisher information) times the squared range. The entries farthest from their group's mean are stored apart, and
    ranges span the rest.

    Attributes:
        sinks: the first tokens, in full precision; none where attention has a sliding window.
        window: the last tokens, in full precision.
        levels: "nonuniform": learned; "uniform": evenly spaced, which needs no calibration.
        outliers: share that is stored apart in 16 bits, with its position: of the keys of a head in `group_size`
            tokens, and of all values of a token; at least one each. 0: none.
    """

    before: ClassVar[Mapping[str, Any]] = MappingProxyType({"levels": "uniform", "outliers": 0.0})

    sinks: int = 1
    window: int = 0
    levels: str = "nonuniform"
    outliers: float = 0.01

    def __post_init__(self) -> None:
        GroupedCache.__post_init__(self)
        if self.sinks < 0:
            raise ValueError(f"sinks must not be negative, not {self.sinks}")
        if self.levels not in {"uniform", "nonuniform"}:
            raise ValueError(f"levels must be uniform or nonuniform, not {self.levels!r}")
        if not 0 <= self.outliers <= _MOST_OUTLIERS:
            raise ValueError(f"outliers is a share from 0 to {_MOST_OUTLIERS}, not {self.outliers}")

    @override
    def check(self, channels: int, place: Place) -> None:
        if place.frequencies is None:
            raise ValueError("kvquant undoes rotary positions, and this model has none; use kivi")
        GroupedCache.check(self, channels, place)
        if self.outliers and self.group_size * channels > MOST:
            raise ValueError(
                f"group_size {self.group_size} times {channels} channels is more than {MOST} keys, among which no "
                f"outlier's position fits into two bytes; set group_size to {MOST // channels // 8 * 8} or less"
            )

    @property
    @override
    def learns(self) -> bool:
        return self.levels == "nonuniform"

    @property
    @override
    def by_gradients(self) -> bool:
        return self.learns

    @override
    def learner(self, place: Place) -> Learner:
        return _Levels(self, place)

    @override
    def pack_keys(self, keys: Heads, place: Place, start: int) -> Packed:
        """Groups of tokens of each channel, as they were before RoPE."""
        before = _unturned(keys, place, start)
        return pack_by_channel(
            before, self.group_size, self._key_bits, self._of(place, "key_levels"), self.aside(before, self.group_size)
        )

    @override
    def unpack_keys(self, packed: Packed, place: Place, start: int) -> Heads:
        assert place.frequencies is not None
        before = unpack_by_channel(packed, self.group_size, self._key_bits, self._of(place, "key_levels"))
        return turn(before, place.frequencies, start)

    @override
    def pack_values(self, values: Heads, place: Place) -> Packed:
        """Groups of channels of each token."""
        levels = self._of(place, "value_levels")
        return pack_by_token(values, self.group_size, self._value_bits, levels, self.aside(values, values.shape[1]))

    @override
    def unpack_values(self, packed: Packed, place: Place) -> Heads:
        return unpack_by_token(packed, self.group_size, self._value_bits, self._of(place, "value_levels"))

    def aside(self, heads: Heads, times: int) -> int:
        """How many outliers are kept among so many times a head's channels."""
        return max(1, round(self.outliers * heads.shape[3] * times)) if self.outliers else 0

    def num_levels(self, name: str) -> int:
        """Of keys or of values."""
        return 1 << (self._key_bits if name == "key_levels" else self._value_bits)

    def _of(self, place: Place, name: str) -> Float[Tensor, " levels"] | None:
        return place.learned[name] if self.learns else None


class _Levels(Learner):
    """Where a block's keys and values lie within their groups, and what each place weighs."""

    def __init__(self, method: KVQuant, place: Place) -> None:
        self._method, self._place = method, place
        self._counts = {"key_levels": LevelCounts(), "value_levels": LevelCounts()}

    @override
    def add(self, keys: Heads, values: Heads, slopes: tuple[Heads, Heads] | None) -> None:
        """The tokens that would be packed if no window were kept."""
        assert slopes is not None
        method, size = self._method, self._method.group_size
        start = 0 if self._place.sliding_window else method.sinks
        packed = slice(start, start + (keys.shape[2] - start) // size * size)
        before, by_keys = (_unturned(each[:, :, packed], self._place, start) for each in (keys, slopes[0]))
        outliers = method.aside(keys, size), method.aside(values, values.shape[1])
        self._count("key_levels", by_channel(before, size), by_channel(by_keys, size), outliers[0])
        of_tokens, by_values = (by_token(each[:, :, packed], size) for each in (values, slopes[1]))
        self._count("value_levels", of_tokens, by_values, outliers[1])

    @override
    def learned(self) -> dict[str, Tensor]:
        return {name: counts.levels(self._method.num_levels(name)) for name, counts in self._counts.items()}

    def _count(self, name: str, x: Tensor, slopes: Tensor, outliers: int) -> None:
        aside = set_aside(x, outliers)[1] if outliers else None
        span, low = (end.float().unsqueeze(-1) for end in ends(x, aside, 1))
        weights = (slopes.double() * span).square()
        if aside is not None:
            weights = weights.masked_fill(aside, 0)
        self._counts[name].add((x - low) / span, weights)


def _unturned(keys: Heads, place: Place, start: int) -> Heads:
    """As they were before RoPE, float32; the same for gradients by keys, since turning is a rotation."""
    assert place.frequencies is not None
    return turn(keys.float(), place.frequencies, start, inverse=True)
