"""An ONNX folder, read back with the onnx package and run in onnxruntime."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from decoct.exporters.graph_verify import GraphDecoder, run_checks, values_check
from decoct.exporters.held import Codes, Held
from decoct.exporters.in_onnxruntime import HINT, OnnxDecoder
from decoct.exporters.onnx.write import GRAPH, VARIANTS, OnnxPlan
from decoct.exporters.report import Check
from decoct.ops.packing import unpack_bits


def verify_onnx(plan: OnnxPlan, out: Path, *, load: bool = True) -> tuple[list[Check], str | None]:
    """Everything that can be checked here, and what onnxruntime wrote."""
    reader = OnnxReader(out)
    values = values_check(plan.model, plan.held, reader)
    if not load or find_spec("onnxruntime") is None:
        return [values, Check("load", ok=None, detail=HINT if load else "left out as asked")], None

    def start(context: int) -> tuple[str, GraphDecoder]:
        return "onnxruntime", OnnxDecoder(out, context=context)

    rounded = plan.level == VARIANTS["rounded"] and any(held.bits is not None for held in plan.held.values())
    checks, text = run_checks(plan.model, plan.held, reader, out, start, nearly=rounded)
    return [values, *checks], text


class OnnxReader:
    """What was written, as the onnx package reads it."""

    def __init__(self, out: Path) -> None:
        """Open the graph; tensors are read when they are asked for."""
        import onnx

        self._out = out
        graph = onnx.load(out / GRAPH, load_external_data=False).graph
        self._found = {each.name: each for each in graph.initializer}

    def floats(self, name: str) -> Tensor:
        """A tensor that is no code, in float32."""
        return self._tensor(name).float()

    def codes(self, name: str, held: Held) -> Codes:
        """A matrix of codes."""
        assert held.bits is not None
        packed = self._tensor(f"{name}.codes")
        rows, groups, _ = packed.shape
        codes = unpack_bits(packed.reshape(rows, -1), held.bits, groups * held.group)
        zero = torch.full((rows, groups), 2.0 ** (held.bits - 1))
        if held.zero != "middle":
            zero = self._tensor(f"{name}.zeros")
            zero = zero if held.zero == "real" else unpack_bits(zero, held.bits, groups).float()
        return Codes(codes.reshape(rows, groups, held.group), self.floats(f"{name}.scales"), zero)

    def _tensor(self, name: str) -> Tensor:
        from onnx import TensorProto
        from onnx.numpy_helper import to_array

        proto: Any = self._found[name]
        array = to_array(proto, base_dir=str(self._out))
        if proto.data_type == TensorProto.BFLOAT16:
            return torch.from_numpy(array.view("int16").copy()).view(torch.bfloat16)
        return torch.from_numpy(array.copy())
