"""A llama-like model in a loop of its own: few calls a block, nothing allocated for the cache while it runs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from decoct.engine.runner import Runner
from decoct.methods.policy import read_policy
from decoct.model import Model
from decoct.runtime.anatomy import Anatomy, anatomy, slow_because
from decoct.runtime.cache import places
from decoct.runtime.heap import large_blocks_apart
from decoct.runtime.keep import Keep, PolicyKeep, Span, StaticKeep
from decoct.runtime.kernels.product import MOST_DIRECT
from decoct.runtime.linears import Linear, joined, product
from decoct.runtime.network import Feed
from decoct.runtime.step import Step, step_of

_TOKENS_AT_ONCE = 512  # of a prompt: what goes through a block together

_ACTIVATE: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}


@dataclass(frozen=True, slots=True)
class Norm:
    """A root-mean-square norm, rounded where its family rounds.

    Attributes:
        gain: in the dtype of the hidden states, or float32 with the offset in it.
        eps: added to the mean square.
    """

    gain: Tensor
    eps: float

    def __call__(self, x: Float[Tensor, "*n width"]) -> Float[Tensor, "*n width"]:
        """Normalise the last axis."""
        exact = x.float()
        exact = exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.gain * exact.to(x.dtype) if self.gain.dtype == x.dtype else (exact * self.gain).to(x.dtype)


@dataclass(frozen=True, slots=True)
class Block:
    """One block's matrices, norms and angles.

    Attributes:
        before: norms of what attention and MLP read.
        after: norms of what they give back, where the family has them.
        heads: norms of each head's queries and keys, where the family has them.
        qkv: the projections to queries, keys and values.
        out: the attention's output projection.
        gate_up: the MLP's two first projections.
        down: its last.
        angles: which of the decoder's rotary embeddings turns its queries and keys.
    """

    before: tuple[Norm, Norm]
    after: tuple[Norm | None, Norm | None]
    heads: tuple[Norm | None, Norm | None]
    qkv: Linear
    out: Linear
    gate_up: Linear
    down: Linear
    angles: int


class Decoder:
    """A model that is ready to go on with sequences; a `Network`.

    Attributes:
        about: one line: what computes.
        context: the most tokens that a sequence may have.
        num_seats: sequences that it holds at once.
        dtype: of hidden states, keys and values.
        form: the family's arithmetic.
        windows: of each block's attention; None: it sees everything.
        blocks: their matrices and norms.
        angles: cosines and signed sines [context, channels] of each rotary embedding.
        final: the norm before the head.
        head: what gives logits.
    """

    def __init__(
        self,
        model: Model,
        *,
        context: int,
        num_seats: int = 1,
        dtype: torch.dtype | None = None,
        rounded_prompts: bool = False,
    ) -> None:
        """Load a model's weights, packed as they are.

        Args:
            model: of a family that the loop knows (`slow_because` gives None).
            context: the most tokens that a sequence may have.
            num_seats: sequences to hold at once.
            dtype: of hidden states, keys and values; None: the model's own.
            rounded_prompts: round what many tokens at once are multiplied with to 8 bits, 64 numbers a scale, where
                there is a kernel for it: faster, and no longer exact. Single tokens stay exact.

        Raises:
            ValueError: the checkpoint lacks a tensor, or the loop cannot run the model.
        """
        reason = slow_because(model)
        if reason is not None:
            raise ValueError(f"{model.source.label}: {reason}; use --engine transformers")
        self.context, self.num_seats = context, num_seats
        self.dtype = dtype or model.dtype
        self.form = anatomy(model)
        runner = Runner(model, self.dtype)
        angles = runner.rotations(context)
        if angles[0][0].shape[-1] != self.form.head_size:
            raise ValueError(
                f"{model.source.label}: its rotary embedding turns a part of each head; use --engine transformers"
            )
        self.windows = [each.sliding_window for each in runner.attentions()]
        self._keep = _keep(model, self.form, runner, self)
        kinds = {id(cosines): (cosines, sines) for cosines, sines in angles}
        order = list(kinds)
        load = _Loader(model, self.form, self.dtype)
        with large_blocks_apart():
            # The largest matrices first: what they take while they are packed is room for blocks afterwards.
            self._table = product(model.weight(model.family.embed), self.dtype)
            head = self._table if model.tied else product(model.weight(model.family.head), self.dtype)
            self.blocks = [load.block(number, order.index(id(angles[number][0]))) for number in range(model.num_blocks)]
        self.angles = [(cosines, _signed(sines)) for cosines, sines in kinds.values()]
        self.final = load.norm(f"{model.family.base_prefix}norm.weight")
        self.head = Linear((head,))
        self._lengths = [0] * num_seats
        self._step = step_of(self, self._keep)
        self.about = f"decoct's decode loop, kernels: {', '.join(sorted(self.kernels))}"
        if rounded_prompts:
            rounding = [layer for layer in self.layers() if layer.round_prompts()]
            self.about += "; prompts rounded to 8 bits" if rounding else "; prompts exact: no kernel here rounds them"

    @property
    def kernels(self) -> set[str]:
        """What multiplies."""
        return set[str]().union(*(layer.kernels for layer in self.layers()))

    @property
    def nbytes(self) -> int:
        """Bytes of the matrices that a token passes through, as they are held: not of a table that is looked up in."""
        return sum(layer.nbytes for layer in self.layers())

    @property
    def cache_nbytes(self) -> int:
        """Bytes of keys and values."""
        return self._keep.nbytes

    def length(self, seat: int) -> int:
        """Tokens that a sequence has so far."""
        return self._lengths[seat]

    def release(self, seat: int) -> None:
        """Forget a sequence."""
        self._lengths[seat] = 0
        self._keep.release(seat)

    @torch.inference_mode()
    def advance(self, feeds: Sequence[Feed]) -> Float[Tensor, "feeds vocab"]:
        """Take tokens in; gives the float32 logits after the last token of each feed."""
        for feed in feeds:
            assert self._lengths[feed.seat] + len(feed.tokens) <= self.context, "the caller counts tokens"
        single = [i for i, feed in enumerate(feeds) if len(feed.tokens) == 1]
        if self._step is None or not 0 < len(single) <= MOST_DIRECT:
            return self._several(feeds)
        if len(single) == len(feeds):
            return self._one_each(self._step, feeds)
        others = [i for i in range(len(feeds)) if i not in single]
        found = [self._one_each(self._step, [feeds[i] for i in single]), self._several([feeds[i] for i in others])]
        return torch.cat(found)[torch.tensor([*single, *others]).argsort()]

    def _several(self, feeds: Sequence[Feed]) -> Float[Tensor, "feeds vocab"]:
        """Prompts, and tokens where there is no step in the kernels."""
        feeds = [self._all_but_the_last_piece(feed) for feed in feeds]
        hidden = self._run(feeds)
        ends = torch.tensor([len(feed.tokens) for feed in feeds]).cumsum(0) - 1
        logits = self.head(self.final(hidden[ends])).float()
        cap = self.form.logit_cap
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def layers(self) -> list[Linear]:
        """All matrices that a token passes through."""
        return [self.head, *(each for b in self.blocks for each in (b.qkv, b.out, b.gate_up, b.down))]

    def _one_each(self, step: Step, feeds: Sequence[Feed]) -> Float[Tensor, "feeds vocab"]:
        """One token for each sequence: without a way back to Python between the blocks."""
        seats = [feed.seat for feed in feeds]
        hidden = self._embedded([feed.tokens[0] for feed in feeds])
        logits = step(hidden, seats, [self._lengths[seat] for seat in seats])
        for seat in seats:
            self._lengths[seat] += 1
        return logits

    def _embedded(self, tokens: Sequence[int]) -> Float[Tensor, "tokens hidden"]:
        hidden = self._table.rows(torch.tensor(tokens), self.dtype)
        if self.form.embed_scale is None:
            return hidden
        return hidden * torch.tensor(self.form.embed_scale, dtype=self.dtype)

    def _all_but_the_last_piece(self, feed: Feed) -> Feed:
        """A long prompt goes through the blocks in pieces, so that it needs no more memory than a short one."""
        tokens = list(feed.tokens)
        while len(tokens) > _TOKENS_AT_ONCE:
            self._run([Feed(feed.seat, tokens[:_TOKENS_AT_ONCE])])
            tokens = tokens[_TOKENS_AT_ONCE:]
        return Feed(feed.seat, tokens)

    def _run(self, feeds: Sequence[Feed]) -> Float[Tensor, "tokens hidden"]:
        spans = [Span(feed.seat, self._lengths[feed.seat], len(feed.tokens)) for feed in feeds]
        positions = torch.tensor([span.start + i for span in spans for i in range(span.count)])
        hidden = self._embedded([token for feed in feeds for token in feed.tokens])
        turns = [(cosines[positions].unsqueeze(1), sines[positions].unsqueeze(1)) for cosines, sines in self.angles]
        for number, block in enumerate(self.blocks):
            hidden = hidden + self._attention(number, block, hidden, turns[block.angles], spans)
            hidden = hidden + self._mlp(block, hidden)
        for span in spans:
            self._lengths[span.seat] += span.count
        return hidden

    def _attention(
        self, number: int, block: Block, hidden: Tensor, turn: tuple[Tensor, Tensor], spans: Sequence[Span]
    ) -> Float[Tensor, "tokens hidden"]:
        form = self.form
        turning = form.heads + form.kv_heads
        mixed = block.qkv(block.before[0](hidden)).view(hidden.shape[0], -1, form.head_size)
        both, values = mixed[:, :turning], mixed[:, turning:]
        query_norm, key_norm = block.heads
        if query_norm is not None and key_norm is not None:
            both = torch.cat([query_norm(both[:, : form.heads]), key_norm(both[:, form.heads :])], dim=1)
        both = both * turn[0] + both.roll(form.head_size // 2, dims=2) * turn[1]
        found = block.out(self._keep.attend(number, both[:, : form.heads], both[:, form.heads :], values, spans))
        return found if block.after[0] is None else block.after[0](found)

    def _mlp(self, block: Block, hidden: Tensor) -> Float[Tensor, "tokens hidden"]:
        gate, up = block.gate_up(block.before[1](hidden)).chunk(2, dim=-1)
        found = block.down(_ACTIVATE[self.form.activation](gate) * up)
        return found if block.after[1] is None else block.after[1](found)


class _Loader:
    """Reads a model's blocks, and joins the matrices that read the same."""

    def __init__(self, model: Model, form: Anatomy, dtype: torch.dtype) -> None:
        self._model, self._form, self._dtype = model, form, dtype
        self._roles = {slot.role: slot.name for slot in model.block_slots}

    def block(self, number: int, angles: int) -> Block:
        """One block, its weights read now; `angles`: which rotary embedding is its own."""
        prefix = self._model.prefix(number)
        found = {name.removeprefix(prefix) for name in self._model.others(number)}
        second = "pre_feedforward_layernorm.weight"
        four = second in found  # Gemma has norms around both halves; elsewhere "post attention" is before the MLP

        def maybe(name: str) -> Norm | None:
            return self.norm(prefix + name) if name in found else None

        before = (prefix + "input_layernorm.weight", prefix + (second if four else "post_attention_layernorm.weight"))
        return Block(
            before=(self.norm(before[0]), self.norm(before[1])),
            after=(
                maybe("post_attention_layernorm.weight" if four else ""),
                maybe("post_feedforward_layernorm.weight"),
            ),
            heads=(maybe("self_attn.q_norm.weight"), maybe("self_attn.k_norm.weight")),
            qkv=self._joined(number, ("attn.q", "attn.k", "attn.v"), "attn.qkv"),
            out=self._joined(number, ("attn.o",)),
            gate_up=self._joined(number, ("mlp.gate", "mlp.up"), "mlp.gate_up"),
            down=self._joined(number, ("mlp.down",)),
            angles=angles,
        )

    def norm(self, name: str) -> Norm:
        """A norm by its gain's full name."""
        gain = self._model.tensor(name)
        offset = self._form.gain_offset
        return Norm(gain.float() + offset if offset else gain.to(self._dtype), self._form.eps)

    def _joined(self, number: int, roles: tuple[str, ...], fused: str = "") -> Linear:
        """Matrices that read the same, as one; `fused`: the role of the one that the checkpoint may have instead."""
        names = [
            self._model.prefix(number) + self._roles[role] for role in ([fused] if fused in self._roles else roles)
        ]
        weights = [self._model.weight(name) for name in names]
        others = set(self._model.others(number))
        biases = [name.removesuffix("weight") + "bias" for name in names]
        given = [self._model.tensor(name).to(self._dtype) for name in biases if name in others]
        bias = torch.cat(given) if given else None
        assert len(given) in (0, len(names)), "all of them have a bias, or none"
        return joined(weights, bias, self._dtype)


def _keep(model: Model, form: Anatomy, runner: Runner, decoder: Decoder) -> Keep:
    attentions, policy = runner.attentions(), read_policy(model)
    if policy is not None:
        return PolicyKeep(form, policy.method, places(policy, attentions))
    return StaticKeep(form, decoder.windows, decoder.num_seats, decoder.context, decoder.dtype)


def _signed(sines: Float[Tensor, "context channels"]) -> Float[Tensor, "context channels"]:
    """Sines for turning by a roll: channel i takes from channel i + half with a minus, and gives to it with a plus."""
    first, second = sines.chunk(2, dim=-1)
    return torch.cat([-first, second], dim=-1)
