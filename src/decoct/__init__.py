"""decoct boils large language models down until they fit the device at hand.

>>> import decoct
>>> decoct.compress("Qwen/Qwen3-0.6B", "w4", "qwen3-w4")  # doctest: +SKIP
>>> decoct.evaluate("qwen3-w4", against="Qwen/Qwen3-0.6B", text="wiki.test.raw")  # doctest: +SKIP
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from decoct.version import __version__

if TYPE_CHECKING:
    from decoct.api import compress, evaluate, export, inspect, load_recipe, plan, plan_search
    from decoct.engine.job import Watch
    from decoct.hf import load
    from decoct.methods import METHODS
    from decoct.model import open_model
    from decoct.runtime.sampling import Sampling
    from decoct.serving.generate import generate

_WHERE = {
    **dict.fromkeys(["compress", "evaluate", "export", "inspect", "load_recipe", "plan", "plan_search"], "decoct.api"),
    "METHODS": "decoct.methods",
    "Sampling": "decoct.runtime.sampling",
    "generate": "decoct.serving.generate",
    "load": "decoct.hf",
    "open_model": "decoct.model",
    "Watch": "decoct.engine.job",
}

__all__ = [
    "METHODS",
    "Sampling",
    "Watch",
    "__version__",
    "compress",
    "evaluate",
    "export",
    "generate",
    "inspect",
    "load",
    "load_recipe",
    "open_model",
    "plan",
    "plan_search",
]


def __getattr__(name: str) -> Any:
    """Load what is used when it is used: `import decoct` alone takes milliseconds."""
    if name not in _WHERE:
        raise AttributeError(f"module 'decoct' has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), name)
