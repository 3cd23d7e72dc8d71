"""Measuring by the field's own protocols; every figure names its protocol."""

from decoct.evaluation.measure import Measurement, append_measurement, evaluate_model

__all__ = ["Measurement", "append_measurement", "evaluate_model"]
