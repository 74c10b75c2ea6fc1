"""Evaluation: the same prompts and seeds for every model, training rewards beside metrics nobody trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from velatura.core.checkpoint import write_json_atomic
from velatura.core.components import Evaluator, ModelAdapter, Task
from velatura.core.interruption import INTERRUPTION
from velatura.core.judge import Judge
from velatura.core.policy import CURRENT, Policy
from velatura.core.recipe import Ref
from velatura.core.report import summarise
from velatura.core.rollout import Sampler, rollout
from velatura.core.routes import Look, routes_of_models
from velatura.core.seeds import derive
from velatura.core.stages.common import StageRun, Ticker, manifest_of
from velatura.core.types import Prompt, Sample

BLOCK = 32
"""Prompts that are drawn and judged together."""


def run(stage: StageRun) -> dict[str, Any]:
    """Draw and measure every model on its routes, then compare with the baseline."""
    config = stage.config
    tasks = evaluation_tasks(stage)
    prompts = {route: _prompts(task, config.max_prompts) for route, task in tasks.items()}
    routes = routes_of_models(stage.recipe, stage.name, prompts, _look(stage))
    adapter = stage.adapter()
    lineage = {model: describe_model(stage, model, own) for model, own in routes.items()}
    if stage.ranks.first:
        write_json_atomic(stage.folder / "models.json", lineage)
    evaluators = [stage.build("evaluator", ref, f"evaluators.{i}") for i, ref in enumerate(config.evaluators)]
    pairs = [(model, route) for model, own in routes.items() for route in own]
    total = sum(len(prompts[route]) for _, route in pairs)
    tables = []
    with stage.judge(config.rewards, 1.0) as judge, stage.progress(total, unit="prompts") as bar:
        for model, route in pairs:
            part = stage.folder / "parts" / f"{model}.{route}.parquet"
            if stage.ranks.from_first(lambda part=part: not part.exists()):  # type: ignore[misc]
                _measure(stage, adapter, judge, evaluators, lineage[model], (model, route), prompts[route], part, bar)
            else:
                bar.tick("measured before", len(prompts[route]))
            if stage.ranks.first:
                tables.append(pq.read_table(part))
    if not stage.ranks.first:
        return {}
    for route, own in prompts.items():
        _save_sources(stage.folder / "images" / "sources" / f"{route}.npz", own)
    _write_table(stage.folder / "samples.parquet", pa.concat_tables(tables, promote_options="default"))
    summary = summarise(stage.folder, config.baseline, bootstrap=config.bootstrap, seed=stage.seed)
    return {"models": list(config.models), "routes": list(tasks), "prompts": {r: len(p) for r, p in prompts.items()},
            "headline": summary.get("headline", {})}  # fmt: skip


def evaluation_tasks(stage: StageRun) -> dict[str, Task[Any]]:
    """Route -> task: those the stage names, or those of the recipe's other stages."""
    tasks = stage.recipe.tasks_of(stage.name)
    own = stage.config.tasks
    return {route: stage.build("task", ref, f"tasks.{route}" if own else "tasks") for route, ref in tasks.items()}


def _look(stage: StageRun) -> Look:
    """The prompts behind a reference to a task."""

    def look(ref: Ref, split: str) -> Sequence[Prompt]:
        prompts: Sequence[Prompt] = stage.build("task", ref, "models").prompts(split)
        return prompts

    return look


def describe_model(stage: StageRun, model: str, routes: Sequence[str]) -> dict[str, Any]:
    """What a model is, at which guidance it samples, and which routes it is for."""
    facts: dict[str, Any] = {"kind": "base", "guidance": "stage", "routes": list(routes)}
    if model == "base":
        return facts
    result = manifest_of(stage.run_folder, model)["result"]
    facts["kind"] = stage.recipe.stage(model).stage
    if result.get("folded") and not stage.config.guide_folded:
        facts["guidance"] = 1.0
    if "teachers" in result:
        facts["teachers"] = result["teachers"]
    return facts


def _prompts(task: Task[Any], limit: int | None) -> list[Prompt]:
    own = task.prompts("eval")
    return [own[i] for i in range(min(len(own), limit or len(own)))]


