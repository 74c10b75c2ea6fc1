"""Whether what a stage learns by goes with its other slots: objectives, distillers, teachers; nothing is run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from velatura.core.build import build
from velatura.core.components import Distiller, PolicyObjective, TimestepSampler
from velatura.core.errors import RecipeError
from velatura.core.folding import folded_scale
from velatura.core.recipe import Recipe, Ref
from velatura.core.registry import Registry
from velatura.core.seeds import generator
from velatura.core.step_checks import check_noise, check_plans, check_solver
from velatura.core.summed import Summed, objective_of
from velatura.core.types import Prompt, Role

Look = Callable[[Ref], Sequence[Prompt]]
"""The first train prompts of a task."""


def objective_at(recipe: Recipe, registry: Registry, name: str) -> PolicyObjective[Any]:
    """What the stage `name` learns by, with all that is added.

    Raises:
        RecipeError: something is not there, or does not go together.
    """

    def at(place: str) -> str:
        parts = [int(part) if part.isdigit() else part for part in place.split(".")]
        return recipe.at(("stages", name, *parts))

    return objective_of(recipe.stage(name), lambda kind, ref, place: build(registry, kind, ref, at(place)), at)


def check_learning(recipe: Recipe, registry: Registry, name: str, objective: PolicyObjective[Any]) -> None:
    """What an objective declares that it needs, against the other slots of its stage.

    Raises:
        RecipeError: with the nearest valid choice.
    """
    stage: Any = recipe.stage(name)
    check_noise(recipe, registry, name, stage, objective)
    check_solver(recipe, registry, name, stage)
    check_plans(recipe, registry, name, stage, objective)
    _check_anchor(recipe, name, stage, objective)
    needs = objective.requires
    if not needs.several_updates and stage.updates_per_step > 1 and stage.stage == "rl":
        raise RecipeError(
            f"{recipe.at(('stages', name, 'updates_per_step'))}: objective '{objective.name}' takes every sample as "
            f"one of the current policy, which holds for the first of the {stage.updates_per_step} updates of a round "
            f"only. Set updates_per_step to 1, or take an objective that knows the policy that sampled, such as 'nft'."
        )
    if needs.shared_noise and not getattr(stage, "share_noise", True):
        raise RecipeError(
            f"{recipe.at(('stages', name, 'share_noise'))}: objective '{objective.name}' compares the errors of a "
            f"group, which are comparable under the same noise alone. Leave share_noise out, or set it to true."
        )
    if needs.whole_group and stage.stage == "rl":
        _check_whole_groups(recipe, registry, name, stage, objective)


def _check_anchor(recipe: Recipe, name: str, stage: Any, objective: PolicyObjective[Any]) -> None:
    """An anchor is named where it is asked for, and asked for where it is named."""
    asked = Role.ANCHOR in objective.roles()
    if asked and stage.anchor is None:
        raise RecipeError(
            f"{recipe.at(('stages', name))}: objective '{objective.name}' pulls to an anchor, and the stage names "
            f"none. Name a stage that trained a model, as in anchor: teacher_t2i; to stay near the start use "
            f"'velocity-kl'."
        )
    if stage.anchor is not None and not asked:
        raise RecipeError(
            f"{recipe.at(('stages', name, 'anchor'))}: '{stage.anchor}' is named as the anchor, but nothing pulls to "
            f"it. Add plus: [{{use: anchor, weight: 0.04}}], or leave the anchor out."
        )


def _check_whole_groups(
    recipe: Recipe, registry: Registry, name: str, stage: Any, objective: PolicyObjective[Any]
) -> None:
    """All samples of a prompt, at all trained steps, fit into one micro-batch."""
    timesteps: TimestepSampler[Any] = build(registry, "timesteps", stage.timesteps)  # type: ignore[assignment]
    grid = torch.linspace(1, 0, stage.sampling.steps + 1)
    trained = len(timesteps.plan(grid, generator(recipe.seed, "plan", 0)).train)
    points = stage.group_size * trained
    if points > stage.micro_batch:
        raise RecipeError(
            f"{recipe.at(('stages', name, 'micro_batch'))}: objective '{objective.name}' compares all samples of a "
            f"prompt in one micro-batch, {stage.group_size} samples at {trained} step(s) are {points} points, and "
            f"micro_batch is {stage.micro_batch}: groups would come in parts. Set micro_batch to {points} or more, or "
            f"take a smaller group_size or fewer timesteps."
        )


def check_distillation(recipe: Recipe, registry: Registry, name: str, look: Look) -> None:
    """What a student learns by, and whether every prompt has a teacher, and every teacher a prompt.

    Raises:
        RecipeError: with the nearest valid choice.
    """
    stage: Any = recipe.stage(name)
    objective = objective_at(recipe, registry, name)
    if objective.requires.advantage:
        terms = objective.objectives if isinstance(objective, Summed) else (objective,)
        wrong = next(term.name for term in terms if term.requires.advantage)
        raise RecipeError(
            f"{recipe.at(('stages', name, 'plus'))}: objective '{wrong}' learns from rewards, which a distill stage "
            f"does not have. Add regularisers, such as 'velocity-kl' or 'anchor'."
        )
    if objective.requires.points == "forward":
        raise RecipeError(
            f"{recipe.at(('stages', name, 'distiller'))}: '{objective.name}' learns from re-noised pictures, and a "
            f"student from the states that it visits. Use a distiller such as 'velocity-match'."
        )
    check_learning(recipe, registry, name, objective)
    distiller: Distiller[Any] = build(registry, "distiller", stage.distiller, recipe.at(("stages", name, "distiller")))  # type: ignore[assignment]
    wanted = {distiller.teacher(prompt): route for route, ref in recipe.tasks_of(name).items() for prompt in look(ref)}
    check_teachers(recipe, name, distiller, wanted)
    idle = [route for route in stage.teachers if route not in wanted]
    if wanted and idle:
        raise RecipeError(
            f"{recipe.at(('stages', name, 'teachers', idle[0]))}: teacher '{idle[0]}' has no task: distiller "
            f"'{distiller.name}' sends no prompt to it. Prompts ask for {', '.join(sorted(wanted))}. Name the route "
            f"like one of them, give it prompts of its own (tasks), or leave it out."
        )


def check_teachers(recipe: Recipe, name: str, distiller: Distiller[Any], wanted: dict[str, str]) -> None:
    """Every prompt has a teacher; `wanted`: teacher asked for -> a route whose prompts do.

    Raises:
        RecipeError: a teacher is not configured.
    """
    stage: Any = recipe.stage(name)
    missing = sorted(set(wanted) - set(stage.teachers))
    if missing:
        raise RecipeError(
            f"{recipe.at(('stages', name, 'teachers'))}: distiller '{distiller.name}' sends prompts of route "
            f"'{wanted[missing[0]]}' to teacher '{missing[0]}', which is not configured. There is: "
            f"{', '.join(stage.teachers)}."
        )


def check_merged_guidance(recipe: Recipe, registry: Registry, name: str) -> None:
    """Models with guidance folded in at different scales have no common one.

    Raises:
        RecipeError: naming both.
    """
    stage: Any = recipe.stage(name)
    scales = {model: folded_scale(recipe, registry, model) for model in stage.models}
    if len(set(scales.values())) > 1:
        named = ", ".join(f"'{model}' {scale:g}" for model, scale in scales.items())
        raise RecipeError(
            f"{recipe.at(('stages', name, 'models'))}: these models have guidance folded in at different scales "
            f"({named}), so what they are merged to has none. Merge students of one scale, or teachers."
        )
