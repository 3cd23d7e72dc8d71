"""decoct boils large language models down until they fit the device at hand."""

from decoct.version import __version__

__all__ = ["__version__"]
