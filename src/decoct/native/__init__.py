"""The compiled kernels: their C++ sources, the library built of them, and attention, which every layer may use."""

from decoct.native.attention import attend
from decoct.native.library import library

__all__ = ["attend", "library"]
