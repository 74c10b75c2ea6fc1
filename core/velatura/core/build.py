"""From references to objects: find the class, check the options, make the component."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from velatura.core.base_settings import Ref
from velatura.core.components import Component, Options
from velatura.core.errors import PluginError, RecipeError, VelaturaError, prefixed
from velatura.core.explain import complaints
from velatura.core.recipe import Recipe
from velatura.core.registry import Registry


def build(registry: Registry, kind: str, ref: Ref, at: str = "") -> Component[Any]:
    """The component that `ref` asks for; `at` is its place in the recipe, for messages."""
    component = registry.get(kind, ref.use, at)
    return component(options(component, ref, at))


def options(component: type[Component[Any]], ref: Ref, at: str = "") -> Options:
    """The options of a component, checked, defaults filled in."""
    wrong = prefixed(at, f"options of {ref.use!r} are wrong:")
    try:
        return component.options_class.model_validate(ref.given)
    except VelaturaError as error:
        raise RecipeError(f"{wrong}\n  {error}") from error
    except ValidationError as error:
        lines = [
            f"  {'.'.join(str(part) for part in location) or 'all together'}: {message}"
            for location, message in complaints(error, component.options_class, "option")
        ]
        raise RecipeError("\n".join([wrong, *lines])) from error


def open_registry(recipe: Recipe) -> Registry:
    """Everything installed, and the plugin files that the recipe names."""
    registry = Registry.discover()
    for index, plugin in enumerate(recipe.plugins):
        try:
            registry.add_file(recipe.folder / plugin)
        except PluginError as error:
            raise PluginError(prefixed(recipe.at(("plugins", index)), str(error))) from error
    return registry


def resolve_options(registry: Registry, recipe: Recipe) -> dict[str, Any]:
    """The resolved recipe with the defaults of every component's options filled in too.

    Every reference of every stage is looked up and its options are checked; all that is wrong is said at once.
    """
    resolved = recipe.resolved()
    found: dict[str, VelaturaError] = {}
    for location, kind, ref in recipe.references():
        try:
            at = recipe.at(location)
            checked = options(registry.get(kind, ref.use, at), ref, at)
        except VelaturaError as error:
            found.setdefault(str(error), error)
            continue
        place: Any = resolved
        for part in location:
            place = place[part]
        place["with"] = checked.model_dump(mode="json", by_alias=True)
    if len(found) == 1:
        raise next(iter(found.values()))
    if found:
        raise RecipeError("\n".join(found))
    return resolved
