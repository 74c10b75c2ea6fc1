"""Which models an evaluation measures on which prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import islice

from velatura.core.errors import RecipeError
from velatura.core.recipe import Recipe, Ref
from velatura.core.types import Prompt

LOOK = 64
"""Prompts of a task that are looked at to see what it holds."""

Look = Callable[[Ref, str], Sequence[Prompt]]
"""Task, split ("train" or "eval") -> its prompts."""


def kinds_of(prompts: Sequence[Prompt]) -> frozenset[str]:
    """The `task`s of the first prompts: t2i, edit, or both."""
    return frozenset(prompt.task for prompt in islice(prompts, LOOK))


def routes_of_models(
    recipe: Recipe, name: str, prompts: Mapping[str, Sequence[Prompt]], look: Look
) -> dict[str, list[str]]:
    """Model of the evaluate stage `name` -> those of the routes in `prompts` that it was made for.

    What was trained on prompts is measured on routes of the same kind of prompts; the base, what a supervised stage
    made of it, and with `cross_task` everything else too, on every route.

    Raises:
        RecipeError: there is nothing to evaluate on, or no route for a model.
    """
    place = recipe.at(("stages", name, "tasks"))
    if not prompts:
        raise RecipeError(
            f"{place}: no stage of the recipe has a task to evaluate on. Give this stage its own, as in "
            f"tasks: {{t2i: prompts}}."
        )
    for route, own in prompts.items():
        if not own:
            raise RecipeError(f"{place}: the task of route '{route}' has no prompt to evaluate on. Give it some.")
    stage = recipe.stage(name)
    known = {route: kinds_of(own) for route, own in prompts.items()}
    found: dict[str, list[str]] = {}
    for model in stage.models:  # type: ignore[union-attr]
        learnt = frozenset[str]() if stage.cross_task else _learnt(recipe, model, look)  # type: ignore[union-attr]
        found[model] = [route for route, kinds in known.items() if not learnt or learnt & kinds]
        if not found[model]:
            there = ", ".join(f"{route} ({', '.join(sorted(kinds))})" for route, kinds in known.items())
            raise RecipeError(
                f"{place}: '{model}' was trained on prompts of kind {', '.join(sorted(learnt))}, and no route of this "
                f"stage has any. There is: {there}. Add a task of that kind to 'tasks', take '{model}' out of "
                f"'models', or set cross_task: true."
            )
    return found


def _learnt(recipe: Recipe, model: str, look: Look) -> frozenset[str]:
    """The kinds of prompts that a model was trained on, where that limits what it is for; empty where not."""
    if model == "base" or recipe.stage(model).stage not in ("rl", "distill"):
        return frozenset()
    return frozenset[str]().union(*(kinds_of(look(ref, "train")) for ref in recipe.tasks_of(model).values()))
