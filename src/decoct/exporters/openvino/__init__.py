"""OpenVINO's IR: our integers as compressed constants, in a graph that is written node by node."""

from decoct.exporters.openvino.verify import verify_openvino
from decoct.exporters.openvino.write import plan_openvino, write_openvino

__all__ = ["plan_openvino", "verify_openvino", "write_openvino"]
