"""Prompt curation: sample a group per prompt from the base, keep prompts whose rewards leave room to learn.

Qwen-Image-2.0-RL keeps a prompt when max_i R_i - min_i R_i of the composite exceeds a threshold; the composite is
taken before any normalisation, because a z-scored group always has about the same range.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from velatura.core.checkpoint import write_json_atomic
from velatura.core.judge import Judge
from velatura.core.pictures import overview, save_png
from velatura.core.policy import CURRENT, Policy
from velatura.core.rollout import Sampler, rollout
from velatura.core.seeds import derive
from velatura.core.stages.common import StageRun, Ticker
from velatura.core.types import Admission, Prompt, RewardReport, group_rows

SHOWN = 6
"""Groups of each kind in the pictures."""


def run(stage: StageRun) -> dict[str, Any]:
    """Measure every prompt, decide, write the ledger."""
    config = stage.config
    adapter = stage.adapter()
    policy = stage.load_policy(adapter, config.model)
    sampler = Sampler(
        adapter=adapter,
        guidance=stage.build("guidance", config.guidance, "guidance"),
        kernel=stage.build("kernel", config.kernel, "kernel"),
        steps=config.sampling.steps,
        batch=config.sampling.batch,
    )
    prompt_filter = stage.build("prompt_filter", config.prompt_filter, "prompt_filter")
    train = stage.task_of(stage.name).prompts("train")
    count = min(len(train), config.max_prompts or len(train))
    prompts = [train[i] for i in range(count)]
    blocks = max(1, config.sampling.batch // config.group_size)
    with stage.judge(config.rewards, config.max_failed) as judge, stage.progress(count, unit="prompts") as bar:
        firsts = range(0, count, blocks)
        own = {
            i: measure(stage, policy, sampler, judge, prompts[i : i + blocks], i, bar) for i in stage.ranks.own(firsts)
        }
        failures = sum(stage.ranks.gather(sum(judge.failures.values())))
        if not stage.ranks.first:
            return {}
        reports = [
            own.get(i) or measure(stage, policy, sampler, judge, prompts[i : i + blocks], i, bar) for i in firsts
        ]
    report = _whole(reports, prompts)
    admission = prompt_filter.admit(report)
    write_ledger(stage.folder / "ledger.parquet", report, admission)
    kept = [p.id for p, keep in zip(prompts, admission.keep.tolist(), strict=True) if keep]
    draw_examples(stage, policy, sampler, prompts, report, admission)
    write_json_atomic(stage.folder / "kept.json", {"prompt_ids": kept})
    return {
        "prompts": count,
        "kept": len(kept),
        "failures": failures,
        "by_category": summary_by_category(report, admission),
    }


def measure(
    stage: StageRun, policy: Policy, sampler: Sampler, judge: Judge, prompts: Sequence[Prompt], first: int, bar: Ticker
) -> RewardReport:
    """The report of one block of prompts, from disk when an earlier run already made it."""
    path = stage.folder / "blocks" / f"{first:06d}.safetensors"
    if path.exists():
        stored = load_file(path)
        bar.tick("measured before", len(prompts))
        names = tuple(reward.label for reward in judge.rewards)
        return RewardReport(
            names=names,
            prompts=tuple(prompts),
            scores=stored["scores"],
            status=stored["status"],
            weight=stored["weight"],
            group=stored["group"],
        )
    with policy.wearing(CURRENT) as net:
        for chunk in rollout(net, sampler, prompts, group_seeds(stage, prompts)):
            judge.submit(chunk.samples)
    report = judge.report(prompts)
    _save_block(path, report)
    bar.tick("", len(prompts))
    return report


def group_seeds(stage: StageRun, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Seeds of the curation samples, disjoint from those of training and evaluation."""
    return [[derive(stage.seed, "curate", p.id, j) for j in range(stage.config.group_size)] for p in prompts]


def _save_block(path: Path, report: RewardReport) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {"scores": report.scores, "status": report.status, "weight": report.weight, "group": report.group}
    temporary = path.with_suffix(".tmp")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
    temporary.replace(path)


def _whole(reports: Sequence[RewardReport], prompts: Sequence[Prompt]) -> RewardReport:
    """One report of all blocks, groups renumbered."""
    offsets = [0]
    for report in reports:
        offsets.append(offsets[-1] + len(report.prompts))
    return RewardReport(
        names=reports[0].names,
        scores=torch.cat([r.scores for r in reports]),
        status=torch.cat([r.status for r in reports]),
        weight=torch.cat([r.weight for r in reports]),
        group=torch.cat([r.group + offset for r, offset in zip(reports, offsets, strict=False)]),
        prompts=tuple(prompts),
    )


def write_ledger(path: Path, report: RewardReport, admission: Admission) -> None:
    """One row a prompt: what was measured, what was decided, and why."""
    groups = group_rows(report.group, len(report.prompts))
    composite = report.composite
    columns: dict[str, list[Any]] = {
        "prompt_id": [p.id for p in report.prompts],
        "text": [p.text for p in report.prompts],
        "category": [p.category for p in report.prompts],
        "task": [p.task for p in report.prompts],
        "keep": admission.keep.tolist(),
        "reason": list(admission.reason),
        "range": [_finite(value) for value in admission.statistic.tolist()],
        "mean": [_mean(composite[rows]) for rows in groups],
        "n_valid": [int((~composite[rows].isnan()).sum()) for rows in groups],
        "n": [len(rows) for rows in groups],
    }
    for r, name in enumerate(report.names):
        columns[f"reward/{name}/mean"] = [_mean(report.scores[rows, r][report.valid[rows, r]]) for rows in groups]
    temporary = path.with_suffix(".tmp")
    pq.write_table(pa.table(columns), temporary)
    temporary.replace(path)


def _finite(value: float) -> float | None:
    return value if value == value else None


def _mean(values: Tensor) -> float | None:
    known = values[~values.isnan()]
    return float(known.mean()) if len(known) else None


def summary_by_category(report: RewardReport, admission: Admission) -> dict[str, dict[str, int]]:
    """Kept and dropped prompts per category."""
    seen = Counter(p.category for p in report.prompts)
    kept = Counter(p.category for p, keep in zip(report.prompts, admission.keep.tolist(), strict=True) if keep)
    return {name: {"prompts": seen[name], "kept": kept[name]} for name in sorted(seen)}


def draw_examples(
    stage: StageRun, policy: Policy, sampler: Sampler, prompts: Sequence[Prompt], report: RewardReport,
    admission: Admission,
) -> None:  # fmt: skip
    """A picture of some kept and some dropped groups, drawn again from their seeds."""
    folder = stage.folder / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    captions = {}
    for name, wanted in (("kept", True), ("dropped", False)):
        chosen = [i for i, keep in enumerate(admission.keep.tolist()) if keep is wanted]
        chosen = chosen[:: max(1, len(chosen) // SHOWN)][:SHOWN]
        if not chosen:
            continue
        own = [prompts[i] for i in chosen]
        rows: list[list[Any]] = [list(p.sources) for p in own]
        with policy.wearing(CURRENT) as net:
            for chunk in rollout(net, sampler, own, group_seeds(stage, own)):
                for sample in chunk.samples:
                    rows[sample.group].append(sample.image)
        save_png(folder / f"{name}.png", overview(rows))
        captions[f"{name}.png"] = f"{name}: " + " · ".join(f"{prompts[i].text} ({admission.reason[i]})" for i in chosen)
    write_json_atomic(folder / "captions.json", captions)
