"""KIVI (arXiv 2402.02750): keys quantized per channel, values per token, the last tokens left as they are."""

from dataclasses import dataclass

from typing_extensions import override

from decoct.methods.cache_policy import GroupedCache


@dataclass(frozen=True, slots=True, kw_only=True)
class KIVI(GroupedCache):
    """Keys have few channels of large size, the same for all tokens, so each channel gets its own levels.

    A group is `group_size` tokens of one channel for keys, `group_size` channels of one token for values; each has a
    minimum and a step in float16, so 4 bits come to 5 a value with groups of 32. Tokens leave the window a group at a
    time, keys and values together (the paper lets values leave one by one, and keys a whole window at a time).

    Attributes:
        window: the last tokens, in full precision.
    """

    window: int = 128

    @property
    @override
    def sinks(self) -> int:
        return 0
