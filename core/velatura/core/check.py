"""Which combinations make sense, and what a run would cost; nothing is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from velatura.core.build import build
from velatura.core.calibrate_checks import check_weights
from velatura.core.cards.required import check_cards
from velatura.core.components import Component, PolicyObjective
from velatura.core.errors import RecipeError, located, suggest
from velatura.core.estimate import Speed, work
from velatura.core.folding import folded_scale, guidance_scale
from velatura.core.learning_checks import check_distillation, check_learning, check_merged_guidance, objective_at
from velatura.core.memory import CPU, PHASES, MemoryPlan
from velatura.core.placement import Placement, advice, readable
from velatura.core.recipe import Recipe, Ref
from velatura.core.registry import Registry
from velatura.core.step_checks import check_timesteps
from velatura.core.types import Context, Prompt, Role

LOOK = 512
"""Prompts that are looked at for their categories."""
CAPTION, NOT_TRIED = "row: one sample at one time through the transformer", "not tried"
WITHOUT_ADAPTER = ("export", "judge-fit", "merge")
"""Stages whose cost is not that of the picture model."""
LARGE = 2e9
"""Bytes at the peak above which a stage's memory is shown part by part."""


def check_combinations(recipe: Recipe, registry: Registry) -> list[str]:
    """Refuse what cannot work, and return warnings about what is unwise.

    Raises:
        RecipeError: with the nearest valid choice.
    """
    warnings = _check_compile(recipe)
    categories = Categories(recipe, registry)
    for name in recipe.order():
        stage = recipe.stage(name)
        _check_optimizer(recipe, name, stage)
        if stage.stage in ("rl", "distill"):
            check_timesteps(recipe, registry, name, stage)
        if stage.stage == "rl":
            _check_rl(recipe, registry, name, stage)
            _check_adapters(recipe, registry, name, stage)
            warnings += check_cards(recipe, registry, name)
        if stage.stage == "supervised":
            _check_supervised(recipe, registry, name, stage)
        if stage.stage == "distill":
            check_distillation(recipe, registry, name, lambda ref: _first_prompts(recipe, registry, ref))
            _check_adapters(recipe, registry, name, stage)
            warnings += _check_guidance_of_teachers(recipe, registry, name, stage)
        if stage.stage == "merge":
            _check_adapters(recipe, registry, name, stage)
            check_merged_guidance(recipe, registry, name)
        if stage.stage in ("rl", "curate", "calibrate", "distill", "rate"):
            warnings += _check_folded_start(recipe, registry, name, stage)
        if stage.stage in ("rl", "curate"):
            warnings += _check_categories(recipe, name, stage, categories)
        if stage.stage in ("rl", "curate", "calibrate"):
            check_weights(recipe, registry, name, categories.of)
    return warnings


def _check_optimizer(recipe: Recipe, name: str, stage: Any) -> None:
    """Muon needs every matrix whole."""
    optimizer = getattr(stage, "optimizer", None)
    if optimizer is not None and optimizer.kind == "muon" and recipe.engine.kind != "local":
        raise RecipeError(
            f"{recipe.at(('stages', name, 'optimizer', 'kind'))}: muon needs whole matrices, and DeepSpeed's ZeRO "
            f"deals them out in pieces. Set engine.kind to 'local', or take 'adamw'."
        )


def _check_compile(recipe: Recipe) -> list[str]:
    """Compiled blocks and weights that come layer by layer: the results are right, and hardly anything is faster."""
    if recipe.engine.kind != "deepspeed" or recipe.engine.zero_stage < 3:
        return []
    for name in recipe.order():
        adapter = getattr(recipe.stage(name), "adapter", None)
        if adapter is not None and adapter.with_.get("compile"):
            return [
                f"{recipe.at(('stages', name, 'adapter', 'with', 'compile'))}: compiling takes minutes and "
                f"hardly helps with engine.zero_stage 3: DeepSpeed fetches weights between any two layers, so torch "
                f"compiles crumbs, up to its limit. Leave compile out, or use zero_stage 2."
            ]
    return []