def _measure(
    stage: StageRun, adapter: ModelAdapter[Any], judge: Judge, evaluators: Sequence[Evaluator[Any]],
    facts: Mapping[str, Any], pair: tuple[str, str], prompts: Sequence[Prompt], part: Path, bar: Ticker,
) -> None:  # fmt: skip
    """Samples and metrics of one model on one route; the table is written last, so it marks the part as done."""
    model, route = pair
    config = stage.config
    policy: Policy = stage.load_policy(adapter, model)
    guidance = config.guidance if facts["guidance"] == "stage" else "none"
    sampler = Sampler(
        adapter=adapter,
        guidance=stage.build("guidance", guidance, "guidance"),
        kernel=stage.build("kernel", config.kernel, "kernel"),
        steps=config.sampling.steps,
        batch=config.sampling.batch,
    )
    drawn: list[Drawn] = []
    for first in range(0, len(prompts), BLOCK):
        if INTERRUPTION.asked:
            break
        numbers = stage.ranks.own(range(first, min(first + BLOCK, len(prompts))))
        block = [prompts[i] for i in numbers]
        bar.tick(f"{model} · {route}", min(BLOCK, len(prompts) - first))
        if not block:
            continue
        seeds = [[derive(stage.seed, "evaluate", p.id, j) for j in range(config.seeds_per_prompt)] for p in block]
        samples: list[Sample] = []
        with policy.wearing(CURRENT) as net:
            for chunk in rollout(net, sampler, block, seeds):
                judge.submit(chunk.samples)
                samples += chunk.samples
        drawn.append(Drawn(
            prompts=[numbers[sample.group] for sample in samples],
            columns=_columns(model, route, samples, judge, evaluators, block),
            pixels=_pixels([sample.image for sample in samples]),
        ))  # fmt: skip
    stage.leave_if_asked()
    every = [one for own in stage.ranks.gather(drawn) for one in own]
    if stage.ranks.first:
        images, rows = in_order(every)
        path = stage.folder / "images" / model / f"{route}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(path, images=images)
        part.parent.mkdir(parents=True, exist_ok=True)
        _write_table(part, pa.table(rows))


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """What one rank drew and measured of a block."""

    prompts: list[int]
    """[n] number of each sample's prompt."""
    columns: dict[str, list[Any]]
    pixels: np.ndarray[Any, Any]
    """uint8 [n H W 3]."""


def in_order(parts: Sequence[Drawn]) -> tuple[np.ndarray[Any, Any], dict[str, list[Any]]]:
    """All samples prompt by prompt, as one process draws them."""
    numbers = [number for part in parts for number in part.prompts]
    order = sorted(range(len(numbers)), key=lambda i: numbers[i])
    columns: dict[str, list[Any]] = {}
    for name in parts[0].columns:
        values = [value for part in parts for value in part.columns[name]]
        columns[name] = [values[i] for i in order]
    return np.concatenate([part.pixels for part in parts])[order], columns


def _columns(
    model: str, route: str, samples: Sequence[Sample], judge: Judge, evaluators: Sequence[Evaluator[Any]],
    prompts: Sequence[Prompt],
) -> dict[str, list[Any]]:  # fmt: skip
    """One row a sample: who, what, and every metric (null where it does not apply or failed)."""
    columns: dict[str, list[Any]] = {
        "model": [model] * len(samples),
        "route": [route] * len(samples),
        "category": [s.prompt.category for s in samples],
        "prompt_id": [s.prompt.id for s in samples],
        "unit": [unit_of(s.prompt) for s in samples],
        "text": [s.prompt.text for s in samples],
        "seed": [s.seed for s in samples],
    }
    for evaluator in evaluators:
        for name, values in evaluator.evaluate(samples).items():
            columns[f"gold/{name}"] = [None if v is None else float(v) for v in values]
    if judge.rewards:
        report = judge.report(prompts)
        for r, name in enumerate(report.names):
            valid = report.valid[:, r].tolist()
            columns[f"reward/{name}"] = [
                float(v) if ok else None for v, ok in zip(report.scores[:, r].tolist(), valid, strict=True)
            ]
    return columns


def unit_of(prompt: Prompt) -> str:
    """Prompts that ask for the same thing are one statistical unit, however often the task repeats them."""
    digest = hashlib.sha256(prompt.text.encode())
    for source in prompt.sources:
        digest.update(source.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _write_table(path: Path, table: pa.Table) -> None:
    temporary = path.with_suffix(".tmp")
    pq.write_table(table, temporary)
    temporary.replace(path)


def _pixels(images: Sequence[torch.Tensor]) -> np.ndarray[Any, Any]:
    """uint8 [n H W 3]."""
    pixels = (torch.stack(list(images)).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1)
    return np.asarray(pixels.numpy())


def _save_sources(path: Path, prompts: Sequence[Prompt]) -> None:
    """First source image of each prompt, where the route edits."""
    if not prompts or not prompts[0].sources:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = [(p.sources[0].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy() for p in prompts]
    np.savez_compressed(path, images=np.stack(pixels), prompt_ids=np.array([p.id for p in prompts]))
