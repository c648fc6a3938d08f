"""Recipes: YAML files whose keys are the flags' names."""

import difflib
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import yaml

from ..errors import UsageError
from ..files import shipped


def recipe_path(name: str | Path) -> Path:
    """The file of a recipe: the path itself, or, if there is no such file, the recipe of that name in this package."""
    return shipped(name, ".yaml")


def read_recipe(path: str | Path, known_keys: Collection[str]) -> dict[str, Any]:
    """Read a YAML recipe, whose keys are the flags' names. ``path`` may be the name of one of the package's recipes.

    Returns a dict. Raises ``UsageError`` naming the file and, for an unknown key, the nearest known one.
    """
    try:
        recipe = yaml.safe_load(recipe_path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"`config` {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"`config` {path}: not YAML: {' '.join(str(error).split())}") from error
    if recipe is None:
        return {}
    if not isinstance(recipe, dict):
        raise UsageError(f"`config` {path}: expected 'flag: value' lines, found a {type(recipe).__name__}")
    check_keys(recipe, known_keys, f"`config` {path}")
    return recipe


def check_keys(given: Iterable, known: Collection, where: str) -> None:
    """Raise ``UsageError`` for the first of ``given`` that is not among ``known``, naming the nearest known one."""
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), map(str, known), n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise UsageError(f"{where}: unknown key '{key}'{hint}")
