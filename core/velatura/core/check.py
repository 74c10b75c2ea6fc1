"""Which combinations make sense, and what a run would cost; nothing is trained."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from velatura.core.build import build
from velatura.core.components import GuidancePolicy, ModelAdapter, PolicyObjective, TimestepSampler
from velatura.core.errors import RecipeError
from velatura.core.recipe import Recipe
from velatura.core.registry import Registry
from velatura.core.seeds import generator
from velatura.core.types import Context, Prompt, Role

BYTES = 4
"""fp32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Transformer rows: one row is one sample at one time through the network, a guidance branch counted singly."""

    forward: int = 0
    """Without gradient."""
    gradient: int = 0
    """With forward and backward."""

    @property
    def cost(self) -> int:
        """In forward rows; a backward costs about two forwards."""
        return self.forward + 3 * self.gradient


def check_combinations(recipe: Recipe, registry: Registry) -> list[str]:
    """Refuse what cannot work, and return warnings about what is unwise.

    Raises:
        RecipeError: with the nearest valid choice.
    """
    warnings: list[str] = []
    for name in recipe.order():
        stage = recipe.stage(name)
        if stage.stage == "rl":
            _check_rl(recipe, registry, name, stage)
        if stage.stage == "distill":
            warnings += _check_guidance_of_teachers(recipe, registry, name, stage)
        if stage.stage in ("rl", "curate"):
            _check_folded_start(recipe, registry, name, stage, warnings)
    return warnings


def _check_rl(recipe: Recipe, registry: Registry, name: str, stage: Any) -> None:
    at = recipe.at(("stages", name))
    place = recipe.at(("stages", name, "objective"))
    objective: PolicyObjective[Any] = build(registry, "objective", stage.objective, place)  # type: ignore[assignment]
    kernel = registry.get("kernel", stage.kernel.use, recipe.at(("stages", name, "kernel")))
    if objective.requires.stochastic_steps and not getattr(kernel, "stochastic", False):
        raise RecipeError(
            f"{at}: objective '{objective.name}' needs stochastic steps, but kernel '{kernel.name}' has none. Choose "
            f"a stochastic kernel, or an objective that re-noises finished samples, such as 'nft'."
        )
    if not any(ref.weight > 0 or any(w > 0 for w in ref.weight_by_category.values()) for ref in stage.rewards):
        place = recipe.at(("stages", name, "rewards"))
        raise RecipeError(f"{place}: every weight is 0, so there is nothing to learn from. Give one a weight.")


def _scale(registry: Registry, ref: Any, role: Role, at: str) -> float:
    guidance: GuidancePolicy[Any] = build(registry, "guidance", ref, at)  # type: ignore[assignment]
    return float(guidance.scale(role, torch.tensor([0.5])))


def _check_guidance_of_teachers(recipe: Recipe, registry: Registry, name: str, stage: Any) -> list[str]:
    """A teacher is best asked at the guidance it was trained under."""
    asked = _scale(registry, stage.guidance, Role.TEACHER, f"stages.{name}.guidance")
    warnings = []
    for route, teacher in stage.teachers.items():
        config = recipe.stage(teacher)
        if config.stage != "rl":
            continue
        trained = _scale(registry, config.guidance, Role.ROLLOUT, f"stages.{teacher}.guidance")
        if trained != asked:
            warnings.append(
                f"stages.{name}.guidance asks teacher '{teacher}' ({route}) at scale {asked:g}, but it was trained on "
                f"rollouts at scale {trained:g}"
            )
    return warnings


def _check_folded_start(recipe: Recipe, registry: Registry, name: str, stage: Any, warnings: list[str]) -> None:
    source = stage.init if stage.stage == "rl" else stage.model
    if source == "base" or recipe.stage(source).stage != "distill":
        return
    scale = _scale(registry, stage.guidance, Role.ROLLOUT, f"stages.{name}.guidance")
    if scale != 1:
        warnings.append(
            f"stages.{name}: '{source}' has guidance folded in and samples at scale 1; guiding it again at {scale:g} "
            f"compounds both. Use guidance 'none'."
        )


def stage_rows(recipe: Recipe, registry: Registry, name: str, adapter: ModelAdapter[Any], count: int) -> Rows:
    """Rows of one step of a looping stage, or of the whole of another. `count`: prompts of curate and evaluate."""
    stage: Any = recipe.stage(name)
    if stage.stage == "supervised":
        return Rows(gradient=stage.batch)
    if stage.stage == "export":
        return Rows()
    guidance: GuidancePolicy[Any] = build(registry, "guidance", stage.guidance)  # type: ignore[assignment]
    times = adapter.times(stage.sampling.steps)

    def per_sample(role: Role) -> int:
        return int((1 + (guidance.scale(role, times[:-1]) != 1).long()).sum())

    def per_point(role: Role) -> int:
        return 2 if bool((guidance.scale(role, times[:-1]) != 1).any()) else 1

    if stage.stage in ("curate", "evaluate"):
        samples = count * (stage.group_size if stage.stage == "curate" else stage.seeds_per_prompt * len(stage.models))
        return Rows(forward=samples * per_sample(Role.ROLLOUT))
    timesteps: TimestepSampler[Any] = build(registry, "timesteps", stage.timesteps)  # type: ignore[assignment]
    trained = len(timesteps.plan(times, generator(0)).train)
    if stage.stage == "rl":
        objective: PolicyObjective[Any] = build(registry, "objective", stage.objective)  # type: ignore[assignment]
        samples, role = stage.prompts_per_step * stage.group_size, Role.ROLLOUT
    else:
        objective = build(registry, "distiller", stage.distiller)  # type: ignore[assignment]
        samples, role = stage.prompts_per_step, Role.CURRENT
    frozen = sum(per_point(r) for r in objective.roles() if r is not Role.CURRENT)
    return Rows(
        forward=samples * per_sample(role) + samples * trained * frozen,
        gradient=samples * trained * per_point(Role.CURRENT),
    )


def seconds_per_row(adapter: ModelAdapter[Any], prompt: Prompt, device: torch.device) -> float | None:
    """Measured on 64 rows, for networks small enough to try; None for larger ones."""
    facts = adapter.describe()
    if float(facts.get("parameters", 0)) > 50e6:
        return None
    net = adapter.load(device)
    prompts = [prompt] * 4
    with torch.no_grad():
        cond = adapter.prepare(net, adapter.encode(prompts))
        x, rows = adapter.noise(prompts * 16, list(range(64))), torch.arange(64) % 4
        adapter.velocity(net, x, torch.full((64,), 0.5), cond, rows)
        begin = time.perf_counter()
        adapter.velocity(net, x, torch.full((64,), 0.5), cond, rows)
    return (time.perf_counter() - begin) / 64


def memory(adapter: ModelAdapter[Any], sets: int, teachers: int) -> float:
    """Bytes of weights, gradients, Adam moments and kept weight sets; activations are not counted."""
    facts = adapter.describe()
    total = float(facts.get("parameters", 0))
    trained = float(facts.get("trainable parameters", total))
    return BYTES * (total + trained * (1 + 2 + sets + teachers))


def check(plan: Any, console: Console) -> None:
    """Print what a run would do: components, stages, arithmetic, time and memory."""
    warnings = check_combinations(plan.recipe, plan.registry)
    console.print(_component_table(plan))
    console.print(_stage_table(plan))
    for warning in warnings:
        console.print(f"[yellow]warning[/]: {warning}")
    console.print(f"Results go to [bold]{plan.folder}[/]. Nothing was run.")


def _component_table(plan: Any) -> Table:
    table = Table(title="Components", title_justify="left")
    for column in ("kind", "name", "from", "what it is"):
        table.add_column(column)
    for info in used_components(plan.recipe, plan.registry):
        table.add_row(info.kind, info.name, f"{info.distribution} {info.version}", info.summary)
    return table


def used_components(recipe: Recipe, registry: Registry) -> Sequence[Any]:
    """Where each component that the recipe names comes from."""
    found = {(kind, ref.use): registry.info(kind, ref.use) for _, kind, ref in recipe.references()}
    return [found[key] for key in sorted(found)]


def _stage_table(plan: Any) -> Table:
    table = Table(title="Stages", title_justify="left", caption="row: one sample at one time through the transformer")
    for column in ("stage", "kind", "needs", "steps", "samples/step", "rows/step fwd+bwd", "time", "memory"):
        table.add_column(column, justify="left" if column in ("stage", "kind", "needs") else "right")
    total = 0.0
    for name in plan.recipe.order():
        row, seconds = _stage_row(plan, name)
        total += seconds
        table.add_row(*row)
    table.add_row("all", "", "", "", "", "", _duration(total), "")
    return table


def _stage_row(plan: Any, name: str) -> tuple[list[str], float]:
    stage: Any = plan.recipe.stage(name)
    needs = ", ".join(plan.recipe.dependencies(name))
    if stage.stage == "export":
        return [name, stage.stage, needs, "1", "", "", "", ""], 0.0
    adapter = set_up(plan, "adapter", stage.adapter)
    prompts = {route: _count(plan, ref, stage) for route, ref in plan.recipe.tasks_of(name).items()}
    rows = stage_rows(plan.recipe, plan.registry, name, adapter, sum(prompts.values()))
    steps = getattr(stage, "steps", 1)
    sample = set_up(plan, "task", next(iter(plan.recipe.tasks_of(name).values()))).prompts("eval")[0]
    per_row = seconds_per_row(adapter, sample, torch.device("cpu"))
    seconds = steps * rows.cost * per_row if per_row else 0.0
    samples = {"rl": lambda: stage.prompts_per_step * stage.group_size, "distill": lambda: stage.prompts_per_step,
               "supervised": lambda: stage.batch}.get(stage.stage, lambda: sum(prompts.values()))()  # fmt: skip
    sets = {"rl": 2, "supervised": 1}.get(stage.stage, 0)
    size = memory(adapter, sets, len(getattr(stage, "teachers", {})))
    return [
        name, stage.stage, needs, str(steps), str(samples), f"{rows.forward:,} + {rows.gradient:,}",
        _duration(seconds) if per_row else "not tried", f"{size / 1e6:,.0f} MB",
    ], seconds  # fmt: skip


def set_up(plan: Any, kind: str, ref: Any) -> Any:
    """A component of the recipe, ready on the CPU."""
    component = build(plan.registry, kind, ref)
    component.setup(Context(device=torch.device("cpu"), cache=Path.home() / ".cache" / "velatura",
                            seed=plan.recipe.seed, base=plan.base))  # fmt: skip
    return component


def _count(plan: Any, ref: Any, stage: Any) -> int:
    split = "eval" if stage.stage == "evaluate" else "train"
    count = len(set_up(plan, "task", ref).prompts(split))
    return min(count, getattr(stage, "max_prompts", None) or count)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
