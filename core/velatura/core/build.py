"""From references to objects: find the class, check the options, make the component."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pydantic import ValidationError

from velatura.core.base_settings import Ref
from velatura.core.components import Component, Options
from velatura.core.errors import PluginError, RecipeError, VelaturaError, prefixed
from velatura.core.explain import complaints
from velatura.core.recipe import Recipe
from velatura.core.registry import Registry
from velatura.core.source import Location


def build(registry: Registry, kind: str, ref: Ref, at: str = "") -> Component[Any]:
    """The component that `ref` asks for; `at` is its place in the recipe, for messages."""
    component = registry.get(kind, ref.use, at)
    return component(options(component, ref, at))


def options(
    component: type[Component[Any]], ref: Ref, at: str = "", line: Callable[[Location], int | None] | None = None
) -> Options:
    """The options of a component, checked, defaults filled in; `line` knows where an option was written."""
    wrong = prefixed(at, f"options of {ref.use!r} are wrong:")
    try:
        return component.options_class.model_validate(ref.given, context=prefixed(at, repr(ref.use)))
    except VelaturaError as error:
        raise RecipeError(f"{wrong}\n  {error}") from error
    except ValidationError as error:
        lines = [
            f"  {_line(line, location)}{'.'.join(str(part) for part in location) or 'all together'}: {message}"
            for location, message in complaints(error, component.options_class, "option")
        ]
        raise RecipeError("\n".join([wrong, *lines])) from error


def _line(line: Callable[[Location], int | None] | None, option: Location) -> str:
    """`line 12: ` of an option, where it is known."""
    number = line(option) if line is not None and option else None
    return "" if number is None else f"line {number}: "


def open_registry(recipe: Recipe) -> Registry:
    """Everything installed, and the plugin files that the recipe names."""
    registry = Registry.discover()
    for index, plugin in enumerate(recipe.plugins):
        try:
            registry.add_file(recipe.folder / plugin)
        except PluginError as error:
            said = f"{error} A path under 'plugins' starts at the folder of the recipe."
            raise PluginError(prefixed(recipe.at(("plugins", index)), said)) from error
    return registry


def _lines_below(recipe: Recipe, slot: Location) -> Callable[[Location], int | None]:
    """Lines of the options in a slot, those left out that stand on the slot's own line."""

    def line(option: Location) -> int | None:
        found = recipe.line_of((*slot, "with", *option))
        return None if found == recipe.line_of(slot) else found

    return line


def resolve_options(registry: Registry, recipe: Recipe) -> dict[str, Any]:
    """The resolved recipe with the defaults of every component's options filled in too.

    Every reference of every stage is looked up and its options are checked; all that is wrong is said at once.
    """
    resolved = recipe.resolved()
    found: dict[str, VelaturaError] = {}
    for location, kind, ref in recipe.references():
        try:
            at = recipe.at(location)
            component = registry.get(kind, ref.use, at)
            checked = options(component, ref, at, _lines_below(recipe, location))
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
