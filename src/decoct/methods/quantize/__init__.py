"""Quantization: one file a method."""
