"""Where a decoding network keeps keys and values: preallocated tensors, or packed as a policy says."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from decoct.methods import CacheMethod, Place
from decoct.native import attend as native_attend
from decoct.runtime.anatomy import Anatomy
from decoct.runtime.cache import BlockCache


@dataclass(frozen=True, slots=True)
class Span:
    """Neighbouring rows of a step's hidden states that belong to one sequence.

    Attributes:
        seat: whose.
        start: position of the first in its sequence.
        count: tokens.
    """

    seat: int
    start: int
    count: int


class Keep(Protocol):
    """Keys and values of all blocks and sequences."""

    def attend(
        self,
        block: int,
        queries: Float[Tensor, "tokens heads channels"],
        keys: Float[Tensor, "tokens kv_heads channels"],
        values: Float[Tensor, "tokens kv_heads channels"],
        spans: Sequence[Span],
    ) -> Float[Tensor, "tokens width"]:
        """Take new keys and values; gives what each query finds in those up to its own."""

    def release(self, seat: int) -> None:
        """Forget a sequence."""

    @property
    def nbytes(self) -> int:
        """Bytes held."""


class StaticKeep:
    """Keys and values as they are, in memory that is allocated once."""

    def __init__(self, form: Anatomy, windows: Sequence[int | None], seats: int, context: int, dtype: torch.dtype):
        """Allocate; `windows`: each block's sliding window, None: it sees everything."""
        self._form, self._windows = form, windows
        shape = (len(windows), seats, form.kv_heads, context, form.head_size)
        self.keys, self.values = torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)

    @property
    def nbytes(self) -> int:
        """Bytes held, used or not."""
        return self.keys.nbytes + self.values.nbytes

    def release(self, seat: int) -> None:
        """Nothing: what is there is written over."""

    def attend(
        self, block: int, queries: Tensor, keys: Tensor, values: Tensor, spans: Sequence[Span]
    ) -> Float[Tensor, "tokens width"]:
        """See `Keep`."""
        found, at = [], 0
        for span in spans:
            rows = slice(at, at + span.count)
            end = span.start + span.count
            mine = (self.keys[block, span.seat], self.values[block, span.seat])
            mine[0][:, span.start : end] = keys[rows].transpose(0, 1)
            mine[1][:, span.start : end] = values[rows].transpose(0, 1)
            window = self._windows[block]
            first = 0 if window is None else max(0, span.start - window + 1)
            seen = (mine[0][:, first:end], mine[1][:, first:end])
            found.append(attend(self._form, queries[rows], *seen, window))
            at += span.count
        return found[0] if len(found) == 1 else torch.cat(found)


class PolicyKeep:
    """Keys and values as a policy that was saved with the model keeps them."""

    def __init__(self, form: Anatomy, method: CacheMethod, places: Sequence[Place]) -> None:
        """Nothing is allocated ahead."""
        self._form, self._method, self._places = form, method, places
        self._caches: dict[int, list[BlockCache]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes held: codes, scales, and the tokens in full precision."""
        return sum(cache.nbytes for caches in self._caches.values() for cache in caches)

    def release(self, seat: int) -> None:
        """Let a sequence's memory go."""
        self._caches.pop(seat, None)

    def attend(
        self, block: int, queries: Tensor, keys: Tensor, values: Tensor, spans: Sequence[Span]
    ) -> Float[Tensor, "tokens width"]:
        """See `Keep`."""
        found, at = [], 0
        for span in spans:
            rows = slice(at, at + span.count)
            if span.seat not in self._caches:
                self._caches[span.seat] = [BlockCache(self._method, place) for place in self._places]
            new = (keys[rows].transpose(0, 1).unsqueeze(0), values[rows].transpose(0, 1).unsqueeze(0))
            seen = self._caches[span.seat][block].update(*new)
            found.append(attend(self._form, queries[rows], seen[0][0], seen[1][0], self._places[block].sliding_window))
            at += span.count
        return found[0] if len(found) == 1 else torch.cat(found)


def attend(
    form: Anatomy,
    queries: Float[Tensor, "tokens heads channels"],
    keys: Float[Tensor, "kv_heads seen channels"],
    values: Float[Tensor, "kv_heads seen channels"],
    window: int | None,
) -> Float[Tensor, "tokens width"]:
    """Causal attention of a sequence's newest tokens, whose own keys come last among those seen."""
    count, seen = queries.shape[0], keys.shape[1]
    if count > 1:
        compiled = native_attend(
            queries.transpose(0, 1).unsqueeze(0), keys.unsqueeze(0), values.unsqueeze(0),
            scale=form.scale, score_cap=form.score_cap, window=window,
        )  # fmt: skip
        if compiled is not None:
            return compiled.reshape(count, -1)
    plain = count == seen and (window is None or count <= window)
    mask = None
    if count > 1 and not (plain and form.score_cap is None):
        at = torch.arange(seen - count, seen).unsqueeze(1)
        other = torch.arange(seen)
        mask = other <= at if window is None else (other <= at) & (other > at - window)
    if form.score_cap is None and count == 1:
        # The heads that share keys are several queries of one head: torch has no fast path for a single query.
        grouped = queries.reshape(1, form.kv_heads, -1, queries.shape[2])
        found = functional.scaled_dot_product_attention(
            grouped, keys.unsqueeze(0), values.unsqueeze(0), scale=form.scale
        )
        return found.reshape(1, -1)
    if form.score_cap is None:
        found = functional.scaled_dot_product_attention(
            queries.transpose(0, 1).unsqueeze(0), keys.unsqueeze(0), values.unsqueeze(0),
            mask, is_causal=mask is None and count > 1, scale=form.scale, enable_gqa=True,
        )[0]  # fmt: skip
    else:
        found = _capped(form, queries.transpose(0, 1), keys, values, mask)
    return found.transpose(0, 1).reshape(count, -1)


def _capped(form: Anatomy, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """Attention whose scores are squashed, head by head of the keys."""
    assert form.score_cap is not None
    grouped = queries.reshape(form.kv_heads, -1, *queries.shape[1:])
    scores = grouped @ keys.unsqueeze(1).transpose(2, 3) * form.scale
    scores = torch.tanh(scores / form.score_cap) * form.score_cap
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    shares = torch.softmax(scores, dim=-1, dtype=torch.float32).to(queries.dtype)
    return (shares @ values.unsqueeze(1)).reshape(queries.shape)
