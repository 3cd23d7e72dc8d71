"""A decoder's parts as OpenVINO operators, in the patterns that its CPU plugin makes its fast ones of."""

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from decoct.exporters.held import Held, codes_of, narrowed
from decoct.exporters.llama_like import Sizes, angles_of, windows_of
from decoct.model import Model
from decoct.ops.packing import pack_bits

Node = Any
"""An output of an OpenVINO operator; the package has no types."""

_SIGNED = {4: "i4", 8: "i8"}
_UNSIGNED = {2: "u2", 4: "u4", 8: "u8"}
_FLOATS = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


@dataclass
class OpenVinoCanvas:
    """Draws with OpenVINO's operators.

    Attributes:
        model: whose tensors.
        sizes: the model's.
        held: how each matrix is written.
        inputs: parameters of the graph, by name.
        sinks: what keeps keys and values from one call to the next.
    """

    model: Model
    sizes: Sizes
    held: dict[str, Held]
    inputs: dict[str, Node] = field(init=False)
    sinks: list[Node] = field(default_factory=list)
    _matrices: dict[str, Node] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Draw what all blocks share: positions, and who sees whom."""
        from openvino import opset15 as op

        self._op = op
        ids = {name: ([-1, -1], "i64") for name in ("input_ids", "attention_mask", "position_ids")}
        self.inputs = {
            name: op.parameter(shape, _type(kind), name=name)
            for name, (shape, kind) in {**ids, "beam_idx": ([-1], "i32")}.items()
        }
        for name, parameter in self.inputs.items():
            parameter.output(0).get_tensor().set_names({name})
        kinds, blocks = angles_of(self.model, self.sizes.context)
        drawn = [tuple(self._turns(table) for table in pair) for pair in kinds]
        self._angles = [drawn[kind] for kind in blocks]
        windows = windows_of(self.model)
        masks = {window: self._mask(window) for window in dict.fromkeys(windows)}
        self._masks = [masks[window] for window in windows]

    def embed(self, name: str) -> Node:
        """Gather of rows."""
        return self._op.gather(self._matrix(name), self.inputs["input_ids"], self._whole(0))

    def norm(self, x: Node, name: str) -> Node:
        """The square root of the mean square, spelled out."""
        op = self._op
        mean = op.reduce_mean(op.power(x, self._real(2.0)), self._whole(-1), True)
        share = op.divide(self._real(1.0), op.sqrt(op.add(mean, self._real(self.sizes.eps))))
        return op.multiply(self._floats(name, self.model.tensor(name)), op.multiply(x, share))

    def norm_heads(self, x: Node, name: str) -> Node:
        """The same after a Reshape to heads."""
        op, size = self._op, self.sizes.head_size
        apart = op.reshape(x, self._whole([0, 0, -1, size]), True)
        return op.reshape(self.norm(apart, name), self._whole([0, 0, -1]), True)

    def product(self, x: Node, name: str, bias: str | None) -> Node:
        """MatMul with what the matrix is unpacked to, which the plugin keeps packed."""
        found = self._op.matmul(x, self._matrix(name), False, True)
        return found if bias is None else self.add(found, self._floats(bias, self.model.tensor(bias)))

    def attention(self, block: int, queries: Node, keys: Node, values: Node) -> Node:
        """ScaledDotProductAttention over keys and values that are kept as variables."""
        op, sizes = self._op, self.sizes
        queries, keys, values = (
            op.transpose(op.reshape(x, self._whole([0, 0, n, sizes.head_size]), True), self._whole([0, 2, 1, 3]))
            for x, n in ((queries, sizes.heads), (keys, sizes.kv_heads), (values, sizes.kv_heads))
        )
        cos, sin = self._angles[block]
        queries, keys = (self._turned(x, cos, sin) for x in (queries, keys))
        keys = self._repeated(self._kept(f"past_key_values.{block}.keypresent.{block}.key", keys))
        values = self._repeated(self._kept(f"past_key_values.{block}.valuepresent.{block}.value", values))
        mixed = op.scaled_dot_product_attention(queries, keys, values, self._masks[block], causal=False)
        return op.reshape(op.transpose(mixed, self._whole([0, 2, 1, 3])), self._whole([0, 0, -1]), True)

    def gated(self, gate: Node, up: Node) -> Node:
        """Swish and a product."""
        return self._op.multiply(self._op.swish(gate), up)

    def add(self, x: Node, y: Node) -> Node:
        """Add."""
        return self._op.add(x, y)

    def last(self, x: Node) -> Node:
        """What stands last: shorter sequences are filled up in front."""
        return self._op.gather(x, self._whole([-1]), self._whole(1))

    def _kept(self, name: str, new: Node) -> Node:
        """What a variable has, in the order of beams, and what is new after it."""
        op, sizes = self._op, self.sizes
        shape = op.concat([self._batch(), self._whole([sizes.kv_heads, 0, sizes.head_size])], 0)
        nothing = op.broadcast(self._real(0.0), shape)
        past = op.read_value(nothing, name, _type("f32"), [-1, sizes.kv_heads, -1, sizes.head_size])
        ordered = op.gather(past, self.inputs["beam_idx"], self._whole(0))
        both = op.concat([ordered, new], 2)
        self.sinks.append(op.assign(both, name))
        return both

    def _repeated(self, x: Node) -> Node:
        """Keys or values for each head of the queries."""
        times, op = self.sizes.heads // self.sizes.kv_heads, self._op
        if times == 1:
            return x
        wide = op.broadcast(
            op.unsqueeze(x, self._whole(2)), self._whole([1, 1, times, 1, 1]), broadcast_spec="BIDIRECTIONAL"
        )
        return op.reshape(wide, self._whole([0, self.sizes.heads, -1, self.sizes.head_size]), True)

    def _turned(self, x: Node, cos: Node, sin: Node) -> Node:
        """Channel i with channel i + half."""
        op = self._op
        first, second = op.split(x, self._whole(3), 2).outputs()
        crossed = op.concat([op.multiply(second, self._real(-1.0)), first], 3)
        return op.add(op.multiply(x, cos), op.multiply(crossed, sin))

    def _turns(self, table: Tensor) -> Node:
        """Cosines or sines at the tokens' positions, [batch, 1, tokens, channels]."""
        op = self._op
        rows = op.gather(self._constant(table, "f32", table.shape), self.inputs["position_ids"], self._whole(0))
        return op.unsqueeze(op.concat([rows, rows], 2), self._whole(1))

    def _mask(self, window: int | None) -> Node:
        """0 where a token sees another, else -inf's next, [batch, 1, tokens, all tokens]."""
        op, one = self._op, self._whole(1)
        total, new = (
            op.gather(op.shape_of(self.inputs[n]), one, self._whole(0)) for n in ("attention_mask", "input_ids")
        )
        everyone = op.range(self._whole(0), total, one, "i64")
        mine = op.unsqueeze(op.range(op.subtract(total, new), total, one, "i64"), one)
        seen = op.less_equal(everyone, mine)
        if window is not None:
            seen = op.logical_and(seen, op.greater(everyone, op.subtract(mine, self._whole(window))))
        there = op.unsqueeze(op.convert(self.inputs["attention_mask"], "boolean"), self._whole([1, 2]))
        least = torch.finfo(torch.float32).min
        return op.select(op.logical_and(there, seen), self._real(0.0), self._real(least))

    def _batch(self) -> Node:
        op = self._op
        return op.gather(op.shape_of(self.inputs["input_ids"]), self._whole([0]), self._whole(0))

    def _matrix(self, name: str) -> Node:
        """A slot's matrix in float32; drawn once."""
        if name not in self._matrices:
            weight, held = self.model.weight(name), self.held[name]
            drawn = self._floats(name, weight.unpack(self.model.dtype)) if held.bits is None else self._unpacked(name)
            self._matrices[name] = drawn
        return self._matrices[name]

    def _unpacked(self, name: str) -> Node:
        """(code - zero) * scale, in the pattern that stays packed: Convert, Subtract, Multiply, Reshape."""
        op, held, shape = self._op, self.held[name], self.model.shape(name)
        assert held.bits is not None
        found = codes_of(self.model.weight(name), held)
        scale = narrowed(found.scale, (torch.float16,))
        kind, (rows, groups, size) = _FLOATS[scale.dtype], found.codes.shape
        signed = held.zero == "middle" and held.bits in _SIGNED
        codes = found.codes ^ 2 ** (held.bits - 1) if signed else found.codes  # zero in the middle: two's complement
        stored = (_SIGNED if signed else _UNSIGNED)[held.bits]
        drawn = op.convert(self._constant(_packed(codes, held.bits), stored, codes.shape, f"{name}.codes"), kind)
        if not signed:
            drawn = op.subtract(drawn, self._zero(name, found.zero, held, kind))
        drawn = op.multiply(drawn, self._constant(scale, kind, [rows, groups, 1], f"{name}.scales"))
        drawn = op.reshape(drawn, self._whole([rows, groups * size]), False)
        assert tuple(shape) == (rows, groups * size)
        return drawn if kind == "f32" else op.convert(drawn, "f32")

    def _zero(self, name: str, zero: Tensor, held: Held, kind: str) -> Node:
        rows, groups = zero.shape
        assert held.bits is not None
        if held.zero == "real":
            exact = self._constant(
                narrowed(zero, (torch.float16,)),
                _FLOATS[narrowed(zero, (torch.float16,)).dtype],
                [rows, groups, 1],
                f"{name}.zeros",
            )
            return self._op.convert(exact, kind)
        if held.zero == "middle":
            return self._op.convert(
                self._constant(zero[:1, :1].to(torch.uint8), "u8", [1, 1, 1], f"{name}.zeros"), kind
            )
        packed = _packed(zero.to(torch.uint8), held.bits)
        stored = self._constant(packed, _UNSIGNED[held.bits], [rows, groups, 1], f"{name}.zeros")
        return self._op.convert(stored, kind)

    def _floats(self, name: str, tensor: Tensor) -> Node:
        """A tensor in its own dtype, and as float32 in what follows."""
        kind = _FLOATS[tensor.dtype]
        stored = self._constant(tensor, kind, tensor.shape, name)
        return stored if kind == "f32" else self._op.convert(stored, "f32")

    def _constant(self, values: Tensor, kind: str, shape: Any, name: str = "") -> Node:
        """A constant of any type from its bytes."""
        import openvino

        tensor = openvino.Tensor(_type(kind), openvino.Shape(list(shape)))
        raw = values.contiguous().flatten().view(torch.uint8).numpy()
        tensor.data.view("uint8").reshape(-1)[:] = raw
        made = self._op.constant(tensor, shared_memory=False)
        if name:
            made.set_friendly_name(name)
        return made

    def _whole(self, values: int | list[int]) -> Node:
        import numpy as np

        return self._op.constant(np.array(values, dtype=np.int64))

    def _real(self, value: float) -> Node:
        import numpy as np

        return self._op.constant(np.array(value, dtype=np.float32))


def _type(kind: str) -> Any:
    from openvino import Type

    known = (Type.f32, Type.f16, Type.bf16, Type.i32, Type.i64, Type.i4, Type.i8, Type.u2, Type.u4, Type.u8)
    return next(each for each in known if each.get_type_name() == kind)


def _packed(codes: UInt8[Tensor, "*shape"], bits: int) -> UInt8[Tensor, " bytes"]:
    """Codes of 2, 4 or 8 bits into bytes without a gap, the first one lowest."""
    return pack_bits(codes.reshape(1, -1), bits)[0]