def _check_rl(recipe: Recipe, registry: Registry, name: str, stage: Any) -> None:
    place = recipe.at(("stages", name, "objective"))
    objective = objective_at(recipe, registry, name)
    if not objective.requires.advantage or Role.TEACHER in objective.roles():
        raise RecipeError(
            f"{place}: objective '{objective.name}' {_not_for_rewards(objective)}, so it does not go into a stage of "
            f"kind rl. Use one that learns from rewards, such as 'nft'."
        )
    check_learning(recipe, registry, name, objective)
    if stage.weights_from is None and not any(
        ref.weight > 0 or any(w > 0 for w in ref.weight_by_category.values()) for ref in stage.rewards
    ):
        place = recipe.at(("stages", name, "rewards"))
        raise RecipeError(f"{place}: every weight is 0, so there is nothing to learn from. Give one a weight.")


def _not_for_rewards(objective: PolicyObjective[Any]) -> str:
    return "asks a teacher" if Role.TEACHER in objective.roles() else "does not look at rewards"


def _check_supervised(recipe: Recipe, registry: Registry, name: str, stage: Any) -> None:
    """Pictures come without rewards, and beside the trained network there is no other."""
    place = recipe.at(("stages", name, "objective"))
    objective: PolicyObjective[Any] = build(registry, "objective", stage.objective, place)  # type: ignore[assignment]
    others = sorted(role.value for role in objective.roles() - {Role.CURRENT})
    if objective.requires.advantage or others:
        need = "rewards" if objective.requires.advantage else f"the velocity of {', '.join(others)}"
        raise RecipeError(
            f"{place}: objective '{objective.name}' needs {need}, which a supervised stage does not have. Use one that "
            f"learns from pictures, such as 'sft'."
        )


def _check_adapters(recipe: Recipe, registry: Registry, name: str, stage: Any) -> None:
    """Teachers, anchors and what is merged are weight sets that one network wears, so all of them are of one."""
    place = recipe.at(("stages", name, "adapter"))
    own = build(registry, "adapter", stage.adapter, place)
    for route, teacher in _models_worn(stage):
        other = build(registry, "adapter", recipe.stage(teacher).adapter, recipe.at(("stages", teacher, "adapter")))  # type: ignore[union-attr]
        if type(other) is not type(own) or other.options != own.options:
            raise RecipeError(
                f"{place}: the student has adapter {_described(own)}, but its {route.format(name=teacher)} has "
                f"{_described(other)}. A teacher's weights are worn by the student's network: give both the same "
                f"adapter, best at the top of the recipe."
                if stage.stage == "distill"
                else f"{place}: {_described(own)} is another adapter than {_described(other)} of its "
                f"{route.format(name=teacher)}. One network wears the weights of both: give them the same adapter, "
                f"best at the top of the recipe."
            )


def _models_worn(stage: Any) -> list[tuple[str, str]]:
    """What a stage's network wears of other stages: how it is called, and the stage."""
    found = []
    if stage.stage == "distill":
        found += [(f"teacher '{{name}}' ({route})", name) for route, own in stage.mixtures.items() for name in own]
    if stage.stage == "merge":
        found += [("model '{name}'", name) for name in stage.models]
    if getattr(stage, "anchor", None) is not None:
        found.append(("anchor '{name}'", stage.anchor))
    return found


def _first_prompts(recipe: Recipe, registry: Registry, ref: Ref) -> list[Prompt]:
    """The first prompts of a task."""
    task: Any = ready(recipe, registry, "task", ref)
    return list(islice(task.prompts("train"), LOOK))


def _described(component: Component[Any]) -> str:
    """Name and the options that are not the default."""
    given = component.options.model_dump(mode="json", exclude_defaults=True)
    return f"'{component.name}'" + (f" with {given}" if given else "")


def _check_guidance_of_teachers(recipe: Recipe, registry: Registry, name: str, stage: Any) -> list[str]:
    """A teacher is best asked at the guidance it was trained under."""
    asked = guidance_scale(registry, stage.guidance, Role.TEACHER, f"stages.{name}.guidance")
    warnings = []
    for route, teacher in [(route, teacher) for route, own in stage.mixtures.items() for teacher in own]:
        config: Any = recipe.stage(teacher)
        if config.stage != "rl":
            continue
        trained = guidance_scale(registry, config.guidance, Role.ROLLOUT, f"stages.{teacher}.guidance")
        if trained != asked:
            warnings.append(
                f"stages.{name}.guidance asks teacher '{teacher}' ({route}) at scale {asked:g}, but it was trained on "
                f"rollouts at scale {trained:g}"
            )
    return warnings


