"""GGUF, the format of llama.cpp, Ollama and LM Studio: our integers as they are, wherever it holds them."""

from decoct.exporters.gguf.choose import VARIANTS
from decoct.exporters.gguf.verify import verify_gguf
from decoct.exporters.gguf.write import plan_gguf, write_gguf

__all__ = ["VARIANTS", "plan_gguf", "verify_gguf", "write_gguf"]
