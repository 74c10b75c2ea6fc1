"""The rewards of a recipe, or one by its name, set up outside a run: to be served, or to be measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from loguru import logger

from velatura.core.build import build
from velatura.core.components import RewardModel
from velatura.core.errors import RecipeError, VelaturaError, suggest
from velatura.core.fingerprint import reward_fingerprint
from velatura.core.pipeline import Plan
from velatura.core.recipe import Ref, RewardRef
from velatura.core.registry import Registry
from velatura.core.source import Source, assign, parse_override
from velatura.core.types import Context


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A reward, set up."""

    label: str
    """What requests call it."""
    use: str
    """Name of the component."""
    summary: str
    version: str
    """Of its package, then a digest of its name, its options and the files that they name."""
    model: RewardModel[Any]


def rewards_of_recipe(plan: Plan, device: str | None, stage: str | None = None) -> list[Served]:
    """Every reward of a recipe, or of one stage of it, once.

    Raises:
        VelaturaError: there is none that scores single pictures, or two of one name differ.
    """
    if stage is not None:
        plan.recipe.stage(stage)
    found: dict[str, tuple[RewardRef, str]] = {}
    for (_, name, *_), kind, ref in plan.recipe.references():
        if kind != "reward" or not isinstance(ref, RewardRef) or stage not in (None, name):
            continue
        known, where = found.setdefault(ref.label, (ref, str(name)))
        if (known.use, known.given) != (ref.use, ref.given):
            raise RecipeError(
                f"stages '{where}' and '{name}' have different rewards called {ref.label!r}. Give one of them another "
                f"'name', or serve one stage: --stage {where}"
            )
    context = recipe_context(plan, device)
    single = {label: ref for label, (ref, _) in found.items() if _scores_single_pictures(plan.registry, label, ref)}
    if not single:
        raise RecipeError("the recipe has no reward that scores single pictures, so there is nothing to serve.")
    return [set_up_reward(plan.registry, ref.opened(plan.folder), label, context) for label, ref in single.items()]


def reward_by_name(name: str, settings: Sequence[str], files: Sequence[str], device: str | None, label: str) -> Served:
    """One reward, with options as `path=value`.

    Raises:
        VelaturaError: there is none of this name, or an option is wrong.
    """
    registry, ref = reference(name, settings, files)
    if not _scores_single_pictures(registry, name, ref):
        raise VelaturaError(f"'{name}' compares the pictures of a prompt with each other and cannot be served.")
    return set_up_reward(registry, ref, label or name, context_of(device or "auto", Path.cwd(), 0))


def reference(name: str, settings: Sequence[str], files: Sequence[str]) -> tuple[Registry, Ref]:
    """A component of the command line, with options as `path=value`, and where it is looked up."""
    registry = Registry.discover()
    for file in files:
        registry.add_file(file)
    source = Source(name="command line", data={})
    for setting in settings:
        assign(source, *parse_override(setting))
    return registry, Ref.model_validate({"use": name, "with": source.data})


def is_reward(name: str, files: Sequence[str]) -> bool:
    """Whether a component of this name is a reward."""
    registry = Registry.discover()
    for file in files:
        registry.add_file(file)
    try:
        registry.info("reward", name)
    except RecipeError:
        return False
    return True


def unknown(name: str) -> VelaturaError:
    """What to say of a name that is neither a recipe nor a reward."""
    known = [info.name for info in Registry.discover().list() if info.kind == "reward"]
    return VelaturaError(f"{name!r} is neither a recipe file nor a reward.{suggest(name, known)}")


def recipe_context(plan: Plan, device: str | None) -> Context:
    """What a reward of a recipe may know of the machine; None takes the device of the recipe."""
    return context_of(device or plan.recipe.engine.device, plan.base, plan.recipe.seed, plan.recipe.engine.precision)


def context_of(device: str, base: Path, seed: int, precision: Literal["fp32", "bf16"] = "fp32") -> Context:
    """`auto` takes the GPU when there is one."""
    chosen = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    cache = Path.home() / ".cache" / "velatura"
    try:
        return Context(device=torch.device(chosen), cache=cache, seed=seed, base=base, precision=precision)
    except RuntimeError as error:
        raise VelaturaError(f"no device is called {device!r}. Use auto, cpu, cuda or cuda:N, as in cuda:1.") from error


def set_up_reward(registry: Registry, ref: Ref, label: str, context: Context) -> Served:
    """One reward, its weights loaded."""
    model = build(registry, "reward", ref)
    if not isinstance(model, RewardModel):
        raise TypeError(f"{ref.use} is no reward")
    model.setup(context)
    info = registry.info("reward", ref.use)
    digest = reward_fingerprint(registry, ref, context, model)[:10]
    version = f"{info.version}-{digest}" if info.version else digest
    return Served(label=label, use=ref.use, summary=info.summary, version=version, model=model)


def _scores_single_pictures(registry: Registry, label: str, ref: Ref) -> bool:
    component = registry.get("reward", ref.use)
    if getattr(component, "scope", "sample") == "sample":
        return True
    logger.warning("reward '{}' compares the pictures of a prompt with each other and is not served", label)
    return False
