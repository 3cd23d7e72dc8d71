"""The base model's last hidden states, kept in a file: a base that many models are compared with runs once."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from decoct.engine.data import tokens_digest
from decoct.model import Model
from decoct.store import open_safetensors, save_safetensors
from decoct.version import __version__

_NAME = "hidden"


@dataclass(frozen=True, slots=True)
class BaseStates:
    """Where the hidden states that a base model's head reads lie, or will lie, for one text.

    The head itself runs again each time: its logits would take many times the space.

    Attributes:
        path: the file; its name tells everything that the states depend on.
        shape: (windows, tokens in a window, hidden).
        dtype: theirs.
    """

    path: Path
    shape: tuple[int, int, int]
    dtype: torch.dtype

    @classmethod
    def of(cls, base: Model, tokens: Int[Tensor, "windows length"], dtype: torch.dtype, folder: Path) -> "BaseStates":
        """Those of a base on these windows, in a folder for states of any base and text."""
        depends = {
            "base": base.source.fingerprint(), "config": base.config, "cache": base.cache, "dtype": str(dtype),
            "tokens": tokens_digest(tokens), "decoct": __version__, "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        }  # fmt: skip
        digest = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:16]
        hidden = base.shape(base.family.embed)[1]
        return cls(folder / f"base-{digest}.safetensors", (*tokens.shape, hidden), dtype)

    def read(self) -> Float[Tensor, "windows length hidden"] | None:
        """The states; None if there is no such file.

        Raises:
            ValueError: the file is damaged.
        """
        if not self.path.exists():
            return None
        found = open_safetensors(self.path)
        info = found.tensors.get(_NAME)
        if info is None or (info.shape, info.dtype) != (self.shape, self.dtype):
            raise ValueError(f"{self.path} does not hold the states that its name promises; delete it")
        return found.read(_NAME)

    def write(self, states: Float[Tensor, "windows length hidden"]) -> None:
        """Keep them, atomically."""
        save_safetensors(self.path, {_NAME: states})
