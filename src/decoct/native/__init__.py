"""The compiled kernels: their C++ sources, the library built of them, and attention, which every layer may use."""

from decoct.native.attention import attend

__all__ = ["attend"]
