"""Which objectives, kernels, guidance policies and timesteps make sense together; nothing is run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from velatura.core.build import build
from velatura.core.components import GuidancePolicy, Kernel, PolicyObjective, TimestepSampler
from velatura.core.errors import RecipeError, VelaturaError
from velatura.core.recipe import Recipe
from velatura.core.registry import Registry
from velatura.core.seeds import generator
from velatura.core.steps import OF_THE_NOISE, spread
from velatura.core.types import Role, StepPlan

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
        other = (
            "an objective that re-noises finished samples, such as 'nft'"
            if stage.stage == "rl"
            else "the distiller for the ODE, 'velocity-match' (with weight: dt2 it is the distance of its steps)"
        )
        raise RecipeError(
            f"{recipe.at(('stages', name))}: objective '{objective.name}' needs stochastic steps, but kernel "
            f"'{kernel.name}' has none. Choose a stochastic kernel, such as 'flow-sde', or {other}."
        )
    if stage.stage == "rl" and Role.OLD in objective.roles():
        _check_ratio(recipe, registry, name, stage, objective)


def check_solver(recipe: Recipe, registry: Registry, name: str, stage: Any) -> None:
    """A solver beside a kernel that draws: deterministic, with steps to take, and none of high order before a draw.

    Raises:
        RecipeError: with the nearest valid choice.
    """
    if stage.solver is None:
        return
    place = recipe.at(("stages", name, "solver"))
    solver: Kernel[Any] = build(registry, "kernel", stage.solver, place)  # type: ignore[assignment]
    kernel: Kernel[Any] = build(registry, "kernel", stage.kernel, place)  # type: ignore[assignment]
    if solver.stochastic:
        raise RecipeError(f"{place}: '{solver.name}' draws noise, and a solver takes the steps on which none is drawn. "
                          f"Use 'ode', 'heun' or 'dpm2', or name it as the kernel.")  # fmt: skip
    if not kernel.stochastic:
        raise RecipeError(f"{place}: kernel '{kernel.name}' draws no noise, so it takes every step itself. Name "
                          f"'{solver.name}' as the kernel, and leave the solver out.")  # fmt: skip
    late = _draws_late(_plans(recipe, registry, name, stage)) if solver.evaluations > 1 else None
    if late is not None:
        raise RecipeError(
            f"{place}: '{solver.name}' is of higher order, and in round {late[0]} step {late[1]} draws noise behind "
            f"steps that do not: what is trained there would start from states that another sampler reached. Take "
            f"solver 'ode', or timesteps that draw from the first step on, such as {{use: window, with: "
            f"{{place: fixed, start: 0}}}}."
        )


def check_plans(recipe: Recipe, registry: Registry, name: str, stage: Any, objective: PolicyObjective[Any]) -> None:
    """A round of which no trained step draws noise, where the objective or the step weight is made of it.

    Raises:
        RecipeError: with the round, its steps, and those that draw.
    """
    if not objective.requires.stochastic_steps and stage.step_weight not in OF_THE_NOISE:
        return
    kernel: Kernel[Any] = build(registry, "kernel", stage.kernel)  # type: ignore[assignment]
    draws = spread(kernel, torch.linspace(1, 0, stage.sampling.steps + 1)) > 0
    for step, plan in _plans(recipe, registry, name, stage):
        noisy = draws & plan.stochastic if objective.requires.stochastic_steps else draws
        if bool(noisy[plan.train].any()):
            continue
        why = (
            "so none has a likelihood to learn from" if objective.requires.stochastic_steps
            else f"so step_weight '{stage.step_weight}' weighs all of them 0"
        )  # fmt: skip
        raise RecipeError(
            f"{recipe.at(('stages', name, 'timesteps'))}: in round {step} the trained step(s) {plan.train.tolist()} "
            f"draw no noise, {why}. Kernel '{kernel.name}' can draw on all steps but "
            f"{torch.nonzero(~draws).flatten().tolist() or 'none'}. Train on more steps in a round, leave these out, "
            f"take a kernel whose every step draws, such as 'flow-sde', or timesteps that draw where they train."
        )


def _plans(recipe: Recipe, registry: Registry, name: str, stage: Any) -> Iterator[tuple[int, StepPlan]]:
    """The plan of every round, and of every route of a student, on an even grid; none where that has no step to train
    on, which the grid of the model may have."""
    timesteps: TimestepSampler[Any] = build(registry, "timesteps", stage.timesteps)  # type: ignore[assignment]
    grid = torch.linspace(1, 0, stage.sampling.steps + 1)
    routes = [(route,) for route in stage.teachers] if stage.stage == "distill" else [()]
    for step in range(stage.steps):
        for route in routes:
            try:
                yield step, timesteps.plan_at(step, grid, generator(recipe.seed, "plan", step, *route))
            except VelaturaError:
                return


def _draws_late(plans: Iterator[tuple[int, StepPlan]]) -> tuple[int, int] | None:
    """The first round, and the step in it, that draws noise after one that does not; None where there is none."""
    for step, plan in plans:
        draws = plan.stochastic.tolist()
        quiet = draws.index(False) if False in draws else len(draws)
        if True in draws[quiet:]:
            return step, draws.index(True, quiet)
    return None


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
