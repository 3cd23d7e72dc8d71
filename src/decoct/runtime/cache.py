"""The key-value cache of one block: packed codes, and a window of tokens in full precision, as a policy says.

`BlockCache` is what a running model holds. `WholeWindow` gives attention over a whole text at once exactly what each of
its tokens would have found in such a cache: what is measured with it holds for decoding token by token.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from decoct.arch.hf import Attention
from decoct.methods import CacheMethod, Place
from decoct.methods.cache_policy import Packed
from decoct.methods.policy import Policy

KeyValues = tuple[Float[Tensor, "batch heads tokens channels"], Float[Tensor, "batch heads tokens channels"]]


def places(policy: Policy, attentions: list[Attention]) -> list[Place]:
    """What the policy may know about each block."""
    return [
        Place(block, each.sliding_window, each.frequencies, policy.of_block(block))
        for block, each in enumerate(attentions)
    ]


class BlockCache:
    """Keys and values of one block's attention.

    New tokens are attended to as they are, earlier ones as they are held. Then the oldest tokens beyond the policy's
    window are packed. So what is held after n tokens does not depend on how many were fed at once.

    Attributes:
        length: tokens seen.
    """

    def __init__(self, method: CacheMethod, place: Place) -> None:
        self._method, self._place = method, place
        self.length = 0
        self._sinks = 0 if place.sliding_window else method.sinks
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.length = 0
        self._dropped = 0  # of the packed tokens: out of the sliding window's reach
        self._packed: tuple[Packed, Packed] | None = None
        self._first: KeyValues | None = None
        self._last: KeyValues | None = None

    @property
    def num_packed(self) -> int:
        """Tokens that were packed so far."""
        return self._method.packed_after(self.length, self._place)

    @property
    def nbytes(self) -> int:
        """Bytes of everything held: codes, scales, zeros, and the tokens in full precision."""
        plain: list[Tensor] = [*(self._first or ()), *(self._last or ())]
        return self.packed_nbytes + sum(int(tensor.nbytes) for tensor in plain)

    @property
    def packed_nbytes(self) -> int:
        """Bytes of the packed tokens alone."""
        return sum(tensor.nbytes for packed in self._packed or () for tensor in packed.values())

    def update(self, keys: Tensor, values: Tensor) -> KeyValues:
        """Take new tokens [batch, heads, tokens, channels]; gives what attention looks at, they come last.

        With a sliding window, that is what the first of the new tokens can see, and what comes after it.
        """
        if self._last is None:
            self._first = (keys[:, :, :0], values[:, :, :0])
            self._last = (keys[:, :, :0], values[:, :, :0])
        held = self.held()
        seen = (torch.cat([held[0], keys], dim=2), torch.cat([held[1], values], dim=2))
        self._append(keys, values)
        window = self._place.sliding_window
        if window is None:
            return seen
        most = window - 1 + keys.shape[2]
        return seen[0][:, :, -most:], seen[1][:, :, -most:]

    def held(self) -> KeyValues:
        """Everything that is held, unpacked, in the order of the tokens."""
        assert self._first is not None
        assert self._last is not None
        keys, values = self.unpacked()
        return (
            torch.cat([self._first[0], keys, self._last[0]], dim=2),
            torch.cat([self._first[1], values, self._last[1]], dim=2),
        )

    def unpacked(self) -> KeyValues:
        """The packed tokens, in the dtype of the others."""
        assert self._last is not None
        if self._packed is None:
            return (self._last[0][:, :, :0], self._last[1][:, :, :0])
        start = self._sinks + self._dropped
        keys = self._method.unpack_keys(self._packed[0], self._place, start)
        values = self._method.unpack_values(self._packed[1], self._place)
        return keys.to(self._last[0].dtype), values.to(self._last[1].dtype)

    def each_sequence(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply a change of the batch (the first axis) to everything held: a choice or a repetition of sequences."""
        if self._first is not None and self._last is not None:
            self._first = (change(self._first[0]), change(self._first[1]))
            self._last = (change(self._last[0]), change(self._last[1]))
        if self._packed is not None:
            keys, values = ({name: change(tensor) for name, tensor in packed.items()} for packed in self._packed)
            self._packed = (keys, values)

    def _append(self, keys: Tensor, values: Tensor) -> None:
        assert self._first is not None
        assert self._last is not None
        fresh = min(max(self._sinks - self.length, 0), keys.shape[2])
        if fresh:
            self._first = (
                torch.cat([self._first[0], keys[:, :, :fresh]], dim=2),
                torch.cat([self._first[1], values[:, :, :fresh]], dim=2),
            )
        ready = self.num_packed
        self.length += keys.shape[2]
        ready = self.num_packed - ready
        last_keys = torch.cat([self._last[0], keys[:, :, fresh:]], dim=2)
        last_values = torch.cat([self._last[1], values[:, :, fresh:]], dim=2)
        if ready:
            self._pack(last_keys[:, :, :ready], last_values[:, :, :ready])
            # A copy: a view would keep the tokens alive that were just packed.
            last_keys, last_values = last_keys[:, :, ready:].clone(), last_values[:, :, ready:].clone()
        self._last = (last_keys, last_values)
        self._drop()

    def _pack(self, keys: Tensor, values: Tensor) -> None:
        start = self.num_packed - keys.shape[2] + self._sinks
        new = (
            self._method.pack_keys(keys, self._place, start),
            self._method.pack_values(values, self._place),
        )
        if self._packed is None:
            self._packed = new
        else:
            old_keys, old_values = self._packed
            self._packed = (_joined(old_keys, new[0]), _joined(old_values, new[1]))

    def _drop(self) -> None:
        """Let packed tokens go, `step` at a time, that no later token of a sliding window can see."""
        window = self._place.sliding_window
        if window is None or self._packed is None:
            return
        assert self._last is not None
        step = self._method.step
        packed = self.num_packed - self._dropped
        spare = packed + self._last[0].shape[2] - (window - 1)
        steps = min(max(spare, 0), packed) // step
        if steps:
            keys, values = (
                {n: t[:, :, _entries(t, packed, steps * step) :] for n, t in p.items()} for p in self._packed
            )
            self._packed = ({n: t.clone() for n, t in keys.items()}, {n: t.clone() for n, t in values.items()})
            self._dropped += steps * step


