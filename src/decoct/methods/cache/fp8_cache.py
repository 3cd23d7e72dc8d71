"""FP8 cache (formats of arXiv 2209.05433): keys and values as E4M3, with scales learned from calibration and saved."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from decoct.methods.cache_policy import CacheMethod, Heads, Learner, Packed, Place
from decoct.ops.minifloat import ELEMENTS, decode, encode

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

    @property
    @override
    def learns(self) -> bool:
        return True

    @override
    def learner(self, place: Place) -> Learner:
        return _Largest(self.margin)

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


class _Largest(Learner):
    """The largest keys and values of each head so far."""

    def __init__(self, margin: float) -> None:
        self._margin = margin
        self._largest: dict[str, Tensor] = {}

    @override
    def add(self, keys: Heads, values: Heads, slopes: tuple[Heads, Heads] | None) -> None:
        for name, new in (("key_scale", keys), ("value_scale", values)):
            largest = new.abs().amax((0, 2, 3)).float()
            self._largest[name] = torch.maximum(self._largest.get(name, largest), largest)

    @override
    def learned(self) -> dict[str, Tensor]:
        found = {}
        for name, largest in self._largest.items():
            if not torch.isfinite(largest).all():
                raise ValueError("keys or values of the calibration text are not finite; the checkpoint is damaged")
            scale = largest * (self._margin / _E4M3.largest)
            found[name] = torch.where(scale > torch.finfo(torch.float32).tiny, scale, torch.ones_like(scale))
        return found


def _scale(place: Place, name: str, like: Tensor) -> Float[Tensor, "heads 1 1"]:
    """What was learned, where `like` is."""
    return place.learned[name].to(like.device).reshape(-1, 1, 1)
