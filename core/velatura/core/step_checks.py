"""Which objectives, kernels, guidance policies and timesteps make sense together; nothing is run."""

from __future__ import annotations

from typing import Any

import torch

from velatura.core.build import build
from velatura.core.components import GuidancePolicy, Kernel, PolicyObjective, TimestepSampler
from velatura.core.errors import RecipeError
from velatura.core.recipe import Recipe
from velatura.core.registry import Registry
from velatura.core.steps import OF_THE_NOISE
from velatura.core.types import Role

LOOK = torch.linspace(0, 1, 101)[1:]
"""Times at which guidance scales are compared."""


def check_timesteps(recipe: Recipe, registry: Registry, name: str, stage: Any) -> None:
    """Timesteps that do not fit on the grid of the stage.

    Raises:
        RecipeError: with what does not fit.
    """
    place = recipe.at(("stages", name, "timesteps"))
    timesteps: TimestepSampler[Any] = build(registry, "timesteps", stage.timesteps, place)  # type: ignore[assignment]
    if wrong := timesteps.complaint(stage.sampling.steps):
        raise RecipeError(f"{place}: {wrong}")


def check_noise(recipe: Recipe, registry: Registry, name: str, stage: Any, objective: PolicyObjective[Any]) -> None:
    """An objective, or a step weight, that needs steps with a likelihood which the other slots do not give.

    Raises:
        RecipeError: with the nearest valid choice.
    """
    place = recipe.at(("stages", name, "kernel"))
    kernel: Kernel[Any] = build(registry, "kernel", stage.kernel, place)  # type: ignore[assignment]
    if stage.step_weight in OF_THE_NOISE and not kernel.stochastic:
        raise RecipeError(
            f"{recipe.at(('stages', name, 'step_weight'))}: '{stage.step_weight}' is made of the noise of a step, and "
            f"kernel '{kernel.name}' draws none. Use a kernel that does, such as 'flow-sde', or step_weight 'dt'."
        )
    if not objective.requires.stochastic_steps:
        return
    if not kernel.stochastic:
        raise RecipeError(
            f"{recipe.at(('stages', name))}: objective '{objective.name}' needs stochastic steps, but kernel "
            f"'{kernel.name}' has none. Choose a stochastic kernel, such as 'flow-sde', or an objective that re-noises "
            f"finished samples, such as 'nft'."
        )
    _check_ratio(recipe, registry, name, stage, objective)


def _check_ratio(recipe: Recipe, registry: Registry, name: str, stage: Any, objective: PolicyObjective[Any]) -> None:
    """A ratio compares the policy with the one that sampled, so both are under one guidance."""
    place = recipe.at(("stages", name, "guidance"))
    guidance: GuidancePolicy[Any] = build(registry, "guidance", stage.guidance, place)  # type: ignore[assignment]
    sampled = guidance.scale(Role.ROLLOUT, LOOK)
    if stage.allow_biased_ratio or all(
        torch.equal(guidance.scale(role, LOOK), sampled) for role in (Role.CURRENT, Role.OLD)
    ):
        return
    raise RecipeError(
        f"{place}: guidance '{guidance.name}' draws samples under another guidance than it trains under, so the "
        f"likelihood ratio of objective '{objective.name}' would not be that of the policy that drew them. Use "
        f"guidance 'both' or 'none', or an objective without a ratio, such as 'nft'; or set allow_biased_ratio: true, "
        f"which compares the conditional policies and logs how far off they are (rollout_gap)."
    )
