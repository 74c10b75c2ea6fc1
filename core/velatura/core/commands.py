"""What the verbs beside `run` do with a finished run: evaluate again, export, draw."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console

from velatura.core.engine.local import choose_device
from velatura.core.errors import RecipeError, VelaturaError, suggest
from velatura.core.pictures import grid, save_png
from velatura.core.pipeline import Plan, plan_run, run_pipeline
from velatura.core.policy import CURRENT
from velatura.core.rollout import Sampler, rollout
from velatura.core.seeds import derive
from velatura.core.stages.common import WEIGHTS, StageRun, manifest_of
from velatura.core.types import Prompt

CPU = torch.device("cpu")


def open_run(folder: Path) -> Plan:
    """The plan that a run folder was made by.

    Raises:
        VelaturaError: it is not a run folder, or its recipe is gone.
    """
    marker = folder / "run.json"
    if not marker.exists():
        raise VelaturaError(f"{folder} is not a run folder: it has no run.json. `velatura run` makes one.")
    owner = json.loads(marker.read_text())
    path = Path(owner["path"])
    if not path.exists():
        raise VelaturaError(f"the recipe of {folder}, {path}, is gone. A copy is in {folder / 'recipe.yaml'}.")
    return plan_run(path, [*owner.get("overrides", []), f"output={folder}"])


def stage_run(plan: Plan, name: str, device: torch.device = CPU) -> StageRun:
    """A stage of a run, to look at it in this process."""
    return StageRun(
        name=name, config=plan.recipe.stage(name), recipe=plan.recipe, registry=plan.registry,
        folder=plan.folder / name, run_folder=plan.folder, seed=plan.recipe.seed, device=device,
        base=plan.base,
    )  # fmt: skip


def models_in(plan: Plan) -> list[str]:
    """Stages of a run that ended with weights."""
    return [name for name in plan.recipe.order() if (plan.folder / name / WEIGHTS).exists()]


def _model_stage(plan: Plan, stage: str | None) -> str:
    """The stage asked for, or the last one that ended with weights."""
    known = models_in(plan)
    if not known:
        raise VelaturaError(f"{plan.folder} has no finished model yet. Go on with `velatura run`.")
    if stage is None:
        return known[-1]
    if stage not in known:
        raise VelaturaError(f"{plan.folder} has no finished model '{stage}'.{suggest(stage, known)}")
    return stage


def eval_run(folder: Path, models: Sequence[str] | None = None, *, console: Console | None = None) -> Path:
    """Run the evaluate stages of a run again, for other models when given. The earlier result is put aside.

    The baseline of a stage is always among its models. What is asked for here is for once: the run keeps the overrides
    it was made with.
    """
    plan = open_run(folder)
    stages = [name for name in plan.recipe.order() if plan.recipe.stage(name).stage == "evaluate"]
    if not stages:
        raise RecipeError("the recipe of this run has no evaluate stage. Add one and use `velatura run`.")
    owner = json.loads((folder / "run.json").read_text())
    overrides = [*owner.get("overrides", []), f"output={folder}"]
    if models:
        for name in stages:
            chosen = dict.fromkeys([plan.recipe.stage(name).baseline, *models])  # type: ignore[union-attr]
            overrides.append(f"stages.{name}.models=[{', '.join(chosen)}]")
    for name in stages:
        run_pipeline(Path(owner["path"]), overrides, only=name, console=console, remember=False)
    return folder


def export_run(folder: Path, target: Path, stage: str | None = None) -> Path:
    """Write a finished model of a run as a folder that stock libraries load."""
    plan = open_run(folder)
    source = _model_stage(plan, stage)
    if target.exists() and any(target.iterdir()):
        raise VelaturaError(f"{target} exists and is not empty. Choose a folder that does not exist yet.")
    run = stage_run(plan, source)
    adapter = run.adapter()
    policy = run.load_policy(adapter, source)
    facts = manifest_of(plan.folder, source)["result"]
    adapter.export(policy.net, target, info={
        "stage": source, "guidance_scale": facts.get("guidance_scale"),
        "guidance_folded": facts.get("folded", False), "folded_scale": facts.get("folded_scale"),
        **({"steps": run.config.sampling.steps} if hasattr(run.config, "sampling") else {}),
    })  # fmt: skip
    return target


def sample(
    folder: Path,
    text: str,
    out: Path,
    *,
    stage: str | None = None,
    seed: int = 0,
    count: int = 4,
    sources: Sequence[Path] = (),
    guidance: float | None = None,
    device: str = "auto",
) -> Path:
    """Draw `count` pictures for a prompt with a model of a run, into one PNG, behind the `sources` of an edit.

    `guidance`: a scale; by default what the model was made for. Guiding a model that has guidance folded in is
    possible, and warned about.
    """
    plan = open_run(folder)
    name = _model_stage(plan, stage)
    run = stage_run(plan, name, choose_device(device, "--device"))
    adapter = run.adapter()
    policy = run.load_policy(adapter, name)
    facts: dict[str, Any] = manifest_of(plan.folder, name)["result"]
    made_for = float(facts.get("guidance_scale") or 1.0)
    scale = made_for if guidance is None else guidance
    if facts.get("folded") and scale != 1:
        sys.stderr.write(
            f"warning: '{name}' has guidance {facts.get('folded_scale'):g} folded in; guiding it again at {scale:g} "
            f"compounds both. Leave --guidance out.\n"
        )
    sampler = Sampler(
        adapter=adapter,
        guidance=run.build("guidance", _guidance_ref(scale), "guidance"),
        kernel=run.build("kernel", "ode", "kernel"),
        steps=run.config.sampling.steps if hasattr(run.config, "sampling") else 40,
        batch=count,
    )
    pictures = tuple(map(_read_image, sources))
    prompt = Prompt(id=f"sample/{text}", text=text, task="edit" if pictures else "t2i", sources=pictures)
    seeds = [[seed if j == 0 else derive(seed, "sample", j) for j in range(count)]]
    with policy.wearing(CURRENT) as net:
        images = [s.image for chunk in rollout(net, sampler, [prompt], seeds) for s in chunk.samples]
    side = images[0].shape[-1]
    save_png(out, grid([[*pictures, *images]], scale=max(1, math.ceil(192 / side))))
    return out


def _guidance_ref(scale: float) -> Any:
    from velatura.core.recipe import Ref

    return Ref.model_validate({"use": "rollout-only", "with": {"scale": scale}} if scale != 1 else {"use": "none"})


def _read_image(path: Path) -> torch.Tensor:
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"), dtype=np.float32) / 255
    except OSError as error:
        raise VelaturaError(f"cannot read the source image {path}: {error}") from error
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
