"""Which methods are stages that this layer brings, and what runs them."""

from typing import Any

from decoct.engine.stages import OwnStage
from decoct.methods import AnyMethod
from decoct.methods.heal.adapter import Adapter
from decoct.methods.training import TrainingMethod
from decoct.training.adapt import AdaptStage
from decoct.training.stage import TrainStage


def own_stage(method: AnyMethod, settings: dict[str, Any]) -> OwnStage | None:
    """The stage of a method; None: the engine has one for it.

    Args:
        method: settings.
        settings: the stage as the recipe spells it.
    """
    match method:
        case TrainingMethod():
            return TrainStage(method, settings)
        case Adapter():
            return AdaptStage(method, settings)
    return None