def _check_folded_start(recipe: Recipe, registry: Registry, name: str, stage: Any) -> list[str]:
    """Guidance that is folded in stays, and more of it compounds."""
    field = "init" if stage.stage in ("rl", "distill") else "model"
    source = getattr(stage, field)
    folded = folded_scale(recipe, registry, source)
    if folded == 1:
        return []
    if stage.stage == "distill":
        return [
            f"stages.{name}.init: '{source}' is a student with guidance {folded:g} folded in. What its teachers do not "
            f"undo stays in this one. Start from what the teachers started from."
        ]
    scale = guidance_scale(registry, stage.guidance, Role.ROLLOUT, f"stages.{name}.guidance")
    if scale == 1:
        return []
    return [
        f"stages.{name}: '{source}' has guidance folded in and samples at scale 1; guiding it again at {scale:g} "
        f"compounds both. Use guidance 'none'."
    ]


class Categories:
    """The categories that tasks have, each task looked at once."""

    def __init__(self, recipe: Recipe, registry: Registry) -> None:
        self.recipe, self.registry = recipe, registry
        self._known: dict[str, frozenset[str]] = {}

    def of(self, ref: Ref) -> frozenset[str]:
        """Categories of the first train prompts."""
        key = ref.model_dump_json(by_alias=True)
        if key not in self._known:
            task: Any = ready(self.recipe, self.registry, "task", ref)
            self._known[key] = frozenset(
                category for prompt in islice(task.prompts("train"), LOOK) for category in prompt.membership
            )
        return self._known[key]


def _check_categories(recipe: Recipe, name: str, stage: Any, categories: Categories) -> list[str]:
    """A weight for a category that no prompt has does nothing."""
    warnings = []
    ref = recipe.task_of(name)
    for index, reward in enumerate(stage.rewards):
        known = categories.of(ref) if ref is not None and reward.weight_by_category else frozenset[str]()
        for category in reward.weight_by_category:
            if known and category not in known:
                warnings.append(
                    f"{recipe.at(('stages', name, 'rewards', index, 'weight_by_category'))}: none of the first {LOOK} "
                    f"prompts is of category '{category}', so this weight does nothing.{suggest(category, known)}"
                )
    return warnings


def check(plan: Any, console: Console, world_size: int = 1) -> None:
    """Print what a run would do: components, stages, arithmetic, time, and what is where on each of `world_size`
    GPUs."""
    warnings = check_combinations(plan.recipe, plan.registry)
    placement = Placement(plan.recipe, plan.registry, world_size)
    memory = {name: _memory(plan, placement, name) for name in plan.recipe.order()}
    console.print(_component_table(plan))
    console.print(_stage_table(plan, memory))
    for name, found in memory.items():
        if found is not None and (found.peak > LARGE or plan.recipe.engine.device.startswith("cuda")):
            console.print(memory_table(name, found))
    for warning in [*warnings, *_too_large(plan, placement, memory)]:
        console.print(f"[yellow]warning[/]: {warning}")
    console.print(f"Results go to [bold]{plan.folder}[/]. Nothing was run.")


def _memory(plan: Any, placement: Placement, name: str) -> MemoryPlan | None:
    stage: Any = plan.recipe.stage(name)
    if stage.stage in WITHOUT_ADAPTER:
        return None
    adapter = set_up(plan, "adapter", stage.adapter)
    with located(plan.recipe.at(("stages", name, "adapter"))):
        adapter.describe()
    with located(plan.recipe.at(("stages", name))):
        return placement.plan(name, adapter, lambda ref, split: set_up(plan, "task", ref).prompts(split))


