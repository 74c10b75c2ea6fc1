"""Guidance that is folded into a model, and where it came from."""

from __future__ import annotations

from typing import Any

import torch

from velatura.core.build import build
from velatura.core.components import GuidancePolicy
from velatura.core.recipe import Recipe, Ref
from velatura.core.registry import Registry
from velatura.core.types import Role


def guidance_scale(registry: Registry, ref: Ref, role: Role, at: str = "") -> float:
    """The scale of a role under a guidance policy."""
    guidance: GuidancePolicy[Any] = build(registry, "guidance", ref, at)  # type: ignore[assignment]
    return strongest_scale(guidance, role)


def strongest_scale(guidance: GuidancePolicy[Any], role: Role) -> float:
    """The scale of a role where it guides most: of one that guides for a part of the time, the scale of that part."""
    scales = guidance.scale(role, torch.linspace(0, 1, 101))
    return float(scales[(scales - 1).abs().argmax()])


def folded_scale(recipe: Recipe, registry: Registry, model: str) -> float:
    """The guidance scale that a model has folded in, itself or from where it started; 1 is none."""
    stage: Any = None if model == "base" else recipe.stage(model)
    if stage is None:
        return 1.0
    if stage.stage == "distill":
        return guidance_scale(registry, stage.guidance, Role.TEACHER, recipe.at(("stages", model, "guidance")))
    if stage.stage == "merge":
        return folded_scale(recipe, registry, next(iter(stage.models)))
    return folded_scale(recipe, registry, stage.init)
