"""Export: a finished model as a folder that stock libraries load."""

from __future__ import annotations

from typing import Any

from velatura.core import __version__
from velatura.core.stages.common import StageRun, manifest_of


def run(stage: StageRun) -> dict[str, Any]:
    """Write `model/` with the weights of the stage named, and how to sample from it."""
    source = stage.config.model
    adapter = stage.build("adapter", _trained(stage, source).adapter, "model")
    policy = stage.load_policy(adapter, source)
    facts = manifest_of(stage.run_folder, source)["result"]
    info: dict[str, Any] = {
        "made_by": f"velatura {__version__}",
        "stage": source,
        "recipe": stage.run_folder.name,
        "guidance_scale": facts.get("guidance_scale"),
        "guidance_folded": facts.get("folded", False),
        "folded_scale": facts.get("folded_scale"),
        "teachers": facts.get("teachers"),
    }
    steps = _steps(stage, source)
    info |= {"steps": steps} if steps else {}
    target = stage.folder / "model"
    if stage.ranks.first:
        adapter.export(policy.net, target, info=info)
    return {"folder": str(target), **info}


def _steps(stage: StageRun, source: str) -> int | None:
    """Solver steps the model was trained with; what it should be sampled with."""
    sampling = getattr(_trained(stage, source), "sampling", None)
    return sampling.steps if sampling else None


def _trained(stage: StageRun, source: str) -> Any:
    """The stage whose model is exported; the recipe has checked that it has one."""
    return stage.recipe.stage(source)