def memory_table(name: str, plan: MemoryPlan) -> Table:
    """What is where, largest first, and the peak."""
    spread = f", each of {plan.world_size} GPUs" if plan.world_size > 1 else ""
    table = Table(
        title=f"Memory of {name}: {_peak(plan)} at the peak ({plan.phase}){spread}", title_justify="left",
        caption="estimated; without reward models and what CUDA takes for itself (about 1 GB)",
    )  # fmt: skip
    for column in ("part", "where", "bytes", "when", "at the peak"):
        table.add_column(column, justify="right" if column == "bytes" else "left")
    for part in sorted(plan.parts, key=lambda part: -(part.size or 0)):
        counts = part.where != CPU and plan.phase in part.phases
        table.add_row(part.name, part.where, "not known" if part.size is None else readable(part.size),
                      "-" if part.where == CPU else "always" if part.phases == PHASES else ", ".join(part.phases),
                      "yes" if counts else "")  # fmt: skip
    return table


def _peak(plan: MemoryPlan | None) -> str:
    if plan is None:
        return "not known"
    return readable(plan.peak) + (f" and {', '.join(plan.unknown)}" if plan.unknown else "")


def _too_large(plan: Any, placement: Placement, memory: Mapping[str, MemoryPlan | None]) -> list[str]:
    """Stages that the GPU of this machine has no room for."""
    if plan.recipe.engine.device == "cpu" or not torch.cuda.is_available():
        return []
    there = torch.cuda.get_device_properties(0).total_memory
    return [
        f"stages.{name} {advice(found, there, plan.recipe.stage(name), placement.sharding)}"
        for name, found in memory.items()
        if found is not None and found.peak > there
    ]


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


def _stage_table(plan: Any, memory: Mapping[str, MemoryPlan | None]) -> Table:
    table = Table(title="Stages", title_justify="left", caption=CAPTION)
    for column in ("stage", "kind", "needs", "steps", "samples/step", "rows/step fwd+bwd", "time", "peak memory"):
        table.add_column(column, justify="left" if column in ("stage", "kind", "needs") else "right")
    total, speed = 0.0, Speed(plan.recipe.engine.threads)
    for name in plan.recipe.order():
        row, seconds = _stage_row(plan, name, speed, memory[name])
        total += seconds
        table.add_row(*row)
        if NOT_TRIED in row:
            table.caption = f"{CAPTION}; {NOT_TRIED}: one row would take this CPU many seconds"
    table.add_row("all", "", "", "", "", "", _duration(total), "")
    return table


def _stage_row(plan: Any, name: str, speed: Speed, memory: MemoryPlan | None) -> tuple[list[str], float]:
    stage: Any = plan.recipe.stage(name)
    needs = ", ".join(plan.recipe.dependencies(name))
    if stage.stage in WITHOUT_ADAPTER:
        return [name, stage.stage, needs, str(getattr(stage, "steps", 1)), "", "", "", ""], 0.0
    adapter = set_up(plan, "adapter", stage.adapter)
    with located(plan.recipe.at(("stages", name))):
        parts = work(
            plan.recipe, plan.registry, name, adapter, lambda ref, split: set_up(plan, "task", ref).prompts(split)
        )
        costs = [speed.seconds(adapter, part) for part in parts]
    steps = getattr(stage, "steps", 1)
    seconds = steps * sum(cost for cost in costs if cost is not None)
    forward, gradient = (sum(getattr(part.rows, kind) for part in parts) for kind in ("forward", "gradient"))
    return [
        name, stage.stage, needs, str(steps), f"{sum(part.samples for part in parts):,}", f"{forward:,} + {gradient:,}",
        _duration(seconds) if None not in costs else NOT_TRIED, _peak(memory),
    ], seconds  # fmt: skip


def ready(recipe: Recipe, registry: Registry, kind: str, ref: Ref) -> Component[Any]:
    """A component of the recipe, ready on the CPU."""
    component = build(registry, kind, ref)
    component.setup(Context(device=torch.device("cpu"), cache=Path.home() / ".cache" / "velatura", seed=recipe.seed,
                            base=recipe.folder.resolve(), precision=recipe.engine.precision))  # fmt: skip
    return component


def set_up(plan: Any, kind: str, ref: Ref) -> Any:
    """A component of a plan, ready on the CPU."""
    return ready(plan.recipe, plan.registry, kind, ref)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
