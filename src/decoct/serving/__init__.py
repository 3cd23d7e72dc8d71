"""Text from models: engines that write it, sequences that share one network, and a server."""

from decoct.serving.engine import Engine, Generation, Options
from decoct.serving.engines import ENGINES, open_engine

__all__ = ["ENGINES", "Engine", "Generation", "Options", "open_engine"]
