"""Recipes that ship with the package, and reading a recipe from a name or a YAML file.

`edgevlm run scenes-tiny` loads `edgevlm/recipes/scenes-tiny.yaml`; a path to a YAML file works as well. A recipe may
start from another one with `base: <name or path>` and then states only what differs.
"""

from importlib import resources
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from edgevlm.errors import RecipeError, nearest
from edgevlm.recipe import Recipe


def shipped_recipes() -> list[str]:
    """Names of the recipes inside the package."""
    folder = resources.files("edgevlm.recipes")
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_recipe(name: str, overrides: list[str] | None = None) -> Recipe:
    """Load a shipped recipe by name or a YAML file by path, and apply `key.sub=value` overrides.

    Raises:
        RecipeError: no such recipe, unreadable YAML, an unknown key (the nearest one is named) or a wrong value.
    """
    values = _read(name)
    for override in overrides or []:
        apply_override(values, override)
    return parse_recipe(values, name)


def parse_recipe(values: dict[str, Any], source: str) -> Recipe:
    """Validate a recipe given as a dictionary; `source` names it in errors."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as problem:
        raise _explain(problem, source) from problem


def _read(name: str, seen: tuple[str, ...] = ()) -> dict[str, Any]:
    if name in seen:
        raise RecipeError(f"Recipe {name} is its own base ({' -> '.join((*seen, name))})", "Remove one `base:` line")
    path = Path(name)
    if name in shipped_recipes():
        text = (resources.files("edgevlm.recipes") / f"{name}.yaml").read_text()
    elif path.suffix in {".yaml", ".yml"} and path.is_file():
        text = path.read_text()
    else:
        hint = nearest(name, shipped_recipes())
        raise RecipeError(
            f"No recipe '{name}'", f"{hint} Shipped: {', '.join(shipped_recipes())}; or give a .yaml file"
        )
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as problem:
        raise RecipeError(
            f"{name} is not valid YAML ({' '.join(str(problem).split())})", "Mend the line named"
        ) from problem
    if not isinstance(values, dict):
        raise RecipeError(f"{name} does not hold a mapping of keys to values", "See docs/recipes.md")
    if base := values.pop("base", None):
        values = _merge(_read(str(base), (*seen, name)), values)
    return values


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        # A named choice with another name starts afresh, as do ordered tables like rungs.
        fresh = both and (value.get("name", merged[key].get("name")) != merged[key].get("name") or key == "rungs")
        merged[key] = _merge(merged[key], value) if both and not fresh else value
    return merged


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set one `key.sub=value` in a recipe given as a dictionary.

    Raises:
        RecipeError: not of this form, or a parent that is no section.
    """
    dotted, separator, text = override.partition("=")
    if not separator or not dotted:
        raise RecipeError(f"Override '{override}' is not key=value", "Write for example --set teacher.steps=500")
    *parents, last = dotted.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise RecipeError(f"Override '{override}': '{parent}' is not a section", "Check the key's spelling")
    values[last] = yaml.safe_load(text)


def time_budget(target_ms: float | None, target: str | None, precision: str | None) -> list[str]:
    """Overrides that prune extractor and fusion until an image and a question take so long on a target.

    Raises:
        RecipeError: a target or precision without a time.
    """
    if target_ms is None:
        if target or precision:
            raise RecipeError(
                "--target and --precision say where a time is measured, and none is given",
                "Add --target-ms, or choose what is exported with --set export.targets=[...]",
            )
        return []
    values = {"measure": "ms", "target_ms": target_ms, "target": target or "onnx", "precision": precision or "fp32"}
    return ["prune.parts=[vision, fusion]", *(f"prune.{key}={value}" for key, value in values.items())]


def _section_in(annotation: Any) -> Any:
    """The section of a field that may also be None."""
    return next((kind for kind in get_args(annotation) if kind is not type(None)), annotation)


def _explain(problem: ValidationError, source: str) -> RecipeError:
    error = problem.errors()[0]
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        section: Any = Recipe
        for part in error["loc"][:-1]:
            section = _section_in(section.model_fields[str(part)].annotation)
        hint = nearest(str(error["loc"][-1]), section.model_fields)
        known = ", ".join(section.model_fields)
        return RecipeError(f"Unknown key '{where}' in recipe {source}", f"{hint} Known keys here: {known}".strip())
    if error["type"] == "missing":
        return RecipeError(
            f"Recipe {source} lacks '{where}'", "Add the key, or start from a shipped recipe with `base:`"
        )
    if not where:  # a rule about several sections
        return RecipeError(f"Recipe {source}: {error['msg'].removeprefix('Value error, ')}", "Mend one of them")
    return RecipeError(f"Recipe {source}: '{where}' {error['msg'].lower()} (got {error['input']!r})", "Mend the value")
