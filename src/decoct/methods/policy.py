"""A key-value cache policy as decoct.json holds it: the method's settings, and what it learned for each block."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from decoct.methods import METHODS, CacheMethod
from decoct.model import CACHE_VERSION, Model

_POLICIES = {name: cls for name, cls in METHODS.items() if issubclass(cls, CacheMethod)}

Learned = tuple[dict[str, Tensor], ...]
"""What a policy learned from calibration, for each block; empty if it learns nothing."""


@dataclass(frozen=True, slots=True)
class Policy:
    """A method, and what it learned.

    Attributes:
        method: how keys and values are kept.
        learned: float32 tensors by name, for each block.
    """

    method: CacheMethod
    learned: Learned = ()

    def of_block(self, block: int) -> dict[str, Tensor]:
        """What was learned for one block."""
        return self.learned[block] if self.learned else {}


def policy_name(method: CacheMethod) -> str:
    """As recipes call it."""
    return next(name for name, cls in METHODS.items() if type(method) is cls)


def policy_settings(method: CacheMethod) -> dict[str, Any]:
    """All of its settings, as recipes spell them."""
    return {policy_name(method): asdict(method)}


def describe_policy(method: CacheMethod, learned: Sequence[Mapping[str, Tensor]]) -> dict[str, Any]:
    """JSON for decoct.json; float32 numbers survive it bit for bit."""
    blocks = [{key: tensor.tolist() for key, tensor in each.items()} for each in learned]
    return {"format_version": CACHE_VERSION, "policy": policy_settings(method), "learned": blocks}


def read_policy(model: Model) -> Policy | None:
    """The policy that was saved with a model; None: it has none.

    Raises:
        ValueError: it is damaged.
    """
    if model.cache is None:
        return None
    try:
        ((name, settings),) = model.cache["policy"].items()
        cls = _POLICIES[name]
        method = cls(**{**cls.before, **settings})
        learned = tuple({key: torch.tensor(value) for key, value in each.items()} for each in model.cache["learned"])
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ValueError(
            f"{model.source.label} has a damaged key-value cache policy in decoct.json; write it again"
        ) from None
    expected = model.num_blocks if method.learns else 0
    if len(learned) != expected:
        raise ValueError(f"{model.source.label}: its key-value cache policy is for another model; write it again")
    return Policy(method, learned)
