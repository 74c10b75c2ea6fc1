"""Which reward a card is made of: one of a recipe, by its name there, or a component with its options."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from velatura.core.build import build
from velatura.core.cards.card import Subject
from velatura.core.cards.identity import identity_of
from velatura.core.components import RewardModel
from velatura.core.errors import RecipeError, suggest
from velatura.core.pipeline import Plan
from velatura.core.recipe import RewardRef
from velatura.core.served import context_of, recipe_context, reference, set_up_reward


def subject_of_recipe(plan: Plan, name: str | None, stage: str | None, device: str | None) -> Subject:
    """A reward of a recipe; without a name the only one that needs a card, or the only one there is.

    Raises:
        RecipeError: there is none of this name, several, or two that differ.
    """
    found = _rewards(plan, stage)
    if name is None:
        wanted = [label for label, ref in found.items() if _needs_card(plan, ref)] or list(found)
        if len(wanted) != 1:
            raise RecipeError(f"which reward? Give --reward with one of: {', '.join(wanted)}")
        name = wanted[0]
    if name not in found:
        raise RecipeError(f"the recipe has no reward called {name!r}.{suggest(name, found)}")
    ref = found[name].opened(plan.folder)
    served = set_up_reward(plan.registry, ref, name, recipe_context(plan, device))
    return Subject(served=served, identity=identity_of(plan.registry, ref, plan.base))


def subject_by_name(
    name: str, settings: Sequence[str], files: Sequence[str], device: str | None, label: str
) -> Subject:  # fmt: skip
    """A component with its options as `path=value`.

    Raises:
        VelaturaError: there is none of this name, or an option is wrong.
    """
    registry, ref = reference(name, settings, files)
    served = set_up_reward(registry, ref, label, context_of(device or "auto", Path.cwd(), 0))
    return Subject(served=served, identity=identity_of(registry, ref, Path.cwd()))


def _rewards(plan: Plan, stage: str | None) -> dict[str, RewardRef]:
    """Label -> reward, of all stages or of one."""
    if stage is not None:
        plan.recipe.stage(stage)
    found: dict[str, tuple[RewardRef, str]] = {}
    for (_, where, *_), kind, ref in plan.recipe.references():
        if kind != "reward" or not isinstance(ref, RewardRef) or stage not in (None, where):
            continue
        known, first = found.setdefault(ref.label, (ref, str(where)))
        if (known.use, known.given) != (ref.use, ref.given):
            raise RecipeError(
                f"stages '{first}' and '{where}' have different rewards called {ref.label!r}. Say which is meant: "
                f"--stage {first}"
            )
    if not found:
        raise RecipeError("the recipe has no rewards")
    return {label: ref for label, (ref, _) in found.items()}


def _needs_card(plan: Plan, ref: RewardRef) -> bool:
    model = build(plan.registry, "reward", ref)
    return isinstance(model, RewardModel) and model.needs_card()
