"""Keys and values rounded while a model is trained (LLM-QAT, arXiv 2305.17888), as a policy rounds them in use."""

from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor
from typing_extensions import override

from decoct.engine.runner import Runner
from decoct.losses import AttentionMaps
from decoct.methods import METHODS, CacheMethod
from decoct.methods.policy import Policy, read_policy
from decoct.methods.training import TrainingMethod
from decoct.model import Model
from decoct.runtime.cache import KeyValues, WholeWindow, places
from decoct.training.objective import Objective


class StraightThrough(WholeWindow):
    """Gives attention what each token would find in the cache; gradients pass as if nothing had been rounded."""

    @override
    def there_and_back(self, keys: Tensor, values: Tensor) -> KeyValues:
        with torch.no_grad():
            back_keys, back_values = super().there_and_back(keys, values)
        return keys + (back_keys - keys).detach(), values + (back_values - values).detach()


def policy_of(method: TrainingMethod, model: Model) -> Policy | None:
    """How keys and values are kept while training: as the settings say, else as the model's own policy does; or not.

    Raises:
        ValueError: no such policy, a wrong setting, or one that has to learn first.
    """
    if method.cache is None:
        return read_policy(model)
    if len(method.cache) != 1:
        raise ValueError(f"cache names one policy, such as {{kivi: {{bits: 4}}}}, not {method.cache!r}")
    ((name, settings),) = method.cache.items()
    known = [each for each, cls in METHODS.items() if issubclass(cls, CacheMethod)]
    if name not in known:
        raise ValueError(f"cache: {name!r} is no policy for keys and values; known: {', '.join(known)}")
    policy = _built(name, settings)
    if policy.learns:
        raise ValueError(f"cache: {name} learns from calibration first; to train with, take one that does not, as kivi")
    return Policy(policy)


def _built(name: str, settings: Any) -> CacheMethod:
    try:
        found = TypeAdapter(METHODS[name]).validate_python(settings or {})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(["cache", name, *(str(part) for part in first["loc"])])
        raise ValueError(f"{where}: {first['msg'].removeprefix('Value error, ')}") from None
    assert isinstance(found, CacheMethod)
    return found


def check_policy(policy: Policy | None, objective: Objective, model: Model) -> None:
    """Refuse a policy that does not fit the model, or what is learned.

    Raises:
        ValueError: its groups do not fit the heads, or attention maps are compared, which have other columns then.
    """
    if policy is None:
        return
    if any(isinstance(loss, AttentionMaps) for _, loss in objective.inner):
        raise ValueError("attention_maps compares attention to keys as they are; leave it out, or the policy for keys")
    channels = model.family.head_size(model.config)
    for place in places(policy, Runner(model, torch.float32).attentions()):
        policy.method.check(channels, place)
