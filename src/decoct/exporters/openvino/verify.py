"""An OpenVINO folder, read back and run by its CPU plugin."""

from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from decoct.exporters.graph_verify import GraphDecoder, run_checks, values_check
from decoct.exporters.held import Codes, Held
from decoct.exporters.in_openvino import GRAPH, OpenVinoDecoder
from decoct.exporters.openvino.write import OpenVinoPlan
from decoct.exporters.report import Check
from decoct.ops.packing import unpack_bits


def verify_openvino(plan: OpenVinoPlan, out: Path, *, load: bool = True) -> tuple[list[Check], str | None]:
    """Everything that can be checked here, and what OpenVINO wrote: inputs of packed matrices not rounded."""
    reader = OpenVinoReader(out)
    values = values_check(plan.model, plan.held, reader)
    if not load:
        return [values, Check("load", ok=None, detail="left out as asked")], None

    def start(context: int) -> tuple[str, GraphDecoder]:
        return "OpenVINO, CPU", OpenVinoDecoder(out, context=context, rounded=False)

    checks, text = run_checks(plan.model, plan.held, reader, out, start, nearly=False)
    return [values, *checks], text


class OpenVinoReader:
    """What was written, as OpenVINO reads it."""

    def __init__(self, out: Path) -> None:
        """Open the graph; its constants are mapped into memory."""
        import openvino

        whole = openvino.Core().read_model(out / GRAPH)
        self._found: dict[str, Any] = {
            node.get_friendly_name(): node for node in whole.get_ops() if node.get_type_name() == "Constant"
        }

    def floats(self, name: str) -> Tensor:
        """A tensor that is no code, in float32."""
        node = self._found[name]
        dtype = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[_kind(node)]
        return _bytes(node).view(dtype).reshape(tuple(node.shape)).float()

    def codes(self, name: str, held: Held) -> Codes:
        """A matrix of codes."""
        assert held.bits is not None
        stored, scale = self._found[f"{name}.codes"], self.floats(f"{name}.scales").squeeze(-1)
        shape, middle = tuple(stored.shape), 2 ** (held.bits - 1)
        codes = _unpacked(stored, held.bits).reshape(shape)
        if _kind(stored).startswith("i"):  # two's complement
            return Codes(codes ^ middle, scale, torch.full_like(scale, middle))
        if held.zero == "real":
            return Codes(codes, scale, self.floats(f"{name}.zeros").squeeze(-1))
        zeros = self._found[f"{name}.zeros"]
        bits = 8 if held.zero == "middle" else held.bits
        return Codes(codes, scale, _unpacked(zeros, bits).reshape(tuple(zeros.shape)[:-1]).float().expand_as(scale))


def _kind(node: Any) -> str:
    return str(node.get_element_type().get_type_name())


def _bytes(node: Any) -> Tensor:
    return torch.from_numpy(node.data.view("uint8").reshape(-1).copy())


def _unpacked(node: Any, bits: int) -> Tensor:
    """Codes of a constant, one after another."""
    count = prod(tuple(node.shape))
    return unpack_bits(_bytes(node).unsqueeze(0), bits, count)[0]
