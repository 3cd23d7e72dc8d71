"""Distillation (arXiv 1503.02531): train what a compressed model stores to predict as its teacher does."""

from dataclasses import dataclass

from decoct.methods.training import TrainingMethod


@dataclass(frozen=True, slots=True, kw_only=True)
class Distill(TrainingMethod):
    """Heals a model: everything that it stores may be trained, in the form in which it is stored.

    A stage of its own in a recipe, anywhere among the others. Codes, masks, ranks and shapes stay as they are, and so
    does the size. By default the teacher is the model that the recipe begins with: nothing else is needed. The whole
    model, its teacher and the optimizer's state must fit in memory.
    """
