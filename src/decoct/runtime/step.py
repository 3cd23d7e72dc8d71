"""One more token for each of some sequences, in one call of the compiled kernels.

Of a small model most of a token's time would pass in Python otherwise.
"""

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, Structure, byref, c_float, c_int32, c_int64, c_void_p
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from decoct.native.library import FLOATS, LEVELS, TYPES, Library, Matrix, library
from decoct.runtime.keep import StaticKeep
from decoct.runtime.kernels import Product
from decoct.runtime.kernels.compiled import Compiled
from decoct.runtime.kernels.composed import Composed
from decoct.runtime.linears import Linear

if TYPE_CHECKING:
    from decoct.runtime.decoder import Block, Decoder, Norm

_ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
_Call = ctypes.CFUNCTYPE(c_int32, c_int64, c_void_p, c_int64, c_void_p)


class _Part(Structure):
    """DecoctPart in native/network.h; so the others below, by their names there."""

    _fields_ = (
        ("matrix", POINTER(Matrix)), ("inner", POINTER(Matrix)), ("rows", c_int64), ("call", _Call),
        ("handle", c_int64),
    )  # fmt: skip


class _Linear(Structure):
    _fields_ = (
        ("parts", POINTER(_Part)), *((name, c_int64) for name in ("num_parts", "rows", "cols")), ("bias", c_void_p),
    )  # fmt: skip


class _Norm(Structure):
    _fields_ = (("gain", c_void_p), ("gain_type", c_int32), ("eps", c_float))


class _Block(Structure):
    _fields_ = (
        *(
            (name, _Norm)
            for name in ("before_attention", "before_mlp", "after_attention", "after_mlp", "queries", "keys")
        ),
        *((name, _Linear) for name in ("qkv", "out", "gate_up", "down")),
        *((name, c_void_p) for name in ("cosines", "sines")),
        ("window", c_int64),
    )


class _Network(Structure):
    _fields_ = (
        *((name, c_int32) for name in ("type", "level", "threads", "activation")),
        *(
            (name, c_int64)
            for name in ("num_blocks", "heads", "kv_heads", "head_size", "width", "context", "seats")
        ),
        *((name, c_float) for name in ("scale", "score_cap", "logit_cap")),
        ("blocks", POINTER(_Block)),
        ("final_norm", _Norm),
        ("head", _Linear),
        *((name, c_void_p) for name in ("keys", "values")),
    )  # fmt: skip


class _Kept:
    """What is raised within is raised again behind the call: it cannot pass through the kernels."""

    def __init__(self, step: "Step") -> None:
        self._step = step

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if error is not None:
            self._step.failed = error
        return True


