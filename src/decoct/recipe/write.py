"""Recipes as they are written: with the rules that a search found, as YAML."""

from dataclasses import replace
from typing import Any

import yaml

from decoct.engine.rules import Rule
from decoct.engine.stages import BlocksStage
from decoct.recipe.parse import Recipe
from decoct.recipe.spell import step_settings


def with_rules(recipe: Recipe, stage: int, step: int, rules: tuple[Rule, ...]) -> Recipe:
    """The same recipe with other rules in one of its steps, and nothing left to search.

    Args:
        recipe: whose stage of this number streams the blocks.
        stage: its number.
        step: the step's number in it.
        rules: in order.
    """
    old = recipe.stages[stage]
    assert isinstance(old, BlocksStage)
    steps = (*old.steps[:step], rules, *old.steps[step + 1 :])
    new = BlocksStage(steps, {"blocks": [step_settings(each) for each in steps]})
    return replace(recipe, stages=(*recipe.stages[:stage], new, *recipe.stages[stage + 1 :]), search=None)


def recipe_text(recipe: Recipe, about: str) -> str:
    """A recipe as YAML that `read_recipe` reads back, every setting stated.

    Args:
        recipe: to write.
        about: one sentence for people.
    """
    budget = {key: value for key, value in recipe.budget.model_dump(mode="json").items() if value is not None}
    value: dict[str, Any] = {"about": about, "data": recipe.data.model_dump(mode="json")}
    value |= {"budget": budget} if budget else {}
    value["stages"] = [stage.description for stage in recipe.stages]
    value |= {"search": recipe.search.model_dump(mode="json")} if recipe.search is not None else {}
    value |= {"export": list(recipe.export)} if recipe.export else {}
    return yaml.safe_dump(value, sort_keys=False, default_flow_style=None, width=118, allow_unicode=True)
