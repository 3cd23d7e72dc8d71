"""A decoder's parts as ONNX nodes: the operators that onnxruntime-genai's models are made of."""

from dataclasses import dataclass, field

import torch
from jaxtyping import UInt8
from torch import Tensor

from decoct.exporters.held import Held, codes_of, narrowed
from decoct.exporters.llama_like import Sizes, angles_of, windows_of
from decoct.exporters.onnx.graph import CONTRIB, OnnxGraph
from decoct.model import Model
from decoct.ops.packing import pack_bits

LOGITS = "logits"
TURNED = 16
"""Channels: GroupQueryAttention turns heads of multiples of it, sequence by sequence."""


@dataclass
class OnnxCanvas:
    """Draws into a graph; a value is the name of a node's output.

    Attributes:
        graph: where to.
        model: whose tensors.
        sizes: the model's.
        held: how each matrix is written.
        level: MatMulNBits' `accuracy_level`: 4 where it may round inputs to 8 bits, 1 where it may not.
    """

    graph: OnnxGraph
    model: Model
    sizes: Sizes
    held: dict[str, Held]
    level: int
    _windows: list[int | None] = field(init=False)
    _turns: list[tuple[str, str]] = field(init=False)
    _packed: dict[str, list[str]] = field(default_factory=dict)
    _count: int = 0

    def __post_init__(self) -> None:
        """Draw what all blocks share: positions, and how long the sequences are."""
        self._windows = windows_of(self.model)
        kinds, blocks = angles_of(self.model, self.sizes.context)
        names = [
            (self.graph.constant(f"rope.{i}.cos", cos), self.graph.constant(f"rope.{i}.sin", sin))
            for i, (cos, sin) in enumerate(kinds)
        ]
        self._turns = [names[kind] for kind in blocks]
        node, one = self.graph.node, self._index("one", [1])
        real = node("ReduceSum", ["attention_mask", one], "lengths", keepdims=0)
        node("Cast", [node("Sub", [real, one], "lengths.last")], "lengths.before", to=6)
        shape = node("Shape", ["attention_mask"], "mask.shape")
        node("Gather", [shape, one], "mask.total")
        node("Cast", ["mask.total"], "lengths.total", to=6)
        count = node("Gather", [node("Shape", ["input_ids"], "tokens.shape"), one], "tokens.count")
        node("Sub", ["mask.total", count], "tokens.before")

    def embed(self, name: str) -> str:
        """GatherBlockQuantized of packed codes, or Gather of rows."""
        held = self.held[name]
        if held.bits is None:
            return self.graph.node("Gather", [self._matrix(name), "input_ids"], "embedding")
        codes, *numbers = self._numbers(name)
        rows, cols = self.model.shape(name)
        width = -(-cols // held.group) * held.group
        flat = self.graph.view(f"{name}.rows", codes, [rows, width * held.bits // 8])
        found = self.graph.node(
            "GatherBlockQuantized", [flat, "input_ids", *numbers], "embedding", domain=CONTRIB, bits=held.bits,
            block_size=held.group, gather_axis=0, quantize_axis=1,
        )  # fmt: skip
        if width == cols:
            return found
        ends = [self._index(f"embedding.{word}", [at]) for word, at in (("start", 0), ("stop", cols), ("axis", 2))]
        return self.graph.node("Slice", [found, *ends], "embedding.whole")

    def norm(self, x: str, name: str) -> str:
        """SimplifiedLayerNormalization."""
        gain = self.graph.floats(name, self.model.tensor(name))
        return self.graph.node(
            "SimplifiedLayerNormalization", [x, gain], self._name("norm"), axis=-1, epsilon=self.sizes.eps, stash_type=1
        )

    def norm_heads(self, x: str, name: str) -> str:
        """The same after a Reshape to heads."""
        heads = self._index("heads", [0, 0, -1, self.sizes.head_size])
        apart = self.graph.node("Reshape", [x, heads], self._name("heads"))
        normed = self.norm(apart, name)
        return self.graph.node("Reshape", [normed, self._index("whole", [0, 0, -1])], self._name("whole"))

    def product(self, x: str, name: str, bias: str | None) -> str:
        """MatMulNBits, or FusedMatMul with the matrix as it lies in the checkpoint."""
        held, out = self.held[name], self._name("product")
        rows, cols = self.model.shape(name)
        if held.bits is None:
            found = self.graph.node("FusedMatMul", [x, self._matrix(name)], out, domain=CONTRIB, transB=1)
        else:
            found = self.graph.node(
                "MatMulNBits", [x, *self._numbers(name)], out, domain=CONTRIB, K=cols, N=rows, bits=held.bits,
                block_size=held.group, accuracy_level=self.level,
            )  # fmt: skip
        if bias is None:
            return found
        return self.add(found, self.graph.floats(bias, self.model.tensor(bias)))

    def attention(self, block: int, queries: str, keys: str, values: str) -> str:
        """GroupQueryAttention, which turns queries and keys, and keeps keys and values."""
        size = self.sizes
        turned = size.head_size % TURNED == 0
        if not turned:
            queries, keys = (self._turn(block, x, n) for x, n in ((queries, size.heads), (keys, size.kv_heads)))
        kept = [f"past_key_values.{block}.{each}" for each in ("key", "value")]
        window = self._windows[block]
        return self.graph.node(
            "GroupQueryAttention",
            [queries, keys, values, *kept, "lengths.before", "lengths.total", *(self._turns[block] if turned else ())],
            self._name("attention"),
            domain=CONTRIB,
            more=[f"present.{block}.{each}" for each in ("key", "value")],
            num_heads=size.heads,
            kv_num_heads=size.kv_heads,
            do_rotary=int(turned),
            local_window_size=-1 if window is None else window,
        )

    def _turn(self, block: int, x: str, heads: int) -> str:
        """RotaryEmbedding from the first new token on: of small heads, and one sequence."""
        return self.graph.node(
            "RotaryEmbedding", [x, "tokens.before", *self._turns[block]], self._name("turned"), domain=CONTRIB,
            num_heads=heads, rotary_embedding_dim=self.sizes.head_size,
        )  # fmt: skip

    def gated(self, gate: str, up: str) -> str:
        """Sigmoid and two products, which onnxruntime makes one."""
        share = self.graph.node("Sigmoid", [gate], self._name("sigmoid"))
        return self.graph.node(
            "Mul", [self.graph.node("Mul", [gate, share], self._name("silu")), up], self._name("mul")
        )

    def add(self, x: str, y: str) -> str:
        """Add."""
        return self.graph.node("Add", [x, y], self._name("add"))

    def last(self, x: str) -> str:
        """Of each sequence its last real token: what fills a sequence up to the longest one stands behind it."""
        node = self.graph.node
        since = node("Sub", ["lengths.last", "tokens.before"], "tokens.last")
        place = node("Max", [since, self._index("none", [0])], "tokens.place")
        index = node("Unsqueeze", [place, self._index("ends", [1, 2])], "tokens.index")
        return node("GatherND", [x, index], self._name("last"), batch_dims=1)

    def _numbers(self, name: str) -> list[str]:
        """Codes, scales and perhaps zero points of a matrix, as MatMulNBits reads them."""
        if name not in self._packed:
            held, graph = self.held[name], self.graph
            assert held.bits is not None
            found = codes_of(self.model.weight(name), held)
            codes = graph.constant(f"{name}.codes", pack(found.codes, held.bits))
            inputs = [codes, graph.floats(f"{name}.scales", narrowed(found.scale))]
            if held.zero != "middle":
                zero = found.zero if held.zero == "real" else pack(found.zero.to(torch.uint8), held.bits)
                inputs.append(graph.constant(f"{name}.zeros", zero))
            self._packed[name] = inputs
        return self._packed[name]

    def _matrix(self, name: str) -> str:
        return self.graph.floats(name, self.model.weight(name).unpack(self.model.dtype))

    def _index(self, name: str, values: list[int]) -> str:
        return self.graph.constant(f"index.{name}", torch.tensor(values))

    def _name(self, kind: str) -> str:
        self._count += 1
        return f"{kind}.{self._count}"


def pack(codes: UInt8[Tensor, "*lead n"], bits: int) -> UInt8[Tensor, "*lead bytes"]:
    """Codes of 2, 4 or 8 bits into bytes, the first one lowest."""
    packed = pack_bits(codes.reshape(-1, codes.shape[-1]), bits)
    return packed.reshape(*codes.shape[:-1], packed.shape[-1])
