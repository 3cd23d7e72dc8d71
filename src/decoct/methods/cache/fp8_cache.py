"""FP8 cache (formats of arXiv 2209.05433): keys and values as E4M3, with scales learned from calibration and saved."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from decoct.methods.cache_policy import CacheMethod, Packed, Place
from decoct.ops.minifloat import ELEMENTS, decode, encode
from decoct.stats import AbsMax

_E4M3 = ELEMENTS["e4m3"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FP8Cache(CacheMethod):
    """A byte for each key and value; one scale for all keys of a head, and one for its values.

    Scales are the largest absolute values of the calibration text over 448, times `margin`; what exceeds them later
    becomes the largest number. Nothing is stored for a token beside its bytes.

    Attributes:
        margin: room above what calibration saw; at least 1.
        window: the last tokens, in full precision.
    """

    stat: ClassVar[type[AbsMax]] = AbsMax

    margin: float = 1.0
    window: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.margin < 100:
            raise ValueError(f"margin must be at least 1 and less than 100, not {self.margin}")
        if self.window < 0:
            raise ValueError(f"window must not be negative, not {self.window}")

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
        """Every head can be packed."""

    @override
    def learn(self, keys: Any, values: Any, heads: int) -> dict[str, Tensor]:
        found = {}
        for name, seen in (("key_scale", keys), ("value_scale", values)):
            largest = seen.maximum.reshape(heads, -1).amax(1)
            if not torch.isfinite(largest).all():
                raise ValueError("keys or values of the calibration text are not finite; the checkpoint is damaged")
            scale = largest * (self.margin / _E4M3.largest)
            found[name] = torch.where(scale > torch.finfo(torch.float32).tiny, scale, torch.ones_like(scale))
        return found

    @override
    def pack_keys(self, keys: Float[Tensor, "batch heads tokens channels"], place: Place, start: int) -> Packed:
        return {"codes": encode(keys.float() / _scale(place, "key_scale", keys), _E4M3)}

    @override
    def unpack_keys(self, packed: Packed, place: Place, start: int) -> Float[Tensor, "batch heads tokens channels"]:
        return decode(packed["codes"], _E4M3) * _scale(place, "key_scale", packed["codes"])

    @override
    def pack_values(self, values: Float[Tensor, "batch heads tokens channels"], place: Place) -> Packed:
        return {"codes": encode(values.float() / _scale(place, "value_scale", values), _E4M3)}

    @override
    def unpack_values(self, packed: Packed, place: Place) -> Float[Tensor, "batch heads tokens channels"]:
        return decode(packed["codes"], _E4M3) * _scale(place, "value_scale", packed["codes"])


def _scale(place: Place, name: str, like: Tensor) -> Float[Tensor, "heads 1 1"]:
    """What was learned, where `like` is."""
    return place.learned[name].to(like.device).reshape(-1, 1, 1)
