"""Recipes: YAML or Python data in, stages out; and back."""

from decoct.recipe.change import with_settings
from decoct.recipe.checks import RecipeError
from decoct.recipe.parse import Recipe, build_method, parse_recipe
from decoct.recipe.read import presets, read_recipe
from decoct.recipe.spell import method_settings
from decoct.recipe.write import recipe_text, with_rules

__all__ = [
    "Recipe",
    "RecipeError",
    "build_method",
    "method_settings",
    "parse_recipe",
    "presets",
    "read_recipe",
    "recipe_text",
    "with_rules",
    "with_settings",
]
