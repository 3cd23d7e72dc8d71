"""Recipe files and presets, as plain data."""

from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from decoct.recipe.checks import RecipeError, nearest


def presets() -> dict[str, str]:
    """Names of the recipes that come with decoct, and what each is for."""
    folder = resources.files("decoct") / "recipes"
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".yaml")), key=lambda f: f.name)
    return {f.name.removesuffix(".yaml"): str(yaml.safe_load(f.read_text(encoding="utf-8"))["about"]) for f in files}


def read_recipe(source: str | Path) -> dict[str, Any]:
    """A preset by name, whatever lies in the current folder, or a recipe file, as plain data.

    Raises:
        RecipeError: there is no such file or preset, it is not YAML, or a key stands twice.
    """
    path = Path(source)
    preset = resources.files("decoct") / "recipes" / f"{path.name}.yaml"
    if str(source) == path.name and preset.is_file():
        text = preset.read_text(encoding="utf-8")
    elif path.suffix in (".yaml", ".yml") or path.exists():
        if not path.exists():
            raise RecipeError(f"recipe {path} does not exist")
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError) as error:
            raise RecipeError(f"{path} cannot be read as a recipe ({error})") from None
    else:
        raise RecipeError(f"no preset or recipe file {str(source)!r}{nearest(str(source), presets())}")
    try:
        _check_keys_differ(yaml.compose(text, Loader=yaml.SafeLoader), source)
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{source} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(value, dict):
        raise RecipeError(f"{source} is no recipe: it must be a mapping with the key stages")
    return value


def _check_keys_differ(root: yaml.Node | None, source: str | Path) -> None:
    """Refuse a key that stands twice in one mapping: YAML would take the last one and drop the others silently."""
    left, seen = [root], set[int]()
    while left:
        node = left.pop()
        if node is None or id(node) in seen:  # an alias may lead back to what it stands in
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            left += node.value
        elif isinstance(node, yaml.MappingNode):
            keys = set[str]()
            for key, inner in node.value:
                if isinstance(key, yaml.ScalarNode) and key.value in keys:
                    line = key.start_mark.line + 1
                    raise RecipeError(f"{source} line {line}: the key {key.value!r} stands twice; keep one of them")
                keys |= {key.value} if isinstance(key, yaml.ScalarNode) else set()
                left.append(inner)