class Step:
    """A decoder's blocks and head, told to the kernels; it keeps what it points to alive.

    Attributes:
        vocabulary: logits of a token.
        failed: what a product raised that was called back for.
    """

    def __init__(self, decoder: "Decoder", kernels: Library, keep: StaticKeep) -> None:
        """Collect pointers; nothing is copied."""
        self._kernels, self._dtype = kernels, decoder.dtype
        self._alive: list[object] = [keep]
        self._called: list[Product] = []
        self.failed: BaseException | None = None
        self._call = _Call(self._multiply)
        form = decoder.form
        assert all(part.dtype == self._dtype and part.is_contiguous() for pair in decoder.angles for part in pair)
        blocks = [self._block(decoder, number, block) for number, block in enumerate(decoder.blocks)]
        self.vocabulary = sum(product.shape[0] for product in decoder.head.products)
        self._network = _Network(
            type=TYPES[decoder.dtype], level=LEVELS.index(kernels.levels[-1]),
            activation=_ACTIVATIONS.index(form.activation), num_blocks=len(blocks), heads=form.heads,
            kv_heads=form.kv_heads, head_size=form.head_size, width=decoder.head.products[0].shape[1],
            context=decoder.context, seats=decoder.num_seats, scale=form.scale, score_cap=form.score_cap or 0.0,
            logit_cap=form.logit_cap or 0.0, blocks=(_Block * len(blocks))(*blocks),
            final_norm=self._norm(decoder.final), head=self._linear(decoder.head), keys=keep.keys.data_ptr(),
            values=keep.values.data_ptr(),
        )  # fmt: skip

    def __call__(
        self, hidden: Float[Tensor, "count width"], seats: Sequence[int], positions: Sequence[int]
    ) -> Float[Tensor, "count vocab"]:
        """Logits after one more token of each sequence, whose keys and values are written to the cache.

        Args:
            hidden: embeddings of the tokens, in the decoder's dtype; overwritten.
            seats: whose they are, each at most once.
            positions: where they come in their sequences.
        """
        assert hidden.is_contiguous()
        assert hidden.dtype == self._dtype
        if min(seats) < 0 or max(seats) >= self._network.seats or max(positions) >= self._network.context:
            raise IndexError("no such seat, or the sequence is longer than the context")
        count = len(seats)
        logits = torch.empty(count, self.vocabulary, dtype=torch.float32, device="cpu")
        self._network.threads = torch.get_num_threads()
        numbers = c_int64 * count
        whole = self._kernels.step(
            byref(self._network), hidden.data_ptr(), numbers(*seats), numbers(*positions), count, logits.data_ptr()
        )
        failed, self.failed = self.failed, None
        if not whole:
            raise failed or KeyboardInterrupt  # Ctrl-C just around the callback never reaches it
        return logits

    def _block(self, decoder: "Decoder", number: int, block: "Block") -> _Block:
        cosines, sines = decoder.angles[block.angles]
        self._alive += [cosines, sines]
        norms = {
            "before_attention": block.before[0], "before_mlp": block.before[1], "after_attention": block.after[0],
            "after_mlp": block.after[1], "queries": block.heads[0], "keys": block.heads[1],
        }  # fmt: skip
        layers = {"qkv": block.qkv, "out": block.out, "gate_up": block.gate_up, "down": block.down}
        return _Block(
            **{name: self._norm(norm) for name, norm in norms.items()},
            **{name: self._linear(layer) for name, layer in layers.items()},
            cosines=cosines.data_ptr(),
            sines=sines.data_ptr(),
            window=decoder.windows[number] or 0,
        )

    def _norm(self, norm: "Norm | None") -> _Norm:
        if norm is None:
            return _Norm()
        gain = norm.gain.contiguous()
        self._alive.append(gain)
        return _Norm(gain.data_ptr(), TYPES[gain.dtype], norm.eps)

    def _linear(self, layer: Linear) -> _Linear:
        assert len({product.shape[1] for product in layer.products}) == 1
        parts = (_Part * len(layer.products))(*map(self._part, layer.products))
        bias = None if layer.bias is None else layer.bias.contiguous()
        self._alive += [parts, bias]
        out = sum(product.shape[0] for product in layer.products)
        return _Linear(parts, len(parts), out, layer.products[0].shape[1], None if bias is None else bias.data_ptr())

    def _part(self, product: Product) -> _Part:
        if isinstance(product, Compiled):
            self._alive.append(product)
            return _Part(ctypes.pointer(product.matrix), None, product.shape[0], _Call(), 0)
        if isinstance(product, Composed) and product.factors is not None:
            left, right = product.factors
            if isinstance(left, Compiled) and isinstance(right, Compiled):
                self._alive.append(product)
                return _Part(
                    ctypes.pointer(left.matrix), ctypes.pointer(right.matrix), product.shape[0], _Call(), 0
                )  # fmt: skip
        self._called.append(product)
        return _Part(None, None, product.shape[0], self._call, len(self._called) - 1)

    def _multiply(self, handle: int, x: int, count: int, out: int) -> int:
        """What the kernels call back for: a product that is none of theirs alone; 0, as ctypes gives too: stop."""
        with _Kept(self), torch.inference_mode():
            product = self._called[handle]
            rows, cols = product.shape
            self._tensor(out, count, rows).copy_(product(self._tensor(x, count, cols)))
            return 1
        return 0

    def _tensor(self, address: int, count: int, width: int) -> Tensor:
        """Numbers in the kernels' memory."""
        size = count * width * self._dtype.itemsize
        return torch.frombuffer((ctypes.c_char * size).from_address(address), dtype=self._dtype).view(count, width)


def step_of(decoder: "Decoder", keep: object) -> Step | None:
    """A decoder's step; None where decoct was installed without kernels, or a cache policy packs keys and values."""
    kernels = library()
    if kernels is None or not isinstance(keep, StaticKeep) or decoder.dtype not in FLOATS:
        return None
    return Step(decoder, kernels, keep)