class WholeWindow:
    """Stands where a cache stands while a block runs on whole sequences at once.

    Token i attends to what a `BlockCache` would have held after the i tokens before it, and to itself: earlier tokens
    unpacked from real codes if they were packed by then, as they are if not. Both kinds of keys and values are handed
    to attention side by side, and the mask lets each token see one of the two.

    Attributes:
        nbytes: bytes of the packed tokens at the end of the sequences.
        num_packed: how many tokens that are.
        num_values: keys and values, packed or not, at the end.
    """

    def __init__(self, method: CacheMethod, place: Place) -> None:
        self._method, self._place = method, place
        self._start = 0 if place.sliding_window else method.sinks
        self.nbytes, self.num_packed, self.num_values = 0, 0, 0

    def update(self, keys: Tensor, values: Tensor, layer: int, *args: object, **kwargs: object) -> KeyValues:
        """The packed tokens as they come back, then all of them as they are."""
        del layer, args, kwargs
        start, length = self._start, keys.shape[2]
        self.num_packed = self._method.packed_after(length, self._place)
        self.num_values = keys.numel() + values.numel()
        seen = self._seen(length)
        if not self.num_packed:
            return keys, values
        chosen = slice(start, start + self.num_packed)
        back_keys, back_values = self.there_and_back(keys[:, :, chosen], values[:, :, chosen])
        return (
            torch.cat([back_keys[:, :, :seen], keys], dim=2),
            torch.cat([back_values[:, :, :seen], values], dim=2),
        )

    def there_and_back(self, keys: Tensor, values: Tensor) -> KeyValues:
        """Packed and unpacked again."""
        packed = (
            self._method.pack_keys(keys, self._place, self._start),
            self._method.pack_values(values, self._place),
        )
        self.nbytes = sum(tensor.nbytes for each in packed for tensor in each.values())
        back_keys = self._method.unpack_keys(packed[0], self._place, self._start)
        return back_keys.to(keys.dtype), self._method.unpack_values(packed[1], self._place).to(values.dtype)

    def mask(self, given: Tensor | None, num_tokens: int) -> Tensor | None:
        """Which of the two each token sees: for the columns that `update` gives, in their order."""
        seen = self._seen(num_tokens)
        if not seen:
            return given
        start = self._start
        if given is None:
            given = torch.ones(1, 1, num_tokens, num_tokens, dtype=torch.bool).tril()
        counts = torch.tensor([self._method.packed_after(i, self._place) for i in range(num_tokens)])
        index = torch.arange(num_tokens)
        packed: Bool[Tensor, "tokens tokens"] = (index >= start) & (index < start + counts.unsqueeze(1))
        return torch.cat([_without(given, ~packed)[..., start : start + seen], _without(given, packed)], dim=-1)

    def _seen(self, length: int) -> int:
        """Tokens that are packed when the last one looks back."""
        return self._method.packed_after(length - 1, self._place)


def _without(mask: Tensor, hidden: Tensor) -> Tensor:
    """A mask that hides these entries too: of truth values, or of numbers that are added to the scores."""
    if mask.dtype == torch.bool:
        return mask & ~hidden
    return mask.masked_fill(hidden, torch.finfo(mask.dtype).min)


def _joined(old: Packed, new: Packed) -> Packed:
    return {name: torch.cat([tensor, new[name]], dim=2) for name, tensor in old.items()}


def _entries(tensor: Tensor, num_tokens: int, dropped: int) -> int:
    """How many entries along axis 2 stand for so many of its tokens."""
    return tensor.shape[2] * dropped // num_tokens
