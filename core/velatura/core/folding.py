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
    """The scale of a role under a guidance policy, half way through."""
    guidance: GuidancePolicy[Any] = build(registry, "guidance", ref, at)  # type: ignore[assignment]
    return float(guidance.scale(role, torch.tensor([0.5])))


def folded_scale(recipe: Recipe, registry: Registry, model: str) -> float:
    """The guidance scale that a model has folded in, itself or from where it started; 1 is none."""
    stage: Any = None if model == "base" else recipe.stage(model)
    if stage is None:
        return 1.0
    if stage.stage == "distill":
        return guidance_scale(registry, stage.guidance, Role.TEACHER, recipe.at(("stages", model, "guidance")))
    return folded_scale(recipe, registry, stage.init)
