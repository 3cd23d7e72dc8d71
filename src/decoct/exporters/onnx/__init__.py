"""ONNX, as onnxruntime-genai lays it out: our integers as they are, in a graph that is written node by node."""

from decoct.exporters.onnx.genai import GENAI
from decoct.exporters.onnx.verify import verify_onnx
from decoct.exporters.onnx.write import VARIANTS, plan_onnx, write_onnx

__all__ = ["GENAI", "VARIANTS", "plan_onnx", "verify_onnx", "write_onnx"]
