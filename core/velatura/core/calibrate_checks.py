"""What can be known of calibrated rewards before anything runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from velatura.core.build import build
from velatura.core.calibrate_settings import DEFAULT
from velatura.core.components import AdvantageEstimator
from velatura.core.errors import RecipeError, prefixed, suggest
from velatura.core.recipe import Recipe, Ref
from velatura.core.registry import Registry

CategoriesOf = Callable[[Ref], frozenset[str]]
"""Task -> categories of its first train prompts."""


def check_weights(recipe: Recipe, registry: Registry, name: str, categories: CategoriesOf) -> None:
    """Budgets cover what is drawn, calibrated weights what is trained on, and the advantage suits its rewards.

    Raises:
        RecipeError: one does not.
    """
    stage: Any = recipe.stage(name)
    task = recipe.task_of(name)
    there = categories(task) if task is not None else frozenset[str]()
    if stage.stage == "calibrate":
        _check_budgets(recipe, name, stage, there)
        return
    if stage.stage == "rl":
        _check_advantage(recipe, registry, name, stage)
    if stage.weights_from is not None:
        source = recipe.task_of(stage.weights_from)
        measured = categories(source) if source is not None else frozenset[str]()
        missing = sorted(there - measured)
        if missing:
            raise RecipeError(
                f"{recipe.at(('stages', name, 'weights_from'))}: '{stage.weights_from}' draws prompts of "
                f"{', '.join(sorted(measured))}, but this stage has prompts of category {', '.join(map(repr, missing))}"
                f", for which there would be no weights. Give both the same task."
            )


def _check_advantage(recipe: Recipe, registry: Registry, name: str, stage: Any) -> None:
    at = recipe.at(("stages", name, "advantage"))
    advantage: AdvantageEstimator[Any] = build(registry, "advantage", stage.advantage, at)  # type: ignore[assignment]
    source: Any = recipe.stage(stage.weights_from) if stage.weights_from is not None else None
    calibrated = [ref.label for ref in source.rewards] if source is not None else []
    weights = {
        ref.label: 1.0 if ref.label in calibrated else max([ref.weight, *ref.weight_by_category.values()])
        for ref in stage.rewards
    }
    complaint = advantage.complaint(weights, calibrated=source is not None)
    if complaint:
        raise RecipeError(prefixed(at, complaint))


def _check_budgets(recipe: Recipe, name: str, stage: Any, there: frozenset[str]) -> None:
    at = recipe.at(("stages", name, "budgets"))
    without = sorted(category for category in there if stage.budget_of(category) is None)
    if without:
        raise RecipeError(
            f"{at}: there are prompts of category {', '.join(map(repr, without))} and no budget for them. Give one, or "
            f"one for '{DEFAULT}'."
        )
    for category in stage.budgets:
        if category not in (*there, DEFAULT):
            place = recipe.at(("stages", name, "budgets", category))
            raise RecipeError(
                f"{place}: none of the first prompts is of category {category!r}.{suggest(category, there)}"
            )
