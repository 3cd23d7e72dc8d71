"""What a teacher is, and what tells one from another."""

import hashlib
import json
from typing import Protocol

import torch
from jaxtyping import Int
from torch import Tensor

from decoct.losses import Targets
from decoct.model import Model
from decoct.version import __version__


class Teach(Protocol):
    """A teacher: from tokens to what it predicts after each of them, sequences one after another."""

    def __call__(self, tokens: Int[Tensor, "batch length"], /) -> Targets:
        """Predictions for batch · length rows."""


def identity(model: Model, dtype: torch.dtype) -> str:
    """Identifies a model's predictions: its files, its config, the dtype it runs in, and this version."""
    depends = {
        "source": model.source.fingerprint(), "config": model.config, "dtype": str(dtype), "decoct": __version__,
    }  # fmt: skip
    return hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()
