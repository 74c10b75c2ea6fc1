"""The recipes that come with Velatura, found by name wherever it is installed."""

from __future__ import annotations

from pathlib import Path

import velatura


def find_recipe(given: Path) -> Path:
    """`given` where it exists; else the shipped recipe of that name, with or without folder and ending; else `given`.

    So `tinyworld` and `recipes/tinyworld.yaml` mean the same recipe in a clone, and anywhere else.
    """
    if given.exists():
        return given
    by_name = {path.stem: path for path in shipped_recipes()}
    plain = given.parent in (Path(), Path("recipes")) and given.suffix in ("", ".yaml")
    return by_name.get(given.stem, given) if plain else given


def shipped_recipes() -> list[Path]:
    """Every recipe of the source tree, where the installation is editable, and of the package elsewhere."""
    portions = [Path(portion) for portion in velatura.__path__]
    trees = sorted({portion.parent.parent for portion in portions})
    found = [path for tree in trees if (tree / "pyproject.toml").is_file() for path in _recipes(tree)]
    return found or [path for portion in portions for path in _recipes(portion)]


def _recipes(folder: Path) -> list[Path]:
    return sorted((folder / "recipes").glob("*.yaml"))
