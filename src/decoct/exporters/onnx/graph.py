"""An ONNX graph under construction: nodes and small tensors in memory, large ones in a file beside it."""

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

if TYPE_CHECKING:
    from onnx import ModelProto

CONTRIB = "com.microsoft"
"""The domain of onnxruntime's own operators."""

OPSET, IR_VERSION = 21, 10
_INSIDE = 1024  # bytes: larger tensors go into the file beside the graph
_ALIGNED = 4096  # bytes: so that tensors can be mapped into memory

_TYPES = {torch.float32: "FLOAT", torch.float16: "FLOAT16", torch.bfloat16: "BFLOAT16", torch.uint8: "UINT8",
          torch.int64: "INT64", torch.int32: "INT32"}  # fmt: skip


class OnnxGraph:
    """Collects a graph. Use it in a `with` statement, which closes the file of large tensors."""

    def __init__(self, data: Path, location: str) -> None:
        """Begin.

        Args:
            data: where large tensors are written.
            location: the name under which the graph will find them.
        """
        self._data, self._location = data.open("wb"), location
        self._nodes: list[Any] = []
        self._initializers: dict[str, Any] = {}
        self._floats: dict[str, str] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._data.close()

    def node(
        self,
        op: str,
        inputs: Sequence[str],
        name: str,
        *,
        domain: str = "",
        more: Sequence[str] = (),
        **attributes: Any,
    ) -> str:
        """Add an operator; gives its output, which is called as it is. `more`: names of further outputs."""
        from onnx import helper

        made = helper.make_node(op, list(inputs), [name, *more], name=name, domain=domain, **attributes)
        self._nodes.append(made)
        return name

    def constant(self, name: str, tensor: Tensor) -> str:
        """A tensor as it is; the same name is the same tensor."""
        from onnx import TensorProto

        if name not in self._initializers:
            proto = TensorProto(name=name, dims=list(tensor.shape), data_type=_onnx_type(tensor.dtype))
            raw = tensor.contiguous().flatten().view(torch.uint8).numpy()
            if raw.nbytes <= _INSIDE:
                proto.raw_data = raw.tobytes()
            else:
                self._data.write(bytes(-self._data.tell() % _ALIGNED))
                self._point(proto, raw.nbytes)
                self._data.write(raw.data)
            self._initializers[name] = proto
        return name

    def view(self, name: str, of: str, shape: Sequence[int]) -> str:
        """Another tensor of the same bytes in another shape: they lie in the file once."""
        from onnx import TensorProto

        proto = TensorProto()
        proto.CopyFrom(self._initializers[of])
        proto.name = name
        del proto.dims[:]
        proto.dims.extend(shape)
        self._initializers[name] = proto
        return name

    def floats(self, name: str, tensor: Tensor) -> str:
        """A tensor in its own dtype, and as float32 in what follows; onnxruntime converts it once, while loading."""
        if tensor.dtype == torch.float32:
            return self.constant(name, tensor)
        if name not in self._floats:
            stored = self.constant(name, tensor)
            self._floats[name] = self.node("Cast", [stored], f"{name}/float", to=_onnx_type(torch.float32))
        return self._floats[name]

    def model(
        self, inputs: dict[str, tuple[str, list[str | int]]], outputs: dict[str, list[str | int]]
    ) -> "ModelProto":
        """The whole, with the inputs' types and shapes, and the shapes of outputs, which are float32."""
        from onnx import TensorProto, helper

        graph = helper.make_graph(
            self._nodes,
            "decoder",
            [helper.make_tensor_value_info(n, TensorProto.DataType.Value(t), s) for n, (t, s) in inputs.items()],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()],
            list(self._initializers.values()),
        )
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="decoct")

    def _point(self, proto: Any, length: int) -> None:
        """Say where in the file a tensor will lie."""
        from onnx import TensorProto

        proto.data_location = TensorProto.EXTERNAL
        for key, value in (("location", self._location), ("offset", self._data.tell()), ("length", length)):
            proto.external_data.add(key=key, value=str(value))


def _onnx_type(dtype: torch.dtype) -> int:
    from onnx import TensorProto

    return int(TensorProto.DataType.Value(_TYPES[dtype]))
